"""What the model needs to know about a backbone family.

`docs/add-a-backbone.md` says how to add one.
"""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mr_reward.layouts import PADDING_SEGMENT, PROMPT_SEGMENT

logger = logging.getLogger(__name__)

_HEADS, _LAYERS, _VISION_WIDTH = 2, 2, 64  # of a tiny copy
_SAMPLE = 64  # values of a picture that are looked at before all of them are


def concatenate_media(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the media tensors of several rows by name, along the first dimension.

    Right for tensors that hold one entry per image, patch or frame; wrong for tensors that count within a row.

    Example:
        >>> concatenate_media([{"pixel_values": torch.zeros(2, 5)}, {}, {"pixel_values": torch.zeros(1, 5)}])[
        ...     "pixel_values"
        ... ].shape
        torch.Size([3, 5])
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.cat([row[name] for row in rows if name in row]) for name in names}


def different_pictures(pictures: Sequence[Tensor], grids: Tensor) -> tuple[list[Tensor], list[int]]:
    """Find the pictures that several rows of a batch show, so that the vision tower encodes them once.

    Example:
        >>> different_pictures([torch.ones(2), torch.zeros(2), torch.ones(2)], torch.ones(3, 3))[1]
        [0, 1, 0]
    """
    different: list[Tensor] = []
    index: list[int] = []
    alike: dict[tuple[float, ...], list[int]] = {}
    for picture, grid in zip(pictures, grids.tolist(), strict=True):
        # A few values tell most pictures apart; to hash them all takes several times as long as to compare two.
        sample = picture.flatten()[:: picture.numel() // _SAMPLE + 1].tolist()
        candidates = alike.setdefault((*picture.shape, *grid, *sample), [])
        found = next((i for i in candidates if torch.equal(different[i], picture)), None)
        if found is None:
            found = len(different)
            different.append(picture)
            candidates.append(found)
        index.append(found)
    if len(different) < len(index):
        logger.debug("%d of the %d images or videos of a batch are encoded", len(different), len(index))
    return different, index


def continue_positions(prompt_positions: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
    """Keep the prompt's positions and let each response count on from the end of the prompt."""
    prompt = segments == PROMPT_SEGMENT
    in_prompt = prompt_positions.masked_fill(~prompt, -1)
    # M-RoPE: text after an image continues at the largest position of all three axes.
    largest = in_prompt.amax(-1, keepdim=True)
    if largest.ndim == 3:
        largest = largest.amax(0, keepdim=True)
    positions = prompt_positions.where(prompt, largest + 1 + offsets)
    return positions.masked_fill(segments == PADDING_SEGMENT, 0)


class BackboneAdapter:
    """The differences between backbone families, and nothing else; as it is, for any text-only decoder.

    A family overrides what differs. `media_keys` are the names of the media tensors that its processor or
    `merge_media` makes, `lora_targets` the linear layers of the language part as `target_modules` of peft (regular
    expression or keyword); with `media_blocks` some media tokens see each other in both directions.

    Example:
        >>> BackboneAdapter().lora_targets
        'all-linear'
    """

    media_keys: tuple[str, ...] = ()
    lora_targets = "all-linear"
    media_blocks = False

    def check_media(self, media: dict[str, Tensor], name: str) -> None:
        """Refuse the media of one prompt that the family's forward does not take, with the name of its group."""

    def merge_media(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The media tensors of the rows of a batch -> those of the batch, with the pixels of each picture once."""
        return concatenate_media(rows)

    def split_media(self, media: dict[str, Tensor], num_images: Sequence[int]) -> list[dict[str, Tensor]]:
        """The image tensors of several prompts in one call of the processor -> those of each prompt."""
        return [{} for _ in num_images]

    def media_block_ids(self, media: dict[str, Tensor]) -> Tensor | None:
        """Blocks (B, L) int64 of tokens that see each other in both directions, -1 outside; None without any."""
        return None

    def position_ids(
        self, backbone: nn.Module, input_ids: Tensor, segments: Tensor, offsets: Tensor, media: dict[str, Tensor]
    ) -> Tensor:
        """Positions for the backbone's forward, here (B, L) int64; every response goes on from the prompt's end."""
        counted = (segments != PADDING_SEGMENT).long().cumsum(-1) - 1  # left padding does not count
        return continue_positions(counted, segments, offsets)

    def forward_arguments(self, backbone: nn.Module, input_ids: Tensor, media: dict[str, Tensor]) -> dict[str, Any]:
        """Media arguments for the backbone's forward, in which each picture is encoded once."""
        return {}


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A copy of a backbone's configuration with few layers and heads; token ids, vocabulary and patches as they are.

    None for a family that this was not written for.
    """
    small: Any = copy.deepcopy(config)
    text = small.get_text_config()
    if getattr(text, "num_experts", None) or not hasattr(text, "num_attention_heads"):
        return None
    width = _HEADS * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    sizes = {"num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS}
    text.update({**sizes, "hidden_size": width, "intermediate_size": 2 * width})
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:_LAYERS]
    vision_sizes = {  # by whatever name a family has them
        **sizes,
        "head_dim": _VISION_WIDTH // _HEADS,
        "hidden_size": _VISION_WIDTH,
        "intermediate_size": _VISION_WIDTH,
        "out_hidden_size": width,
        "text_hidden_size": width,
        "deepstack_visual_indexes": [0],
        "fullatt_block_indexes": [_LAYERS - 1],
        "vision_feature_layer": [_LAYERS - 1, 0],
    }
    for name in ("vision_config", "adapter_config"):
        part = getattr(small, name, None)
        if part is not None:
            part.update({size: value for size, value in vision_sizes.items() if hasattr(part, size)})
    return small
