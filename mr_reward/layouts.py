"""Layouts: which token of a row sees which, at which position, and where each score is read. Pure tensors, no model.

One row holds one group: the prompt, then for each response its text and its readout tokens.

    causal, isolated    P  r_1 s  r_2 s  ...  r_N s        the score is read at each s
    set                 P  r_1 s c  r_2 s c  ...  r_N s c  the score is read at each c

Legend: B rows, N responses, L tokens of a row, P tokens of the prompt. A token is described by its `segment`
(-1 padding, 0 prompt, i = 1..N the i-th response with its readout tokens) and its `kind` (`TokenKind`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from mr_reward.errors import ConfigurationError

__all__ = [
    "LAYOUTS",
    "Layout",
    "PADDING_SEGMENT",
    "PROMPT_SEGMENT",
    "RowPlan",
    "TokenKind",
    "check_layout",
    "plan_row",
    "visible",
]

Layout = Literal["causal", "isolated", "set"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PADDING_SEGMENT = -1
PROMPT_SEGMENT = 0


class TokenKind(IntEnum):
    """What a token is: text (or media) of the row, or one of the two learned readout vectors."""

    TEXT = 0
    SUMMARY = 1
    COMPARISON = 2


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Where everything of one row is."""

    segments: Tensor  # (L,) int64, 0 = prompt, i = the i-th response
    kinds: Tensor  # (L,) int64, a `TokenKind`
    offsets: Tensor  # (L,) int64, position of a response's token counted from the end of the prompt; 0 in the prompt
    # N half-open token ranges of the response texts, without readout tokens; an empty text has start == end
    spans: tuple[tuple[int, int], ...]
    score_sites: tuple[int, ...]  # N token indices where the scores are read


def check_layout(layout: str) -> Layout:
    """The same name, or a ConfigurationError if there is no such layout."""
    if layout not in LAYOUTS:
        raise ConfigurationError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    return cast(Layout, layout)


def readout_kinds(layout: Layout) -> tuple[TokenKind, ...]:
    """The readout tokens that follow each response; the score is read at the last of them."""
    return (TokenKind.SUMMARY, TokenKind.COMPARISON) if layout == "set" else (TokenKind.SUMMARY,)


def plan_row(
    layout: Layout,
    num_prompt_tokens: int,
    num_response_tokens: Sequence[int],
    framing: Sequence[tuple[int, int]] | None = None,
) -> RowPlan:
    """Lay out one group; spans and sites are computed here and never searched for.

    Args:
        layout: `causal`, `isolated` or `set`.
        num_prompt_tokens: P, media tokens included.
        num_response_tokens: N lengths of the response texts; 0 is allowed.
        framing: for templates that separate the responses by text: N numbers of tokens (before, after) each response
            that belong to the template. Scores are then read at the last of them; there are no readout tokens.

    Returns:
        The plan of L = P + sum(lengths) + N * (number of readout tokens) tokens, or P + sum(lengths) + sum(framing).

    Example:
        >>> plan_row("set", 2, [1, 0]).segments.tolist()
        [0, 0, 1, 1, 1, 2, 2]
        >>> plan_row("set", 2, [1, 0]).score_sites
        (4, 6)
    """
    kinds_after_text = readout_kinds(check_layout(layout)) if framing is None else ()
    framing = [(0, 0)] * len(num_response_tokens) if framing is None else framing
    segments = [PROMPT_SEGMENT] * num_prompt_tokens
    kinds: list[int] = [TokenKind.TEXT] * num_prompt_tokens
    offsets = [0] * num_prompt_tokens
    spans, score_sites = [], []
    for segment, (length, (before, after)) in enumerate(zip(num_response_tokens, framing, strict=True), start=1):
        start, num_text = len(segments), before + length + after
        size = num_text + len(kinds_after_text)
        spans.append((start + before, start + before + length))
        segments += [segment] * size
        kinds += [TokenKind.TEXT] * num_text + [*kinds_after_text]
        first = start - num_prompt_tokens if layout == "causal" else 0
        offsets += range(first, first + size)
        score_sites.append(start + size - 1)
    # One call for all three: a call costs more than the numbers in it.
    tensors = torch.tensor([segments, kinds, offsets], dtype=torch.long).unbind()
    return RowPlan(tensors[0], tensors[1], tensors[2], tuple(spans), tuple(score_sites))


def visible(layout: Layout, segments: Tensor, kinds: Tensor, blocks: Tensor | None = None) -> Tensor:
    """Who sees whom, as a dense boolean mask: the reference of every faster form.

    `isolated` is a causal mask in which a response sees the prompt and itself only. `set` adds that the comparison
    token of every response sees the summary tokens of all responses, as in Set-Encoder (arXiv 2404.06912). A padding
    token sees itself, so that no row of the mask is empty, and nobody sees it.

    Args:
        layout: `causal`, `isolated` or `set`.
        segments: (B, L) int64.
        kinds: (B, L) int64.
        blocks: (B, L) int64 or None; tokens of the same block of a row see each other in both directions, as the image
            tokens of some backbones do; -1 is outside of any block. Blocks stand in the prompt.

    Returns:
        (B, L, L) bool, [b, query, key] is True where the query sees the key.

    Example:
        >>> plan = plan_row("set", 1, [1, 1])
        >>> visible("set", plan.segments[None], plan.kinds[None])[0, 3].int().tolist()  # c of the first response
        [1, 1, 1, 1, 0, 1, 0]
    """
    query, key = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    if check_layout(layout) != "causal":
        mask = mask & ((key == PROMPT_SEGMENT) | (key == query))
    if layout == "set":
        mask = mask | ((kinds == TokenKind.COMPARISON)[:, :, None] & (kinds == TokenKind.SUMMARY)[:, None, :])
    if blocks is not None:
        mask = mask | ((blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None])
    mask = mask & (query != PADDING_SEGMENT) & (key != PADDING_SEGMENT)
    return mask | torch.eye(length, dtype=torch.bool, device=segments.device)
