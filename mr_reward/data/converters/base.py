"""What every converter uses: reading fields with errors that name them, and making a group of N graded responses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup, dense_ranks

__all__ = [
    "Convert",
    "Converter",
    "Row",
    "SkippedRow",
    "exchange",
    "field",
    "graded_group",
    "image_field",
    "messages_field",
    "numbers_field",
    "row_id",
    "strip_placeholders",
]

Row = Mapping[str, Any]
Convert = Callable[[Row], ResponseGroup]

_PLACEHOLDERS = re.compile(r"[ \t]*<(?:image|video)>[ \t]*")


class SkippedRow(Exception):
    """A valid row that holds no preference; the reason is counted, it is no error."""


@dataclass(frozen=True, slots=True)
class Converter:
    """How one public data set becomes groups.

    Args:
        name: on the command line; also the groups' `source`.
        hub_id: the data set this was written against.
        licence: of the data, as its page states it; read it before you train on it.
        make: a first look at all rows -> the function from a row to a group. Most data sets need no first look.
        config: the configuration of the hub data set to read, if it has several.
        split: its split.
    """

    name: str
    hub_id: str
    licence: str
    make: Callable[[Iterable[Row]], Convert]
    config: str | None = None
    split: str = "train"


def field(row: Any, name: str, kind: type | tuple[type, ...], *, at: str = "") -> Any:
    """A field of the published schema.

    Args:
        row: the row, or an object inside it.
        name: of the field.
        kind: type or types that it must have; a bool is no int.
        at: where the object stands in the row, such as `answers[2]`, for the message.

    Returns:
        Its value.

    Raises:
        GroupError: it is missing or of another type; the message names it and what was found.

    Example:
        >>> field({"question": "Why?"}, "question", str)
        'Why?'
    """
    path = f"{at}.{name}" if at else name
    if not isinstance(row, Mapping):
        raise GroupError(
            f"{at or 'the row'} is {row!r:.60}, expected an object with {name!r}; check data set and version"
        )
    if name not in row:
        raise GroupError(
            f"field {path!r} is missing, found {sorted(row)}; the published schema has it, check data set and version"
        )
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(row[name], kinds) or (isinstance(row[name], bool) and bool not in kinds):
        raise GroupError(
            f"field {path!r} is {type(row[name]).__name__} ({row[name]!r:.60}), expected "
            f"{' or '.join(k.__name__ for k in kinds)}; check data set and version"
        )
    return row[name]


def numbers_field(row: Row, name: str, size: int) -> list[float]:
    """A field with one number for each of the responses.

    Args:
        row: the row.
        name: of the field.
        size: number of responses.

    Returns:
        The numbers.

    Raises:
        GroupError: something else, or another count.
    """
    values = field(row, name, list)
    valid = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in values)
    if len(values) != size or not valid:
        raise GroupError(
            f"field {name!r} is {values!r:.60}, expected {size} numbers, one per response; check the data set"
        )
    return [float(value) for value in values]


def row_id(row: Row, name: str = "id") -> str | None:
    """The row's own name, if it has one.

    Args:
        row: the row.
        name: of the field.

    Returns:
        The name, or None.
    """
    return str(row[name]) if row.get(name) not in (None, "") else None


def messages_field(row: Row, name: str) -> list[dict[str, str]]:
    """A field that holds chat messages whose last one is the assistant's.

    Args:
        row: the row.
        name: of the field.

    Returns:
        The messages as `{"role", "content"}`.

    Raises:
        GroupError: something else.
    """
    messages = field(row, name, list)
    valid = all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not valid or not messages or messages[-1]["role"] != "assistant":
        raise GroupError(
            f"field {name!r} is {messages!r:.80}, expected chat messages with role and content that end with the "
            "assistant's; check data set and version"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def exchange(row: Row, name: str) -> tuple[str, str]:
    """A field in LLaVA's form that holds one human and one gpt turn.

    Args:
        row: the row.
        name: of the field.

    Returns:
        What the human and what the model said.

    Raises:
        GroupError: something else.
    """
    turns = field(row, name, list)
    if [turn.get("from") if isinstance(turn, Mapping) else None for turn in turns] != ["human", "gpt"]:
        raise GroupError(f"field {name!r} is {turns!r:.80}, expected a human and a gpt turn; check the data set")
    return field(turns[0], "value", str, at=f"{name}[0]"), field(turns[1], "value", str, at=f"{name}[1]")


def image_field(row: Row, name: str) -> Any:
    """A field with an image.

    Args:
        row: the row.
        name: of the field.

    Returns:
        A PIL image, a path, or the encoded bytes that `datasets` gives for an undecoded image.

    Raises:
        GroupError: there is none.
    """
    value = row.get(name)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "" or value == b"":
        raise GroupError(f"field {name!r} is missing or empty, found {sorted(row)}; the published schema has an image")
    if not isinstance(value, (str, bytes, Image.Image)):
        raise GroupError(
            f"field {name!r} is {value!r:.60}, expected an image, a path or encoded bytes; check the data set"
        )
    return value


def graded_group(
    prompt: str | Sequence[Mapping[str, Any]],
    responses: Sequence[str],
    badness: Sequence[float],
    *,
    source: str,
    id: str | None,
    images: Sequence[Any] = (),
    videos: Sequence[Sequence[Any]] = (),
) -> ResponseGroup:
    """A ranked group of responses with grades, smaller is better, equal grades tie.

    Empty responses are left out. Of texts that are equal but for white space around them the first stays if their
    grades agree; if they differ, the judges have contradicted themselves and all of them go.

    Args:
        prompt: text or chat messages; `<image>` and `<video>` placeholders are taken out of a text that comes with
            media, and are words like others in one that comes without.
        responses: texts.
        badness: a grade for each.
        source: name of the data set.
        id: of the row, if it has one.
        images: of the prompt.
        videos: of the prompt.

    Returns:
        The group, dense ranks from 1 on.

    Raises:
        SkippedRow: fewer than two responses are left, or all of them tie.
        GroupError: as many grades as responses are needed; the prompt is empty.

    Example:
        >>> graded_group("2 + 2?", ["5", "4", "4"], [2, 1, 1], source="sums", id="1").rankings
        (2, 1)
    """
    if len(responses) != len(badness):
        raise GroupError(f"{len(responses)} responses with {len(badness)} grades, expected one each")
    grades: dict[str, set[float]] = {}
    first: dict[str, str] = {}
    for text, grade in zip(responses, badness, strict=True):
        grades.setdefault(text.strip(), set()).add(grade)
        first.setdefault(text.strip(), text)
    kept = [(first[text], min(values)) for text, values in grades.items() if text and len(values) == 1]
    if len(kept) < 2:
        raise SkippedRow("fewer than two different responses")
    if len({grade for _, grade in kept}) == 1:
        raise SkippedRow("all responses tie")
    if isinstance(prompt, str):
        prompt = strip_placeholders(prompt) if images or videos else prompt
        if not prompt.strip():
            raise GroupError("the prompt is empty, expected a question; check data set and version")
    return ResponseGroup(
        prompt=prompt,
        responses=[text for text, _ in kept],
        rankings=dense_ranks([grade for _, grade in kept]),
        images=images,
        videos=videos,
        id=id,
        source=source,
    )


def strip_placeholders(text: str) -> str:
    """Text without `<image>` and `<video>`; the group's media have places of their own.

    Args:
        text: a prompt.

    Returns:
        The text, stripped.
    """
    return _PLACEHOLDERS.sub(" ", text).strip()
