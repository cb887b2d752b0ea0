"""Fields of a row. An error about one names it, and says what was found and what was expected."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mr_reward.data.sources import Row
from mr_reward.errors import GroupError, shown
from mr_reward.messages.completions import completion_text
from mr_reward.messages.prompts import Message, tools_of
from mr_reward.templates.images import image_source

_PLACEHOLDERS = re.compile(r"[ \t]*<(?:image|video)>[ \t]*")
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "tool": "tool"} | {
    role: role for role in ("system", "user", "assistant")
}
_CALLS = ("function_call", "tool_call")  # of ShareGPT and of ms-swift: messages that are a call
_TOOL_ROLES = {"tool_response": "tool", "observation": "tool"}


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


def chat_field(row: Row, name: str, *, at: str = "") -> list[Message]:
    """Chat messages: OpenAI's form (`role`, `content`; its other keys stay), or ShareGPT's (`from`, `value`)."""
    messages = [_message(message) for message in field(row, name, list, at=at)]
    if not messages or None in messages:
        raise wrong_field(name, row[name], "chat messages with role and content, or with from and value")
    return _joined_calls([message for message in messages if message is not None])


def _message(message: Any) -> Message | None:
    if not isinstance(message, Mapping):
        return None
    # Arrow has every key in every message, and None where it was not given.
    kept = {key: value for key, value in message.items() if value is not None and key != "loss_weight"}
    if "from" in kept and "role" not in kept:
        kept["role"], kept["content"] = kept.pop("from"), kept.pop("value", None)
        kept["role"] = kept["role"] if kept["role"] in _CALLS else _ROLES.get(kept["role"])
    if not isinstance(kept.get("role"), str):
        return None
    content = kept.setdefault("content", None)
    if kept["role"] in _CALLS:
        return {"role": "assistant", "content": None, "tool_calls": _tool_calls(content)}
    kept["role"] = _TOOL_ROLES.get(kept["role"], kept["role"])
    if content is None and kept.get("tool_calls"):
        return kept
    if isinstance(content, list):
        blocks = [_block(block) for block in content]
        kept["content"] = [block for block in blocks if not _is_call(block)]
        if calls := [call for block in blocks if _is_call(block) for call in _tool_calls(block.get("tool_call"))]:
            kept["tool_calls"] = calls
    elif not isinstance(content, str):
        return None
    return kept


def _is_call(block: Any) -> bool:
    return isinstance(block, Mapping) and block.get("type") == "tool_call"


def _tool_calls(content: Any) -> list[Any]:
    """Calls from their JSON: one object with name and arguments, or a list of them."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise wrong_field("tool call", content, 'JSON with name and arguments: {"name": ..., "arguments": ...}')
    return [{"type": "function", "function": dict(call)} for call in calls]


def _joined_calls(messages: Sequence[Message]) -> list[Message]:
    """Calls that stand in messages of their own, one after the other, are those of one turn."""
    joined: list[Message] = []
    for message in messages:
        alone = message["role"] == "assistant" and not message["content"] and message.get("tool_calls")
        if alone and joined and joined[-1]["role"] == "assistant" and joined[-1].get("tool_calls"):
            joined[-1] = {**joined[-1], "tool_calls": [*joined[-1]["tool_calls"], *message["tool_calls"]]}
        else:
            joined.append(message)
    return joined


def tools_field(row: Row) -> list[Any]:
    """The schemas of the tools: a list, or JSON text of one; bare functions get the frame that templates expect."""
    if is_empty(row.get("tools")):
        return []
    tools = tools_of(row["tools"])
    if isinstance(tools, list):
        tools = [tools_of(tool) for tool in tools]  # ms-swift has a text for each
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise wrong_field("tools", row["tools"], "a list of JSON schemas, or JSON text of one")
    bare = ["name" in tool and "function" not in tool for tool in tools]
    return [{"type": "function", "function": tool} if own else tool for tool, own in zip(tools, bare, strict=True)]


def _block(block: Any) -> Any:
    """A content block without the keys that Arrow has added; text of LLaMA-Factory's v1 stands under `value`."""
    if not isinstance(block, Mapping):
        return block
    kept = {key: value for key, value in block.items() if value is not None}
    if isinstance(kept.get("value"), str) and isinstance(kept.get("type"), str) and kept["type"] not in kept:
        kept[{"image_url": "image", "video_url": "video"}.get(kept["type"], kept["type"])] = kept.pop("value")
        kept["type"] = {"image_url": "image", "video_url": "video"}.get(kept["type"], kept["type"])
    return kept


def answer_text(turns: Sequence[Message], name: str) -> str:
    """The answer that these turns are: one of the assistant, or several with calls of tools and their results."""
    roles = [turn["role"] for turn in turns]
    if roles[-1:] != ["assistant"] or set(roles) - {"assistant", "tool"} or (len(roles) > 1 and "tool" not in roles):
        raise wrong_field(name, list(turns), "an answer of the assistant: one turn, or more with results of tools")
    return completion_text(turns, name=f"field {name!r}")


def context_fields(row: Row) -> dict[str, Any]:
    """`images`, `videos` and `tools`, from the columns that formats have for them, one medium or several."""
    videos = _media(row, ("video", "videos"), "video")
    return {
        "images": _media(row, ("image", "images", "img_path"), "image"),
        "videos": [[video] if isinstance(video, str) else video for video in videos],
        "tools": tools_field(row),
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


def pair_grades(row: Row) -> dict[str, Any]:
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
        return {"badness": [-chosen, -rejected], "rated": True}
    return {"badness": [1, 2]}


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


def trim_tags(prompt: str | Sequence[Message], kinds: Sequence[str]) -> str | list[Message]:
    """A prompt without the white space beside `<image>` and `<video>`; what these stand for the group itself says."""
    if isinstance(prompt, str):
        for kind in kinds:
            prompt = re.sub(rf"\s*<{kind}>\s*", f"<{kind}>", prompt)
        return prompt.strip() if kinds else prompt
    return [
        {**message, "content": trim_tags(message["content"], kinds)}
        if isinstance(message["content"], str) and any(f"<{kind}>" in message["content"] for kind in kinds)
        else message
        for message in prompt
    ]


def strip_placeholders(text: str) -> str:
    """Text without `<image>` and `<video>`, stripped; the group's media have places of their own."""
    return _PLACEHOLDERS.sub(" ", text).strip()
