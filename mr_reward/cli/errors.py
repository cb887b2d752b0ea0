"""How a program of this package ends where something is wrong: the commands and the recipe scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from mr_reward.errors import MRRewardError


@contextmanager
def one_error_line() -> Iterator[None]:
    """An error of this package or of a file ends the program with one `error:` line and exit code 1."""
    try:
        yield
    except (MRRewardError, OSError) as error:
        told = " ".join([str(error), *getattr(error, "__notes__", [])])
        Console(stderr=True, soft_wrap=True).print("error:", told, style="red", markup=False, highlight=False)
        sys.exit(1)
