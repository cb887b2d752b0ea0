"""Ranked groups in JSON Lines, read and written.

One object per line: `prompt` (text or chat messages), `responses`, `rankings` (1 = best, ties share a rank) and, where
there are any, `images`, `videos`, `id` and `source`. The paper's public data (`prompt, responses, rankings, image,
video`, arXiv 2604.10966) reads as it is.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mr_reward.data.media_files import resolve_media, write_image
from mr_reward.errors import GroupError, MRRewardError
from mr_reward.groups import Message, ResponseGroup

__all__ = ["json_lines", "load_preferences", "save_preferences"]

logger = logging.getLogger(__name__)

_REQUIRED = ("prompt", "responses", "rankings")
_KEYS = {*_REQUIRED, "image", "images", "video", "videos", "id", "source"}


def load_preferences(path: str | Path, *, skip_bad: bool = False) -> list[ResponseGroup]:
    """Read ranked groups.

    Args:
        path: a `.jsonl` file. `image` is one path, `images` a list of paths; `video` is one video and `videos` a list,
            a video being a folder of frames, in the order of the numbers in their names, or a list of frame paths, one
            frame a second. Relative paths count from the file's folder. Other keys are ignored.
        skip_bad: leave out lines that are no valid group; they are listed in a warning, with their number.

    Returns:
        The groups in file order.

    Raises:
        GroupError: a line that is no valid group or whose media do not exist (the message names file, line and field),
            or no group at all.

    Example:
        >>> groups = load_preferences("train.jsonl")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise GroupError(f"{path}: is not a file; give a .jsonl file with one ranked group per line")
    groups, bad = [], []
    for number, row in json_lines(path):
        try:
            if isinstance(row, GroupError):
                raise row
            groups.append(resolve_media(_group(row, f"{path.name}:{number}"), path.parent))
        except MRRewardError as error:
            if not skip_bad:
                raise GroupError(f"{path}, line {number}: {error}") from error
            bad.append(f"line {number}: {error}")
    if bad:
        logger.warning("%s: skipped %d bad lines\n%s", path, len(bad), "\n".join(bad))
    if not groups:
        raise GroupError(f"{path}: holds no group; give a .jsonl file with one ranked group per line")
    return groups


def save_preferences(groups: Iterable[ResponseGroup], path: str | Path) -> int:
    """Write ranked groups so that `load_preferences` reads equal ones.

    Media that are paths stay where they are, relative to the file's folder. Embedded ones (bytes, PIL images) are
    written beside the file, to `<name>_media/<sha256>.<type>`, so that a picture that many groups share is there once.
    The file appears when it is whole.

    Args:
        groups: ranked groups; an iterator is read one group at a time.
        path: the `.jsonl` file, replaced if it exists.

    Returns:
        The number of groups.

    Raises:
        GroupError: a group without rankings, or no group at all.
        MediaError: a medium that is no image.

    Example:
        >>> save_preferences(groups, "train.jsonl")  # doctest: +SKIP
        1234
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as lines:
            for group in groups:
                # ASCII: a lone surrogate in a response would be no UTF-8.
                lines.write(json.dumps(_row(group, path)) + "\n")
                count += 1
        if not count:
            raise GroupError(f"{path}: there is no group to write; check the source and what was skipped")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a JSON Lines file with their numbers from 1 on; blank ones are left out.

    Args:
        path: the file.

    Yields:
        Number and value; the value is a `GroupError` for a line that is no JSON.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:  # no JSON, or no UTF-8
                    yield number, GroupError(f"the line is no JSON ({error})")


def _group(row: Any, fallback_id: str) -> ResponseGroup:
    """One object of the file. Its media are not looked at yet; a video given as a folder is a list of that path."""
    if not isinstance(row, Mapping):
        raise GroupError(f"the row is {type(row).__name__}, expected an object with {', '.join(_REQUIRED)}")
    missing = [key for key in _REQUIRED if row.get(key) is None]
    if missing:
        raise GroupError(f"keys {missing} are missing, found {sorted(row)}; known keys are {sorted(_KEYS)}")
    for key in ("id", "source"):
        if isinstance(row.get(key), (Mapping, list)):
            raise GroupError(f"{key} is {row[key]!r:.60}, expected a text")
    images, videos = _one_or_many(row, "image"), _one_or_many(row, "video")
    return ResponseGroup(
        prompt=row["prompt"],
        responses=row["responses"],
        rankings=row["rankings"],
        images=images,
        videos=[[video] if isinstance(video, str) else video for video in videos],
        id=str(row["id"]) if row.get("id") is not None else fallback_id,
        source=str(row["source"]) if row.get("source") is not None else None,
    )


def _one_or_many(row: Mapping[str, Any], key: str) -> list[Any]:
    """The media under `image` or `images`; the same for videos."""
    one, many = row.get(key), row.get(f"{key}s")
    if one and many:
        raise GroupError(f"{key} and {key}s are both given; keep one of them")
    if many and not isinstance(many, list):
        raise GroupError(f"{key}s is {type(many).__name__}, expected a list; a single one goes under {key!r}")
    return [one] if one else many or []


def _row(group: ResponseGroup, path: Path) -> dict[str, Any]:
    if group.rankings is None:
        raise GroupError(
            f"{group.name}: has no rankings, expected 1 = best, ties share a rank; rank it or leave it out"
        )
    row: dict[str, Any] = {"id": group.id, "source": group.source, "prompt": _prompt(group)}
    row |= {"responses": list(group.responses), "rankings": list(group.rankings)}
    row["images"] = [_stored(image, path) for image in group.images]
    row["videos"] = [[_stored(frame, path) for frame in video] for video in group.videos]
    return {key: value for key, value in row.items() if value not in (None, [])}


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
