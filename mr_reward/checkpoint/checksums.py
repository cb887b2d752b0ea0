"""A folder that is written whole or not at all, and that tells when one of its files has changed since."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CHECKSUM_FILE", "changed_file", "write_checksums", "written_whole", "written_whole_file"]

CHECKSUM_FILE = "SHA256SUMS"  # `sha256sum --check SHA256SUMS` reads it too
# For people, who may edit it.
_CARD = "README.md"
_PARTIAL = ".partial-"


@contextmanager
def written_whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file under another name first; it gets its own name when the block has ended well.

    Args:
        path: the file; its folder is made if needed.

    Yields:
        The name to write to, in the same folder.

    Example:
        >>> with written_whole_file("scores.json") as unfinished:  # doctest: +SKIP
        ...     unfinished.write_text("{}")
    """
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

    Args:
        folder: where the files go; made if needed.

    Yields:
        An empty folder on the same disk to write to.

    Example:
        >>> with written_whole("rm") as unfinished:  # doctest: +SKIP
        ...     model.save_pretrained(unfinished)
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

    Args:
        folder: of a checkpoint.
        leave_out: names of files that may change, beside the model card.

    Example:
        >>> write_checksums("rm")  # doctest: +SKIP
    """
    folder = Path(folder)
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in {_CARD, CHECKSUM_FILE, *leave_out}:
            lines.append(f"{_sha256(path, flush=True)}  {path.relative_to(folder).as_posix()}\n")
    (folder / CHECKSUM_FILE).write_text("".join(lines))


def changed_file(folder: Path) -> str | None:
    """The first file of a folder that is not what was saved.

    Args:
        folder: of a checkpoint; without `SHA256SUMS` nothing is known, and nothing is found.

    Returns:
        Its name; None if all are as they were.

    Example:
        >>> changed_file(Path("rm"))  # doctest: +SKIP
    """
    try:
        lines = (folder / CHECKSUM_FILE).read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return CHECKSUM_FILE
    for line in lines:
        digest, _, name = line.partition("  ")
        # A name that leads elsewhere is not looked at.
        if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_file():
            return name
        if _sha256(folder / name) != digest:
            return name
    return None


def _sha256(path: Path, *, flush: bool = False) -> str:
    with path.open("rb") as content:
        if flush:
            os.fsync(content.fileno())
        return hashlib.file_digest(content, "sha256").hexdigest()
