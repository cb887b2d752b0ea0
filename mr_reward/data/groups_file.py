"""A group as an object of a JSON Lines file, both ways, ranked or not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mr_reward.data.jsonl import read_json_lines
from mr_reward.data.media_files import resolve_media, write_image
from mr_reward.errors import GroupError, MRRewardError
from mr_reward.groups import Message, ResponseGroup

__all__ = ["group_from_row", "read_groups", "row_from_group"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_KEYS = {"prompt", "responses", "rankings", "image", "images", "video", "videos", "id", "source"}


def read_groups(
    path: str | Path,
    make: Callable[[ResponseGroup, Mapping[str, Any]], T],
    *,
    expected: str,
    ranked: bool = False,
    skip_bad: bool = False,
    media_within: str | Path | None = None,
) -> list[T]:
    """What `make` gives for each group of a file and its row. An error names file, line and what is `expected`."""
    path = Path(path)
    if not path.is_file():
        raise GroupError(f"{path}: is not a file; give {expected}")
    made, bad = [], []
    within = None if media_within is None else Path(media_within)
    for number, row in read_json_lines(path):
        try:
            if isinstance(row, GroupError):
                raise row
            group = group_from_row(row, f"{path.name}:{number}", ranked=ranked)
            made.append(make(resolve_media(group, path.parent, within), row))
        except MRRewardError as error:
            if not skip_bad:
                raise GroupError(f"{path}, line {number}: {error}") from error
            bad.append(f"line {number}: {error}")
    if bad:
        logger.warning("%s: skipped %d bad lines\n%s", path, len(bad), "\n".join(bad))
    if not made:
        raise GroupError(f"{path}: holds no group; give {expected}")
    return made


def group_from_row(row: Any, fallback_id: str, *, ranked: bool) -> ResponseGroup:
    """The group of an object of a file. Its media are not looked at yet: a folder of frames is a list of its path."""
    required = ("prompt", "responses", "rankings") if ranked else ("prompt", "responses")
    if not isinstance(row, Mapping):
        raise GroupError(f"the row is {type(row).__name__}, expected an object with {', '.join(required)}")
    missing = [key for key in required if row.get(key) is None]
    if missing:
        raise GroupError(f"keys {missing} are missing, found {sorted(row)}; known keys are {sorted(_KEYS)}")
    for key in ("id", "source"):
        if isinstance(row.get(key), (Mapping, list)):
            raise GroupError(f"{key} is {row[key]!r:.60}, expected a text")
    images, videos = _one_or_many(row, "image"), _one_or_many(row, "video")
    return ResponseGroup(
        prompt=row["prompt"],
        responses=row["responses"],
        rankings=row.get("rankings"),
        images=images,
        videos=[[video] if isinstance(video, str) else video for video in videos],
        id=str(row["id"]) if row.get("id") is not None else fallback_id,
        source=str(row["source"]) if row.get("source") is not None else None,
    )


def row_from_group(group: ResponseGroup, path: Path) -> dict[str, Any]:
    """What `group_from_row` reads as an equal group from the file at `path`, which need not exist yet.

    Media that are paths are named relative to the file's folder; embedded ones are written beside the file, to
    `<name>_media/<sha256>.<type>`.
    """
    row: dict[str, Any] = {"id": group.id, "source": group.source, "prompt": _prompt(group)}
    row |= {"responses": list(group.responses), "rankings": None if group.rankings is None else list(group.rankings)}
    row["images"] = [_stored(image, path) for image in group.images]
    row["videos"] = [[_stored(frame, path) for frame in video] for video in group.videos]
    return {key: value for key, value in row.items() if value not in (None, [])}


def _one_or_many(row: Mapping[str, Any], key: str) -> list[Any]:
    """The media under `image` or `images`; the same for videos."""
    one, many = row.get(key), row.get(f"{key}s")
    if one and many:
        raise GroupError(f"{key} and {key}s are both given; keep one of them")
    if many and not isinstance(many, list):
        raise GroupError(f"{key}s is {type(many).__name__}, expected a list; a single one goes under {key!r}")
    return [one] if one else many or []


def _prompt(group: ResponseGroup) -> str | list[Message]:
    """The prompt in its shortest form that reads as the same messages."""
    messages = group.messages
    text = [block["text"] for block in messages[0]["content"] if block["type"] == "text"]
    if len(messages) == len(text) == 1:
        short = ResponseGroup(prompt=text[0], responses=group.responses, images=group.images, videos=group.videos)
        if short.messages == messages:
            return text[0]
    return [
        {**message, "content": message["content"][0]["text"]}
        if [block["type"] for block in message["content"]] == ["text"]
        else message
        for message in messages
    ]


def _stored(image: Any, path: Path) -> str:
    """The path of an image as it stands in the file at `path`."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, (str, Path)):
        image = write_image(image, path.with_name(f"{path.stem}_media"))
    return Path(os.path.relpath(image, path.parent)).as_posix()
