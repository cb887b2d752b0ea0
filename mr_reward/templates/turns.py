"""Responses of several turns, with tool calls and results: as the chat template writes them behind the prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.messages.completions import Transcript, thought
from mr_reward.messages.prompts import Message
from mr_reward.templates.chat import TEMPLATE_ERRORS, ChatTemplate, is_prefilled, mark, template_options


class TurnEncoder:
    """Encodes transcripts; control tokens that are text stay text, those that the template writes are tokens."""

    def __init__(self, template: ChatTemplate, tokenizer: Any, control_tokens: re.Pattern[str], opener: str) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        self._opener = opener  # of a thought, at the end of the prompt; the turns bring it

    def encode(self, group: ResponseGroup, transcript: Transcript, index: int) -> list[int]:
        """Token ids of response `index`, without the mark that ends its last turn, as a text has none either."""
        name = f"{group.name}, response {index}"
        if is_prefilled(group.messages):
            raise GroupError(
                f"{name}: has turns with tool calls or results, which cannot continue the assistant turn that the "
                "prompt ends in; end the prompt with another turn"
            )
        options = template_options(group)
        before = self._text(name, group.messages, **options).removesuffix(self._opener)
        del options["add_generation_prompt"]
        whole = self._text(name, [*group.messages, *self._shown(group, transcript.turns, name)], **options)
        if not whole.startswith(before):
            raise GroupError(
                f"{name}: the backbone's chat template writes the prompt in another way when tool calls or results "
                "follow it, so nobody knows what the policy saw; give the backbone a template that keeps it (TRL has "
                "one for training: trl.chat_template_utils.get_training_chat_template), or take another backbone"
            )
        return encode_marked_chat(self._tokenizer, whole[len(before) :].removesuffix(self._ending()))

    def _shown(self, group: ResponseGroup, turns: Sequence[Message], name: str) -> Sequence[Message]:
        """The turns in the form that the template shows whole: thoughts by a key of their own, or in the text."""
        for form in (turns, [_with_thought_inside(turn) for turn in turns]):
            lost = self._template.find_lost(name, [*group.messages, *form], {}, tools=group.tools, thoughts=True)
            if lost is None:
                return form
        raise GroupError(
            f"{name}: the backbone's chat template leaves out {lost}, which the policy wrote or saw; take a backbone "
            "whose template shows it, or one with another chat template"
            + ("; or make a model with thoughts='stripped'" if "thought" in str(lost) else "")
        )

    def _ending(self) -> str:
        """What the template writes after the last turn."""
        texts = [mark(0), mark(1)]
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in zip(("user", "assistant"), texts, strict=True)
        ]
        return self._template.text(turns).rpartition(texts[1])[2]

    def _text(self, name: str, messages: Sequence[Message], **options: Any) -> str:
        try:
            return self._template.text(self._marked(messages), **self._marked(options))
        except (*TEMPLATE_ERRORS, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise GroupError(
                f"{name}: the backbone's chat template refuses the turns ({roles}): {error}; take a backbone whose "
                "template shows tool calls and results"
            ) from error

    def _marked(self, value: Any) -> Any:
        """As transformers marks text that looks like a control token, in keys too: arguments are the policy's."""
        if isinstance(value, Mapping):
            return {mark_control_tokens(key, self._control_tokens): self._marked(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(one) for one in value]
        return mark_control_tokens(value, self._control_tokens)


def _with_thought_inside(turn: Message) -> Message:
    if not (reasoning := turn.get("reasoning_content")):
        return turn
    rest = {key: value for key, value in turn.items() if key != "reasoning_content"}
    return {**rest, "content": [{"type": "text", "text": thought(reasoning)}, *turn["content"]]}
