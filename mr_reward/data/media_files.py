"""Media of groups as files: what a row names -> media that exist, and media -> files named by their content."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mr_reward.checkpoint.checksums import written_whole_file
from mr_reward.errors import MediaError
from mr_reward.groups import ResponseGroup
from mr_reward.templates.images import load_image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})


def resolve_media(group: ResponseGroup, root: Path, within: str | Path | None = None) -> ResponseGroup:
    """The group with media that can be opened: paths that exist, encoded bytes, PIL images.

    Images are given as paths, bytes, PIL images or rows of `datasets` (`{"bytes": ..., "path": ...}`); a video is a
    list of such frames, or of one path, that of a folder of frames. Relative paths count from `root`, and what a row
    names has to lie in `within`, or, if that is None, in `root` or the working folder.
    """
    if not group.images and not group.videos:
        return group
    roots = _Roots(root, (root, Path.cwd()) if within is None else (Path(within),))
    images = [_resolve_image(image, roots, f"images[{i}]") for i, image in enumerate(group.images)]
    videos = [_resolve_video(video, roots, f"videos[{i}]") for i, video in enumerate(group.videos)]
    # The messages hold the placeholders and no media; the prompt as given may still hold both.
    return replace(group, prompt=group.messages, images=images, videos=videos)


def rebase_path(path: str, root: Path, folder: Path) -> str:
    """A path that counts from `root`, counted from `folder`; absolute ones and URLs stay as they are."""
    if Path(path).is_absolute() or path.startswith(("http://", "https://")):
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


def _resolve_image(image: Any, roots: _Roots, field: str) -> Any:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (bytes, bytearray)):
        _suffix(bytes(image), f"{field}: ")
        return bytes(image)
    path = _path(image, roots, field)
    if not os.path.isfile(path):  # unlike the method, no error for a name that no file can have
        raise MediaError(
            f"{field}: {str(path)!r:.300} is not a file; check the path and the folder that it counts from"
        )
    return path


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
        raise MediaError(f"{field}: is {value!r:.60}, expected a path, encoded bytes or a PIL image")
    if str(value).startswith(("http://", "https://")):
        raise MediaError(f"{field}: {value!r:.200} is a URL and nothing is fetched; download it and give the path")
    path = roots.base / value
    # By name: a link in the folder was put there by who owns it.
    place = Path(os.path.abspath(path))
    if not any(place.is_relative_to(os.path.abspath(folder)) for folder in roots.allowed):
        # Rows come from anywhere, and what they name is opened, copied and shown.
        raise MediaError(
            f"{field}: {str(value)!r:.200} leads out of {' and of '.join(repr(str(root)) for root in roots.allowed)}; "
            "move the file there, or start from a folder that holds it"
        )
    return path


def _suffix(content: bytes, where: str = "") -> str:
    """The file type of encoded bytes; reads the header only."""
    try:
        with Image.open(BytesIO(content)) as image:
            return f".{(image.format or 'image').lower()}".replace(".jpeg", ".jpg")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{where}{len(content)} bytes are no image ({error}); replace or remove it") from error


def _natural_key(name: str) -> list[Any]:
    # Text and digits alternate, text first, so that the keys of two names compare part by part.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
