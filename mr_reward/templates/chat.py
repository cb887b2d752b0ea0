"""What a processor's chat template makes of a prompt's turns, seen as text: nothing of them may get lost in it.

A template leaves out what it does not know: tool calls, the turns of tools, content in another form than it expects.
So each *shape* of a prompt (its roles, blocks and calls) is rendered once with marks in place of its texts, and a mark
that does not come out is an error. What a template takes out of a text itself (earlier thoughts) is its own business:
the policy does not see that either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.messages.completions import THOUGHT_BEGINS, THOUGHT_ENDS, thought
from mr_reward.messages.prompts import Message, tool_function

# What templates raise: their own refusals, and text that is joined to what is none.
TEMPLATE_ERRORS = (TemplateError, TypeError)


def chat_template_text(processor: Any) -> str:
    """The chat template of a processor or of its tokenizer; several by name are one JSON text."""
    template = getattr(processor, "chat_template", None) or getattr(
        getattr(processor, "tokenizer", None), "chat_template", None
    )
    if not template:
        raise ConfigurationError(
            f"{type(processor).__name__} has no chat template; set processor.chat_template before making the model"
        )
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def encodable(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 tokenizer takes, by U+FFFD.

    Example:
        >>> encodable("a" + chr(0xD800)) == "a" + chr(0xFFFD)
        True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_prefilled(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a prompt ends in the assistant's turn, which the responses then continue."""
    return messages[-1]["role"] == "assistant"


def template_options(group: ResponseGroup) -> dict[str, Any]:
    """How the chat template ends a prompt, as TRL's `apply_chat_template` does, and the tools that it names."""
    ending = "continue_final_message" if is_prefilled(group.messages) else "add_generation_prompt"
    tools = _encodable(list(group.tools))
    return {ending: True, "tools": tools} if tools else {ending: True}


class ChatTemplate:
    """The chat template of a processor (vision-language) or of a tokenizer (text-only), and what it can show."""

    def __init__(self, processor: Any, *, sees_images: bool) -> None:
        chat_template_text(processor)
        self.processor = processor
        self._lost: dict[str, str | None] = {}  # by shape of a prompt: the part that it leaves out
        known = [{"role": "user", "content": [{"type": "text", "text": mark(0)}]}]
        reasons = []
        for self.takes_blocks in (True,) if sees_images else (False, True):
            try:
                if self._comes_out([self.turn(message) for message in known], {"add_generation_prompt": True}, 1):
                    return
                reasons.append("the text of a user turn does not come out of it")
            except (*TEMPLATE_ERRORS, ValueError) as error:
                reasons.append(f"{type(error).__name__}: {error}")
        raise ConfigurationError(
            f"the chat template of {type(processor).__name__} shows no user turn "
            f"({'; '.join(dict.fromkeys(reasons))}); give the backbone a template that writes the content of messages"
        )

    def turn(self, message: Message) -> Message:
        """A message of a group in the form that the template reads, without its media."""
        rest = {key: _encodable(value) for key, value in message.items() if key != "content"}
        blocks = message["content"]
        if not blocks and "tool_calls" in message:
            # As transformers has it: templates handle a missing key
            return {**rest, "content": []} if self.takes_blocks else rest
        if self.takes_blocks:
            return {**rest, "content": [_encodable(block) for block in blocks]}
        return {**rest, "content": "".join(encodable(block["text"]) for block in blocks if block["type"] == "text")}

    def text(self, messages: Sequence[Message], **options: Any) -> str:
        """The chat of a group's messages as text, its media as placeholders."""
        return self._render([self.turn(message) for message in messages], options)

    def check(self, group: ResponseGroup) -> None:
        """Refuse a prompt of which the template leaves something out, or that has no turn to continue."""
        last = group.messages[-1]
        if is_prefilled(group.messages) and (
            "tool_calls" in last or not last["content"] or last["content"][-1]["type"] != "text"
        ):
            raise GroupError(
                f"{group.name}: the prompt ends in an assistant turn with "
                f"{'tool calls' if 'tool_calls' in last else 'no text at its end'}, which no response can continue; "
                "add the turns of the tools, or leave it out"
            )
        if lost := self.find_lost(group.name, group.messages, template_options(group), tools=group.tools):
            raise GroupError(
                f"{group.name}: the backbone's chat template leaves out {lost}, which the policy may have seen; "
                "take a backbone whose template shows it, or one with another chat template, or change the prompt"
            )

    def find_lost(
        self,
        name: str,
        messages: Sequence[Message],
        options: dict[str, Any],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thoughts: bool = False,
    ) -> str | None:
        """What the template leaves out of these turns and tools, once for each shape; `thoughts` count if asked."""
        probe = _Probe(name, messages, tools, self, thoughts=thoughts)
        if probe.shape not in self._lost:
            self._lost[probe.shape] = self._look(probe, options)
        return self._lost[probe.shape]

    def _look(self, probe: _Probe, options: dict[str, Any]) -> str | None:
        if probe.tools:
            options = {**options, "tools": probe.tools}
        try:
            text = self._render(probe.messages, options)
            lost = [part for made, part in probe.parts.items() if made not in text]
            for part, others in () if lost else probe.without_media():
                if self._render(others, options) == text:
                    lost.append(part)
        except (*TEMPLATE_ERRORS, ValueError):
            return None  # the prompt itself will say so, under its name
        return lost[0] if lost else None

    def _comes_out(self, messages: list[Message], options: dict[str, Any], marks: int) -> bool:
        """Whether all marks are in the text, and blocks are not written as Python or JSON."""
        text = self._render(messages, options)
        found = all(mark(number) in text for number in range(marks))
        return found and not any(f"{quote}text{quote}: {quote}{mark(0)}" in text for quote in "'\"")

    def _render(self, messages: list[Message], options: dict[str, Any]) -> str:
        (text,) = self.processor.apply_chat_template([messages], tokenize=False, **options)
        return text


class _Probe:
    """A chat with marks in place of its texts, calls and tools; chats of one shape have equal ones."""

    def __init__(
        self,
        name: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        template: ChatTemplate,
        *,
        thoughts: bool,
    ) -> None:
        self.parts: dict[str, str] = {}  # mark -> what it stands for
        self._name, self._thoughts = name, thoughts
        self.messages = [self._message(message, i, template) for i, message in enumerate(messages)]
        self.tools = [self._tool(tool, i) for i, tool in enumerate(tools)]
        keys = [[key for key in message if key != "content"] for message in messages]
        shown = [
            [message["role"], message.get("content"), [c.get("function", c) for c in message.get("tool_calls", ())]]
            for message in self.messages
        ]  # without ids of calls, which differ from one to the next
        self.shape = json.dumps([shown, keys, len(self.tools), thoughts])

    def without_media(self) -> Iterator[tuple[str, list[Message]]]:
        """The media of one kind in one turn, and the prompt without them."""
        for i, message in enumerate(self.messages):
            blocks = message.get("content", ())
            for kind in dict.fromkeys(block["type"] for block in blocks if not isinstance(block, str)):
                if kind != "text":
                    rest = {**message, "content": [block for block in blocks if block["type"] != kind]}
                    others = [*self.messages[:i], rest, *self.messages[i + 1 :]]
                    yield f"the {kind} of turn {i} ({message['role']!r})", others

    def _message(self, message: Message, index: int, template: ChatTemplate) -> Message:
        place = f"turn {index} ({message['role']!r})"
        content = [
            {**block, "text": self._text(block["text"], place)} if block.get("text", "").strip() else block
            for block in message["content"]
        ]
        probe = {**message, "content": content}
        if self._thoughts and "reasoning_content" in message:
            probe["reasoning_content"] = self._mark(f"the thought of {place}")
        if "tool_calls" in message:
            probe["tool_calls"] = [self._call(call, f"a tool call of {place}") for call in message["tool_calls"]]
        return template.turn(probe)

    def _text(self, text: str, place: str) -> str:
        if self._thoughts and text.startswith(THOUGHT_BEGINS) and text.endswith(f"{THOUGHT_ENDS}\n\n"):
            return thought(self._mark(f"the thought of {place}"))
        return self._mark(f"the text of {place}")

    def _call(self, call: Any, part: str) -> Any:
        function = tool_function(call, f"{self._name}: {part}")
        marked = {**function, "name": self._mark(part)}
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping) and arguments:
            marked["arguments"] = {self._mark(part): self._mark(part) for _ in arguments}
        elif isinstance(arguments, str) and arguments:
            marked["arguments"] = json.dumps({self._mark(part): self._mark(part)})
        return {**call, "function": marked} if "function" in call else marked

    def _tool(self, tool: Mapping[str, Any], index: int) -> dict[str, Any]:
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise GroupError(
                f"{self._name}: tool {index} is {tool!r:.100}, expected {{'function': {{'name': ..., ...}}}}"
            )
        marked = {**function, "name": self._mark(f"tool {index}")}
        return {**tool, "function": marked} if "function" in tool else marked

    def _mark(self, part: str) -> str:
        made = mark(len(self.parts))
        self.parts[made] = part
        return made


def mark(number: int) -> str:
    """A word that no template and no prompt has, in place of a text; none is the beginning of another."""
    return f"mark{number}end"


def _encodable(value: Any) -> Any:
    """`encodable` for every text in a JSON value."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        return {key: _encodable(inner) for key, inner in value.items()}
    return [_encodable(inner) for inner in value] if isinstance(value, list) else value
