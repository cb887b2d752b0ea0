"""Media of groups as files: what a row names -> media that exist, and media -> files named by their content."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

from PIL import Image, UnidentifiedImageError

from mr_reward.checkpoint.checksums import written_whole_file
from mr_reward.errors import MediaError, shown
from mr_reward.groups import ResponseGroup
from mr_reward.templates.images import image_source, is_url, load_image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})

_LARGEST_DOWNLOAD = 64 << 20  # bytes of an image that is fetched
_SECONDS = 30.0  # without an answer
_LARGEST_ASPECT_RATIO = 200  # `smart_resize` in transformers' image processors of Qwen


def resolve_media(
    group: ResponseGroup, root: Path, within: str | Path | None = None, *, fetch_urls: bool = False
) -> ResponseGroup:
    """The group with media that can be opened: paths that exist, encoded bytes, PIL images.

    Images are given as `load_image` takes them; a video is a list of such frames, or of one path, that of a folder of
    frames. Relative paths count from `root`, and what a row names has to lie in `within`, or, if that is None, in
    `root` or the working folder. `fetch_urls`: images behind http and https are downloaded; a row decides then what
    this machine asks for.
    """
    if not group.images and not group.videos:
        return group
    roots = _Roots(root, (root, Path.cwd()) if within is None else (Path(within),), fetch_urls)
    images = [_resolve_image(image, roots, f"images[{i}]") for i, image in enumerate(group.images)]
    videos = [_resolve_video(video, roots, f"videos[{i}]") for i, video in enumerate(group.videos)]
    # The messages hold the placeholders and no media; the prompt as given may still hold both.
    return replace(group, prompt=group.messages, images=images, videos=videos)


def check_readable(group: ResponseGroup) -> None:
    """Decode all media of a group: MediaError for one that no model could be shown, with its place in the group."""
    places = [(f"images[{i}]", image) for i, image in enumerate(group.images)]
    places += [(f"videos[{i}][{j}]", frame) for i, video in enumerate(group.videos) for j, frame in enumerate(video)]
    for field, source in places:
        try:
            size = load_image(source).size
        except MediaError as error:
            raise MediaError(f"{field}: {error}") from error
        if max(size) > _LARGEST_ASPECT_RATIO * min(size):
            raise MediaError(
                f"{field}: the image {shown(source)} is {size[0]} x {size[1]}, and Qwen's processors take none that "
                f"is more than {_LARGEST_ASPECT_RATIO} times as long as wide; crop or remove it"
            )


def rebase_path(path: str, root: Path, folder: Path) -> str:
    """A path that counts from `root`, counted from `folder`; absolute ones, URLs and other URIs stay as they are."""
    if Path(path).is_absolute() or is_url(path) or path[:7].lower().startswith(("data:", "file://")):
        return path
    return Path(os.path.relpath(root / path, folder)).as_posix()


def write_image(image: Any, folder: Path) -> Path:
    """Write an image as `<sha256>.<type>`; what is there already is left alone.

    Encoded bytes are written as they are, anything else that `load_image` takes as PNG.
    """
    if isinstance(image, (bytes, bytearray)):
        content, suffix = bytes(image), _suffix(bytes(image))
    else:
        buffer = BytesIO()
        load_image(image).save(buffer, "PNG")
        content, suffix = buffer.getvalue(), ".png"
    path = folder / f"{sha256(content).hexdigest()}{suffix}"
    if not path.exists():
        with written_whole_file(path) as unfinished:
            unfinished.write_bytes(content)
    return path


class _Roots(NamedTuple):
    base: Path  # relative paths count from here
    allowed: tuple[Path, ...]  # every path lies in one of these
    fetch_urls: bool = False


def _resolve_image(image: Any, roots: _Roots, field: str) -> Any:
    try:
        image = image_source(image)
        if roots.fetch_urls and is_url(image):
            image = _fetched(image)
    except MediaError as error:
        raise MediaError(f"{field}: {error}") from error
    if isinstance(image, bytes):
        _suffix(image, f"{field}: ")
        return image
    if isinstance(image, Image.Image) or hasattr(image, "__array__"):
        return image
    path = _path(image, roots, field)
    if not os.path.isfile(path):  # unlike the method, no error for a name that no file can have
        raise MediaError(
            f"{field}: {shown(str(path), 300)} is not a file; check the path and the folder that it counts from"
        )
    return path


def _fetched(url: str) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "mr-reward"}), timeout=_SECONDS) as answer:
            content = answer.read(_LARGEST_DOWNLOAD + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise MediaError(f"{shown(url, 200)} cannot be fetched ({error}); download it and give the path") from error
    if len(content) > _LARGEST_DOWNLOAD:
        raise MediaError(
            f"{shown(url, 200)} has more than {_LARGEST_DOWNLOAD >> 20} MiB; download it and give the path"
        )
    return content


def _resolve_video(video: Sequence[Any], roots: _Roots, field: str) -> list[Any]:
    if len(video) == 1 and isinstance(video[0], (str, Path)):
        path = _path(video[0], roots, field)
        if path.suffix.lower() in VIDEO_SUFFIXES:
            # torchvision reads no videos any more, and no decoder is among the dependencies.
            raise MediaError(
                f"{field}: {str(path)!r} is a video file and none is decoded here; write its frames into a folder, "
                f"for example `ffmpeg -i {path.name} -vf fps=1 {path.stem}/%05d.jpg`, and give the folder"
            )
        if os.path.isdir(path):
            frames = [frame for frame in path.iterdir() if frame.suffix.lower() in IMAGE_SUFFIXES]
            if not frames:
                raise MediaError(
                    f"{field}: {str(path)!r} holds no image file, expected one for each frame of the video"
                )
            return sorted(frames, key=lambda frame: _natural_key(frame.name))  # frame 2 before frame 10
    return [_resolve_image(frame, roots, f"{field}[{i}]") for i, frame in enumerate(video)]


def _path(value: Any, roots: _Roots, field: str) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise MediaError(f"{field}: is {shown(value, 60)}, expected a path, encoded bytes or a PIL image")
    if is_url(value):
        raise MediaError(
            f"{field}: {shown(value, 200)} is a URL and nothing is fetched; download it and give the path, or give "
            "--fetch-urls to `mr-reward score`, `evaluate` or `data convert`, in Python fetch_urls=True to "
            "load_preferences"
        )
    path = roots.base / value
    # By name: a link in the folder was put there by who owns it.
    place = Path(os.path.abspath(path))
    if not any(place.is_relative_to(os.path.abspath(folder)) for folder in roots.allowed):
        # Rows come from anywhere, and what they name is opened, copied and shown.
        raise MediaError(
            f"{field}: {shown(str(value), 200)} leads out of "
            f"{' and of '.join(repr(str(root)) for root in roots.allowed)}; move the file there, or start from a "
            "folder that holds it"
        )
    return path


def _suffix(content: bytes, where: str = "") -> str:
    """The file type of encoded bytes; reads the header only."""
    try:
        with Image.open(BytesIO(content)) as image:
            return f".{(image.format or 'image').lower()}".replace(".jpeg", ".jpg")
    except UnidentifiedImageError as error:  # its text is the address of a buffer
        raise MediaError(
            f"{where}{len(content)} bytes are no image (no known type: cut off, or a web page?); replace or remove it"
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{where}{len(content)} bytes are no image ({error}); replace or remove it") from error


def _natural_key(name: str) -> list[Any]:
    # Text and digits alternate, text first, so that the keys of two names compare part by part.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
