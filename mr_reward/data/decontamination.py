"""Take training groups out that share a picture, a prompt or a response with a benchmark.

The paper's training mixture contains the sources of VL-RewardBench (POVID, RLAIF-V, WildVision, VLFeedback) and of
MM-RLHF-RewardBench, so numbers on them mean little without this step.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import dctn

from mr_reward.groups import ResponseGroup
from mr_reward.media import load_image

__all__ = ["Decontamination", "decontaminate", "perceptual_hash"]

# Prompts such as "Describe this image." are shared by thousands of unrelated rows; beside a picture only a longer one
# says that two rows are the same question.
_DISTINCTIVE_PROMPT = 40  # characters
_DISTINCTIVE_RESPONSE = 40
_HASH_BITS = 64
_MAX_DISTANCE = 4  # bits; a picture re-encoded or resized stays within, other pictures are some 32 away
# 64 bits in 5 bands: two hashes at most 4 bits apart agree in at least one whole band.
_BANDS = np.array_split(np.arange(_HASH_BITS), _MAX_DISTANCE + 1)


@dataclass(frozen=True, slots=True)
class Decontamination:
    """What is left and what was removed.

    Args:
        kept: the clean groups, in their order.
        removed: (group, benchmark, reason) of each removed group, by the first match.
    """

    kept: list[ResponseGroup]
    removed: list[tuple[ResponseGroup, str, str]]

    @property
    def counts(self) -> Counter[tuple[str, str, str]]:
        """(training source, benchmark, reason) -> removed groups."""
        return Counter((group.source or "unknown", benchmark, reason) for group, benchmark, reason in self.removed)


def decontaminate(
    groups: Iterable[ResponseGroup], benchmarks: Mapping[str, Sequence[ResponseGroup]]
) -> Decontamination:
    """Remove training groups that meet a benchmark.

    A group is removed for the first of these: `image`, the same picture (equal pixels, or a perceptual hash at most
    4 of 64 bits away); `prompt`, the same text up to case, spacing and Unicode form, where a group with media counts
    only if its prompt has at least 40 characters; `response`, an equal response of at least 40 characters. Videos are
    compared by their first frame.

    Args:
        groups: training groups.
        benchmarks: name -> the benchmark's groups.

    Returns:
        Kept and removed groups.

    Raises:
        MediaError: an image that cannot be read.

    Example:
        >>> clean = ResponseGroup(prompt="a", responses=["b", "c"], rankings=[1, 2])
        >>> decontaminate([clean], {"bench": [ResponseGroup(prompt="A ", responses=["d", "e"])]}).removed[0][1:]
        ('bench', 'prompt')
    """
    indices = {name: _Index(items) for name, items in benchmarks.items()}
    kept, removed = [], []
    for group in groups:
        match = next(
            ((name, reason) for name, index in indices.items() if (reason := index.match(group)) is not None), None
        )
        if match is None:
            kept.append(group)
        else:
            removed.append((group, *match))
    return Decontamination(kept, removed)


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """64 bits that re-encoding and resizing hardly change: signs of the low frequencies of the grey picture.

    Args:
        image: any picture.

    Returns:
        (64,) bool.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = dctn(grey, norm="ortho")[:8, :8].flatten()
    return low > np.median(low[1:])  # the first is the mean brightness


class _Index:
    """Look-ups over one benchmark."""

    def __init__(self, groups: Sequence[ResponseGroup]) -> None:
        self.prompts = {_normalise(_prompt_text(group)) for group in groups}
        self.responses = {text for group in groups for text in _long_responses(group)}
        self.pixels: set[str] = set()
        self.bands: dict[tuple[int, bytes], list[np.ndarray]] = {}
        for group in groups:
            for image in _pictures(group):
                self.pixels.add(_pixel_hash(image))
                found = perceptual_hash(image)
                for key in _band_keys(found):
                    self.bands.setdefault(key, []).append(found)

    def match(self, group: ResponseGroup) -> str | None:
        """The first reason for which a group meets the benchmark."""
        tests: dict[str, Callable[[ResponseGroup], bool]] = {
            "image": self._shares_image,
            "prompt": self._shares_prompt,
            "response": lambda g: not self.responses.isdisjoint(_long_responses(g)),
        }
        return next((reason for reason, test in tests.items() if test(group)), None)

    def _shares_prompt(self, group: ResponseGroup) -> bool:
        prompt = _normalise(_prompt_text(group))
        has_media = bool(group.images or group.videos)
        return prompt in self.prompts and (not has_media or len(prompt) >= _DISTINCTIVE_PROMPT)

    def _shares_image(self, group: ResponseGroup) -> bool:
        if not self.pixels:
            return False
        for image in _pictures(group):
            if _pixel_hash(image) in self.pixels:
                return True
            found = perceptual_hash(image)
            candidates = [other for key in _band_keys(found) for other in self.bands.get(key, ())]
            if any(np.count_nonzero(found != other) <= _MAX_DISTANCE for other in candidates):
                return True
        return False


def _pictures(group: ResponseGroup) -> list[Image.Image]:
    media: list[Any] = [*group.images, *(video[0] for video in group.videos)]
    return [load_image(item) for item in media]


def _pixel_hash(image: Image.Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + image.convert("RGB").tobytes()).hexdigest()


def _band_keys(found: np.ndarray) -> list[tuple[int, bytes]]:
    return [(number, found[band].tobytes()) for number, band in enumerate(_BANDS)]


def _long_responses(group: ResponseGroup) -> set[str]:
    texts = {_normalise(response) for response in group.responses}
    return {text for text in texts if len(text) >= _DISTINCTIVE_RESPONSE}


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _prompt_text(group: ResponseGroup) -> str:
    return " ".join(block["text"] for turn in group.messages for block in turn["content"] if block["type"] == "text")
