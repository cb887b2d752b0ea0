"""Ranked groups in JSON Lines: one object per line with `prompt`, `responses`, `rankings` and optional media.

It is the form of the paper's public data (`prompt, responses, rankings, image, video`), with several media per row.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from mr_reward.errors import GroupError, MediaError, MRRewardError
from mr_reward.groups import ResponseGroup
from mr_reward.media import load_image

__all__ = ["load_preferences", "resolve_media", "save_preferences"]

logger = logging.getLogger(__name__)

_KEYS = {"prompt", "responses", "rankings", "image", "images", "video", "videos", "id", "source"}
_FRAME_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}


def load_preferences(path: str | Path, *, skip_bad: bool = False) -> list[ResponseGroup]:
    """Read ranked groups.

    Args:
        path: a `.jsonl` file. `image` is one path, `images` a list of paths; `video` is one video and `videos` a list,
            a video being a folder of frames, in the order of their names, or a list of frame paths. Relative paths
            count from the file's folder. Other keys are ignored.
        skip_bad: leave out lines that are no valid group; they are listed in a warning, with their number.

    Returns:
        The groups in file order.

    Raises:
        GroupError: a line that is no valid group (the message names file and line), or no group at all.

    Example:
        >>> groups = load_preferences("train.jsonl")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise GroupError(f"{path}: is not a file; give a .jsonl file with one ranked group per line")
    groups, bad = [], []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                groups.append(_read_group(json.loads(line), path, number))
            except (json.JSONDecodeError, MRRewardError) as error:
                if not skip_bad:
                    raise GroupError(f"{path}, line {number}: {error}") from error
                bad.append(f"line {number}: {error}")
    if bad:
        logger.warning("%s: skipped %d bad lines\n%s", path, len(bad), "\n".join(bad))
    if not groups:
        raise GroupError(f"{path}: holds no group; give a .jsonl file with one ranked group per line")
    return groups


def save_preferences(groups: Iterable[ResponseGroup], path: str | Path) -> int:
    """Write groups so that `load_preferences` reads the same ones.

    Images in memory go to a folder beside the file, named by their content, so that a picture that many groups share
    is written once. The file appears when it is whole.

    Args:
        groups: groups.
        path: of the `.jsonl` file.

    Returns:
        The number of groups written.

    Raises:
        MediaError: a medium that is no image, path or bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as lines:
        for group in groups:
            row: dict[str, Any] = {
                "id": group.id,
                "source": group.source,
                "prompt": group.messages,
                "responses": list(group.responses),
                "rankings": None if group.rankings is None else list(group.rankings),
                "images": [_stored(image, path) for image in group.images],
                "videos": [[_stored(frame, path) for frame in video] for video in group.videos],
            }
            lines.write(json.dumps({key: value for key, value in row.items() if value}) + "\n")
            count += 1
    partial.replace(path)
    return count


def resolve_media(group: ResponseGroup, folder: Path) -> ResponseGroup:
    """Let relative paths count from a folder, and read a video that is a folder of frames.

    Args:
        group: a group.
        folder: where its media are.

    Returns:
        A group whose media are absolute or as they were in memory.

    Raises:
        MediaError: a video that is neither a folder of frames nor a list of them.
    """
    return replace(
        group,
        prompt=group.messages,
        images=[folder / image if isinstance(image, (str, Path)) else image for image in group.images],
        videos=[_frames(video, folder) for video in group.videos],
    )


def _read_group(row: Any, path: Path, number: int) -> ResponseGroup:
    missing = {"prompt", "responses", "rankings"} - set(row if isinstance(row, dict) else ())
    if missing:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise GroupError(f"keys {sorted(missing)} are missing, found {found}; known keys are {sorted(_KEYS)}")
    videos = row.get("videos") or ([row["video"]] if row.get("video") else [])
    group = ResponseGroup(
        prompt=row["prompt"],
        responses=row["responses"],
        rankings=row["rankings"],
        images=row.get("images") or ([row["image"]] if row.get("image") else []),
        videos=[[video] if isinstance(video, str) else video for video in videos],
        id=str(row.get("id", f"{path.name}:{number}")),
        source=row.get("source"),
    )
    return resolve_media(group, path.parent)


def _frames(video: Sequence[Any], folder: Path) -> list[Any]:
    """The frames of one video; a single path names a folder or the only frame."""
    frames = [folder / frame if isinstance(frame, (str, Path)) else frame for frame in video]
    if len(frames) != 1 or not isinstance(frames[0], Path):
        return frames
    only = frames[0]
    if only.is_dir():
        found = sorted(path for path in only.iterdir() if path.suffix.lower() in _FRAME_SUFFIXES)
        if not found:
            raise MediaError(f"video {only}: the folder holds no image; give a folder of frames")
        return list(found)
    if only.suffix.lower() not in _FRAME_SUFFIXES:
        raise MediaError(
            f"video {only}: expected a folder of frames or a list of frame files; extract them first, for example "
            f"with ffmpeg -i {only.name} -vf fps=1 {only.stem}/%04d.png"
        )
    return frames


def _stored(medium: Any, path: Path) -> str:
    """The path of a medium for the file, written beside it if it is in memory."""
    if isinstance(medium, (str, Path)):
        medium = Path(medium)
        return str(medium.relative_to(path.parent) if medium.is_relative_to(path.parent) else medium.absolute())
    image = load_image(medium)  # refuses what no image can be read from
    if isinstance(medium, bytes):
        with Image.open(io.BytesIO(medium)) as opened:
            content, suffix = medium, f".{(opened.format or 'img').lower()}"
    else:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        content, suffix = buffer.getvalue(), ".png"
    folder = path.with_name(path.stem + "_media")
    folder.mkdir(exist_ok=True)
    stored = folder / (hashlib.sha256(content).hexdigest()[:32] + suffix)
    if not stored.is_file():
        stored.write_bytes(content)
    return f"{folder.name}/{stored.name}"
