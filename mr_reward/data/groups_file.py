"""Groups in JSON Lines: ranked ones, and ones with their scores.

One object per line: `prompt` (text or chat messages), `responses`, `rankings` (1 = best, ties share a rank) and, where
there are any, `images`, `videos`, `id`, `source` and `tools` (JSON schemas). The paper's public data (`prompt,
responses, rankings, image, video`, arXiv 2604.10966) reads as it is. A group that was scored has what scoring it gave
besides: that is what `mr-reward score` and a GRPO run write, and `mr-reward inspect` reads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mr_reward.data.jsonl import read_json_lines, write_json_lines
from mr_reward.data.media_files import resolve_media, write_image
from mr_reward.errors import GroupError, MRRewardError
from mr_reward.groups import GroupScores, Message, ResponseGroup, tools_of
from mr_reward.templates.images import image_source, is_url

logger = logging.getLogger(__name__)
T = TypeVar("T")

_KEYS = {"prompt", "responses", "rankings", "image", "images", "video", "videos", "id", "source", "tools"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredGroup:
    """A group and what scoring it gave.

    Args:
        group: the group.
        result: its scores, or why there are none.
        rewards: N values that a trainer got, None for one that got none; None outside of training.
        step: the optimizer step that it was scored for, as in the trainer's log; None outside of training.

    Raises:
        GroupError: the numbers of scores, flags or rewards differ from the number of responses.

    Example:
        >>> group = ResponseGroup(prompt="2 + 2?", responses=["4", "5"])
        >>> result = GroupScores(scores=(1.7, -0.9), truncated=(False, False))
        >>> ScoredGroup(group=group, result=result).scores
        (1.7, -0.9)
    """

    group: ResponseGroup
    result: GroupScores
    rewards: tuple[float | None, ...] | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        given = {"scores": self.scores, "truncated": self.result.truncated, "rewards": self.rewards}
        for name, values in given.items():
            if values is not None and len(values) != self.group.num_responses:
                raise GroupError(
                    f"{self.group.name}: got {len(values)} {name} for {self.group.num_responses} responses, "
                    "expected one each"
                )

    @property
    def scores(self) -> tuple[float, ...] | None:
        """N scores in the order of the responses; None if the group was dropped."""
        return self.result.scores


def load_preferences(
    path: str | Path, *, skip_bad: bool = False, media_within: str | Path | None = None
) -> list[ResponseGroup]:
    """Read ranked groups.

    Args:
        path: a `.jsonl` file. `image` is one path, `images` a list of paths; `video` is one video and `videos` a list,
            a video being a folder of frames, in the order of the numbers in their names, or a list of frame paths, one
            frame a second. Relative paths count from the file's folder. Other keys are ignored.
        skip_bad: leave out lines that are no valid group; they are listed in a warning, with their number.
        media_within: folder that the files named in rows have to lie in; None for the file's and the working folder.

    Returns:
        The groups in file order.

    Raises:
        GroupError: a line that is no valid group or whose media do not exist (the message names file, line and field),
            or no group at all.

    Example:
        >>> groups = load_preferences("train.jsonl")  # doctest: +SKIP
    """
    expected = "a .jsonl file with one ranked group per line"
    return read_groups(
        path, lambda group, _: group, expected=expected, ranked=True, skip_bad=skip_bad, media_within=media_within
    )


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

    def rows() -> Iterator[dict[str, Any]]:
        empty = True
        for group in groups:
            empty = False
            if group.rankings is None:
                raise GroupError(
                    f"{group.name}: has no rankings, expected 1 = best, ties share a rank; rank it or leave it out"
                )
            yield row_from_group(group, path)
        if empty:
            raise GroupError(f"{path}: there is no group to write; check the source and what was skipped")

    return write_json_lines(path, rows())


def read_scored(path: str | Path, *, media_within: str | Path | None = None) -> list[ScoredGroup]:
    """Read groups with their scores.

    Args:
        path: a `.jsonl` file. Relative paths of media count from its folder.
        media_within: as in `load_preferences`.

    Returns:
        The groups in file order.

    Raises:
        GroupError: a line that is no group, whose media do not exist, or that was never scored; or no line at all.

    Example:
        >>> read_scored("scores.jsonl")[0].scores  # doctest: +SKIP
        (1.7, -0.9)
    """
    expected = "a .jsonl file that `mr-reward score` or a GRPO run has written"
    return read_groups(path, _scored, expected=expected, media_within=media_within)


def write_scored(groups: Iterable[ScoredGroup], path: str | Path) -> int:
    """Write groups with their scores so that `read_scored` reads equal ones. The file appears when it is whole.

    Args:
        groups: any number.
        path: the `.jsonl` file, replaced if it exists; its folder is made. For media see `save_preferences`.

    Returns:
        The number of groups.

    Raises:
        MediaError: a medium that is no image.

    Example:
        >>> write_scored(groups, "out/groups/step_00005.rank0.jsonl")  # doctest: +SKIP
        8
    """
    path = Path(path)

    def rows() -> Iterator[dict[str, Any]]:
        for one in groups:
            training = {"rewards": one.rewards, "step": one.step}
            given = {key: value for key, value in training.items() if value is not None}
            yield row_from_group(one.group, path) | one.result.to_dict() | given

    return write_json_lines(path, rows())


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
    for number, row in read_json_lines(path):
        try:
            if isinstance(row, GroupError):
                raise row
            group = group_from_row(row, f"{path.name}:{number}", ranked=ranked)
            made.append(make(resolve_media(group, path.parent, media_within), row))
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
        tools=tools_of(row.get("tools")),
    )


def row_from_group(group: ResponseGroup, path: Path) -> dict[str, Any]:
    """What `group_from_row` reads as an equal group from the file at `path`; embedded media are written beside it."""
    row = {
        "id": group.id,
        "source": group.source,
        "prompt": _prompt(group),
        "responses": list(group.responses),
        "rankings": list(group.rankings or ()),
        "images": [_stored(image, path) for image in group.images],
        "videos": [[_stored(frame, path) for frame in video] for video in group.videos],
        "tools": list(group.tools),
    }
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
    image = image_source(image)
    if is_url(image):
        return str(image)
    if not isinstance(image, (str, Path)):
        image = write_image(image, path.with_name(f"{path.stem}_media"))
    return Path(os.path.relpath(image, path.parent)).as_posix()


def _scored(group: ResponseGroup, row: Mapping[str, Any]) -> ScoredGroup:
    rewards = row.get("rewards")
    if rewards is not None and not (
        isinstance(rewards, list) and all(isinstance(reward, int | float | None) for reward in rewards)
    ):
        raise GroupError(f"{group.name}: rewards is {rewards!r:.80}, expected a list with a value for each response")
    return ScoredGroup(
        group=group,
        result=GroupScores.from_dict(row, group),
        rewards=None if rewards is None else tuple(rewards),
        step=row.get("step"),
    )
