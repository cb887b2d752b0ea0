"""Qwen2.5-VL and Qwen3-VL: multimodal rotary positions (time, height, width), images and videos."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mr_reward.backbones.base import BackboneAdapter, concatenate_media, continue_positions, different_pictures
from mr_reward.layouts import PADDING_SEGMENT

# kind -> names of its pixels, of its grids, and of what says which picture each of the grids belongs to
_KINDS = {
    "image": ("pixel_values", "image_grid_thw", "image_index"),
    "video": ("pixel_values_videos", "video_grid_thw", "video_index"),
}


class QwenVLAdapter(BackboneAdapter):
    """M-RoPE positions come from the backbone's own `get_rope_index`, so that they follow the release in use."""

    media_keys: tuple[str, ...] = (
        *_KINDS["image"],
        *_KINDS["video"],
        "second_per_grid_ts",
    )
    # The vision tower of Qwen2.5-VL has layers of the same names.
    lora_targets = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

    def merge_media(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Concatenated by name, the pixels of each picture once.

        `pixel_values` and `pixel_values_videos` hold the patches of one picture after the other. Where a picture is
        shown more than once, `image_index` (images,) int64 or `video_index` (videos,) int64 says which of the pictures
        in the pixels each one is. The grids are those of all images and videos, in the order of the rows: positions
        follow from them.
        """
        kept: dict[str, Tensor] = {}
        for pixels, grids, index in _KINDS.values():
            shown = [row for row in rows if pixels in row]
            if not shown:
                continue
            pictures = [picture for row in shown for picture in row[pixels].split(row[grids].prod(-1).tolist())]
            different, numbers = different_pictures(pictures, torch.cat([row[grids] for row in shown]))
            kept[pixels] = torch.cat(different)
            if len(different) < len(numbers):
                kept[index] = torch.tensor(numbers)
        others = [{name: tensor for name, tensor in row.items() if name not in kept} for row in rows]
        return {**concatenate_media(others), **kept}

    def split_media(self, media: dict[str, Tensor], num_images: Sequence[int]) -> list[dict[str, Tensor]]:
        """The patches of a prompt's images lie side by side, as many as their grids have cells."""
        grids = media["image_grid_thw"].split(list(num_images))
        patches = media["pixel_values"].split([int(grid.prod(-1).sum()) for grid in grids])
        return [
            {"pixel_values": pixels, "image_grid_thw": grid} if len(grid) else {}
            for pixels, grid in zip(patches, grids, strict=True)
        ]

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

    def forward_arguments(self, backbone: nn.Module, input_ids: Tensor, media: dict[str, Tensor]) -> dict[str, Any]:
        """The vision tensors, or what the vision tower makes of them if a picture is shown more than once.

        Token types are needed for positions only.
        """
        if "image_index" in media or "video_index" in media:
            # The forward takes no pixels beside features, so the other kind is encoded here as well.
            features = {kind: _encode(backbone, kind, media) for kind, (name, *_) in _KINDS.items() if name in media}
            return {"mm_encoder_outputs": features}
        return {key: value for key, value in media.items() if key not in ("mm_token_type_ids", "second_per_grid_ts")}


def _encode(backbone: nn.Module, kind: str, media: dict[str, Tensor]) -> Any:
    """The features of all images or videos as the backbone's own method gives them, from one copy of each picture."""
    pixels, all_grids, index = _KINDS[kind]
    grids = media[all_grids]
    numbers = media[index].tolist() if index in media else list(range(len(grids)))
    first = [numbers.index(i) for i in range(max(numbers) + 1)]
    output = getattr(backbone, f"get_{kind}_features")(media[pixels], grids[first], return_dict=True)
    output.pooler_output = [output.pooler_output[i] for i in numbers]
    if "deepstack_features" in output:  # Qwen3-VL: features for several layers
        output.deepstack_features = [[layer[i] for i in numbers] for layer in output.deepstack_features]
    return output
