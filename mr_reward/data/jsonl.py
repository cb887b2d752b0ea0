"""JSON Lines: one reader, a writer of whole files, and a writer of files that grow and are resumed after a kill."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Self

from mr_reward.checkpoint.checksums import written_whole_file
from mr_reward.errors import ConfigurationError, GroupError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


def read_json_lines(source: str | Path | Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """The values of a file, or of encoded lines from anywhere, with their line numbers from 1 on; blank lines not.

    A line that is no JSON comes as a `GroupError`, so that the caller decides whether it stops.
    """
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as lines:
            yield from read_json_lines(lines)
        return
    for number, line in enumerate(source, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested thousands of times
                yield number, GroupError(f"the line is no JSON ({error})")


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> int:
    """Write one value a line and return their number. The file appears, or is replaced, when it is whole.

    Raises ConfigurationError where another process writes the same file.
    """
    count = 0
    with _held(Path(path)), written_whole_file(path) as unfinished, unfinished.open("wb") as file:
        for row in rows:
            file.write(json_line(row))
            count += 1
    return count


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep other processes from writing a file, which need not be there yet."""
    if fcntl is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.lock")
    with FileIO(beside, "a") as file:
        _lock(file, path)
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)


def _lock(file: FileIO, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigurationError(
            f"{path}: another process writes to this file; wait for it, or name another one"
        ) from error
    except OSError:
        logger.debug("%s: no locks on this disk", path)


class ResumableJsonLines:
    """A file that grows by whole lines; a run that was killed is resumed behind the last of them.

    As a context: look through `rows()`, what earlier runs have written, then `write()`. Nothing changes in a file that
    is there before the first `write()`, so a caller can refuse to resume a file of something else.

    Raises ConfigurationError where another process writes to the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._size = 0  # of the whole lines, in bytes

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as to_close:
            self._file = to_close.enter_context(FileIO(self.path, "a"))
            _lock(self._file, self.path)
            self._size = sum(map(len, self._whole_lines()))
            to_close.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def rows(self) -> Iterator[tuple[int, Any]]:
        """As `read_json_lines`; a torn last line, which has no line feed, is left out."""
        return read_json_lines(self._whole_lines())

    def write(self, rows: Iterable[Any]) -> None:
        """Append values. What is torn at the end of the file is cut off first, and again where the disk is full."""
        content = b"".join(map(json_line, rows))
        self._file.truncate(self._size)
        left = memoryview(content)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(content)

    def _whole_lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as lines:
            yield from (line for line in lines if line.endswith(b"\n"))


def json_line(row: Any) -> bytes:
    """A value as a line."""
    # ASCII: a lone surrogate in a response would be no UTF-8.
    return json.dumps(row).encode("ascii") + b"\n"
