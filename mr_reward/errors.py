"""Every error type of the package.

A message says what was got, what was expected and what to do. Errors that a wrong argument causes are also
`ValueError`, so callers that catch the builtin keep working.
"""

import operator
import re
from typing import Any

# An image that somebody wrote as text: behind `base64,`, or a long run without a dot, which a path would have.
_BASE64 = re.compile(r"(?<=base64,)[^'\"]+|[A-Za-z0-9+/=_-]{120,}")


def shown(value: Any, limit: int = 80) -> str:
    """A value as messages show it: cut to `limit` characters, and without the base64 of an image.

    Example:
        >>> shown("data:image/png;base64,iVBORw0KGgo=")
        "'data:image/png;base64,(12 characters)'"
    """
    return _BASE64.sub(lambda match: f"({len(match.group())} characters)", repr(value))[:limit]


class MRRewardError(Exception):
    """Base of every error that this package raises on purpose."""


class GroupError(MRRewardError, ValueError):
    """A `ResponseGroup` contradicts itself: no responses, mismatched lengths, rankings that are not ranks."""


class MediaError(MRRewardError, ValueError):
    """An image or video is missing, unreadable, or does not match the prompt's placeholders."""


class ConfigurationError(MRRewardError, ValueError):
    """An option has a value that does not exist or does not fit the others (layout, template, loss, sizes)."""


class BackendError(MRRewardError, ValueError):
    """The attention backend cannot express the layout, or an argument would silently break it."""


class OverLengthError(MRRewardError, ValueError):
    """A group does not fit the token budget and the policy is not to change it."""


class CheckpointError(MRRewardError, ValueError):
    """A checkpoint folder is incomplete, has unknown keys, or was trained with another template."""


class GroupAssemblyError(MRRewardError, ValueError):
    """The rows handed over by the trainer cannot be cut into groups of `num_generations`."""


class NonFiniteScoreError(MRRewardError, RuntimeError):
    """The reward model produced NaN or infinity; the run must not use them."""


class PeerRankError(MRRewardError, RuntimeError):
    """Another rank failed inside the reward; the message names the rank, the group and the cause."""


class ScoringServerError(MRRewardError, RuntimeError):
    """A scoring server cannot be reached in time, refuses the request, or gives answers that cannot be right."""


def whole_number(value: Any, name: str, what: str) -> int:
    """A setting that counts something, from 1 on, as Python's own int; numpy's and torch's whole numbers count."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigurationError(f"{name} is {value!r}, expected a whole number from 1 on: {what}")
    return number
