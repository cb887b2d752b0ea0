"""Where everything is in a row that holds all rows of a batch end to end: read off the segments once, for all layers.

On a CPU the sequences of one length run as one batch of torch's flash kernel, on views of the row; on CUDA all of them
are one call of the variable-length kernel.

Legend: B rows (one group each), N responses, L tokens of the longest row, T tokens of all rows, P tokens of a prompt,
G groups, S sequences or summaries, h' heads of keys, d width of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mr_reward.errors import BackendError, ConfigurationError
from mr_reward.layouts import PADDING_SEGMENT, PROMPT_SEGMENT, Layout, TokenKind

# Below this length a call of the kernel costs more than the work in it, so sequences are padded to a common length.
_BUCKETED = 256
# The shortest sequence of a bucket has at least this share of the longest one's tokens, unless all are very short.
_BUCKET_RATIO, _VERY_SHORT = 0.75, 16
# So many neighbours of one length are worth a call of their own.
_MIN_RUN = 4


@dataclass(frozen=True, slots=True)
class RaggedSequence:
    """Queries that lie side by side and the keys they see, which lie side by side too."""

    query: int  # first query
    num_queries: int  # how many
    key: int  # first key
    num_keys: int  # how many; as many as queries if the attention is causal


@dataclass(frozen=True, slots=True, eq=False)
class KernelCall:
    """One call of the CPU kernel: `count` sequences as a batch."""

    first: RaggedSequence  # the first of the sequences; the others follow it without a gap, unless `gather` is given
    count: int  # S
    # (S * longest,) int64 sites of the queries relative to the row, padded with a sequence's last one
    gather: Tensor | None = None
    shift: int = 0  # from the site of a query to that of its own key; for `gather` only
    real: Tensor | None = None  # int64 places in `gather` that are not padding
    sites: Tensor | None = None  # int64 sites of the queries at `real`


@dataclass(frozen=True, slots=True, eq=False)
class KernelLengths:
    """What the variable-length kernel of CUDA is told."""

    queries: Tensor  # int64 sites of the queries of all sequences, in order
    keys: Tensor  # int64 sites of the keys
    query_starts: Tensor  # (S + 1,) int32
    key_starts: Tensor  # (S + 1,) int32
    max_queries: int  # of a sequence
    max_keys: int  # of a sequence


class Ragged:
    """Sequences, prepared once for all layers."""

    def __init__(self, sequences: Sequence[RaggedSequence], causal: bool, device: torch.device) -> None:
        if device.type not in ("cpu", "cuda"):
            raise BackendError(
                f"group attention has no kernel for device {device.type!r}, expected cpu or cuda; use "
                "attn_implementation='sdpa'"
            )
        self.sequences = [sequence for sequence in sequences if sequence.num_queries and sequence.num_keys]
        self.causal = causal
        self.pieces: list[KernelCall] = []
        self.lengths: KernelLengths | None = None
        if not self.sequences:
            return
        if device.type == "cpu":
            self.pieces = _make_pieces(self.sequences, causal)
        else:
            self.lengths = _make_lengths(self.sequences, device)


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonPlan:
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


class PromptCache(DynamicCache):
    """Keys and values of a prompt that was read once, shown to every pass over its responses without growing."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        # What stands before the keys of the rows that are read over it
        self.prompt = 0  # P, tokens of the prompt; the rows themselves have none
        self.summaries = 0  # S, summaries of all responses of the group that the row is a chunk of; 0 if it is none
        self.first = 0  # place of the row's first response in that group
        self._axes: tuple[int, ...] = ()
        self._end: Tensor | None = None
        self._sites: Tensor | None = None
        self._summaries: list[list[tuple[Tensor, Tensor]]] = []

    def freeze(self, positions: Tensor) -> None:
        """The prompt is complete; its tokens had these positions (..., 1, P) in the family's form."""
        self.frozen, self._axes, self._end = True, positions.shape[:-2], positions.amax() + 1
        self.prompt = positions.shape[-1]

    def positions(self, offsets: Tensor) -> Tensor:
        """Positions (..., B, L) of responses with offsets (B, L): they run on from the end of the prompt."""
        assert self._end is not None
        return (self._end + offsets).expand(*self._axes, *offsets.shape)

    def collect(self, sites: Tensor) -> None:
        """Keep the keys and values at some of the T tokens of the next pass."""
        self._sites = sites
        self._summaries = self._summaries or [[] for _ in self.layers]

    def with_collected(self) -> PromptCache:
        """A cache that shows what was collected behind the prompt, in the order of the passes; this one forgets it."""
        cache = copy.copy(self)
        cache.layers = [copy.copy(layer) for layer in self.layers]
        for layer, pieces in zip(cache.layers, self._summaries, strict=True):
            layer.keys = torch.cat([layer.keys, *(key for key, _ in pieces)], 2)
            layer.values = torch.cat([layer.values, *(value for _, value in pieces)], 2)
        cache.summaries = sum(key.shape[2] for key, _ in self._summaries[0])
        for either in (self, cache):
            either._sites, either._summaries = None, []
        return cache

    def starting_at(self, first: int) -> PromptCache:
        """For the rows whose first response has that place among the responses with collected summaries."""
        cache = copy.copy(self)
        cache.first = first
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' caches: what the layer's attention sees, (1, h', P + S + T, d)."""
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._sites is not None:
            kept = key_states[:, :, self._sites], value_states[:, :, self._sites]
            self._summaries[layer_idx].append(kept)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], 2), torch.cat([layer.values, value_states], 2)


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """Where everything is in a row of T tokens that holds all rows of a batch, made once for all layers."""

    tokens: Tensor  # (T,) int64, the tokens that are not padding as places in the flattened batch
    row_lengths: tuple[int, ...]  # B numbers of tokens
    own: Ragged  # each prompt and each response, causally
    prompts: Ragged  # the responses of each prompt and the prompt they see
    comparison: ComparisonPlan | None  # for `set`
    blocks: tuple[Block, ...]  # prompts with media blocks

    @classmethod
    def of(
        cls,
        layout: Layout,
        segments: Tensor,
        kinds: Tensor,
        blocks: Tensor | None = None,
        device: torch.device | None = None,
        cache: PromptCache | None = None,
    ) -> GroupPlan:
        """Read the structure off a batch. On a GPU that waits for it, so give tensors that are still on the CPU."""
        device = segments.device if device is None else device
        cache = PromptCache() if cache is None else cache
        segments, kinds = segments.cpu(), kinds.cpu()
        tokens = (segments != PADDING_SEGMENT).flatten().nonzero()[:, 0]
        rows = _read_rows(segments, tokens)
        masks = {} if blocks is None else _block_masks(rows, blocks.cpu().flatten()[tokens])
        shift = cache.prompt + cache.summaries
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
        if cache.prompt:
            prompts = [RaggedSequence(0, len(tokens), 0, cache.prompt)]
        comparison = None
        if layout == "set" and (kinds == TokenKind.COMPARISON).any():
            comparison = _comparison_plan(rows, kinds.flatten()[tokens], cache, device)
        return cls(
            tokens=tokens.to(device, non_blocking=True),
            row_lengths=tuple(sum(size for _, size in row) for row in rows),
            own=Ragged(own, causal=True, device=device),
            prompts=Ragged(prompts, causal=False, device=device),
            comparison=comparison,
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


def _comparison_plan(
    rows: Sequence[list[tuple[int, int]]], kinds: Tensor, cache: PromptCache, device: torch.device
) -> ComparisonPlan:
    """Both sites of each response; they follow its text."""
    counts = torch.tensor([len(row) - 1 for row in rows])
    real = torch.arange(int(counts.max())) < counts[:, None]
    sites = []
    for kind in (TokenKind.COMPARISON, TokenKind.SUMMARY):
        padded = torch.zeros(real.shape, dtype=torch.long)
        padded[real] = (kinds == kind).nonzero()[:, 0]
        sites.append(padded)
    comparisons, summaries = sites
    if cache.summaries:  # the row is a chunk of one group: all summaries are there already
        own = cache.first + torch.arange(real.shape[1])[:, None]
        summaries = cache.prompt + torch.arange(cache.summaries)[None]
        seen = (torch.arange(cache.summaries) != own)[None]
    else:
        summaries = summaries + cache.prompt
        seen = real[:, None] & real[:, :, None] & ~torch.eye(real.shape[1], dtype=torch.bool)
    bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None, None]
    places = real.flatten().nonzero()[:, 0]
    comparisons, summaries = comparisons.flatten(), summaries.flatten()
    tensors = (comparisons, summaries, bias, places, comparisons[places])
    comparisons, summaries, bias, places, found = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return ComparisonPlan(comparisons, summaries, bias, None if bool(real.all()) else places, found)


def _make_pieces(sequences: list[RaggedSequence], causal: bool) -> list[KernelCall]:
    """Runs of neighbours of one length are views; short sequences that are left are gathered into padded batches."""
    pieces, short = [], []
    for run in _runs(sequences):
        if causal and len(run) < _MIN_RUN and run[0].num_queries <= _BUCKETED:
            short += run
        else:
            pieces.append(KernelCall(run[0], len(run)))
    short.sort(key=lambda sequence: -sequence.num_queries)
    while short:
        longest = short[0].num_queries
        shortest = 0 if longest <= _VERY_SHORT else longest * _BUCKET_RATIO
        bucket = [sequence for sequence in short if sequence.num_queries >= shortest]
        short = short[len(bucket) :]
        pieces.append(_gathered(bucket) if len(bucket) > 1 else KernelCall(bucket[0], 1))
    return pieces


def _runs(sequences: list[RaggedSequence]) -> list[list[RaggedSequence]]:
    """Split into runs of sequences of one length that follow each other without a gap."""
    runs: list[list[RaggedSequence]] = []
    following = None
    for sequence in sequences:
        if sequence == following:
            runs[-1].append(sequence)
        else:
            runs.append([sequence])
        queries, keys = sequence.num_queries, sequence.num_keys
        following = RaggedSequence(sequence.query + queries, queries, sequence.key + keys, keys)
    return runs


def _gathered(bucket: list[RaggedSequence]) -> KernelCall:
    starts = torch.tensor([sequence.query for sequence in bucket])[:, None]
    lengths = torch.tensor([sequence.num_queries for sequence in bucket])[:, None]
    places = torch.arange(int(lengths[0]))
    gather = (starts + places.minimum(lengths - 1)).flatten()
    real = (places < lengths).flatten().nonzero()[:, 0]
    shift = bucket[0].key - bucket[0].query
    return KernelCall(bucket[0], len(bucket), gather, shift, real, gather[real])


def _make_lengths(sequences: list[RaggedSequence], device: torch.device) -> KernelLengths:
    def sites(starts: list[int], lengths: list[int]) -> Tensor:
        return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])

    def running(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    num_queries = [sequence.num_queries for sequence in sequences]
    num_keys = [sequence.num_keys for sequence in sequences]
    tensors = (
        sites([sequence.query for sequence in sequences], num_queries),
        sites([sequence.key for sequence in sequences], num_keys),
        running(num_queries),
        running(num_keys),
    )
    queries, keys, query_starts, key_starts = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return KernelLengths(queries, keys, query_starts, key_starts, max(num_queries), max(num_keys))
