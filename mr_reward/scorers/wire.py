"""What client and server send each other, and groups in and out of it.

JSON with every character outside ASCII escaped, so that the lone surrogates that a policy can write arrive as they
are. Images travel as the bytes of their file, or as PNG, which loses nothing. A request holds no path and no URL that
the server could be made to open, and nothing is unpickled.
"""

from __future__ import annotations

import base64
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mr_reward.errors import GroupError, MediaError
from mr_reward.groups import GroupScores, ResponseGroup
from mr_reward.messages.completions import Transcript, completion_text
from mr_reward.templates.images import image_source, load_image

# What the server opens; images of other kinds are sent as PNG. Pillow opens more, some through other programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class WireBlock(_Message):
    """A content block; media blocks are placeholders."""

    type: Literal["text", "image", "video"]
    text: str | None = None


class WireTurn(_Message):
    """A chat message."""

    role: str
    content: list[WireBlock]
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None  # of a tool
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None


class WireGroup(_Message):
    """A group to score."""

    id: str = Field(min_length=1, max_length=100)  # unique in its request
    name: str | None = None  # what messages call it
    messages: list[WireTurn]
    responses: list[str | list[WireTurn]]
    images: list[str] = []  # base64 of image files, in the order of the placeholders
    videos: list[list[str]] = []  # the same for each frame of each video
    tools: list[dict[str, Any]] = []  # JSON schemas


class ScoreRequest(_Message):
    """Groups to score."""

    request_id: str = Field(min_length=1, max_length=100)  # comes back with the answer
    groups: list[WireGroup] = Field(min_length=1)


class WireResult(_Message):
    """The id of a group, and beside it what `GroupScores.to_dict` gives, whatever that is."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, list[float] | list[bool] | float | str | None]
    id: str

    @classmethod
    def of(cls, id: str, scored: GroupScores) -> WireResult:
        """The result of the group with this id."""
        return cls.model_validate({**scored.to_dict(), "id": id})

    def scored(self, group: ResponseGroup) -> GroupScores:
        """The result of the group; ValueError if it cannot be one."""
        try:
            scored = GroupScores.from_dict(self.__pydantic_extra__, group)
        except GroupError as error:  # of the answer, not of the group
            raise ValueError(str(error)) from error
        if scored.scores is None and scored.drop_reason is None:
            raise ValueError("a group without scores and without a reason")
        for number in (scored.order_spread, scored.order_flip_rate):
            if isinstance(number, str | list):
                raise ValueError(f"{number!r:.80} where a number has to be")
        return scored


class ScoreAnswer(_Message):
    """Results of a request."""

    request_id: str
    model_hash: str  # `weights_digest` of the model that scored
    options: dict[str, Any]  # of the scorer, as far as they change scores
    results: list[WireResult]  # one for each group, in any order


class Health(_Message):
    """State of a server."""

    status: Literal["ok"]
    version: str  # of this package
    model_hash: str  # `weights_digest` of the model
    layout: str
    options: dict[str, Any]  # of the scorer, as far as they change scores
    max_groups: int  # of a request
    max_request_bytes: int
    pending_groups: int  # accepted and not scored yet


class ErrorAnswer(_Message):
    """Why there are no results."""

    error: str  # name of the error's type
    message: str


def dump(message: BaseModel) -> bytes:
    """A message as JSON in ASCII, of which `json.loads` gives back every string and number as it was."""
    # What was not set stays away: a server of an earlier version knows no tools.
    return json.dumps(message.model_dump(exclude_unset=True), separators=(",", ":")).encode("ascii")


def explain(error: Exception) -> str:
    """Where a message is wrong, without its content, which may be long."""
    if not isinstance(error, ValidationError):
        return str(error)[:500]
    first, *more = error.errors(include_input=False, include_url=False)
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" + (f" (and {len(more)} more)" if more else "")


def to_wire(group: ResponseGroup, id: str) -> WireGroup:
    """A group as it is sent; rankings and source stay here. MediaError if an image is missing or unreadable."""
    with _named(group.name):
        images = [_encode(image) for image in group.images]
        videos = [[_encode(frame) for frame in video] for video in group.videos]
    responses = [list(text.turns) if isinstance(text, Transcript) else text for text in group.responses]
    sent = {"id": id, "name": group.id, "messages": group.messages, "responses": responses}
    tools = {"tools": list(group.tools)} if group.tools else {}
    return WireGroup.model_validate({**sent, "images": images, "videos": videos, **tools})


def from_wire(message: WireGroup, max_pixels: int) -> ResponseGroup:
    """The group that a client sent; images with more pixels are refused before they are unpacked."""
    with _named("group (no id)" if message.name is None else f"group {message.name!r}"):
        images = [_decode(image, max_pixels) for image in message.images]
        videos = [[_decode(frame, max_pixels) for frame in video] for video in message.videos]
    return ResponseGroup(
        prompt=[_turn(turn) for turn in message.messages],
        responses=[
            completion_text(response if isinstance(response, str) else [*map(_turn, response)])
            for response in message.responses
        ],
        images=images,
        videos=videos,
        id=message.name,
        tools=message.tools,
    )


def _turn(turn: WireTurn) -> dict[str, Any]:
    return turn.model_dump(exclude_none=True)


@contextmanager
def _named(group: str) -> Iterator[None]:
    try:
        yield
    except MediaError as error:
        raise MediaError(f"{group}: {error}") from error


def _encode(source: Any) -> str:
    """Base64 of the image's file if the server opens its kind, else of a PNG with the same pixels."""
    content = _file_content(source)
    if content is None or not _is_known(content):
        buffer = BytesIO()
        load_image(source).save(buffer, format="PNG", compress_level=1)
        content = buffer.getvalue()
    return base64.b64encode(content).decode("ascii")


def _file_content(source: Any) -> bytes | None:
    source = image_source(source)
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path) and os.path.isfile(source) and os.access(source, os.R_OK):
        return Path(source).read_bytes()
    return None


def _is_known(content: bytes) -> bool:
    try:
        with _open(content):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _open(content: bytes) -> Image.Image:
    """Reads the header only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the server has its own limit
        return Image.open(BytesIO(content), formats=_FORMATS)


def _decode(text: str, max_pixels: int) -> Image.Image:
    try:
        image = _open(base64.b64decode(text, validate=True))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(
            f"an image of {len(text)} characters cannot be opened ({error}), expected base64 of a file of type "
            f"{', '.join(_FORMATS)}; replace or remove it"
        ) from error
    if image.width * image.height > max_pixels:
        raise MediaError(
            f"an image has {image.width} x {image.height} pixels, the server takes {max_pixels}; make it smaller, or "
            "start the server with a larger --max-megapixels"
        )
    return image
