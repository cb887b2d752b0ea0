"""The backbone reads packed rows, padded under a dense mask or end to end: hidden states at the score sites.

Legend: B rows (one group each), N responses, L tokens of the longest row, T tokens of all rows, H width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mr_reward.attention.backends import attention_mask, flat_arguments
from mr_reward.attention.plan import GroupPlan
from mr_reward.attention.prompt_cache import PromptCache
from mr_reward.backbones import BackboneAdapter
from mr_reward.errors import BackendError, ConfigurationError
from mr_reward.model.head import ReadoutVectors

__all__ = ["Reader", "Rows", "check_arguments"]

_FORBIDDEN_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "inputs_embeds")


def check_arguments(media: dict[str, Any], media_keys: tuple[str, ...], layout: str) -> None:
    """Refuse arguments of the reward model's forward that would replace the layout, or that nobody reads.

    Args:
        media: what was given beside the rows; arguments that say nothing are taken out.
        media_keys: names of the media tensors that the backbone takes.
        layout: of the rows, for the message.

    Raises:
        BackendError: an argument that would replace the layout's mask or positions.
        ConfigurationError: an unknown argument.
    """
    for key in _FORBIDDEN_ARGUMENTS:
        value = media.pop(key, None)
        if value is not None and value is not False:  # by identity: a mask tensor cannot be compared
            raise BackendError(
                f"forward got {key}, but mask and positions follow from the layout {layout!r}; "
                f"{key} would silently let responses see each other; leave it out"
            )
    unknown = set(media) - set(media_keys) - {"mm_token_type_ids"}
    if unknown:
        raise ConfigurationError(
            f"forward got unknown arguments {sorted(unknown)}; this backbone takes the media tensors {media_keys}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Packed rows, as in `mr_reward.model.rows.PackedBatch`.

    Args:
        input_ids: (B, L) int64.
        segments: (B, L) int64.
        kinds: (B, L) int64.
        offsets: (B, L) int64.
        score_sites: (B, N) int64.
        media: tensors by name.
    """

    input_ids: Tensor
    segments: Tensor
    kinds: Tensor
    offsets: Tensor
    score_sites: Tensor
    media: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """Reads rows with a backbone.

    Args:
        backbone: the base model.
        adapter: of its family.
        readouts: the learned vectors; None if the template separates the responses by text.
        layout: `causal`, `isolated` or `set`.
        backend: transformers' `attn_implementation` of the backbone.
    """

    backbone: nn.Module
    adapter: BackboneAdapter
    readouts: ReadoutVectors | None
    layout: str
    backend: str | None

    def padded(self, rows: Rows) -> Tensor:
        """Read the rows as they are, under a dense mask: the reference.

        Args:
            rows: the rows.

        Returns:
            (B, N, H) hidden states at the score sites; anything in empty slots.
        """
        embeds = self._embed(rows.input_ids, rows.kinds)
        hidden = self.backbone(
            inputs_embeds=embeds,
            attention_mask=attention_mask(
                self.layout,
                self.backend,
                rows.segments,
                rows.kinds,
                embeds.dtype,
                self.adapter.media_block_ids(rows.media),
            ),
            position_ids=self._positions(rows),
            use_cache=False,
            **self.adapter.forward_arguments(self.backbone, rows.input_ids, rows.media),
        ).last_hidden_state
        row = torch.arange(len(hidden), device=hidden.device)[:, None]
        return hidden[row, rows.score_sites]

    def flat(self, rows: Rows, plan: GroupPlan | None = None, cache: PromptCache | None = None) -> Tensor:
        """Read the rows end to end, without padding.

        Args:
            rows: the rows.
            plan: of the rows; None reads it off them, for which a GPU is waited for.
            cache: an empty one takes the row in; a frozen one holds the prompt of rows that have none, and `plan`
                says so.

        Returns:
            As `padded`.
        """
        blocks = self.adapter.media_block_ids(rows.media)
        if plan is None:
            plan = GroupPlan.of(self.layout, rows.segments, rows.kinds, blocks)
        tokens = plan.tokens

        def squeeze(values: Tensor) -> Tensor:
            """(..., B, L) -> (..., 1, T)."""
            return values.flatten(-2)[..., tokens].unsqueeze(-2)

        media = {
            name: squeeze(values) if name == "mm_token_type_ids" else values for name, values in rows.media.items()
        }
        input_ids = squeeze(rows.input_ids)
        hidden = self.backbone(
            inputs_embeds=self._embed(input_ids, squeeze(rows.kinds)),
            position_ids=squeeze(self._positions(rows, cache)),
            use_cache=cache is not None,
            past_key_values=cache,
            **flat_arguments(self.layout, self.backend, plan, rows.segments, rows.kinds, blocks),
            **self.adapter.forward_arguments(self.backbone, input_ids, media),
        ).last_hidden_state[0]
        places = torch.zeros(rows.segments.numel(), dtype=torch.long, device=tokens.device)
        places[tokens] = torch.arange(len(tokens), device=tokens.device)
        return hidden[places.view_as(rows.segments).gather(1, rows.score_sites)]

    def prompt(self, rows: Rows) -> PromptCache:
        """Read a prompt alone and keep its keys and values.

        Args:
            rows: one row without responses.

        Returns:
            The cache for `flat`.
        """
        cache = PromptCache()
        self.flat(rows, cache=cache)
        positions = self._positions(rows)
        cache.freeze(positions.shape[:-2], positions.amax() + 1)
        return cache

    def _embed(self, input_ids: Tensor, kinds: Tensor) -> Tensor:
        embeds = self.backbone.get_input_embeddings()(input_ids)  # type: ignore[operator]
        return embeds if self.readouts is None else self.readouts(embeds, kinds)

    def _positions(self, rows: Rows, cache: PromptCache | None = None) -> Tensor:
        if cache is not None and cache.frozen:
            return cache.positions(rows.offsets)
        return self.adapter.position_ids(self.backbone, rows.input_ids, rows.segments, rows.offsets, rows.media)
