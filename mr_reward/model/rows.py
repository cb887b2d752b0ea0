"""Rendered groups -> packed rows -> batches, within a token budget.

Legend: B rows (one group each), N responses, L tokens of the longest row, P tokens of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mr_reward.backbones import check_media, merge_media
from mr_reward.errors import ConfigurationError, OverLengthError
from mr_reward.groups import ResponseGroup
from mr_reward.layouts import PADDING_SEGMENT, check_layout, plan_row, readout_kinds
from mr_reward.templates.rendered import RenderedGroup
from mr_reward.templates.rendering import Renderer, check_template

__all__ = ["OVER_LENGTH_POLICIES", "PackedBatch", "PackedRow", "Packer", "build_row", "collate", "plan_batches"]

OVER_LENGTH_POLICIES = ("error", "drop_group", "truncate_responses")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """One group laid out as a row.

    Args:
        input_ids: (L,) int64; readout sites hold 0, the model puts its vectors there.
        segments: (L,) int64, see `mr_reward.layouts`.
        kinds: (L,) int64.
        offsets: (L,) int64.
        spans: N half-open token ranges of the response texts.
        score_sites: N token indices.
        media: tensors of the prompt's media by name.
        mm_token_type_ids: (P,) int64 or None.
        truncated: N flags, True where tokens of the response were cut off.
    """

    input_ids: Tensor
    segments: Tensor
    kinds: Tensor
    offsets: Tensor
    spans: tuple[tuple[int, int], ...]
    score_sites: tuple[int, ...]
    media: dict[str, Tensor]
    mm_token_type_ids: Tensor | None
    truncated: tuple[bool, ...]

    @property
    def num_tokens(self) -> int:
        """L."""
        return len(self.input_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Rows of one forward pass, padded to one length. Fields as in `PackedRow`, with a leading B.

    Args:
        input_ids: (B, L) int64.
        segments: (B, L) int64, -1 at padding.
        kinds: (B, L) int64.
        offsets: (B, L) int64.
        score_sites: (B, N) int64, 0 in empty slots.
        response_mask: (B, N) bool.
        media: tensors by name, merged over the rows by the family's rule, pixels of a picture that several rows show
            once; with media also `mm_token_type_ids` (B, L).
    """

    input_ids: Tensor
    segments: Tensor
    kinds: Tensor
    offsets: Tensor
    score_sites: Tensor
    response_mask: Tensor
    media: dict[str, Tensor] = field(default_factory=dict)

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of `MultiResponseRewardModel.forward`."""
        return {
            "input_ids": self.input_ids,
            "segments": self.segments,
            "kinds": self.kinds,
            "offsets": self.offsets,
            "score_sites": self.score_sites,
            "response_mask": self.response_mask,
            **self.media,
        }


class Packer:
    """Lays groups out as rows and applies the over-length policy.

    Args:
        renderer: makes the token ids.
        layout: `causal`, `isolated` or `set`.
        max_tokens: largest number of tokens of a row.
        context_tokens: largest number of positions of the backbone; None for no limit. Responses of `isolated` and
            `set` share positions, so only the longest one counts against it.
        over_length: `error` raises; `drop_group` leaves the group out; `truncate_responses` cuts the ends of the
            longest responses. Neither the prompt nor its media are ever cut.

    Raises:
        ConfigurationError: unknown layout or policy, a layout that the template does not go with, a budget below 1.

    Example:
        >>> packer = Packer(Renderer(processor), layout="set", max_tokens=4096)  # doctest: +SKIP
        >>> row = packer.pack(group)  # doctest: +SKIP
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        layout: str,
        max_tokens: int,
        context_tokens: int | None = None,
        over_length: str = "error",
    ) -> None:
        if over_length not in OVER_LENGTH_POLICIES:
            raise ConfigurationError(
                f"unknown over-length policy {over_length!r}, expected one of {', '.join(OVER_LENGTH_POLICIES)}"
            )
        if max_tokens < 1:
            raise ConfigurationError(f"the token budget is {max_tokens}, expected at least 1")
        self.layout = check_layout(layout)
        check_template(renderer.template, layout)
        self.renderer = renderer
        self.max_tokens = max_tokens
        self.context_tokens = context_tokens
        self.over_length = over_length

    def pack(self, group: ResponseGroup) -> PackedRow | None:
        """Render and lay out one group.

        Args:
            group: the group.

        Returns:
            The row, or None if it does not fit and the policy is `drop_group`.

        Raises:
            OverLengthError: it does not fit and the policy is `error`, or its prompt alone does not fit.
            MediaError: its media cannot be read, or not by this family of backbones.
        """
        return self.lay_out(self.renderer.render(group), group.name)

    def lay_out(self, rendered: RenderedGroup, name: str) -> PackedRow | None:
        """Lay out a rendered group, for callers that lay out the same group in several orders.

        Args:
            rendered: token ids and media.
            name: of the group, for messages.

        Returns:
            As `pack`.

        Raises:
            OverLengthError: as `pack`.
            MediaError: as `pack`.
        """
        check_media(rendered.media, name)
        lengths = [len(ids) for ids in rendered.response_ids]
        fixed = self._fixed_lengths(rendered)
        prompt_length = len(rendered.prompt_ids)
        kept = self._fit(prompt_length, lengths, fixed)
        if kept != lengths:
            if self.over_length == "drop_group":
                return None
            if self.over_length == "error" or kept is None:
                if rendered.framing is not None:
                    prompt_length += sum(fixed)
                raise OverLengthError(self._explain(name, prompt_length, lengths))
        return build_row(rendered, self.layout, kept)

    def trim(self, rendered: RenderedGroup, name: str) -> tuple[RenderedGroup, tuple[bool, ...]] | None:
        """Apply the over-length policy to responses that are read over their prompt in several passes.

        Args:
            rendered: token ids and media.
            name: of the group, for messages.

        Returns:
            The group, of which each response fits the budget together with the prompt, and N flags, True where tokens
            were cut off; None if one does not fit and the policy is `drop_group`.

        Raises:
            OverLengthError: as `pack`.
            MediaError: as `pack`.
        """
        check_media(rendered.media, name)
        prompt_length, lengths = len(rendered.prompt_ids), [len(ids) for ids in rendered.response_ids]
        limit = min(self.max_tokens, self.context_tokens or self.max_tokens) - prompt_length
        limit -= max(self._fixed_lengths(rendered))
        if limit < 0 or max(lengths) > limit:
            if self.over_length == "drop_group":
                return None
            if self.over_length == "error" or limit < 0:
                raise OverLengthError(
                    f"{name}: a response of {max(lengths)} tokens does not fit beside {prompt_length} prompt tokens "
                    f"into a pass of {self.max_tokens} tokens and a context of {self.context_tokens} positions "
                    f"in layout {self.layout!r}; raise max_tokens_per_batch, shorten the prompt or its media, or "
                    "choose over_length='drop_group' or 'truncate_responses'"
                )
        cut = replace(rendered, response_ids=[ids[:limit] for ids in rendered.response_ids])
        return cut, tuple(length > limit for length in lengths)

    def num_tokens(self, rendered: RenderedGroup) -> int:
        """L of the group's row if nothing is cut off.

        Args:
            rendered: token ids and media.

        Returns:
            Number of tokens, readout tokens and framing included.
        """
        return len(rendered.prompt_ids) + sum(map(len, rendered.response_ids)) + sum(self._fixed_lengths(rendered))

    def _fixed_lengths(self, rendered: RenderedGroup) -> list[int]:
        """Tokens beside each response that are never cut: readout tokens or the template's framing."""
        if rendered.framing is None:
            return [len(readout_kinds(self.layout))] * len(rendered.response_ids)
        return [len(before) + len(after) for before, after in rendered.framing]

    def _fit(self, prompt_length: int, lengths: list[int], fixed: list[int]) -> list[int] | None:
        """The lengths to keep: the longest responses are cut to one common length. None if even 0 does not fit."""
        free = self.max_tokens - prompt_length - sum(fixed)
        limit = max(lengths)
        if self.context_tokens is not None:
            if self.layout == "causal":
                free = min(free, self.context_tokens - prompt_length - sum(fixed))
            else:
                limit = min(limit, self.context_tokens - prompt_length - max(fixed))
        if free < 0 or limit < 0:
            return None
        # Water filling: short responses keep everything, the room that is left is shared by the longer ones.
        for i, length in enumerate(sorted(lengths)):
            share = free // (len(lengths) - i)
            if min(length, limit) > share:
                limit = share
                break
            free -= min(length, limit)
        return [min(length, limit) for length in lengths]

    def _explain(self, name: str, prompt_length: int, lengths: list[int]) -> str:
        context = "" if self.context_tokens is None else f" and a context of {self.context_tokens} positions"
        return (
            f"{name}: {prompt_length} prompt tokens and responses of {lengths} tokens do not fit a row of "
            f"{self.max_tokens} tokens{context} in layout {self.layout!r}; raise max_tokens_per_batch, shorten the "
            "prompt or its media, or choose over_length='drop_group' or 'truncate_responses'"
        )


def build_row(rendered: RenderedGroup, layout: str, kept: Sequence[int] | None = None) -> PackedRow:
    """Lay out a rendered group without looking at the budget.

    Args:
        rendered: token ids and media; without responses it is a row of the prompt alone, without a prompt one of
            the responses alone.
        layout: `causal`, `isolated` or `set`.
        kept: N lengths to which the responses are cut; None cuts nothing.

    Returns:
        The row.
    """
    lengths = [len(ids) for ids in rendered.response_ids]
    kept = lengths if kept is None else kept
    framing = rendered.framing
    sizes = None if framing is None else [(len(before), len(after)) for before, after in framing]
    plan = plan_row(layout, len(rendered.prompt_ids), kept, sizes)
    input_ids = torch.zeros_like(plan.segments)
    input_ids[: len(rendered.prompt_ids)] = rendered.prompt_ids
    for i, ((start, end), ids) in enumerate(zip(plan.spans, rendered.response_ids, strict=True)):
        before, after = ([], []) if framing is None else framing[i]
        ids = [*before, *ids[: end - start], *after]
        input_ids[start - len(before) : end + len(after)] = torch.tensor(ids, dtype=torch.long)
    return PackedRow(
        input_ids=input_ids,
        segments=plan.segments,
        kinds=plan.kinds,
        offsets=plan.offsets,
        spans=plan.spans,
        score_sites=plan.score_sites,
        media=rendered.media,
        mm_token_type_ids=rendered.mm_token_type_ids,
        truncated=tuple(keep < length for keep, length in zip(kept, lengths, strict=True)),
    )


def plan_batches(num_tokens: Sequence[int], max_tokens: int, padded: bool = True) -> list[list[int]]:
    """Put rows together so that the tokens that a batch computes stay within the budget.

    Args:
        num_tokens: length of each row, each at most `max_tokens`.
        max_tokens: budget of a batch.
        padded: rows are padded to the longest of a batch, so rows of similar length go together; otherwise a batch
            computes the sum of its rows, and each row goes to the first batch that has room.

    Returns:
        Lists of row indices, the longest rows first, so that running out of memory shows at once.

    Example:
        >>> plan_batches([2, 5, 2], 6)
        [[1], [0, 2]]
        >>> plan_batches([2, 5, 2, 1], 6, padded=False)
        [[1, 3], [0, 2]]
    """
    batches: list[list[int]] = []
    sizes: list[int] = []  # tokens of each batch; padded: of its longest row
    for row in sorted(range(len(num_tokens)), key=lambda i: -num_tokens[i]):
        size = num_tokens[row]
        if padded:
            fits = [len(batches) - 1] if batches and (len(batches[-1]) + 1) * sizes[-1] <= max_tokens else []
        else:
            fits = [i for i, total in enumerate(sizes) if total + size <= max_tokens][:1]
        if fits:
            batches[fits[0]].append(row)
            sizes[fits[0]] += 0 if padded else size
        else:
            batches.append([row])
            sizes.append(size)
    return batches


def collate(rows: Sequence[PackedRow], padding_side: str = "right") -> PackedBatch:
    """Pad rows to one length and stack them.

    Args:
        rows: B rows.
        padding_side: `right` or `left`; scores do not depend on it.

    Returns:
        The batch.
    """
    longest = max(row.num_tokens for row in rows)
    num_slots = max(len(row.score_sites) for row in rows)
    starts = [longest - row.num_tokens if padding_side == "left" else 0 for row in rows]

    def pad(values: Sequence[Tensor], fill: int) -> Tensor:
        padded = torch.full((len(rows), longest), fill, dtype=torch.long)
        for row, (value, start) in enumerate(zip(values, starts, strict=True)):
            padded[row, start : start + len(value)] = value
        return padded

    score_sites = torch.zeros(len(rows), num_slots, dtype=torch.long)
    response_mask = torch.zeros(len(rows), num_slots, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        score_sites[i, : len(row.score_sites)] = torch.tensor(row.score_sites) + start
        response_mask[i, : len(row.score_sites)] = True
    media = merge_media([row.media for row in rows])
    if media:
        types = [row.mm_token_type_ids if row.mm_token_type_ids is not None else row.input_ids[:0] for row in rows]
        media["mm_token_type_ids"] = pad(types, 0)
    return PackedBatch(
        input_ids=pad([row.input_ids for row in rows], 0),
        segments=pad([row.segments for row in rows], PADDING_SEGMENT),
        kinds=pad([row.kinds for row in rows], 0),
        offsets=pad([row.offsets for row in rows], 0),
        score_sites=score_sites,
        response_mask=response_mask,
        media=media,
    )
