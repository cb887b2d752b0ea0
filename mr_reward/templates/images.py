"""Open and check images: one form (RGB, upright) for everything that follows."""

import os
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mr_reward.errors import MediaError

__all__ = ["load_image"]

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
        An RGB image.

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
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert() would make everything above 255 white
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except _DECODER_ERRORS as error:  # a truncated file shows only when its pixels are read
        raise MediaError(f"image {name} cannot be read ({error}); replace or remove it") from error
