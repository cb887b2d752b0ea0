"""A group as an object of a JSON Lines file, both ways."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mr_reward.data.media_files import write_image
from mr_reward.errors import GroupError
from mr_reward.groups import Message, ResponseGroup

__all__ = ["group_from_row", "row_from_group"]

_KEYS = {"prompt", "responses", "rankings", "image", "images", "video", "videos", "id", "source"}


def group_from_row(row: Any, fallback_id: str, *, ranked: bool) -> ResponseGroup:
    """The group of one object of a file. Its media are not looked at yet.

    Args:
        row: the object. A video that is given as a folder becomes a list of that path.
        fallback_id: the group's id if the row has none.
        ranked: whether rankings have to be there.

    Returns:
        The group.

    Raises:
        GroupError: a key is missing or has a value of another kind.

    Example:
        >>> group_from_row({"prompt": "2 + 2?", "responses": ["4"]}, "line 1", ranked=False).id
        'line 1'
    """
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
    """A group as an object of a file.

    Args:
        group: media that are paths are named relative to the file's folder; embedded ones are written beside the file,
            to `<name>_media/<sha256>.<type>`.
        path: the file, which need not exist yet.

    Returns:
        What `group_from_row` reads as an equal group.

    Raises:
        MediaError: a medium that is no image.

    Example:
        >>> row_from_group(ResponseGroup(prompt="2 + 2?", responses=["4"]), Path("out.jsonl"))
        {'prompt': '2 + 2?', 'responses': ['4']}
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
