"""Rows of public data sets: from a file, a folder or the hub, each with the place it came from; and their fields.

An error about a field names it, and says what was found and what was expected.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mr_reward.data.jsonl import read_json_lines
from mr_reward.errors import ConfigurationError, GroupError

Row = Mapping[str, Any]

SUFFIXES = (".parquet", ".jsonl", ".json")  # of a folder with several kinds the first kind is read
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BATCH = 64  # rows in memory at a time; they may hold images
_PLACEHOLDERS = re.compile(r"[ \t]*<(?:image|video)>[ \t]*")


@dataclass(frozen=True, slots=True)
class RowSource:
    """Rows that can be read more than once, from the start each time, as (place, row)."""

    name: str
    folder: Path  # relative paths in the rows count from here, unless told otherwise
    read: Callable[[], Iterator[tuple[str, Any]]]  # starts a reading; a row that cannot be read is a `GroupError`

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self.read()


def read_rows(source: str | Path, *, split: str | None = None, config: str | None = None) -> RowSource:
    """Open a `.jsonl`, `.json` (one list) or `.parquet` file, a folder of them, or a data set of the hub (its id).

    Its rows are read when they are asked for. `split`: of the hub, `train` if None; of a folder, how the files'
    names start. `config`: of the hub; of a folder, one above the files. Images are `{"bytes": ..., "path": ...}`.
    """
    path = Path(source)
    if path.is_file():
        if split or config:
            raise ConfigurationError(f"{path} is one file, expected no split and no config with it; leave them out")
        return RowSource(str(path), path.parent, lambda: _read_file(path))
    if path.is_dir():
        files = _files(path, split, config)
        return RowSource(str(path), path, lambda: (row for file in files for row in _read_file(file)))
    if path.suffix not in SUFFIXES and _HUB_ID.fullmatch(str(source)):
        return _hub_rows(str(source), split or "train", config)
    raise ConfigurationError(
        f"{source} is no file, no folder and no hub id; give a {', '.join(SUFFIXES)} file, a folder or 'owner/name'"
    )


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


def wrong_field(path: str, value: object, expected: str) -> GroupError:
    """The error about a value that contradicts the published schema."""
    return GroupError(f"field {path!r} is {value!r:.80}, expected {expected}; check data set and version")


def texts_field(row: Row, name: str) -> list[str]:
    """A list of texts."""
    texts = field(row, name, list)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong_field(f"{name}[{i}]", text, "a text")
    return texts


def numbers_field(row: Row, name: str, size: int) -> list[float]:
    """A list with one finite number for each of the responses."""
    values = field(row, name, list)
    valid = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in values)
    if len(values) != size or not valid:
        raise wrong_field(name, values, f"{size} numbers, one per response")
    return [float(value) for value in values]


def row_id(row: Row, name: str = "id") -> str | None:
    """The row's own name, if it has one."""
    return str(row[name]) if row.get(name) not in (None, "") else None


def messages_field(row: Row, name: str) -> list[dict[str, str]]:
    """Chat messages whose last one is the assistant's."""
    messages = field(row, name, list)
    keys = ("role", "content")
    valid = all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in keys) for message in messages
    )
    if not valid or not messages or messages[-1]["role"] != "assistant":
        raise wrong_field(name, messages, "chat messages with role and content that end with the assistant's")
    return [{key: message[key] for key in keys} for message in messages]


def turns_field(row: Row, name: str) -> tuple[str, str]:
    """What the human and what the model said, in LLaVA's form: one human and one gpt turn."""
    turns = field(row, name, list)
    if [turn.get("from") if isinstance(turn, Mapping) else None for turn in turns] != ["human", "gpt"]:
        raise wrong_field(name, turns, "a human and a gpt turn")
    return field(turns[0], "value", str, at=f"{name}[0]"), field(turns[1], "value", str, at=f"{name}[1]")


def image_field(row: Row, name: str) -> Any:
    """A PIL image, a path, or the encoded bytes that `datasets` gives for an undecoded image."""
    value = row.get(name)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "" or value == b"":
        raise GroupError(f"field {name!r} is missing or empty, found {sorted(row)}; the published schema has an image")
    if not isinstance(value, (str, bytes, Image.Image)):
        raise wrong_field(name, value, "an image, a path or encoded bytes")
    return value


def strip_placeholders(text: str) -> str:
    """Text without `<image>` and `<video>`, stripped; the group's media have places of their own."""
    return _PLACEHOLDERS.sub(" ", text).strip()


def _files(folder: Path, split: str | None, config: str | None) -> list[Path]:
    for suffix in SUFFIXES:
        found = [
            path
            for path in sorted(folder.rglob(f"*{suffix}"))
            if (split is None or path.name.startswith(split))
            and (config is None or config in path.relative_to(folder).parts[:-1])
        ]
        if found:
            return found
    raise ConfigurationError(
        f"{folder} holds no {', '.join(SUFFIXES)} file for split {split} and config {config}; a split is the start of "
        "the file's name, a config a folder above it"
    )


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    readers = {".jsonl": ("line", read_json_lines), ".json": ("item", _json_list), ".parquet": ("row", _parquet)}
    if path.suffix not in readers:
        raise ConfigurationError(f"{path} is no {', '.join(SUFFIXES)} file; convert it to one of them")
    word, read = readers[path.suffix]
    yield from ((f"{path}, {word} {number}", row) for number, row in read(path))


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise GroupError(f"{path} is no JSON ({error}); one object per line goes into a .jsonl file") from error
    if not isinstance(content, list):
        raise GroupError(f"{path} holds one {type(content).__name__}, expected a list of rows")
    yield from enumerate(content, start=1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    # Through `datasets` every file would be copied into its cache first.
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=_BATCH) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except ArrowException as error:
        raise GroupError(f"{path} cannot be read as parquet ({error}); replace it") from error


def _hub_rows(hub_id: str, split: str, config: str | None) -> RowSource:
    import datasets

    try:
        data = datasets.load_dataset(hub_id, config, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ConfigurationError(
            f"data set {hub_id!r} (config {config}, split {split!r}) cannot be loaded: {error}; check the names and "
            "the connection, or give a local file or folder"
        ) from error
    # Arrow's own values: images stay encoded.
    stored = data.with_format("arrow")

    def read() -> Iterator[tuple[str, Any]]:
        batches = (batch.to_pylist() for batch in stored.iter(batch_size=_BATCH))
        rows = (row for batch in batches for row in batch)
        yield from ((f"{hub_id} [{split}], row {number}", row) for number, row in enumerate(rows, start=1))

    return RowSource(hub_id, Path("."), read)
