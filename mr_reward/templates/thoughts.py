"""Thoughts: what a reasoning policy writes between `<think>` and `</think>`, and what is judged of it.

`included`: all that was written. `stripped`: the answer alone. `refused`: a thought is an error. Where the chat
template itself opens a thought at the end of the prompt, an answer without one stands behind a thought that is closed
as the template closes it, and a thought that the response ends stands inside the open one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.messages.completions import THOUGHT_BEGINS, THOUGHT_ENDS, Transcript
from mr_reward.templates.chat import ChatTemplate, is_prefilled, mark

THOUGHTS = ("included", "stripped", "refused")
# A thought with both ends, or one that is open at the start or at the end of the text
_THOUGHT = re.compile(f"{THOUGHT_BEGINS}.*?(?:{THOUGHT_ENDS}\\s*|$)", re.DOTALL)
_OPEN_BEFORE = re.compile(f"^(?:(?!{THOUGHT_BEGINS}).)*?{THOUGHT_ENDS}\\s*", re.DOTALL)


def check_thoughts(thoughts: str) -> None:
    """Refuse a value that does not exist."""
    if thoughts not in THOUGHTS:
        raise ConfigurationError(f"thoughts is {thoughts!r}, expected one of {', '.join(THOUGHTS)}")


def without_thoughts(text: str) -> str:
    """The answer alone; white space behind a thought goes with it.

    Example:
        >>> without_thoughts("2 and 2, so</think> 4")
        '4'
    """
    return _THOUGHT.sub("", _OPEN_BEFORE.sub("", text))


def opened_thought(template: ChatTemplate) -> tuple[str, str] | None:
    """How the template opens a thought at the end of a prompt, and what it writes there before an answer without one.

    None if it opens none.
    """
    asked, answer = mark(0), mark(1)
    user = {"role": "user", "content": [{"type": "text", "text": asked}]}
    end = template.text([user], add_generation_prompt=True).rpartition(asked)[2]
    if not end.rstrip().endswith(THOUGHT_BEGINS):
        return None
    header, _, space = end.rpartition(THOUGHT_BEGINS)
    chat = [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    before = template.text(chat).rpartition(answer)[0].rpartition(asked)[2]
    closed = before.removeprefix(header)
    if not before.startswith(header):
        closed = f"{THOUGHT_BEGINS}{space}\n{THOUGHT_ENDS}\n\n"
    return THOUGHT_BEGINS + space, closed


def _stripped(response: str) -> str:
    if not isinstance(response, Transcript):
        return without_thoughts(response)
    turns = []
    for turn in response.turns:
        kept = {key: value for key, value in turn.items() if key != "reasoning_content"}
        if turn["role"] == "assistant":
            kept["content"] = [{**block, "text": without_thoughts(block["text"])} for block in turn["content"]]
        turns.append(kept)
    return Transcript(turns)


class ThoughtRules:
    """Encodes responses as far as they are judged, behind the thought that the template opens or closes."""

    def __init__(self, thoughts: str, template: ChatTemplate, tokenizer: Any) -> None:
        check_thoughts(thoughts)
        self._thoughts = thoughts
        found = opened_thought(template)
        self.opener = None if found is None else found[0]
        texts = (*(found or ("", "")), THOUGHT_ENDS)
        self.opened, self._closed, self._close = (
            tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts
        )

    def judged(self, group: ResponseGroup) -> list[str]:
        """The texts of the responses, and the transcripts, as far as they are judged."""
        if self._thoughts == "stripped":
            return [_stripped(response) for response in group.responses]
        for i, text in enumerate(group.responses) if self._thoughts == "refused" else ():
            if THOUGHT_BEGINS in text or THOUGHT_ENDS in text:
                raise GroupError(
                    f"{group.name}: response {i} holds a thought, and the model was made with thoughts='refused'; cut "
                    "it out, or make a model with thoughts='included' or 'stripped'"
                )
        return list(group.responses)

    def encode(
        self, group: ResponseGroup, texts: Sequence[str], encode_all: Callable[[Sequence[str]], list[list[int]]]
    ) -> list[list[int]]:
        """A list of token ids for each text that is judged."""
        if self.opener is None or is_prefilled(group.messages):
            return encode_all(texts)
        encoded = []
        for text in texts:
            inside = text.removeprefix(self.opener).removeprefix(THOUGHT_BEGINS)
            thought, closed, answer = inside.partition(THOUGHT_ENDS)
            first, second = encode_all([thought, answer])
            if closed:
                encoded.append([*self.opened, *first, *self._close, *second])
            else:  # an unfinished thought, if the response opened it itself; else an answer
                encoded.append([*(self._closed if inside == text else self.opened), *first])
        return encoded

    def cut(self, ids: Any, name: str) -> int:
        """The length of the prompt without the thought that it opens: the responses bring it, open or closed."""
        end = len(ids) - len(self.opened)
        if ids[end:].tolist() != self.opened:
            raise ConfigurationError(
                f"{name}: the tokenizer merges the end of the prompt with the {self.opener!r} that the chat template "
                "writes; make the thought's marks added tokens, or take a template that opens no thought"
            )
        return end
