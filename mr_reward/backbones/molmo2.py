"""Molmo2: image and frame tokens that see each other in both directions, and media tensors that hold indices."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mr_reward.backbones.base import BackboneAdapter, different_pictures
from mr_reward.errors import MediaError

_MEDIA_TOKEN_TYPE = 1  # of image and of frame tokens alike, their start, end and column tokens included


class Molmo2Adapter(BackboneAdapter):
    """One position per token as in text; all media tokens of a row are one block, several images and frames included.

    The forward takes either images or videos, for the whole batch. A video is to it a number of images that have no
    high-resolution crops, and so a batch is handed over as images.
    """

    media_keys: tuple[str, ...] = (
        "pixel_values",
        "image_token_pooling",
        "image_grids",
        "image_num_crops",
        "pixel_values_videos",
        "video_token_pooling",
        "video_grids",
    )
    # The vision tower and the adapter between it and the language part have layers of the same names.
    lora_targets = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    media_blocks = True

    def check_media(self, media: dict[str, Tensor], name: str) -> None:
        """Refuse images beside a video, of which Molmo2's forward takes no row with both, and a second video."""
        if "pixel_values" in media and "pixel_values_videos" in media:
            raise MediaError(
                f"{name}: images and a video in one prompt, Molmo2 reads either; remove the images or the video, or "
                "use another backbone"
            )
        videos = len(media.get("video_grids", ()))
        if videos > 1:
            raise MediaError(
                f"{name}: {videos} videos in one prompt, Molmo2 reads one; remove the others, or use another backbone"
            )

    def merge_media(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Images and videos of all rows as images, in the order of the rows, in which their tokens are filled.

        What the processor makes of each prompt (C crops or frames, V patches of each, T media tokens, W patches that a
        token pools):

        - `pixel_values` or `pixel_values_videos` (C, V, pixels of a patch)
        - `image_token_pooling` or `video_token_pooling` (T, W) int64, indices into the C * V patches of this
          prompt, -1 for none; W differs between images and videos
        - `image_grids` (images, 4), rows and columns of the low- and of the high-resolution view in tokens, or
          `video_grids` (videos, 3), frames, rows and columns
        - `image_num_crops` (images,), of videos the frames

        What comes out: `pixel_values` (each picture once), `image_token_pooling` (with indices into the patches of the
        batch; the tokens of a picture that is shown again point at the patches that are there) and `image_grids`.
        """
        rows = [_as_images(row) for row in rows if row]
        if not rows:
            return {}
        width = max(row["image_token_pooling"].shape[1] for row in rows)
        poolings, num_patches = [], 0
        for row in rows:
            pooling = row["image_token_pooling"]
            pooling = torch.where(pooling >= 0, pooling + num_patches, pooling)
            poolings.append(F.pad(pooling, (0, width - pooling.shape[1]), value=-1))
            num_patches += row["pixel_values"].shape[:2].numel()
        grids = torch.cat([row["image_grids"] for row in rows])
        pictures = [one for row in rows for one in row["pixel_values"].split(row["image_num_crops"].tolist())]
        different, index = different_pictures(pictures, grids)
        return {
            "pixel_values": torch.cat(different),
            "image_token_pooling": _point_at(torch.cat(poolings), different, index),
            "image_grids": grids,
        }

    def split_media(self, media: dict[str, Tensor], num_images: Sequence[int]) -> list[dict[str, Tensor]]:
        """Crops, grids and tokens of a prompt's images lie side by side; indices count from its own first patch."""
        grids = media["image_grids"].split(list(num_images))
        crops = media["image_num_crops"].split(list(num_images))
        pixels = media["pixel_values"].split([int(count.sum()) for count in crops])
        # A token of the low-resolution view for each cell of its grid, and of the high-resolution one.
        tokens = [int((grid[:, :2].prod(-1) + grid[:, 2:].prod(-1)).sum()) for grid in grids]
        poolings = media["image_token_pooling"].split(tokens)
        starts = [0, *accumulate(len(own) * own.shape[1] for own in pixels)][:-1]
        return [
            {
                "pixel_values": own,
                "image_token_pooling": torch.where(pooling >= 0, pooling - start, pooling),
                "image_grids": grid,
                "image_num_crops": count,
            }
            if len(grid)
            else {}
            for own, pooling, start, grid, count in zip(pixels, poolings, starts, grids, crops, strict=True)
        ]

    def media_block_ids(self, media: dict[str, Tensor]) -> Tensor | None:
        """All media tokens of a row are block 0, whatever image or frame they belong to."""
        if "mm_token_type_ids" not in media:
            return None
        return (media["mm_token_type_ids"] == _MEDIA_TOKEN_TYPE).long() - 1

    def forward_arguments(self, backbone: nn.Module, input_ids: Tensor, media: dict[str, Tensor]) -> dict[str, Any]:
        """The media tensors, and token types even for text alone: Molmo2 insists on them in training.

        With the padding mask of `causal` it builds the block of media tokens from the types; a 4-D mask it passes on.
        """
        return {"mm_token_type_ids": torch.zeros_like(input_ids), **media}


def _as_images(media: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name a video's tensors as those of images, as Molmo2's own `get_video_features` does."""
    if "video_grids" not in media:
        return media
    frames, rows, columns = media["video_grids"].unbind(-1)
    none = torch.zeros_like(frames)
    return {
        "pixel_values": media["pixel_values_videos"],
        "image_token_pooling": media["video_token_pooling"],
        "image_grids": torch.stack([frames * rows, columns, none, none], -1),
        "image_num_crops": frames,
    }


def _point_at(pooling: Tensor, different: Sequence[Tensor], index: Sequence[int]) -> Tensor:
    """Indices into the patches of all pictures -> into those of the different ones."""
    starts = [0, *accumulate(map(len, different))]
    crops = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in index])
    num_patches = different[0].shape[1]
    moved = crops[pooling // num_patches] * num_patches + pooling % num_patches
    return torch.where(pooling >= 0, moved.to(pooling.dtype), pooling)
