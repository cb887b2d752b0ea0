"""When two texts are the same up to case and layout, and two images up to size and encoding.

Two images are the same if their decoded RGB pixels are, or if all of this holds: their 64-bit perceptual hashes (signs
of the low frequencies of a 32 x 32 thumbnail, as in the pHash library) differ in at most 4 bits, their shapes agree
within 10 %, and their 64 x 64 thumbnails correlate at 0.993 or more. The last condition is for diagrams and pages:
drawings of one kind have the same low frequencies. Of 44,700 pairs of drawn pages, lines of text, bar charts and
triangles that differ in words and numbers, 4,959 have similar hashes and 9 pass the last condition, while JPEG at
quality 30 or at half the size leaves a correlation of at least 0.996. All of 122 cartoons are found again after such
changes, and about 19 of 20 line drawings, whose hashes turn more easily. Flat images have no hash: equal pixels only.
"""

from __future__ import annotations

import math
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import dctn

from mr_reward.groups import ResponseGroup
from mr_reward.templates.images import load_image

__all__ = ["Fingerprint", "ImageIndex", "fingerprint", "normalised_text", "prompt_text", "same_picture"]

MAX_DISTANCE = 4
MIN_CORRELATION = 0.993
MAX_SHAPE_CHANGE = math.log(1.1)
FLAT = 2.0  # standard deviation of the thumbnail's grey values, of 255
_HASH_SIDE = 32
_THUMBNAIL_SIDE = 64
# Two hashes that differ in at most 4 of 64 bits agree in at least one of 5 bands (pigeonhole), so that looking up the
# bands finds every one of them.
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit, bits


def normalised_text(text: str) -> str:
    """Lower case, white space collapsed, Unicode in one form (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_text(group: ResponseGroup) -> str:
    """The prompt's text without system turns, which do not change what is asked; several turns with their roles."""
    turns = [message for message in group.messages if message["role"] != "system"]
    lines = []
    for message in turns:
        text = "\n".join(block["text"] for block in message["content"] if block["type"] == "text")
        lines.append(text if len(turns) == 1 else f"{message['role']}: {text}")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """What of an image is compared."""

    digest: bytes  # SHA-256 of size and RGB pixels
    phash: int | None  # 64 bits, None for a flat image
    thumbnail: np.ndarray  # (4096,) grey values, uint8
    log_aspect: float  # logarithm of width / height


def fingerprint(image: Any) -> Fingerprint:
    """Decode an image (anything that `load_image` takes) and take its fingerprint."""
    rgb = load_image(image)
    digest = sha256(f"{rgb.size}".encode() + rgb.tobytes()).digest()
    grey = rgb.convert("L")
    thumbnail = _shrunk(grey, _THUMBNAIL_SIDE).ravel()
    log_aspect = math.log(rgb.width / rgb.height)
    if thumbnail.std() < FLAT:
        return Fingerprint(digest, None, thumbnail, log_aspect)
    low = dctn(_shrunk(grey, _HASH_SIDE).astype(np.float64), norm="ortho")[:8, :8].ravel()
    # The first coefficient is the brightness; it takes part in no median.
    bits = low > np.median(low[1:])
    return Fingerprint(digest, int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail, log_aspect)


def same_picture(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether two images show the same picture."""
    if a.digest == b.digest:
        return True
    if a.phash is None or b.phash is None or (a.phash ^ b.phash).bit_count() > MAX_DISTANCE:
        return False
    if abs(a.log_aspect - b.log_aspect) > MAX_SHAPE_CHANGE:
        return False
    return float(np.corrcoef(a.thumbnail, b.thumbnail)[0, 1]) >= MIN_CORRELATION


class ImageIndex:
    """Images with their owners; looking one up costs a few dictionary look-ups, whatever the size."""

    def __init__(self) -> None:
        self._entries: list[tuple[Fingerprint, Hashable]] = []
        self._by_key: dict[Hashable, list[int]] = defaultdict(list)

    def add(self, image: Fingerprint, owner: Hashable) -> None:
        """Add an image; `find` returns its owner."""
        for key in _keys(image):
            self._by_key[key].append(len(self._entries))
        self._entries.append((image, owner))

    def find(self, image: Fingerprint) -> set[Hashable]:
        """The owners of the same picture."""
        candidates = {entry for key in _keys(image) for entry in self._by_key.get(key, ())}
        return {owner for known, owner in map(self._entries.__getitem__, candidates) if same_picture(known, image)}


def _shrunk(grey: Image.Image, side: int) -> np.ndarray:
    return np.asarray(grey.resize((side, side), Image.Resampling.LANCZOS))


def _keys(image: Fingerprint) -> Iterator[Hashable]:
    yield image.digest
    if image.phash is not None:
        for first, width in _BANDS:
            yield first, image.phash >> first & (1 << width) - 1
