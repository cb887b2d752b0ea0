"""Attention over many sequences of different lengths that lie in one row, with the log-sum-exp of each query's logits.

The log-sum-exp is what lets a softmax over several sets of keys be taken part by part and merged exactly. On a CPU the
sequences of one length run as one batch of torch's flash kernel, on views of the row; on CUDA all of them are one call
of the variable-length kernel.

Legend: T tokens of the row, S sequences, h heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from mr_reward.errors import BackendError

__all__ = ["Part", "Ragged", "RaggedSequence", "attend", "gradients"]

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
class _Piece:
    """One call of the CPU kernel: `count` sequences as a batch."""

    first: RaggedSequence  # the first of the sequences; the others follow it without a gap, unless `gather` is given
    count: int  # S
    # (S * longest,) int64 sites of the queries relative to the row, padded with a sequence's last one
    gather: Tensor | None = None
    shift: int = 0  # from the site of a query to that of its own key; for `gather` only
    real: Tensor | None = None  # int64 places in `gather` that are not padding
    sites: Tensor | None = None  # int64 sites of the queries at `real`


@dataclass(frozen=True, slots=True, eq=False)
class _Lengths:
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
        self.pieces: list[_Piece] = []
        self.lengths: _Lengths | None = None
        if not self.sequences:
            return
        if device.type == "cpu":
            self.pieces = _make_pieces(self.sequences, causal)
        else:
            self.lengths = _make_lengths(self.sequences, device)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What some queries found among some keys."""

    sites: slice | Tensor  # of the queries in the row
    out: Tensor  # (n, h, d)
    lse: Tensor  # (n, h) float32 or float64


def attend(query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, scale: float | None) -> Iterator[Part]:
    """Attention of each sequence."""
    for piece in ragged.pieces:
        parts = [_take(states, piece, is_query=i == 0) for i, states in enumerate((query, key, value))]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, ragged.causal, scale=scale)
        out, lse = out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        if piece.sites is None:
            yield Part(_query_slice(piece), out, lse)
        else:
            yield Part(piece.sites, out.index_select(0, piece.real), lse.index_select(0, piece.real))
    if ragged.lengths is not None:
        sizes = ragged.lengths
        out, lse = varlen_attn(
            query.index_select(0, sizes.queries),
            key.index_select(0, sizes.keys),
            value.index_select(0, sizes.keys),
            sizes.query_starts,
            sizes.key_starts,
            sizes.max_queries,
            sizes.max_keys,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0) if ragged.causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        yield Part(sizes.queries, out, lse.transpose(0, 1))  # the kernel gives (h, n)


def gradients(
    grad: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    ragged: Ragged,
    scale: float | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add the gradients of this part of a merged softmax.

    Given the merged output and its log-sum-exp, the kernel's backward gives what this part contributes: its
    probabilities are exp(logit - lse), whichever keys the sum ran over (as in ring attention, arXiv 2310.01889).
    """
    if ragged.lengths is not None:
        raise BackendError(
            f"group attention has gradients on the CPU only, the tensors are on {grad.device}; train with "
            "attn_implementation='sdpa' or 'flex_attention'"
        )
    for piece in ragged.pieces:
        parts = [_take(tensor, piece, is_query=i == 0) for i, tensor in enumerate(states)]
        upstream = _take(grad, piece, is_query=True)
        if piece.real is not None:  # padding repeats a real query, whose gradient must count once
            upstream = upstream.transpose(1, 2).flatten(0, 1)
            cleared = torch.zeros_like(upstream).index_copy_(0, piece.real, upstream.index_select(0, piece.real))
            upstream = cleared.unflatten(0, (piece.count, -1)).transpose(1, 2)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream,
            *parts,
            _take(out, piece, is_query=True),
            _take(lse[..., None], piece, is_query=True)[..., 0],
            0.0,
            ragged.causal,
            scale=scale,
        )
        for i, (total, part) in enumerate(zip(grads, found, strict=True)):
            _add(total, part.transpose(1, 2).flatten(0, 1), piece, is_query=i == 0)


def _query_slice(piece: _Piece) -> slice:
    return slice(piece.first.query, piece.first.query + piece.count * piece.first.num_queries)


def _key_slice(piece: _Piece) -> slice:
    return slice(piece.first.key, piece.first.key + piece.count * piece.first.num_keys)


def _take(states: Tensor, piece: _Piece, is_query: bool) -> Tensor:
    """(T, h, d) -> (S, h, longest, d); a view of the row where the sequences lie side by side."""
    if piece.gather is None:
        chosen = states[_query_slice(piece) if is_query else _key_slice(piece)]
    else:
        chosen = states.index_select(0, piece.gather if is_query else piece.gather + piece.shift)
    return chosen.unflatten(0, (piece.count, -1)).transpose(1, 2)


def _add(total: Tensor, part: Tensor, piece: _Piece, is_query: bool) -> None:
    """Add (S * longest, h, d) where `_take` took it from; what padding got goes to the token that it repeats."""
    if piece.gather is None:
        total[_query_slice(piece) if is_query else _key_slice(piece)] += part
    else:
        total.index_add_(0, piece.gather if is_query else piece.gather + piece.shift, part)


def _make_pieces(sequences: list[RaggedSequence], causal: bool) -> list[_Piece]:
    """Runs of neighbours of one length are views; short sequences that are left are gathered into padded batches."""
    pieces, short = [], []
    for run in _runs(sequences):
        if causal and len(run) < _MIN_RUN and run[0].num_queries <= _BUCKETED:
            short += run
        else:
            pieces.append(_Piece(run[0], len(run)))
    short.sort(key=lambda sequence: -sequence.num_queries)
    while short:
        longest = short[0].num_queries
        shortest = 0 if longest <= _VERY_SHORT else longest * _BUCKET_RATIO
        bucket = [sequence for sequence in short if sequence.num_queries >= shortest]
        short = short[len(bucket) :]
        pieces.append(_gathered(bucket) if len(bucket) > 1 else _Piece(bucket[0], 1))
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


def _gathered(bucket: list[RaggedSequence]) -> _Piece:
    starts = torch.tensor([sequence.query for sequence in bucket])[:, None]
    lengths = torch.tensor([sequence.num_queries for sequence in bucket])[:, None]
    places = torch.arange(int(lengths[0]))
    gather = (starts + places.minimum(lengths - 1)).flatten()
    real = (places < lengths).flatten().nonzero()[:, 0]
    shift = bucket[0].key - bucket[0].query
    return _Piece(bucket[0], len(bucket), gather, shift, real, gather[real])


def _make_lengths(sequences: list[RaggedSequence], device: torch.device) -> _Lengths:
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
    return _Lengths(queries, keys, query_starts, key_starts, max(num_queries), max(num_keys))
