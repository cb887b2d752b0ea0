"""How a data set becomes ranked groups: a converter for its rows, and what is counted on the way.

A row that does not fit its schema is an error that names the field, a row without a preference raises `SkippedRow`
with a reason, a column that no one has read is told, and one that holds media or a part of the prompt is an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mr_reward.data.fields import is_empty, strip_placeholders, trim_tags
from mr_reward.data.media_files import check_readable, resolve_media
from mr_reward.data.sources import Row, RowSource
from mr_reward.errors import GroupError, MRRewardError
from mr_reward.groups import ResponseGroup, dense_ranks
from mr_reward.messages.completions import Transcript
from mr_reward.messages.prompts import Message

logger = logging.getLogger(__name__)


class SkippedRow(Exception):
    """A valid row that holds no preference; the reason is counted, it is no error."""


# Columns of media, by the kind that a group then has to have.
_MEDIA_COLUMNS = {
    "image": ("image", "images", "img", "img_path", "image_path", "image_url", "image_urls"),
    "video": ("video", "videos", "video_path"),
    "audio": ("audio", "audios"),
}
_PROMPT_COLUMNS = ("system", "system_prompt", "tools", "history", "input", "context", "question", "query")


class ReadRow(Mapping[str, Any]):
    """A row that knows which of its columns were read, and what was left out of its group."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._read: set[str] = set()
        self.left_out: Counter[str] = Counter()  # answers, by reason

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._row[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def unread(self) -> list[str]:
        """Columns that hold something and that no one has looked at."""
        return [key for key, value in self._row.items() if key not in self._read and not is_empty(value)]


def leave_out(row: Row, reason: str) -> None:
    """Count an answer that does not become a response."""
    if isinstance(row, ReadRow):
        row.left_out[reason] += 1


def alternatives(*forms: str) -> tuple[frozenset[str], ...]:
    """The columns of each form, from their names in a text."""
    return tuple(frozenset(form.split()) for form in forms)


@dataclasses.dataclass(frozen=True, slots=True)
class Converter:
    """How the rows of one data set, or of one format, become groups."""

    name: str  # on the command line; also the groups' `source`
    convert: Callable[..., ResponseGroup]  # a row -> a group
    _: dataclasses.KW_ONLY
    hub_id: str = ""  # the data set this was written against
    licence: str = "see its page"  # of the data; read it before you train on it
    config: str | None = None  # of the hub data set, if it has several
    split: str = "train"
    # What every row has, in one of the format's forms: a folder's other files are not read, and a file that has them
    # is recognised.
    columns: tuple[frozenset[str], ...] = ()
    fits: Callable[[Row], bool] | None = None  # a row with these columns is recognised if this agrees
    # A first look at all rows gives what else `convert` has to know. Most data sets need none.
    look: Callable[[Iterable[Row]], dict[str, Any]] | None = None
    # Rows that make one group -> one row, where the source has a row for each answer.
    gather: Callable[[Iterable[tuple[str, Any]]], Iterator[tuple[str, Any]]] | None = None

    def make(self, rows: Iterable[Row]) -> Callable[[Row], ResponseGroup]:
        """The function from a row to a group, for a data set with these rows."""
        known = {} if self.look is None else self.look(rows)
        return lambda row: self._checked(self.convert(row, **known), row)

    def _checked(self, group: ResponseGroup, row: Row) -> ResponseGroup:
        """The group, if nothing of the row that it needs was left unread."""
        for name in row.unread() if isinstance(row, ReadRow) else ():
            kind = next((kind for kind, names in _MEDIA_COLUMNS.items() if name in names), None)
            if kind is not None and not getattr(group, f"{kind}s", ()):
                raise GroupError(
                    f"field {name!r} holds {kind} data that {self.name} does not read; the responses are about it, so "
                    "take another format (`auto` finds it), or remove the field if they are not"
                )
            if name in _PROMPT_COLUMNS:
                raise GroupError(
                    f"field {name!r} is a part of the prompt that {self.name} does not read; put it into the prompt, "
                    "or remove the field"
                )
        return dataclasses.replace(group, source=self.name)


def graded_group(
    prompt: str | Sequence[Message],
    responses: Sequence[str],
    badness: Sequence[float],
    *,
    id: str | None,
    images: Sequence[Any] = (),
    videos: Sequence[Sequence[Any]] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    rated: bool = False,
) -> ResponseGroup:
    """A ranked group of responses with grades, smaller is better, equal grades tie.

    Empty responses are left out. Of texts that are equal but for white space around them the first stays if their
    grades agree; if they differ, the judges have contradicted themselves and all of them go. `rated`: the grades are
    numbers of the source's own, and their opposites the group's ratings.
    """
    if len(responses) != len(badness):
        raise GroupError(f"{len(responses)} responses with {len(badness)} grades, expected one each")
    grades: dict[str, set[float]] = {}
    first: dict[str, str] = {}
    for text, grade in zip(responses, badness, strict=True):
        same = text if isinstance(text, Transcript) else text.strip()  # turns are no text that reads like them
        grades.setdefault(same, set()).add(grade)
        first.setdefault(same, text)
    kept = [(first[text], min(values)) for text, values in grades.items() if text and len(values) == 1]
    if len(kept) < 2:
        raise SkippedRow("fewer than two different responses")
    if len({grade for _, grade in kept}) == 1:
        raise SkippedRow("all responses tie")
    if isinstance(prompt, str) and not strip_placeholders(prompt):
        raise GroupError("the prompt is empty, expected a question; check data set and version")
    return ResponseGroup(
        prompt=trim_tags(prompt, [kind for kind, media in (("image", images), ("video", videos)) if media]),
        responses=[text for text, _ in kept],
        rankings=dense_ranks([grade for _, grade in kept]),
        ratings=[-grade for _, grade in kept] if rated else None,
        tools=tools,
        images=images,
        videos=videos,
        id=id,
    )


@dataclasses.dataclass
class Conversion:
    """The groups of a data set, made while they are iterated over; the counts are complete at the end.

    Public pairs store the chosen response first, which a model that sees all responses would learn. So the order of
    the responses is shuffled, for each group in the same way at every run.
    """

    converter: Converter
    rows: RowSource
    _: dataclasses.KW_ONLY
    media_within: str | Path | None = None  # see `resolve_media`
    media_root: Path | None = None  # relative paths in the rows count from here; the folder of the source if None
    limit: int | None = None  # stop after so many rows
    skip_bad: bool = False  # leave a bad row out and continue; otherwise it is an error with file, line and field
    keep_order: bool = False  # do not shuffle the responses
    fetch_urls: bool = False  # download images that are http or https URLs
    num_rows: int = dataclasses.field(default=0, init=False)  # rows that were read
    # Rows without a preference, by reason.
    skipped: Counter[str] = dataclasses.field(default_factory=Counter, init=False)
    left_out: Counter[str] = dataclasses.field(default_factory=Counter, init=False)  # answers, by reason
    unread: Counter[str] = dataclasses.field(default_factory=Counter, init=False)  # columns with something in them
    # Rows that contradict the schema or whose media are missing: file and line, field, what was found and expected.
    bad_rows: list[str] = dataclasses.field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[ResponseGroup]:
        convert = self.converter.make(row for _, row in self.rows)
        self.num_rows = 0
        for counter in (self.skipped, self.left_out, self.unread):
            counter.clear()
        self.bad_rows.clear()
        for number, (place, found) in enumerate(self._rows(), start=1):
            try:
                if isinstance(found, GroupError):
                    raise found
                if not isinstance(found, Mapping):
                    raise GroupError(f"the row is {found!r:.60}, expected an object; check data set and version")
                row = ReadRow(found)
                group = self._finish(convert(row), number)
            except SkippedRow as reason:
                self.skipped[str(reason)] += 1
            except MRRewardError as error:
                if not self.skip_bad:
                    raise GroupError(
                        f"{place}: {error} (converter {self.converter.name}; --skip-bad leaves such rows out)"
                    ) from error
                self.bad_rows.append(f"{place}: {error}")
            else:
                self.unread.update(row.unread())
                self.left_out += row.left_out
                yield group
        if self.bad_rows:
            logger.warning("%s: skipped %d of %d rows as bad", self.rows.name, len(self.bad_rows), self.num_rows)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """The rows, counted, and gathered where several make a group."""

        def counted() -> Iterator[tuple[str, Any]]:
            for place, row in itertools.islice(self.rows, self.limit):
                self.num_rows += 1
                yield place, row

        return counted() if self.converter.gather is None else self.converter.gather(counted())

    def _finish(self, group: ResponseGroup, number: int) -> ResponseGroup:
        """Find the media and look whether they can be shown, name the group, shuffle the responses."""
        name = group.id if group.id is not None else f"{self.converter.name}-{number}"
        root = self.media_root or self.rows.folder
        group = resolve_media(group, root, self.media_within, fetch_urls=self.fetch_urls)
        group = dataclasses.replace(group, prompt=group.messages, id=name)
        check_readable(group)
        if self.keep_order:
            return group
        # By the row's number too: ids need not be unique.
        order = random.Random(f"{name} {number}").sample(range(group.num_responses), group.num_responses)
        return group.select(order)
