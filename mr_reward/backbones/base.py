"""What the model needs to know about a backbone family.

`docs/add-a-backbone.md` says how to add one.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mr_reward.layouts import PADDING_SEGMENT, PROMPT_SEGMENT

__all__ = ["BackboneAdapter", "TextAdapter", "concatenate_media", "continue_positions"]


class BackboneAdapter(Protocol):
    """The differences between backbone families, and nothing else.

    Args:
        media_keys: names of the media tensors that the family's processor makes and its forward takes.
        lora_targets: linear layers of the language part, as `target_modules` of peft (regular expression or keyword).
        media_blocks: some media tokens see each other in both directions, so `media_block_ids` has to be asked.
    """

    media_keys: tuple[str, ...]
    lora_targets: str
    media_blocks: bool

    def check_media(self, media: dict[str, Tensor], name: str) -> None:
        """Refuse the media of one prompt that the family's forward does not take, with the name of its group."""
        ...

    def merge_media(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The media tensors of the rows of a batch -> those of the batch."""
        ...

    def media_block_ids(self, media: dict[str, Tensor]) -> Tensor | None:
        """Blocks (B, L) int64 of tokens that see each other in both directions, -1 outside; None without media."""
        ...

    def position_ids(
        self, backbone: nn.Module, input_ids: Tensor, segments: Tensor, offsets: Tensor, media: dict[str, Tensor]
    ) -> Tensor:
        """Positions for the backbone's forward; every response continues from the end of the prompt."""
        ...

    def forward_arguments(self, input_ids: Tensor, media: dict[str, Tensor]) -> dict[str, Any]:
        """Media arguments for the backbone's forward."""
        ...


def concatenate_media(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the media tensors of several rows by name, along the first dimension.

    Right for tensors that hold one entry per image, patch or frame; wrong for tensors that count within a row.

    Args:
        rows: tensors by name; a row without media is empty.

    Returns:
        Tensors by name.

    Example:
        >>> concatenate_media([{"pixel_values": torch.zeros(2, 5)}, {}, {"pixel_values": torch.zeros(1, 5)}])[
        ...     "pixel_values"
        ... ].shape
        torch.Size([3, 5])
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.cat([row[name] for row in rows if name in row]) for name in names}


def continue_positions(prompt_positions: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
    """Keep the prompt's positions and let each response count on from the end of the prompt.

    Args:
        prompt_positions: (..., B, L) int64, right at the prompt's tokens, anything elsewhere.
        segments: (B, L) int64.
        offsets: (B, L) int64, from the layout.

    Returns:
        (..., B, L) int64, 0 at padding.
    """
    prompt = segments == PROMPT_SEGMENT
    in_prompt = prompt_positions.masked_fill(~prompt, -1)
    # M-RoPE: text after an image goes on from the largest position of all three axes.
    largest = in_prompt.amax(-1, keepdim=True)
    if largest.ndim == 3:
        largest = largest.amax(0, keepdim=True)
    positions = prompt_positions.where(prompt, largest + 1 + offsets)
    return positions.masked_fill(segments == PADDING_SEGMENT, 0)


class TextAdapter:
    """Any text-only decoder: one position per token. What it says about media holds for most other families too."""

    media_keys: tuple[str, ...] = ()
    lora_targets = "all-linear"
    media_blocks = False

    def check_media(self, media: dict[str, Tensor], name: str) -> None:
        """Every combination is taken."""

    def merge_media(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Concatenated by name."""
        return concatenate_media(rows)

    def media_block_ids(self, media: dict[str, Tensor]) -> Tensor | None:
        """None: everything is causal."""
        return None

    def position_ids(
        self, backbone: nn.Module, input_ids: Tensor, segments: Tensor, offsets: Tensor, media: dict[str, Tensor]
    ) -> Tensor:
        """Positions (B, L) int64."""
        counted = (segments != PADDING_SEGMENT).long().cumsum(-1) - 1  # left padding does not count
        return continue_positions(counted, segments, offsets)

    def forward_arguments(self, input_ids: Tensor, media: dict[str, Tensor]) -> dict[str, Any]:
        """Nothing: there are no media."""
        return {}
