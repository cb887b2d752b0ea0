"""Open and check images: one form (RGB, upright) for everything that follows."""

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from mr_reward.errors import MediaError

__all__ = ["load_image"]


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
        return _upright_rgb(_open(BytesIO(source), f"{len(source)} bytes"), f"{len(source)} bytes")
    if isinstance(source, (str, Path)):
        if str(source).startswith(("http://", "https://")):
            raise MediaError(f"image {source!r} is a URL and nothing is fetched; download it and pass the path")
        if not Path(source).is_file():
            raise MediaError(f"image {str(source)!r} does not exist or is not a file; check the path")
        return _upright_rgb(_open(Path(source), repr(str(source))), repr(str(source)))
    if isinstance(source, Image.Image):
        return _upright_rgb(source, f"PIL image {source.size}")
    raise MediaError(f"an image is {type(source).__name__}, expected a PIL image, a path or encoded bytes")


def _open(source: BytesIO | Path, name: str) -> Image.Image:
    try:
        return Image.open(source)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise MediaError(f"image {name} cannot be opened ({error}); replace or remove it") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if not image.width or not image.height:
        raise MediaError(f"image {name} has no pixels; replace or remove it")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # a truncated file shows only when its pixels are read
        raise MediaError(f"image {name} cannot be read ({error}); replace or remove it") from error
