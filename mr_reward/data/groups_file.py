"""Groups in JSON Lines: ranked ones, and ones with their scores.

One object per line: `prompt` (text or chat messages), `responses`, `rankings` (1 = best, ties share a rank) and, where
there are any, `images`, `videos`, `id`, `source`, `tools` (JSON schemas) and `ratings` (the source's own numbers). The
paper's public data (`prompt, responses, rankings, image, video`, arXiv 2604.10966) reads as it is. A group that was
scored has what scoring it gave besides: that is what `mr-reward score` and a GRPO run write, and `mr-reward inspect`
reads.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mr_reward.data.jsonl import write_json_lines
from mr_reward.data.media_files import resolve_media, write_image
from mr_reward.data.sources import RowSource, dataset_rows, is_hub_id, read_rows
from mr_reward.errors import ConfigurationError, GroupError, MRRewardError, shown
from mr_reward.groups import GroupScores, ResponseGroup, dense_ranks
from mr_reward.hub import near_name
from mr_reward.messages.completions import Transcript
from mr_reward.messages.prompts import Message, short_messages, tools_of
from mr_reward.templates.images import image_source, is_url

if TYPE_CHECKING:
    from datasets import Dataset

    from mr_reward.data.conversion import Converter

logger = logging.getLogger(__name__)
T = TypeVar("T")

_KEYS = {"prompt", "responses", "rankings", "image", "images", "video", "videos", "id", "source", "tools", "ratings"}


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
    path: str | Path | Dataset,
    *,
    skip_bad: bool = False,
    media_within: str | Path | None = None,
    fetch_urls: bool = False,
) -> list[ResponseGroup]:
    """Read ranked groups. Rows of another format whose fields leave no doubt are converted, see docs/data-formats.md.

    Args:
        path: a `.jsonl`, `.jsonl.gz`, `.json` or `.parquet` file, a folder of them or one that `save_to_disk` wrote, a
            hub id (its split `train`), or a `datasets.Dataset`. Rows without `rankings` are ranked by their `scores`.
            `image` is one path, `images` a list of paths; `video` is one video and `videos` a list, a video being a
            folder of frames, in the order of the numbers in their names, or a list of frame paths, one frame a second.
            Relative paths count from the file's folder. Other keys are ignored.
        skip_bad: leave out lines that are no valid group; they are listed in a warning, with their number.
        media_within: folder that the files named in rows have to lie in; None for the file's and the working folder.
        fetch_urls: download images that are http or https URLs; the rows then decide what this machine asks for.

    Returns:
        The groups in file order.

    Raises:
        GroupError: a line that is no valid group or whose media do not exist (the message names file, line and field),
            or no group at all.

    Example:
        >>> groups = load_preferences("train.jsonl")  # doctest: +SKIP
    """
    expected = "a file with one ranked group per line or row, see docs/data-formats.md"
    options: dict[str, Any] = {"skip_bad": skip_bad, "media_within": media_within, "fetch_urls": fetch_urls}
    if (rows := _open(path)) is not None and (converter := _other_format(rows)) is not None:
        return _converted(converter, rows, **options)
    return read_groups(path, lambda group, _: group, expected=expected, ranked=True, **options)


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
    path: str | Path | Dataset,
    make: Callable[[ResponseGroup, Mapping[str, Any]], T],
    *,
    expected: str,
    ranked: bool = False,
    skip_bad: bool = False,
    media_within: str | Path | None = None,
    fetch_urls: bool = False,
) -> list[T]:
    """What `make` gives for each group of a file and its row. An error names file, line and what is `expected`."""
    rows = _open(path)
    if rows is None:
        raise GroupError(f"{path}: is not a file; give {expected}{near_name(Path(str(path)))}")
    made, bad = [], []
    for place, row in rows:
        file, _, number = place.rpartition(", ")
        try:
            if isinstance(row, GroupError):
                raise row
            group = group_from_row(row, f"{Path(file).name}:{number.partition(' ')[2]}", ranked=ranked)
            made.append(make(resolve_media(group, rows.folder, media_within, fetch_urls=fetch_urls), row))
        except MRRewardError as error:
            if not skip_bad:
                raise GroupError(f"{place}: {error}") from error
            bad.append(f"{number}: {error}")
    if bad:
        logger.warning("%s: skipped %d bad lines\n%s", rows.name, len(bad), "\n".join(bad))
    if not made:
        raise GroupError(f"{rows.name}: holds no group; give {expected}")
    return made


def _open(source: str | Path | Dataset) -> RowSource | None:
    """The rows, or None where there is no such file or folder and the name is no hub id."""
    if not isinstance(source, str | Path):
        return dataset_rows(source, "the data set", Path())
    if not os.path.exists(source) and not is_hub_id(source):
        return None
    return read_rows(source)


def _other_format(rows: RowSource) -> Converter | None:
    """The format of rows that are no groups, if their fields leave no doubt."""
    from mr_reward.data.converters import recognise

    first = next((row for _, row in rows if isinstance(row, Mapping)), {})
    if "responses" in first:
        return None
    try:
        return recognise(rows)
    except ConfigurationError:
        return None  # the rows say themselves what they lack


def _converted(converter: Converter, rows: RowSource, **options: Any) -> list[ResponseGroup]:
    from mr_reward.data.conversion import Conversion

    groups = Conversion(converter, rows, keep_order=True, **options)
    made = list(groups)
    left = {**groups.skipped, **groups.left_out, "bad": len(groups.bad_rows)}
    logger.warning(
        "%s: %d rows in the format %s became %d groups; left out: %s; fields not read: %s",
        rows.name,
        groups.num_rows,
        converter.name,
        len(made),
        ", ".join(f"{count} {reason}" for reason, count in left.items() if count) or "nothing",
        ", ".join(sorted(groups.unread)) or "none",
    )
    if not made:
        raise GroupError(f"{rows.name}: holds no group with a preference; see what was left out")
    return made


def group_from_row(row: Any, fallback_id: str, *, ranked: bool) -> ResponseGroup:
    """The group of an object of a file. Its media are not looked at yet: a folder of frames is a list of its path."""
    required = ("prompt", "responses", "rankings") if ranked else ("prompt", "responses")
    if not isinstance(row, Mapping):
        raise GroupError(f"the row is {type(row).__name__}, expected an object with {', '.join(required)}")
    if ranked and row.get("rankings") is None and row.get("scores") is not None:
        row = {"ratings": row["scores"], **row, "rankings": _by_scores(row["scores"])}
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
        ratings=row.get("ratings"),
    )


def _by_scores(scores: Any) -> list[int]:
    """Ranks by scores, larger is better, equal ones tie."""
    numbers = isinstance(scores, list) and all(
        isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score) for score in scores
    )
    if not numbers:
        raise GroupError(f"scores is {shown(scores)}, expected a list of numbers, as there are no rankings")
    return list(dense_ranks([-score for score in scores]))


def row_from_group(group: ResponseGroup, path: Path) -> dict[str, Any]:
    """What `group_from_row` reads as an equal group from the file at `path`; embedded media are written beside it."""
    row = {
        "id": group.id,
        "source": group.source,
        "prompt": _prompt(group),
        "responses": [
            short_messages(response.turns) if isinstance(response, Transcript) else response
            for response in group.responses
        ],
        "rankings": list(group.rankings or ()),
        "images": [_stored(image, path) for image in group.images],
        "videos": [[_stored(frame, path) for frame in video] for video in group.videos],
        "tools": list(group.tools),
        "ratings": None if group.ratings is None else list(group.ratings),
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
    return short_messages(messages)


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
