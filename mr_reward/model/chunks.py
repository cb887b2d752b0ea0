"""Score many responses to one prompt that is read once: groups that share a prompt, and groups larger than a pass.

`isolated`: the responses are cut into chunks, each read over the prompt's keys and values. `set`: whole groups share a
chunk; a group that is larger than one is read twice, first for the summaries of all its responses, then for the
comparisons, which see them. Exact in both cases, and no pass computes more tokens than the budget.

Legend: G groups, N responses of a group, P tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mr_reward.attention.plan import PromptCache
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.rows import Packer, Rows, build_row, collate
from mr_reward.templates.rendering import RenderedGroup


@torch.inference_mode()
def score_over_prompt(
    model: MultiResponseRewardModel, packer: Packer, groups: Sequence[RenderedGroup]
) -> list[list[float]]:
    """Scores of G groups with one prompt and its media, in layout `isolated` or `set`, by a model that reads flat.

    Each response fits the packer's budget together with the prompt.
    """
    row = build_row(groups[0].select([]), packer.layout)
    prompt = model.read_prompt(collate([row], model.adapter).to(model.device))
    budget = packer.max_tokens - row.num_tokens
    scores: list[list[float]] = [[] for _ in groups]
    without_prompt = [group.without_prompt() for group in groups]
    if packer.layout == "isolated":
        pieces = [
            (index, piece) for index, group in enumerate(without_prompt) for piece in _split(packer, group, budget)
        ]
    else:
        pieces = [(i, group) for i, group in enumerate(without_prompt) if packer.num_tokens(group) <= budget]
    for chunk in _fill([packer.num_tokens(piece) for _, piece in pieces], budget):
        found = _score(model, [build_row(pieces[i][1], packer.layout) for i in chunk], prompt)
        for i, values in zip(chunk, found, strict=True):
            scores[pieces[i][0]] += values
    for index, group in enumerate(without_prompt):
        if not scores[index]:
            scores[index] = _score_in_two_phases(model, packer, list(_split(packer, group, budget)), prompt)
    return scores


def _score_in_two_phases(
    model: MultiResponseRewardModel, packer: Packer, chunks: Sequence[RenderedGroup], prompt: PromptCache
) -> list[float]:
    """`set` for one group that is larger than a pass."""
    for chunk in chunks:
        row = build_row(chunk, "isolated")  # without comparison tokens, which nothing else sees
        prompt.collect(row.score_sites[0].to(model.device))
        _score(model, [row], prompt)
    summaries = prompt.with_collected()
    scores: list[float] = []
    for chunk in chunks:
        scores += _score(model, [build_row(chunk, packer.layout)], summaries.starting_at(len(scores)))[0]
    return scores


def _score(model: MultiResponseRewardModel, rows: Sequence[Rows], prompt: PromptCache) -> list[list[float]]:
    batch = model.place(collate(rows, model.adapter), prompt)
    scores = model(batch, prompt=prompt).scores.tolist()
    return [values[: row.score_sites.shape[1]] for values, row in zip(scores, rows, strict=True)]


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
