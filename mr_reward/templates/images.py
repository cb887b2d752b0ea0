"""Open and check images: one form (RGB, upright) for everything that follows."""

import hashlib
import os
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mr_reward.errors import MediaError

# What Pillow's decoders raise for damaged files; its own limits on unpacked data are ValueErrors.
_DECODER_ERRORS = (
    EOFError,
    IndexError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


def load_image(source: Any) -> Image.Image:
    """Open an image, turn it upright by its EXIF tag and convert it to RGB.

    Transparent pixels become white, as they look on a page; the conversion of PIL alone would show what hides there.

    Args:
        source: PIL image, path, encoded bytes, or a row of `datasets` (`{"bytes": ..., "path": ...}`).

    Returns:
        An RGB image: the one given, if it is upright and RGB already.

    Raises:
        MediaError: missing, unreadable, truncated or of an unknown type. URLs are not fetched.

    Example:
        >>> load_image(Image.new("L", (2, 3))).mode
        'RGB'
    """
    if isinstance(source, dict) and (source.get("bytes") or source.get("path")):
        source = source.get("bytes") or source["path"]
    if isinstance(source, (bytes, bytearray)):
        return _decode(bytes(source), f"{len(source)} bytes")
    if isinstance(source, (str, Path)):
        name = repr(str(source)[:200])  # a path may turn out to be a whole encoded image
        if str(source).startswith(("http://", "https://")):
            raise MediaError(f"image {name} is a URL and nothing is fetched; download it and pass the path")
        if not os.path.isfile(source):
            raise MediaError(f"image {name} does not exist or is not a file; check the path")
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise MediaError(f"image {name} cannot be opened ({error}); replace or remove it") from error
        return _decode(content, name)
    if isinstance(source, Image.Image):
        return _upright_rgb(source, f"PIL image {source.size}")
    raise MediaError(f"an image is {type(source).__name__}, expected a PIL image, a path or encoded bytes")


class DecodedImages:
    """`load_image` that decodes an object, or a path or bytes that it has met, once: for one call and no longer.

    What is given has to live, and its file to stay as it is, as long as this does.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Image.Image] = {}
        self._digests: dict[int, str] = {}  # by object
        self._last: tuple[Any, str] = None, ""  # size and pixels, and their hash

    def __call__(self, source: Any) -> Image.Image:
        """The image."""
        if isinstance(source, dict):
            source = source.get("bytes") or source.get("path") or source
        key = source if isinstance(source, str | bytes | Path) else id(source)
        if key not in self._known:
            self._known[key] = load_image(source)
        return self._known[key]

    def digest(self, source: Any) -> str:
        """Hash of size and pixels as a model sees them: a file, its bytes and the opened image have the same."""
        image = self(source)
        if id(image) not in self._digests:
            pixels = image.size, image.tobytes()
            if pixels != self._last[0]:  # the rollouts of a prompt come one after the other, each with its own copy
                self._last = pixels, hashlib.blake2b(f"{image.size}".encode() + pixels[1]).hexdigest()
            self._digests[id(image)] = self._last[1]
        return self._digests[id(image)]


def _decode(content: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(BytesIO(content))
    except _DECODER_ERRORS as error:
        raise MediaError(f"image {name} cannot be opened ({error}); replace or remove it") from error
    return _upright_rgb(image, name)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if not image.width or not image.height:
        raise MediaError(f"image {name} has no pixels; replace or remove it")
    try:
        image.load()  # a truncated file shows only when its pixels are read
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert() would make everything above 255 white
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except _DECODER_ERRORS as error:
        raise MediaError(f"image {name} cannot be read ({error}); replace or remove it") from error
