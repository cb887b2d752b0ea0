"""What every converter uses: reading fields with errors that name them, and making a group of N graded responses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup, dense_ranks

__all__ = [
    "Convert",
    "Converter",
    "Row",
    "SkippedRow",
    "field",
    "graded_group",
    "messages_field",
    "strip_placeholders",
]

Row = Mapping[str, Any]
Convert = Callable[[Row], ResponseGroup]

_PLACEHOLDERS = re.compile(r"<(?:image|video)>\n?")


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


def field(row: Row, name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of the published schema.

    Args:
        row: the row.
        name: of the field.
        kind: type or types that it must have.

    Returns:
        Its value.

    Raises:
        GroupError: it is missing or of another type; the message names it and what was found.

    Example:
        >>> field({"question": "Why?"}, "question", str)
        'Why?'
    """
    if name not in row:
        raise GroupError(
            f"field {name!r} is missing, found {sorted(row)}; the published schema has it, check data set and version"
        )
    if not isinstance(row[name], kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise GroupError(
            f"field {name!r} is {type(row[name]).__name__} ({row[name]!r:.60}), expected "
            f"{' or '.join(k.__name__ for k in kinds)}; check data set and version"
        )
    return row[name]


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
    """The first human and gpt turn of a field in LLaVA's form.

    Args:
        row: the row.
        name: of the field.

    Returns:
        What the human and what the model said.

    Raises:
        GroupError: something else.
    """
    turns = field(row, name, list)
    if [turn.get("from") for turn in turns if isinstance(turn, Mapping)][:2] != ["human", "gpt"]:
        raise GroupError(f"field {name!r} is {turns!r:.80}, expected a human and a gpt turn; check the data set")
    return field(turns[0], "value", str), field(turns[1], "value", str)


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
    if row.get(name) is None:
        raise GroupError(f"field {name!r} is missing or empty, found {sorted(row)}; the published schema has an image")
    value = row[name]
    if isinstance(value, Mapping):
        return value.get("bytes") or field(value, "path", str)
    return value


def graded_group(
    prompt: str | Sequence[Mapping[str, Any]],
    responses: Sequence[str],
    badness: Sequence[float],
    *,
    source: str,
    id: str,
    images: Sequence[Any] = (),
    videos: Sequence[Sequence[Any]] = (),
) -> ResponseGroup:
    """A ranked group of responses with grades, smaller is better, equal grades tie.

    Empty responses are left out. Of equal texts the first stays if their grades agree; if they differ, the judges have
    contradicted themselves and all of them go.

    Args:
        prompt: text or chat messages; `<image>` and `<video>` placeholders of text are taken out.
        responses: texts.
        badness: a grade for each.
        source: name of the data set.
        id: of the row.
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
    for text, grade in zip(responses, badness, strict=True):
        grades.setdefault(text, set()).add(grade)
    kept = [(text, min(values)) for text, values in grades.items() if text.strip() and len(values) == 1]
    if len(kept) < 2:
        raise SkippedRow("fewer than two different responses")
    if len({grade for _, grade in kept}) == 1:
        raise SkippedRow("all responses tie")
    if isinstance(prompt, str):
        prompt = strip_placeholders(prompt)
        if not prompt:
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
    return _PLACEHOLDERS.sub("", text).strip()
