"""Chat messages: the turns of a prompt, with its media and tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mr_reward.errors import GroupError, MediaError, shown

MEDIA_TYPES = ("image", "video")
_IMAGE_BLOCKS = ("image", "image_url", "input_image")  # of transformers and TRL; of OpenAI's two interfaces
# What chat templates read of a turn beside role and content; the name of a tool's turn besides.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TURN_KEYS = ("tool_calls", "tool_call_id", *REASONING_KEYS)
Message = dict[str, Any]


def normalise_messages(
    prompt: str | Sequence[Mapping[str, Any]], name: str
) -> tuple[list[Message], dict[str, list[Any]]]:
    """Copy the prompt into messages of content blocks and take the media out of them."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not prompt:
        raise GroupError(
            f"{name}: prompt is {shown(prompt, 200)}, expected a string or a non-empty list of chat messages"
        )
    embedded: dict[str, list[Any]] = {kind: [] for kind in MEDIA_TYPES}
    messages = []
    for i, message in enumerate(prompt):
        calls = isinstance(message, Mapping) and message.get("tool_calls")
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or ("content" not in message and not calls)
        ):
            raise GroupError(
                f"{name}: message {i} is {shown(message, 200)}, expected a dict with 'role' and 'content'"
            )
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif content is None and calls:
            content = []
        if not isinstance(content, Sequence):
            raise GroupError(
                f"{name}: content of message {i} is {type(content).__name__}, expected a string or a list of blocks"
            )
        keys = (*_TURN_KEYS, "name") if message["role"] == "tool" else _TURN_KEYS
        rest = {key: message[key] for key in keys if message.get(key) is not None}
        blocks = [_normalise_block(block, i, name, embedded) for block in content]
        messages.append({"role": message["role"], "content": blocks, **plain_json(rest, f"{name}: message {i}")})
    return messages, embedded


def plain_json(value: Any, name: str) -> Any:
    """A copy made of what JSON has; chat templates, files and the wire take nothing else."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise GroupError(f"{name}: {error}; expected values that JSON has") from error


def tools_of(column: Any) -> Any:
    """The tools of a row: a list, or, as TRL's data sets may have it, the same as JSON text; None for no tools."""
    if not isinstance(column, str):
        return column or ()
    try:
        return json.loads(column)
    except ValueError as error:
        raise GroupError(
            f"tools is {column!r:.80}, which is no JSON ({error}); give a list of JSON schemas"
        ) from error


def split_tags(text: str, kinds: Sequence[str] = MEDIA_TYPES) -> list[dict[str, Any]]:
    """Text in which `<image>` and `<video>` stand for media, as content blocks.

    Example:
        >>> split_tags("<image>What?")
        [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
    """
    pieces = re.split("|".join(f"(<{kind}>)" for kind in kinds), text)
    tags = {f"<{kind}>": kind for kind in kinds}
    return [{"type": tags[piece]} if piece in tags else {"type": "text", "text": piece} for piece in pieces if piece]


def _normalise_block(block: Any, index: int, name: str, embedded: dict[str, list[Any]]) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return {"type": "text", "text": block["text"]}
    if kind in _IMAGE_BLOCKS:
        if (image := image_of(block)) is not None:
            embedded["image"].append(image)
        return {"type": "image"}
    if kind == "video":
        if block.get("video") is not None:
            embedded["video"].append(block["video"])
        return {"type": "video"}
    raise GroupError(
        f"{name}: a content block of message {index} is {shown(block, 200)}, expected "
        "{'type': 'text', 'text': str}, {'type': 'image'} or {'type': 'video'}"
    )


def image_of(block: Mapping[str, Any]) -> Any:
    """The image that a content block carries; None for a placeholder or another block."""
    if block.get("type") not in _IMAGE_BLOCKS:
        return None
    if block.get("base64") is not None:
        return {"base64": block["base64"]}
    return next((block[key] for key in ("image", "image_url", "path", "url") if block.get(key) is not None), None)


def match_media(
    messages: list[Message], kind: str, given: Sequence[Any], embedded: list[Any], name: str
) -> tuple[Any, ...]:
    """Pair the media with the placeholders; add placeholders to a prompt that has none."""
    placeholders = sum(block["type"] == kind for message in messages for block in message["content"])
    if embedded and given:
        raise MediaError(
            f"{name}: {len(given)} {kind}s were passed and {len(embedded)} more sit inside the prompt's blocks; "
            "pass them in one place only"
        )
    media = tuple(embedded or given)
    if media and not placeholders:
        placeholders = _place_tags(messages, kind, len(media), name)
    if media and not placeholders:
        turn = next((message for message in messages if message["role"] == "user"), None)
        if turn is None:
            raise MediaError(f"{name}: {len(media)} {kind}s but no user turn in the prompt to show them in")
        turn["content"][:0] = [{"type": kind} for _ in media]
    elif len(media) != placeholders:
        raise MediaError(
            f"{name}: the prompt has {placeholders} {kind} placeholders but {len(media)} {kind}s came with it; "
            "give one for each placeholder, in order"
        )
    for medium in media if kind == "video" else ():
        if isinstance(medium, (str, bytes)) or not isinstance(medium, Sequence) or not medium:
            raise MediaError(
                f"{name}: a video is {shown(medium, 60)}, expected a non-empty list of frames (images, paths, bytes); "
                "read the frames from the file first"
            )
    return media


def _place_tags(messages: list[Message], kind: str, num_media: int, name: str) -> int:
    """Make the `<image>` or `<video>` of the texts placeholder blocks; their number, 0 if there are none."""
    tag = f"<{kind}>"
    blocks = [block for message in messages for block in message["content"] if block["type"] == "text"]
    num_tags = sum(block["text"].count(tag) for block in blocks)
    if num_tags not in (0, num_media):
        raise MediaError(
            f"{name}: the text of the prompt has {num_tags} {tag} but {num_media} {kind}s came with it; give one for "
            f"each {tag}, or say where they stand with blocks {{'type': '{kind}'}}, beside which {tag} is text"
        )
    for message in messages if num_tags else ():
        message["content"] = [
            part
            for block in message["content"]
            for part in (split_tags(block["text"], (kind,)) if tag in block.get("text", "") else [block])
        ]
    return num_tags


def tool_function(call: Any, part: str) -> Mapping[str, Any]:
    """Name and arguments of a tool call, in both forms that there are; `part` is what an error calls it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise GroupError(f"{part} is {call!r:.100}, expected {{'function': {{'name': ..., 'arguments': ...}}}}")
    return function


def short_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages whose content is a text where it is nothing else."""
    return [
        {**message, "content": message["content"][0]["text"]}
        if [block["type"] for block in message["content"]] == ["text"]
        else message
        for message in messages
    ]
