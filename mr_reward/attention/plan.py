"""Where everything is in a row that holds all rows of a batch end to end: read off the segments once, for all layers.

Legend: B rows (one group each), N responses, L tokens of the longest row, T tokens of all rows, P tokens of a prompt,
G groups, S summaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mr_reward.attention.varlen import Ragged, RaggedSequence
from mr_reward.errors import ConfigurationError
from mr_reward.layouts import PADDING_SEGMENT, PROMPT_SEGMENT, TokenKind

__all__ = ["Block", "Cached", "Exchange", "GroupPlan"]


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """The comparison tokens and the summaries they see beside their own."""

    comparisons: Tensor  # (G * N,) int64 sites of queries; any site in empty slots
    summaries: Tensor  # (G * S,) int64 sites of keys
    bias: Tensor  # (G, 1, 1, N, S) float32 to add to the logits: 0 where a comparison sees a summary, else -inf
    real: Tensor | None  # int64 places of the real slots among the G * N; None if all are
    sites: Tensor  # int64 sites of the real comparisons


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A prompt in which some tokens see each other in both directions."""

    start: int  # first token
    mask: Tensor  # (P, P) bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """Keys that stand before those of the row: a prompt that all its responses see, and summaries of other chunks."""

    prompt: int = 0  # P, tokens of the prompt; the rows themselves have none
    summaries: int = 0  # S, summaries of all responses of the group that the row is a chunk of; 0 if it is no chunk
    first: int = 0  # place of the row's first response in that group


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """Where everything is in a row of T tokens that holds all rows of a batch, made once for all layers."""

    tokens: Tensor  # (T,) int64, the tokens that are not padding as places in the flattened batch
    row_lengths: tuple[int, ...]  # B numbers of tokens
    own: Ragged  # each prompt and each response, causally
    prompts: Ragged  # the responses of each prompt and the prompt they see
    exchange: Exchange | None  # for `set`
    blocks: tuple[Block, ...]  # prompts with media blocks

    @classmethod
    def of(
        cls,
        layout: str,
        segments: Tensor,
        kinds: Tensor,
        blocks: Tensor | None = None,
        device: torch.device | None = None,
        cached: Cached = Cached(),
    ) -> GroupPlan:
        """Read the structure off a batch. On a GPU that waits for it, so give tensors that are still on the CPU."""
        device = segments.device if device is None else device
        segments, kinds = segments.cpu(), kinds.cpu()
        tokens = (segments != PADDING_SEGMENT).flatten().nonzero()[:, 0]
        rows = _read_rows(segments, tokens)
        masks = {} if blocks is None else _block_masks(rows, blocks.cpu().flatten()[tokens])
        shift = cached.prompt + cached.summaries
        own, prompts = [], []
        for (start, length), *responses in rows:
            if layout == "causal":  # one sequence, or two if media blocks give the prompt a mask
                rest = sum(size for _, size in responses)
                responses = [(start + length, rest)] if start in masks else []
                length += 0 if start in masks else rest
            if start not in masks:
                own.append(RaggedSequence(start, length, start + shift, length))
            own += [RaggedSequence(site, size, site + shift, size) for site, size in responses]
            prompts.append(RaggedSequence(start + length, sum(size for _, size in responses), start, length))
        if cached.prompt:
            prompts = [RaggedSequence(0, len(tokens), 0, cached.prompt)]
        exchange = None
        if layout == "set" and (kinds == TokenKind.COMPARISON).any():
            exchange = _exchange(rows, kinds.flatten()[tokens], cached, device)
        return cls(
            tokens=tokens.to(device, non_blocking=True),
            row_lengths=tuple(sum(size for _, size in row) for row in rows),
            own=Ragged(own, causal=True, device=device),
            prompts=Ragged(prompts, causal=False, device=device),
            exchange=exchange,
            blocks=tuple(Block(start, mask.to(device, non_blocking=True)) for start, mask in masks.items()),
        )


def _read_rows(segments: Tensor, tokens: Tensor) -> list[list[tuple[int, int]]]:
    """For each row (first token, number of tokens) of the prompt, which may have none, and of each response."""
    length = segments.shape[1]
    most = int(segments.max()) + 1
    names = tokens // length * most + segments.flatten()[tokens]
    found, counts = torch.unique_consecutive(names, return_counts=True)
    if (found.diff() <= 0).any():
        raise ConfigurationError(
            "the tokens of a segment do not lie side by side, or not in the order of the segments; pack the rows with "
            "Packer and collate"
        )
    rows: list[list[tuple[int, int]]] = []
    start, last = 0, -1
    for name, count in zip(found.tolist(), counts.tolist(), strict=True):
        row, segment = divmod(name, most)
        if row != last:
            rows.append([] if segment == PROMPT_SEGMENT else [(start, 0)])
        rows[-1].append((start, count))
        start, last = start + count, row
    return rows


def _block_masks(rows: Sequence[list[tuple[int, int]]], blocks: Tensor) -> dict[int, Tensor]:
    """The masks of the prompts that have blocks, by their first token."""
    masks = {}
    for (start, length), *_ in rows:
        own = blocks[start : start + length]
        if (own >= 0).any():
            together = (own[:, None] == own[None, :]) & (own >= 0)[:, None]
            masks[start] = together | torch.ones(length, length, dtype=torch.bool).tril()
    return masks


def _exchange(rows: Sequence[list[tuple[int, int]]], kinds: Tensor, cached: Cached, device: torch.device) -> Exchange:
    """Both sites of each response; they follow its text."""
    counts = torch.tensor([len(row) - 1 for row in rows])
    real = torch.arange(int(counts.max())) < counts[:, None]
    sites = []
    for kind in (TokenKind.COMPARISON, TokenKind.SUMMARY):
        padded = torch.zeros(real.shape, dtype=torch.long)
        padded[real] = (kinds == kind).nonzero()[:, 0]
        sites.append(padded)
    comparisons, summaries = sites
    if cached.summaries:  # the row is a chunk of one group: all summaries are there already
        own = cached.first + torch.arange(real.shape[1])[:, None]
        summaries = cached.prompt + torch.arange(cached.summaries)[None]
        seen = (torch.arange(cached.summaries) != own)[None]
    else:
        summaries = summaries + cached.prompt
        seen = real[:, None] & real[:, :, None] & ~torch.eye(real.shape[1], dtype=torch.bool)
    bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None, None]
    places = real.flatten().nonzero()[:, 0]
    comparisons, summaries = comparisons.flatten(), summaries.flatten()
    tensors = (comparisons, summaries, bias, places, comparisons[places])
    comparisons, summaries, bias, places, found = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return Exchange(comparisons, summaries, bias, None if bool(real.all()) else places, found)
