"""Open and check images: what people have -> one form (RGB, upright) for everything that follows."""

import base64
import binascii
import hashlib
import os
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mr_reward.errors import MediaError, shown

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
    Numbers are read by their range: 0 to 1 (not whole) and 0 to 255 as brightness, whole ones above 255 as 16 bits.

    Args:
        source: PIL image, path, encoded bytes, or a row of `datasets` (`{"bytes": ..., "path": ...}`); also
            `file://` and `data:` URIs, an open file, an array (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4, and
            a content block of a chat (`{"type": "image_url", "image_url": {"url": ...}}`).

    Returns:
        An RGB image: the one given, if it is upright and RGB already.

    Raises:
        MediaError: missing, unreadable, truncated, of an unknown type or of numbers in another range. URLs are not
            fetched.

    Example:
        >>> load_image(Image.new("L", (2, 3))).mode
        'RGB'
    """
    source = image_source(source)
    if isinstance(source, bytes):
        return _decode(source, f"{len(source)} bytes")
    if isinstance(source, str | Path):
        name = shown(str(source), 200)  # a path may turn out to be a whole encoded image
        if is_url(source):
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
    if hasattr(source, "__array__"):
        return _upright_rgb(_from_array(source), "array")
    raise MediaError(f"an image is {type(source).__name__}, expected a PIL image, a path or encoded bytes")


def image_source(value: Any) -> Any:
    """What an image is to be read from: a path or URL, bytes, a PIL image or an array; else the value as it is.

    Looks into content blocks and rows of `datasets`, and reads open files, `data:` and `file://` URIs.
    """
    if isinstance(value, Mapping):
        if isinstance(encoded := value.get("base64"), str):
            return _from_base64(encoded)
        keys = ("bytes", "image", "image_url", "path", "url")
        found = next((value[key] for key in keys if value.get(key) is not None and not _is_empty(value[key])), None)
        return value if found is None else image_source(found)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str) and value[:5].lower() == "data:":
        head, _, body = value[5:].partition(",")
        return _from_base64(body) if head.rstrip().lower().endswith(";base64") else unquote_to_bytes(body)
    if isinstance(value, str) and value[:7].lower() == "file://":
        parts = urlsplit(value)
        if parts.netloc not in ("", "localhost"):
            raise MediaError(f"image {shown(value, 200)} names a file of another machine; give file:///PATH")
        return url2pathname(parts.path)
    if hasattr(value, "read") and hasattr(value, "seek"):
        value.seek(0)
        content = value.read()
        return content if isinstance(content, bytes) else value
    return value


def is_url(source: Any) -> bool:
    """Whether a source would have to be fetched."""
    return isinstance(source, str | Path) and str(source).lower().startswith(("http://", "https://"))


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
        found = image_source(source)
        key = found if isinstance(found, str | bytes | Path) else id(found)
        if key not in self._known:
            self._known[key] = load_image(found)
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


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | bytes) and not value


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(
            f"the base64 of an image ({len(text)} characters) cannot be read ({error}); encode the file again"
        ) from error


def _from_array(array: Any) -> Image.Image:
    try:
        values = np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor of bfloat16, or on a GPU
        raise MediaError(f"an image is an array that numpy cannot read ({error}); pass it as uint8") from error
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, -1)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (1, 3, 4)) or not values.size:
        raise MediaError(
            f"an image is an array of shape {values.shape}, expected (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 "
            "channels; pass each image on its own"
        )
    values = _eight_bits(values, "array")
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else np.ascontiguousarray(values))


def _eight_bits(values: np.ndarray, name: str, *, sixteen: bool = False) -> np.ndarray:
    """Brightness as uint8; PIL's own conversion cuts at 0 and 255, which makes black and white of other ranges."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise MediaError(f"image {name} holds {values.dtype}, expected numbers; convert it to uint8")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and 0 <= low and high <= 1:
        return np.rint(values * 255.0).astype(np.uint8)
    sixteen = sixteen or values.dtype == np.uint16
    if 0 <= low and high <= 255 and not sixteen:
        return values.astype(np.uint8)
    if 0 <= low and high <= 65535 and values.dtype.kind in "iu":
        return (values // 256).astype(np.uint8)
    raise MediaError(
        f"image {name} holds numbers from {low:g} to {high:g}, expected 0 to 1, 0 to 255 or whole ones up to 65535; "
        "scale them to 0 to 255"
    )


def _decode(content: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(BytesIO(content))
    except UnidentifiedImageError as error:  # its text is the address of a buffer
        raise MediaError(
            f"image {name} cannot be opened (no known type of image: cut off, or a web page?); replace or remove it"
        ) from error
    except _DECODER_ERRORS as error:
        raise MediaError(f"image {name} cannot be opened ({error}); replace or remove it") from error
    return _upright_rgb(image, name)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if not image.width or not image.height:
        raise MediaError(f"image {name} has no pixels; replace or remove it")
    try:
        image.load()  # a truncated file shows only when its pixels are read
        of_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_eight_bits(np.asarray(image), name, sixteen=of_16_bits))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except MediaError:
        raise
    except _DECODER_ERRORS as error:
        raise MediaError(f"image {name} cannot be read ({error}); replace or remove it") from error
