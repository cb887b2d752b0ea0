"""What to lower, in the message of a device that has run out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["memory_advice"]


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """A block that needs memory; an error about it keeps its type and gets a note.

    Example:
        >>> with memory_advice("lower max_tokens_per_batch"):
        ...     scores = model(**inputs).scores  # doctest: +SKIP
    """
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator has no type of its own.
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            error.add_note(f"mr_reward: out of memory; {advice}")
        raise
