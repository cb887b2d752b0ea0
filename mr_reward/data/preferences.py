"""Ranked groups from JSON Lines: one object per line with `prompt`, `responses`, `rankings` and optional media."""

import json
from pathlib import Path
from typing import Any

from mr_reward.errors import GroupError, MRRewardError
from mr_reward.groups import ResponseGroup

__all__ = ["load_preferences"]

_KEYS = {"prompt", "responses", "rankings", "image", "images", "video", "id"}


def load_preferences(path: str | Path) -> list[ResponseGroup]:
    """Read ranked groups, in the form of the paper's public data (`prompt, responses, rankings, image, video`).

    Args:
        path: a `.jsonl` file. `image` is one path, `images` a list of paths, `video` a list of frame paths; relative
            paths count from the file's folder. Other keys are ignored.

    Returns:
        The groups in file order.

    Raises:
        GroupError: a line that is no valid group; the message names file and line.

    Example:
        >>> groups = load_preferences("train.jsonl")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise GroupError(f"{path}: is not a file; give a .jsonl file with one ranked group per line")
    groups = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    groups.append(_read_group(json.loads(line), path, number))
                except (json.JSONDecodeError, MRRewardError) as error:
                    raise GroupError(f"{path}, line {number}: {error}") from error
    if not groups:
        raise GroupError(f"{path}: holds no group; give a .jsonl file with one ranked group per line")
    return groups


def _read_group(row: Any, path: Path, number: int) -> ResponseGroup:
    missing = {"prompt", "responses", "rankings"} - set(row if isinstance(row, dict) else ())
    if missing:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise GroupError(f"keys {sorted(missing)} are missing, found {found}; known keys are {sorted(_KEYS)}")
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    frames = row.get("video") or []
    return ResponseGroup(
        prompt=row["prompt"],
        responses=row["responses"],
        rankings=row["rankings"],
        images=[path.parent / image for image in images],
        videos=[[path.parent / frame for frame in frames]] if frames else [],
        id=str(row.get("id", f"{path.name}:{number}")),
    )
