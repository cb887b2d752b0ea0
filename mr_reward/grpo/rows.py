"""Rollouts as TRL hands them over -> a one-response `ResponseGroup` and the small row that travels between ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.templates.images import load_image

__all__ = ["RolloutRow", "completion_text", "prompt_fingerprint", "read_rollouts"]

Completion = str | Sequence[Mapping[str, Any]]
Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """What the other ranks need to know of one rollout: two strings, never media.

    Args:
        fingerprint: hash of the prompt's text and media; equal for all rollouts of one prompt.
        response: the text of the completion.
    """

    fingerprint: str
    response: str


def read_rollouts(
    prompts: Sequence[Prompt], completions: Sequence[Completion], columns: Mapping[str, Any]
) -> tuple[list[ResponseGroup], list[RolloutRow]]:
    """Read this rank's rollouts.

    Images are taken from the prompt's content blocks, where TRL puts them; from the `images` or else the `image`
    column if no block carries one.

    Args:
        prompts: M prompts, plain text or chat messages.
        completions: M completions, plain text or chat messages.
        columns: the keyword arguments of the reward call; `images` (M lists or None) and `image` (M images or None)
            are looked at.

    Returns:
        M groups of one response each (they hold prompt and media) and the M rows to be gathered.

    Raises:
        GroupError: a prompt or a completion is not in a shape that TRL produces; the message names the row.
        MediaError: media are missing, unreadable or do not match the placeholders.

    Example:
        >>> groups, rows = read_rollouts(["2 + 2?"], ["4"], {})
        >>> rows[0].response
        '4'
    """
    images = _image_column(columns, len(prompts))
    if not len(prompts) == len(completions) == len(images):
        raise GroupError(
            f"got {len(prompts)} prompts, {len(completions)} completions and {len(images)} entries in the image "
            "column, expected one of each per rollout; pass what GRPOTrainer passes to a reward function"
        )
    groups = []
    for i, (prompt, completion, media) in enumerate(zip(prompts, completions, images, strict=True)):
        name = f"rollout {i}"
        groups.append(
            ResponseGroup(
                prompt=_without_empty_content(prompt),
                responses=[completion_text(completion, name=name)],
                images=() if _carries_images(prompt) else media,
                id=name,
            )
        )
    return groups, [RolloutRow(prompt_fingerprint(group), group.responses[0]) for group in groups]


def completion_text(completion: Completion, *, name: str = "completion") -> str:
    """The text of a completion that the reward model is to judge.

    The rule: what a reader of the chat would see the policy say. That is the content of the assistant turns, several
    joined by a blank line; a missing content is the empty text. Left out: tool calls, tool results and other turns,
    and reasoning that TRL's response parser has moved to a key of its own (reasoning inside the content stays).

    Args:
        completion: plain text or chat messages with string content, text blocks or None.
        name: how to call it in an error message.

    Returns:
        The text, unchanged: lone surrogates, control tokens as text and white space are kept.

    Raises:
        GroupError: another shape, or an assistant turn with a block that is not text.

    Example:
        >>> completion_text([{"role": "assistant", "content": "4"}])
        '4'
    """
    if isinstance(completion, str):
        return completion
    turns = []
    for message in completion if isinstance(completion, Sequence) else [None]:
        if not isinstance(message, Mapping):
            raise GroupError(
                f"{name}: completion is {completion!r}, expected a string or a list of chat messages; pass the "
                "completions that GRPOTrainer passes to a reward function"
            )
        if message.get("role") == "assistant":
            turns.append(_turn_text(message, name))
    return "\n\n".join(turn for turn in turns if turn)


def prompt_fingerprint(group: ResponseGroup) -> str:
    """Hash of everything that makes a prompt: roles, text, placeholders and the content of the media.

    Args:
        group: a group; its responses do not count.

    Returns:
        32 hexadecimal digits.

    Raises:
        MediaError: a medium cannot be read.

    Example:
        >>> one, two = (ResponseGroup(prompt="Hi", responses=[text]) for text in "ab")
        >>> prompt_fingerprint(one) == prompt_fingerprint(two)
        True
    """
    digest = hashlib.blake2b(digest_size=16)
    # json escapes lone surrogates, which have no UTF-8
    parts: list[bytes] = [json.dumps(group.messages, sort_keys=True).encode()]
    for medium in (*group.images, *group.videos):
        parts.extend(_media_parts(medium))
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _turn_text(message: Mapping[str, Any], name: str) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        if not isinstance(block, Mapping) or not isinstance(block.get("text"), str):
            kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
            raise GroupError(
                f"{name}: an assistant turn has a content block of type {kind!r}, expected text blocks; "
                "the reward model judges text responses only"
            )
        texts.append(block["text"])
    return "".join(texts)


def _without_empty_content(prompt: Prompt) -> Prompt:
    """Give assistant turns that only call tools the empty text; `ResponseGroup` wants a content everywhere."""
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "content": ""} if isinstance(message, Mapping) and message.get("content") is None else message
        for message in prompt
    ]


def _blocks(prompt: Prompt) -> Iterable[Mapping[str, Any]]:
    for message in () if isinstance(prompt, str) else prompt:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, Sequence) and not isinstance(content, str):
            yield from (block for block in content if isinstance(block, Mapping))


def _carries_images(prompt: Prompt) -> bool:
    return any(block.get("image") is not None for block in _blocks(prompt))


def _image_column(columns: Mapping[str, Any], length: int) -> list[Sequence[Any]]:
    """M lists of images; `images` wins over `image`, as in TRL."""
    if columns.get("images") is not None:
        return [images if images is not None else () for images in columns["images"]]
    if columns.get("image") is not None:
        return [(image,) if image is not None else () for image in columns["image"]]
    return [()] * length


def _media_parts(medium: Any) -> Iterable[bytes]:
    if isinstance(medium, Sequence) and not isinstance(medium, str | bytes | bytearray):
        yield f"{len(medium)} frames".encode()
        for frame in medium:
            yield from _media_parts(frame)
    else:
        # as the model will see it: a file, its bytes and the opened image are the same picture
        image = load_image(medium)
        yield f"{image.size}".encode()
        yield image.tobytes()
