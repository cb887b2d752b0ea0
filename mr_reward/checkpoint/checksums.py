"""A folder that is written whole or not at all, and that tells when one of its files has changed since."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CHECKSUM_FILE = "SHA256SUMS"  # `sha256sum --check SHA256SUMS` reads it too
# For people, who may edit it.
_CARD = "README.md"
_PARTIAL = ".partial-"
_WEIGHTS = ".safetensors"
_SMALL = 1 << 20  # bytes: up to here a file is read whole at every load
_TENSOR_BYTES = 64  # of each tensor in a sketch
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it


@contextmanager
def written_whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file under another name first; it gets its own name when the block has ended well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """Write files elsewhere first; they appear in the folder when the block has ended well.

    A full disk or a kill before that leaves the folder as it was. Weights of an earlier save that have no successor (a
    shard more than now) are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_PARTIAL}*"):  # by a run that was killed here
        shutil.rmtree(left)
    unfinished = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
    try:
        yield unfinished
        write_checksums(unfinished)
        names = {path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()}
        for stale in {*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")}:
            if stale.relative_to(folder) not in names:
                stale.unlink()
        # The checksums last: a folder with files of two saves does not agree with them.
        for name in sorted(names, key=lambda name: (name.name == CHECKSUM_FILE, name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / name, folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_checksums(folder: str | Path, *, leave_out: Sequence[str] = ()) -> None:
    """Write `SHA256SUMS` for the files of a folder, and wait until they are on the disk.

    A large file has a comment line besides, `# bytes sketch  name`, so that a load need not read the whole file.
    """
    folder = Path(folder)
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in {_CARD, CHECKSUM_FILE, *leave_out}:
            name = path.relative_to(folder).as_posix()
            lines.append(f"{_sha256(path, flush=True)}  {name}\n")
            if path.suffix == _WEIGHTS or path.stat().st_size > _SMALL:
                lines.append(f"# {_sketch(path)}  {name}\n")
    (folder / CHECKSUM_FILE).write_text("".join(lines))


def listed_files(folder: Path) -> dict[str, tuple[str, str | None]]:
    """Name -> checksum, and size and sketch of a large file; ValueError or OSError where the list cannot be read."""
    lines = [line.partition("  ")[::2] for line in (folder / CHECKSUM_FILE).read_text(encoding="ascii").splitlines()]
    sketches = {name: known.removeprefix("# ") for known, name in lines if known.startswith("# ")}
    return {name: (known, sketches.get(name)) for known, name in lines if not known.startswith("# ")}


def changed_file(folder: Path, *, verify: bool = True) -> str | None:
    """The first file of a folder that is not what was saved; None if all are, or if there is no `SHA256SUMS`.

    With `verify` every byte is read. Otherwise of large files the size and a sketch: the header of weights and the
    first bytes of each tensor, which tells another model or half a file, but not one wrong bit.
    """
    try:
        listed = listed_files(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return CHECKSUM_FILE
    for name, (digest, sketch) in listed.items():
        # A name that leads elsewhere is not looked at.
        if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_file():
            return name or CHECKSUM_FILE
        if verify or (sketch is None and Path(name).suffix != _WEIGHTS):
            if _sha256(folder / name) != digest:
                return name
        # A list of an earlier release has no sketches: the header says at loading whether weights are whole.
        elif sketch is not None and sketch != _sketch(folder / name):
            return name
    return None


def _sha256(path: Path, *, flush: bool = False) -> str:
    with path.open("rb") as content:
        if flush:
            os.fsync(content.fileno())
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sketch(path: Path) -> str:
    """Size, and checksum of the beginning of a file or of a safetensors header and the first bytes of each tensor."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as content:
        if path.suffix != _WEIGHTS:
            return f"{size} {hashlib.sha256(content.read(_SMALL)).hexdigest()}"
        length = content.read(8)
        header = content.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))
        sketch = hashlib.sha256(length + header)
        try:
            tensors = [value for key, value in json.loads(header).items() if key != "__metadata__"]
            for start in sorted(tensor["data_offsets"][0] for tensor in tensors):
                content.seek(8 + len(header) + start)
                sketch.update(content.read(_TENSOR_BYTES))
        except (AttributeError, LookupError, OSError, OverflowError, RecursionError, TypeError, ValueError):
            pass  # no header, so not the one that was written
        return f"{size} {sketch.hexdigest()}"
