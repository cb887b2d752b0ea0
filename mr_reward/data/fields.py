"""Fields of rows of public data sets; an error names the field, what was found and what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from mr_reward.errors import GroupError

__all__ = [
    "field",
    "image_field",
    "messages_field",
    "numbers_field",
    "row_id",
    "strip_placeholders",
    "texts_field",
    "turns_field",
]

Row = Mapping[str, Any]

_PLACEHOLDERS = re.compile(r"[ \t]*<(?:image|video)>[ \t]*")


def field(row: Any, name: str, kind: type | tuple[type, ...], *, at: str = "") -> Any:
    """A field of one of these types (a bool is no int); `at` is where the object stands in the row: `answers[2]`."""
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


def texts_field(row: Row, name: str) -> list[str]:
    """A list of texts."""
    texts = field(row, name, list)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise GroupError(f"field '{name}[{i}]' is {text!r:.60}, expected str; check data set and version")
    return texts


def numbers_field(row: Row, name: str, size: int) -> list[float]:
    """A list with one finite number for each of the responses."""
    values = field(row, name, list)
    valid = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in values)
    if len(values) != size or not valid:
        raise GroupError(
            f"field {name!r} is {values!r:.60}, expected {size} numbers, one per response; check the data set"
        )
    return [float(value) for value in values]


def row_id(row: Row, name: str = "id") -> str | None:
    """The row's own name, if it has one."""
    return str(row[name]) if row.get(name) not in (None, "") else None


def messages_field(row: Row, name: str) -> list[dict[str, str]]:
    """Chat messages whose last one is the assistant's."""
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


def turns_field(row: Row, name: str) -> tuple[str, str]:
    """What the human and what the model said, in LLaVA's form: one human and one gpt turn."""
    turns = field(row, name, list)
    if [turn.get("from") if isinstance(turn, Mapping) else None for turn in turns] != ["human", "gpt"]:
        raise GroupError(f"field {name!r} is {turns!r:.80}, expected a human and a gpt turn; check the data set")
    return field(turns[0], "value", str, at=f"{name}[0]"), field(turns[1], "value", str, at=f"{name}[1]")


def image_field(row: Row, name: str) -> Any:
    """A PIL image, a path, or the encoded bytes that `datasets` gives for an undecoded image."""
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


def strip_placeholders(text: str) -> str:
    """Text without `<image>` and `<video>`, stripped; the group's media have places of their own."""
    return _PLACEHOLDERS.sub(" ", text).strip()
