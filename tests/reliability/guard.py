"""Notices what must never happen while an input from outside is read: Python's audit events, watched in a block."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Unpickling, the network, and other programs.
FORBIDDEN = ("pickle.find_class", "marshal.load", "socket.connect", "socket.getaddrinfo", "urllib.Request")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
SECRET = "secret-canary"  # a path with this word may not be opened

_seen: list[list[str]] = []  # of the blocks that are open, in any thread


class ForbiddenError(AssertionError):
    """What an input from outside made the process do."""


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _seen:
        return
    seen = _seen[-1]
    if event in FORBIDDEN or event in PROGRAMS:
        seen.append(f"{event} {args!r:.200}")
    elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(args[0]))
        if SECRET in path or path.startswith("/etc/passwd"):
            seen.append(f"open {path}")


@contextmanager
def guarded() -> Iterator[None]:
    """Fail if this process does anything forbidden inside the block.

    Raises:
        ForbiddenError: with what it did.
    """
    _install()
    seen: list[str] = []
    _seen.append(seen)
    try:
        yield
    finally:
        _seen.pop()
    if seen:
        raise ForbiddenError("; ".join(seen))


def _install(installed: list[bool] = []) -> None:  # noqa: B006  a hook cannot be removed, so it is added once
    if not installed:
        installed.append(True)
        sys.addaudithook(_hook)
