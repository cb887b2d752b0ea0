"""Qwen2.5-VL and Qwen3-VL: multimodal rotary positions (time, height, width), images and videos."""

from typing import Any

import torch
from torch import Tensor, nn

from mr_reward.backbones.base import TextAdapter, continue_positions
from mr_reward.layouts import PADDING_SEGMENT

__all__ = ["QwenVLAdapter"]


class QwenVLAdapter(TextAdapter):
    """M-RoPE positions come from the backbone's own `get_rope_index`, so that they follow the release in use."""

    media_keys: tuple[str, ...] = (
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
    )
    # The vision tower of Qwen2.5-VL has layers of the same names.
    lora_targets = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

    def position_ids(
        self, backbone: nn.Module, input_ids: Tensor, segments: Tensor, offsets: Tensor, media: dict[str, Tensor]
    ) -> Tensor:
        """Positions (4, B, L) int64: the row index of text, then time, height and width.

        Four rows, not three: with three the release in use cannot tell them from packed rows.
        """
        if "image_grid_thw" in media or "video_grid_thw" in media:
            axes, _ = backbone.get_rope_index(  # type: ignore[operator]
                input_ids,
                media["mm_token_type_ids"],
                **{
                    key: media[key]
                    for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
                    if key in media
                },
                attention_mask=(segments != PADDING_SEGMENT).long(),
            )
        else:
            counted = (segments != PADDING_SEGMENT).long().cumsum(-1) - 1
            axes = counted.expand(3, -1, -1)
        axes = continue_positions(axes, segments, offsets)
        return torch.cat([axes.amax(0, keepdim=True), axes])

    def forward_arguments(self, input_ids: Tensor, media: dict[str, Tensor]) -> dict[str, Any]:
        """The vision tensors; token types are needed for positions only."""
        return {key: value for key, value in media.items() if key not in ("mm_token_type_ids", "second_per_grid_ts")}
