"""Rendered groups -> rows -> batches, within a token budget: one record, `Rows`, from packing to the forward pass.

Legend: B rows (one group each), N responses, L tokens of the longest row, P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mr_reward.attention.plan import GroupPlan
from mr_reward.backbones.base import BackboneAdapter
from mr_reward.errors import ConfigurationError, OverLengthError
from mr_reward.groups import ResponseGroup
from mr_reward.layouts import PADDING_SEGMENT, Layout, check_layout, plan_row, readout_kinds
from mr_reward.templates.rendering import RenderedGroup, Renderer, check_template

if TYPE_CHECKING:
    from mr_reward.model.model import MultiResponseRewardModel

OVER_LENGTH_POLICIES = ("error", "drop_group", "truncate_responses")


def check_over_length(policy: str) -> None:
    """Refuse a policy that does not exist."""
    if policy not in OVER_LENGTH_POLICIES:
        known = ", ".join(OVER_LENGTH_POLICIES)
        raise ConfigurationError(f"unknown over-length policy {policy!r}, expected one of {known}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """B packed rows with one group each: what the packer makes (B = 1), `collate` joins and the model reads."""

    input_ids: Tensor  # (B, L) int64; what stands at readout sites and padding does not matter, it is 0
    segments: Tensor  # (B, L) int64, see `mr_reward.layouts`; -1 at padding
    kinds: Tensor  # (B, L) int64, a `TokenKind`
    offsets: Tensor  # (B, L) int64, position counted from the end of the prompt
    score_sites: Tensor  # (B, N) int64 token indices; 0 in empty slots
    response_mask: Tensor  # (B, N) bool, True where there is a response
    spans: tuple[tuple[tuple[int, int], ...], ...]  # of each row: half-open token ranges of the response texts
    truncated: tuple[tuple[bool, ...], ...]  # of each row: True where tokens of the response were cut off
    # Tensors by name, those of one prompt as its processor makes them, those of a batch as the family merges them;
    # with media also `mm_token_type_ids` (B, L).
    media: dict[str, Tensor] = field(default_factory=dict)
    plan: GroupPlan | None = None  # for the attention; None: read off the rows when they are read

    @property
    def num_tokens(self) -> int:
        """B * L, padding included."""
        return self.input_ids.numel()

    @property
    def device(self) -> torch.device:
        """Of the tensors."""
        return self.input_ids.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The rows on a device. A plan is on the device that it was made for and stays there."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Rows:
        """As of a tensor."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Rows:
        names = ("input_ids", "segments", "kinds", "offsets", "score_sites", "response_mask")
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, media={name: function(tensor) for name, tensor in self.media.items()}, **changed)


class Packer:
    """Lays groups out as rows of at most `max_tokens` tokens, and applies the over-length policy.

    `error` raises; `drop_group` leaves the group out; `truncate_responses` cuts the ends of the longest responses.
    Neither the prompt nor its media are ever cut. `context_tokens` is the largest number of positions of the backbone:
    responses of `isolated` and `set` share positions, so only the longest one counts against it.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        layout: Layout | str,
        max_tokens: int,
        context_tokens: int | None = None,
        over_length: str = "error",
    ) -> None:
        check_over_length(over_length)
        if max_tokens < 1:
            raise ConfigurationError(f"the token budget is {max_tokens}, expected at least 1")
        self.layout = check_layout(layout)
        check_template(renderer.template, layout)
        self.renderer = renderer
        self.max_tokens = max_tokens
        self.context_tokens = context_tokens
        self.over_length = over_length

    @classmethod
    def of(cls, model: MultiResponseRewardModel, *, max_tokens: int, over_length: str = "error") -> Packer:
        """The packer of a model's rows."""
        return cls(
            Renderer(model.processor, model.config.template, thoughts=model.config.thoughts, adapter=model.adapter),
            layout=model.config.layout,
            max_tokens=max_tokens,
            context_tokens=model.context_tokens,
            over_length=over_length,
        )

    def pack(self, group: ResponseGroup) -> Rows | None:
        """Render and lay out one group; None if it does not fit and the policy is `drop_group`.

        Raises OverLengthError if it does not fit under `error`, or its prompt alone does not fit, and MediaError if
        its media cannot be read, or not by this family of backbones.
        """
        return self.lay_out(self.renderer.render(group), group.name)

    def lay_out(self, rendered: RenderedGroup, name: str) -> Rows | None:
        """As `pack`, for a rendered group; `name` is for messages."""
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
                raise OverLengthError(
                    f"{name}: {prompt_length} prompt tokens and responses of {lengths} tokens do not fit a row of "
                    f"{self.max_tokens} tokens{self._advice()}"
                )
        return build_row(rendered, self.layout, kept)

    def trim(self, rendered: RenderedGroup, name: str) -> tuple[RenderedGroup, tuple[bool, ...]] | None:
        """Apply the over-length policy to responses that are read over their prompt in several passes.

        Gives the group, of which each response fits the budget together with the prompt, and N flags, True where
        tokens were cut off; None and the error as `pack`.
        """
        prompt_length, lengths = len(rendered.prompt_ids), [len(ids) for ids in rendered.response_ids]
        limit = min(self.max_tokens, self.context_tokens or self.max_tokens) - prompt_length
        limit -= max(self._fixed_lengths(rendered))
        if limit < 0 or max(lengths) > limit:
            if self.over_length == "drop_group":
                return None
            if self.over_length == "error" or limit < 0:
                raise OverLengthError(
                    f"{name}: a response of {max(lengths)} tokens does not fit beside {prompt_length} prompt tokens "
                    f"into a pass of {self.max_tokens} tokens{self._advice()}"
                )
        cut = replace(rendered, response_ids=[ids[:limit] for ids in rendered.response_ids])
        return cut, tuple(length > limit for length in lengths)

    def num_tokens(self, rendered: RenderedGroup) -> int:
        """L of the group's row if nothing is cut off, readout tokens and framing included."""
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

    def _advice(self) -> str:
        context = "" if self.context_tokens is None else f" and a context of {self.context_tokens} positions"
        return (
            f"{context} in layout {self.layout!r}; raise max_tokens_per_batch, shorten the prompt or its media, or "
            "choose over_length='drop_group' or 'truncate_responses'"
        )


def build_row(rendered: RenderedGroup, layout: Layout, kept: Sequence[int] | None = None) -> Rows:
    """Lay out a rendered group without looking at the budget; responses are cut to the N lengths `kept`.

    Without responses it is a row of the prompt alone, without a prompt one of the responses alone.
    """
    lengths = [len(ids) for ids in rendered.response_ids]
    kept = lengths if kept is None else kept
    framing = rendered.framing
    sizes = None if framing is None else [(len(before), len(after)) for before, after in framing]
    plan = plan_row(layout, len(rendered.prompt_ids), kept, sizes)
    length, prompt_length = len(plan.segments), len(rendered.prompt_ids)
    behind = [0] * (length - prompt_length)  # the tokens behind the prompt
    for i, ((start, end), ids) in enumerate(zip(plan.spans, rendered.response_ids, strict=True)):
        before, after = ([], []) if framing is None else framing[i]
        first, last = start - len(before) - prompt_length, end + len(after) - prompt_length
        behind[first:last] = [*before, *ids[: end - start], *after]
    input_ids = torch.cat([rendered.prompt_ids, torch.tensor(behind, dtype=torch.long)])
    media = dict(rendered.media)
    if media and rendered.mm_token_type_ids is not None:
        types = rendered.mm_token_type_ids
        media["mm_token_type_ids"] = F.pad(types, (0, length - prompt_length))[None]
    return Rows(
        input_ids=input_ids[None],
        segments=plan.segments[None],
        kinds=plan.kinds[None],
        offsets=plan.offsets[None],
        score_sites=torch.tensor([plan.score_sites], dtype=torch.long),
        response_mask=torch.ones(1, len(lengths), dtype=torch.bool),
        spans=(plan.spans,),
        truncated=(tuple(keep < length for keep, length in zip(kept, lengths, strict=True)),),
        media=media,
    )


def plan_batches(num_tokens: Sequence[int], max_tokens: int, padded: bool = True) -> list[list[int]]:
    """Put rows together so that the tokens that a batch computes stay within the budget.

    Padded: a batch computes as many tokens for each row as the longest has, so rows of similar length go together;
    otherwise it computes the sum of its rows, and each goes to the first batch that has room. The longest rows come
    first, so that running out of memory shows at once.

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


def collate(rows: Sequence[Rows], adapter: BackboneAdapter, padding_side: str = "right") -> Rows:
    """Join the rows of a packer to a batch: padded to one length, with the pixels of each picture once.

    Scores do not depend on the side, `right` or `left`.
    """
    lengths = [row.input_ids.shape[1] for row in rows]
    starts = [max(lengths) - length if padding_side == "left" else 0 for length in lengths]

    def pad(values: Sequence[Tensor], fill: int = 0, side: str = padding_side) -> Tensor:
        return pad_sequence([value[0] for value in values], True, fill, side)

    types = "mm_token_type_ids"
    media = adapter.merge_media([{k: v for k, v in row.media.items() if k != types} for row in rows])
    if media:
        media[types] = pad([row.media.get(types, torch.zeros_like(row.input_ids)) for row in rows])
    return Rows(
        input_ids=pad([row.input_ids for row in rows]),
        segments=pad([row.segments for row in rows], PADDING_SEGMENT),
        kinds=pad([row.kinds for row in rows]),
        offsets=pad([row.offsets for row in rows]),
        score_sites=pad([row.score_sites + start for row, start in zip(rows, starts, strict=True)], side="right"),
        response_mask=pad([row.response_mask for row in rows], side="right"),
        spans=tuple(
            tuple((first + start, end + start) for first, end in row.spans[0])
            for row, start in zip(rows, starts, strict=True)
        ),
        truncated=tuple(row.truncated[0] for row in rows),
        media=media,
    )
