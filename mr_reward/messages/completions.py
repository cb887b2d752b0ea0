"""Completions: what a policy wrote, as the text or the turns that are judged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mr_reward.errors import GroupError, shown
from mr_reward.messages.prompts import REASONING_KEYS, Message, plain_json, tool_function

Completion = str | Sequence[Mapping[str, Any]]

THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"


class Transcript(str):
    """A response of several turns: as text what a reader sees, and the turns, which the chat template renders.

    It is no text to the scorer: it never equals one, and of its text alone the turns cannot be read again.
    """

    turns: tuple[Message, ...]  # with content blocks, as those of a prompt

    def __new__(cls, turns: Sequence[Message]) -> Transcript:
        made = super().__new__(cls, "\n\n".join(filter(None, map(_readable, turns))))
        made.turns = tuple(turns)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transcript) and repr(self) == repr(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"Transcript({json.dumps(self.turns)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Transcript, (self.turns,)


def completion_text(completion: Completion, *, name: str = "completion") -> str:
    """A completion that is to be judged: the text of assistant turns, or a `Transcript` of turns that hold more.

    Several assistant turns are joined by a blank line, and a missing content is the empty text. Reasoning that TRL's
    response parser has moved to a key of its own stands before the content again. With tool calls, their results or
    turns of others it is a transcript. Nothing else changes: lone surrogates, control tokens as text and white space
    are kept.
    """
    if isinstance(completion, str):
        return completion
    turns = []
    for message in completion if isinstance(completion, Sequence) else [None]:
        if not isinstance(message, Mapping):
            raise GroupError(
                f"{name}: completion is {shown(completion, 200)}, expected a string or a list of chat messages; pass "
                "the completions that GRPOTrainer passes to a reward function"
            )
        turns.append(_completion_turn(message, name))
    if any(turn.keys() - {"role", "content", "reasoning_content"} or turn["role"] != "assistant" for turn in turns):
        return Transcript(turns)
    return "\n\n".join(filter(None, map(_readable, turns)))


def with_before(text: str, response: str) -> str:
    """A response with another text and a blank line before it."""
    if not isinstance(response, Transcript):
        return f"{text}\n\n{response}"
    first, *rest = response.turns
    said = "".join(block["text"] for block in first["content"])
    block = {"type": "text", "text": f"{text}\n\n{said}" if said else text}
    return Transcript([{**first, "content": [block]}, *rest])


def _completion_turn(message: Mapping[str, Any], name: str) -> Message:
    role = message.get("role")
    text = _turn_text(message, name)
    kept = {key: message[key] for key in ("tool_calls", "tool_call_id", "name") if message.get(key)}
    for call in kept.get("tool_calls", ()):
        tool_function(call, f"{name}: a tool call")
    if role == "assistant":
        kept.pop("name", None)
        reasoning = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), None)
        if reasoning:
            kept["reasoning_content"] = reasoning
    elif not isinstance(role, str):
        raise GroupError(f"{name}: a turn of a completion is {shown(message, 200)}, expected one with a 'role'")
    content = [{"type": "text", "text": text}] if text or not kept.get("tool_calls") else []
    return {"role": role, "content": content, **plain_json(kept, name)}


def _readable(turn: Message) -> str:
    """A turn of a completion as a reader sees it; calls and results in the form that most chat templates have."""
    text = "".join(block["text"] for block in turn["content"])
    if turn["role"] == "tool":
        return f"<tool_response>\n{text}\n</tool_response>"
    if turn["role"] != "assistant":
        return f"{turn['role']}: {text}"
    if reasoning := turn.get("reasoning_content"):
        text = thought(reasoning) + text
    calls = []
    for call in turn.get("tool_calls", ()):
        function = tool_function(call, "a tool call")
        written = json.dumps({"name": function["name"], "arguments": function.get("arguments")}, ensure_ascii=False)
        calls.append(f"<tool_call>\n{written}\n</tool_call>")
    return "\n\n".join(filter(None, [text, *calls]))


def thought(reasoning: str) -> str:
    """Reasoning as it stands before an answer in a text."""
    return f"{THOUGHT_BEGINS}\n" + reasoning.strip("\n") + f"\n{THOUGHT_ENDS}\n\n"


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
                f"{name}: a turn of {message.get('role')!r} has a content block of type {kind!r}, expected text "
                "blocks; the reward model judges text responses only, so let tools return text"
            )
        texts.append(block["text"])
    return "".join(texts)
