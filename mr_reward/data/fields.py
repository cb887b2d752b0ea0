"""Fields of a row. An error about one names it, and says what was found and what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from mr_reward.data.sources import Row
from mr_reward.errors import GroupError, shown
from mr_reward.messages.prompts import Message
from mr_reward.templates.images import image_source

_PLACEHOLDERS = re.compile(r"[ \t]*<(?:image|video)>[ \t]*")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def field(row: Any, name: str, kind: type | tuple[type, ...], *, at: str = "") -> Any:
    """A field of one of these types (a bool is no int); `at` is where the object stands in the row: `answers[2]`."""
    path = f"{at}.{name}" if at else name
    if not isinstance(row, Mapping):
        raise GroupError(
            f"{at or 'the row'} is {row!r:.60}, expected an object with {name!r}; check data set and version"
        )
    if name not in row:
        raise GroupError(
            f"field {path!r} is missing, found {sorted(row)}; the published schema has it, check data set and version"
        )
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(row[name], kinds) or (isinstance(row[name], bool) and not {bool, object} & set(kinds)):
        raise GroupError(
            f"field {path!r} is {type(row[name]).__name__} ({shown(row[name], 60)}), expected "
            f"{' or '.join(k.__name__ for k in kinds)}; check data set and version"
        )
    return row[name]


def wrong_field(path: str, value: object, expected: str) -> GroupError:
    """The error about a value that contradicts the published schema."""
    return GroupError(f"field {path!r} is {shown(value)}, expected {expected}; check data set and version")


def texts_field(row: Row, name: str) -> list[str]:
    """A list of texts."""
    texts = field(row, name, list)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong_field(f"{name}[{i}]", text, "a text")
    return texts


def numbers_field(row: Row, name: str, size: int) -> list[float]:
    """A list with one finite number for each of the responses."""
    values = field(row, name, list)
    valid = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in values)
    if len(values) != size or not valid:
        raise wrong_field(name, values, f"{size} numbers, one per response")
    return [float(value) for value in values]


def row_id(row: Row, name: str = "id") -> str | None:
    """The row's own name, if it has one."""
    return str(row[name]) if row.get(name) not in (None, "") else None


def messages_field(row: Row, name: str) -> list[Message]:
    """Chat messages with an answer, the assistant's last turn, behind them."""
    messages = chat_field(row, name)
    if messages[-1]["role"] != "assistant" or not isinstance(messages[-1]["content"], str):
        raise wrong_field(name, messages, "chat messages with role and content that end with the assistant's")
    return messages


def chat_field(row: Row, name: str, *, at: str = "") -> list[Message]:
    """Chat messages: OpenAI's form (`role`, `content`; its other keys stay), or ShareGPT's (`from`, `value`)."""
    messages = [_message(message) for message in field(row, name, list, at=at)]
    if not messages or None in messages:
        raise wrong_field(name, row[name], "chat messages with role and content, or with from and value")
    return messages  # type: ignore[return-value]  # none is None


def _message(message: Any) -> Message | None:
    if not isinstance(message, Mapping):
        return None
    # Arrow has every key in every message, and None where it was not given.
    kept = {key: value for key, value in message.items() if value is not None and key != "loss_weight"}
    if "from" in kept and "role" not in kept:
        kept["role"], kept["content"] = _ROLES.get(kept.pop("from")), kept.pop("value", None)
    if not isinstance(kept.get("role"), str):
        return None
    content = kept.setdefault("content", None)
    if content is None and kept.get("tool_calls"):
        kept["content"] = ""
    elif isinstance(content, list):
        kept["content"] = [_block(block) for block in content]
    elif not isinstance(content, str):
        return None
    return kept


def _block(block: Any) -> Any:
    """A content block without the keys that Arrow has added; text of LLaMA-Factory's v1 stands under `value`."""
    if not isinstance(block, Mapping):
        return block
    kept = {key: value for key, value in block.items() if value is not None}
    if isinstance(kept.get("value"), str) and isinstance(kept.get("type"), str) and kept["type"] not in kept:
        kept[{"image_url": "image", "video_url": "video"}.get(kept["type"], kept["type"])] = kept.pop("value")
        kept["type"] = {"image_url": "image", "video_url": "video"}.get(kept["type"], kept["type"])
    return kept


def answer_text(message: Message, name: str) -> str:
    """The text of an assistant's turn; one that calls tools is no text."""
    content = message["content"]
    if message["role"] != "assistant" or message.get("tool_calls"):
        raise wrong_field(name, message, "an answer of the assistant, in text")
    if isinstance(content, str):
        return content
    if any(not isinstance(block, Mapping) or block.get("type") != "text" for block in content):
        raise wrong_field(name, content, "an answer in text blocks only")
    return "".join(block["text"] for block in content)


def media_fields(row: Row) -> dict[str, list[Any]]:
    """`images` and `videos` of a row, from the columns that formats have for them, one medium or several."""
    videos = _media(row, ("video", "videos"), "video")
    return {
        "images": _media(row, ("image", "images", "img_path"), "image"),
        "videos": [[video] if isinstance(video, str) else video for video in videos],
    }


def _media(row: Row, names: tuple[str, ...], kind: str) -> list[Any]:
    given = {name: row[name] for name in names if name in row and not is_empty(row[name])}
    if len(given) > 1:
        raise GroupError(f"fields {sorted(given)} are both given, expected one for the {kind}s; remove the other")
    values: Any = next(iter(given.values()), [])
    return [medium for medium in (values if isinstance(values, list) else [values]) if medium is not None]


_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)


def pair_badness(row: Row) -> list[float]:
    """Of the chosen and the rejected answer: by their scores where the row has them, so that equal ones tie."""
    for names in _SCORES:
        scores = [row.get(name) for name in names]
        if any(score is None for score in scores):
            continue
        try:
            chosen, rejected = (float(score) for score in scores)  # type: ignore[arg-type]  # a TypeError
        except (TypeError, ValueError):
            raise wrong_field(" and ".join(names), scores, "two numbers") from None
        if not chosen >= rejected:
            raise wrong_field(" and ".join(names), scores, "a chosen answer that is not the worse one")
        return [-chosen, -rejected]
    return [1, 2]


def turns_field(row: Row, name: str) -> tuple[str, str]:
    """What the human and what the model said, in LLaVA's form: one human and one gpt turn."""
    turns = field(row, name, list)
    if [turn.get("from") if isinstance(turn, Mapping) else None for turn in turns] != ["human", "gpt"]:
        raise wrong_field(name, turns, "a human and a gpt turn")
    return field(turns[0], "value", str, at=f"{name}[0]"), field(turns[1], "value", str, at=f"{name}[1]")


def image_field(row: Row, name: str) -> Any:
    """A PIL image, an array, a path or URL, or encoded bytes; see `image_source`."""
    value = image_source(row.get(name))
    if value is None or isinstance(value, Mapping) or (isinstance(value, str | bytes) and not value):
        raise GroupError(f"field {name!r} is missing or empty, found {sorted(row)}; the published schema has an image")
    if not isinstance(value, (str, bytes, Image.Image)) and not hasattr(value, "__array__"):
        raise wrong_field(name, value, "an image, a path or encoded bytes")
    return value


def is_empty(value: Any) -> bool:
    """Whether a column of a row holds nothing."""
    return value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and not value)


def place_media(messages: Sequence[Message], num_images: int, num_videos: int) -> list[Message]:
    """Messages whose `<image>` and `<video>` are placeholders where they stand, if there is a medium for each.

    They are taken out where the numbers differ: the media then stand before the first question.
    """
    texts = [message["content"] for message in messages if isinstance(message["content"], str)]
    numbers = {"<image>": num_images, "<video>": num_videos}
    in_place = all(sum(text.count(tag) for text in texts) == number for tag, number in numbers.items())
    if not (num_images or num_videos):
        return list(messages)
    place: Callable[[str], Any] = _with_blocks if in_place else strip_placeholders
    return [
        {**message, "content": place(message["content"])} if isinstance(message["content"], str) else message
        for message in messages
    ]


def _with_blocks(text: str) -> str | list[dict[str, str]]:
    parts = re.split(r"\s*<(image|video)>\s*", text)
    if len(parts) == 1:
        return text
    blocks = [{"type": part} if i % 2 else {"type": "text", "text": part} for i, part in enumerate(parts)]
    return [block for block in blocks if block.get("text") != ""]


def strip_placeholders(text: str) -> str:
    """Text without `<image>` and `<video>`, stripped; the group's media have places of their own."""
    return _PLACEHOLDERS.sub(" ", text).strip()
