"""A verifier that runs in other processes can import."""

from __future__ import annotations

from typing import Any


def early_letter(completions: list[Any], **_: Any) -> list[float]:
    """Right is a completion that begins with a letter of the first half of the alphabet."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float("a" <= text.strip()[:1].lower() < "n") for text in texts]
