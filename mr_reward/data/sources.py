"""Rows from a file, a folder, the hub or a data set in memory, each with the place it came from."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mr_reward.data.jsonl import read_json_lines
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.hub import why_missing

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json")  # of a folder with several kinds the first kind is read
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BATCH = 64  # rows in memory at a time; they may hold images


@dataclass(frozen=True, slots=True)
class RowSource:
    """Rows that can be read more than once, from the start each time, as (place, row)."""

    name: str
    folder: Path  # relative paths in the rows count from here, unless told otherwise
    read: Callable[[], Iterator[tuple[str, Any]]]  # starts a reading; a row that cannot be read is a `GroupError`

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self.read()


def read_rows(
    source: str | Path, *, split: str | None = None, config: str | None = None, columns: Sequence[Collection[str]] = ()
) -> RowSource:
    """Open a `.jsonl`, `.jsonl.gz`, `.json` or `.parquet` file, a folder of them, a folder that `save_to_disk` wrote,
    or a data set of the hub (its id).

    Its rows are read when they are asked for. `split`: of the hub, `train` if None; of a folder, how the files'
    names start. `config`: of the hub; of a folder, one above the files. `columns`: the forms of a row; files of
    a folder with none of them are left alone. Images are `{"bytes": ..., "path": ...}`.
    """
    path = Path(source)
    if is_saved(path):
        return dataset_rows(read_saved(path, split), str(path), path)
    if path.is_file():
        if split or config:
            raise ConfigurationError(f"{path} is one file, expected no split and no config with it; leave them out")
        return RowSource(str(path), path.parent, lambda: _read_file(path))
    if path.is_dir():
        files = _files(path, split, config, columns)
        return RowSource(str(path), path, lambda: (row for file in files for row in _read_file(file)))
    if is_hub_id(source):
        return _hub_rows(str(source), split or "train", config)
    raise ConfigurationError(
        f"{source} is no file, no folder and no hub id; give a {', '.join(SUFFIXES)} file, a folder or 'owner/name'"
    )


def _files(folder: Path, split: str | None, config: str | None, columns: Sequence[Collection[str]]) -> list[Path]:
    """Files of the first kind of which there are some; others, like pairs made of the rows, may lie beside them."""
    others: list[str] = []
    wanted = " or ".join(", ".join(sorted(form)) for form in columns)
    for suffix in SUFFIXES:
        found = [
            path
            for path in sorted(folder.rglob(f"*{suffix}"))
            if (split is None or path.name.startswith(split))
            and (config is None or config in path.relative_to(folder).parts[:-1])
        ]
        with_columns = [path for path in found if _has(path, columns)]
        others += [path.name for path in found if path not in with_columns]
        if with_columns:
            if others:
                logger.info("%s: left alone, without the fields %s: %s", folder, wanted, ", ".join(others))
            return with_columns
    if others:
        raise ConfigurationError(
            f"{folder}: no file has the fields {wanted}, found {', '.join(others)}; check data set and "
            "version, or give the file"
        )
    raise ConfigurationError(
        f"{folder} holds no {', '.join(SUFFIXES)} file for split {split} and config {config}; a split is the start of "
        "the file's name, a config a folder above it"
    )


def _has(path: Path, columns: Sequence[Collection[str]]) -> bool:
    """Whether the first row has these columns, of one of the forms; what is no row is left to the reading."""
    _, row = next(_read_file(path), ("", None)) if columns else ("", None)
    return not isinstance(row, Mapping) or any(set(form) <= set(row) for form in columns)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    readers: dict[str, tuple[str, Callable[[Path], Iterator[tuple[int, Any]]]]] = {
        ".jsonl": ("line", read_json_lines),
        ".jsonl.gz": ("line", _gzip),
        ".json": ("item", _json_list),
        ".parquet": ("row", _parquet),
    }
    suffix = next((suffix for suffix in readers if path.name.endswith(suffix)), None)
    if suffix is None:
        raise ConfigurationError(f"{path} is no {', '.join(SUFFIXES)} file; convert it to one of them")
    word, read = readers[suffix]
    yield from ((f"{path}, {word} {number}", row) for number, row in read(path))


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        lines = list(read_json_lines(path))
        if len(lines) > 1 and not any(isinstance(row, GroupError) for _, row in lines):  # under the wrong name
            yield from lines
            return
        raise GroupError(f"{path} is no JSON ({error}); one object per line goes into a .jsonl file") from error
    if not isinstance(content, list):
        raise GroupError(f"{path} holds one {type(content).__name__}, expected a list of rows")
    yield from enumerate(content, start=1)


def _gzip(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with gzip.open(path, "rb") as lines:
            yield from read_json_lines(lines)
    except (OSError, EOFError) as error:
        raise GroupError(f"{path} cannot be unpacked ({error}); replace it") from error


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of a `Dataset` or a `DatasetDict` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def read_saved(folder: Path, split: str | None) -> Dataset:
    """The data set of such a folder."""
    import datasets

    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.Dataset):
        return data
    name = split or ("train" if "train" in data else next(iter(data)) if len(data) == 1 else None)
    if name not in data:
        raise ConfigurationError(f"{folder} has the splits {list(data)}, got {split}; name one, or give its folder")
    return data[name]


def is_hub_id(source: object) -> bool:
    """Whether it is no path, of a file that is not there: it has a suffix, or its folder is there."""
    name = str(source)
    there = Path(name).exists() or Path(name).parent.is_dir()
    return bool(_HUB_ID.fullmatch(name)) and not there and not name.endswith(SUFFIXES)


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

    if reason := why_missing(hub_id, kind="dataset"):
        raise ConfigurationError(f"data set {hub_id} {reason}")
    try:
        data = datasets.load_dataset(hub_id, config, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ConfigurationError(
            f"data set {hub_id!r} (config {config}, split {split!r}) cannot be loaded: {error}; check the names and "
            "the connection, or give a local file or folder"
        ) from error
    return dataset_rows(data, f"{hub_id} [{split}]", Path())


def dataset_rows(data: Dataset, name: str, folder: Path) -> RowSource:
    """The rows of a data set that `datasets` has opened."""
    # Arrow's own values: images stay encoded.
    stored = data.with_format("arrow")

    def read() -> Iterator[tuple[str, Any]]:
        batches = (batch.to_pylist() for batch in stored.iter(batch_size=_BATCH))
        rows = (row for batch in batches for row in batch)
        yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))

    return RowSource(name, folder, read)
