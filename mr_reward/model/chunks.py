"""Score many responses to one prompt that is read once: groups that share a prompt, and groups larger than a pass.

`isolated`: the responses are cut into chunks, each read over the prompt's keys and values. `set`: whole groups share a
chunk; a group that is larger than one is read twice, first for the summaries of all its responses, then for the
comparisons, which see them. Exact in both cases, and no pass computes more tokens than the budget.

Legend: G groups, N responses of a group, P tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from mr_reward.attention.plan import Cached, GroupPlan
from mr_reward.attention.prompt_cache import PromptCache
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.reader import Rows
from mr_reward.model.rows import PackedRow, Packer, build_row, collate
from mr_reward.templates.rendered import RenderedGroup

__all__ = ["score_over_prompt"]


def score_over_prompt(
    model: MultiResponseRewardModel, packer: Packer, groups: Sequence[RenderedGroup]
) -> list[list[float]]:
    """Score groups of one prompt.

    Args:
        model: a model that reads rows end to end (`reads_flat`), of layout `isolated` or `set`.
        packer: lays the chunks out; each response fits its budget together with the prompt.
        groups: G groups whose prompts and media are the same.

    Returns:
        G lists of N scores.
    """
    device = model.device
    prompt = build_row(groups[0].select([]), packer.layout)
    cache = model.reader.prompt(_rows(prompt, device=device))
    budget = packer.max_tokens - prompt.num_tokens
    scores: list[list[float]] = [[] for _ in groups]
    without_prompt = [group.without_prompt() for group in groups]
    if packer.layout == "isolated":
        pieces = [
            (index, piece) for index, group in enumerate(without_prompt) for piece in _split(packer, group, budget)
        ]
    else:
        pieces = [(i, group) for i, group in enumerate(without_prompt) if packer.num_tokens(group) <= budget]
    for chunk in _fill([packer.num_tokens(piece) for _, piece in pieces], budget):
        rows = [build_row(pieces[i][1], packer.layout) for i in chunk]
        found = _score(model, rows, cache, Cached(prompt=prompt.num_tokens))
        for i, values in zip(chunk, found, strict=True):
            scores[pieces[i][0]] += values
    for index, group in enumerate(without_prompt):
        if not scores[index]:
            scores[index] = _score_in_two_phases(model, packer, group, cache, prompt.num_tokens)
    return scores


def _score_in_two_phases(
    model: MultiResponseRewardModel, packer: Packer, group: RenderedGroup, cache: PromptCache, num_prompt_tokens: int
) -> list[float]:
    """`set` for one group that is larger than a pass."""
    chunks = list(_split(packer, group, packer.max_tokens - num_prompt_tokens))
    reader = replace(model.reader, layout="isolated")  # without comparison tokens, which nothing else sees
    for chunk in chunks:
        row = build_row(chunk, "isolated")
        plan = GroupPlan.of(
            "isolated",
            row.segments[None],
            row.kinds[None],
            device=model.device,
            cached=Cached(prompt=num_prompt_tokens),
        )
        cache.collect(torch.tensor(row.score_sites, device=model.device))
        reader.flat(_rows(row, device=model.device), plan, cache)
    with_summaries = cache.with_collected()
    scores: list[float] = []
    for chunk in chunks:
        held = Cached(prompt=num_prompt_tokens, summaries=len(group.response_ids), first=len(scores))
        scores += _score(model, [build_row(chunk, packer.layout)], with_summaries, held)[0]
    return scores


def _score(
    model: MultiResponseRewardModel, rows: Sequence[PackedRow], cache: PromptCache, cached: Cached
) -> list[list[float]]:
    batch = collate(rows)
    plan = GroupPlan.of(model.config.layout, batch.segments, batch.kinds, device=model.device, cached=cached)
    hidden = model.reader.flat(_rows(*rows, device=model.device), plan, cache)
    scores = model.read_scores(hidden, batch.response_mask.to(model.device)).tolist()
    return [values[: len(row.score_sites)] for values, row in zip(scores, rows, strict=True)]


def _rows(*rows: PackedRow, device: torch.device) -> Rows:
    inputs = {name: tensor.to(device) for name, tensor in collate(rows).model_inputs().items()}
    names = ("input_ids", "segments", "kinds", "offsets", "score_sites")
    media = {name: tensor for name, tensor in inputs.items() if name not in (*names, "response_mask")}
    return Rows(**{name: inputs[name] for name in names}, media=media)


def _split(packer: Packer, group: RenderedGroup, budget: int) -> Iterator[RenderedGroup]:
    """Cut the responses into runs that fit the budget."""
    run: list[int] = []
    for i in range(len(group.response_ids)):
        if run and packer.num_tokens(group.select([*run, i])) > budget:
            yield group.select(run)
            run = []
        run.append(i)
    yield group.select(run)


def _fill(num_tokens: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Put pieces together, in their order, up to the budget."""
    chunk: list[int] = []
    for i, size in enumerate(num_tokens):
        if chunk and sum(num_tokens[j] for j in chunk) + size > budget:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk
