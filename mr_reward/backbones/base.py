"""What the model needs to know about a backbone family, and the registry of families.

To add a family: write an adapter with these members in a file of its own and register it in `ADAPTERS`.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from mr_reward.layouts import PADDING_SEGMENT, PROMPT_SEGMENT

__all__ = ["BackboneAdapter", "TextAdapter", "continue_positions"]


class BackboneAdapter(Protocol):
    """The differences between backbone families, and nothing else.

    Args:
        media_keys: names of the media tensors that the family's processor makes and its forward takes, concatenated
            over the groups of a batch along the first dimension.
        lora_targets: linear layers of the language part, as `target_modules` of peft (regular expression or keyword).
    """

    media_keys: tuple[str, ...]
    lora_targets: str

    def position_ids(
        self, backbone: nn.Module, input_ids: Tensor, segments: Tensor, offsets: Tensor, media: dict[str, Tensor]
    ) -> Tensor:
        """Positions for the backbone's forward; every response continues from the end of the prompt."""
        ...

    def forward_arguments(self, media: dict[str, Tensor]) -> dict[str, Any]:
        """Media arguments for the backbone's forward."""
        ...


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
    """Any text-only decoder: one position per token."""

    media_keys: tuple[str, ...] = ()
    lora_targets = "all-linear"

    def position_ids(
        self, backbone: nn.Module, input_ids: Tensor, segments: Tensor, offsets: Tensor, media: dict[str, Tensor]
    ) -> Tensor:
        """Positions (B, L) int64."""
        counted = (segments != PADDING_SEGMENT).long().cumsum(-1) - 1  # left padding does not count
        return continue_positions(counted, segments, offsets)

    def forward_arguments(self, media: dict[str, Tensor]) -> dict[str, Any]:
        """Nothing: there are no media."""
        return {}
