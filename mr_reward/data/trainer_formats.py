"""The formats in which trainers take preferences: pairs, labelled answers, chats, and groups as they are here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from PIL import Image

from mr_reward.data.conversion import Converter, SkippedRow, alternatives, graded_group
from mr_reward.data.fields import (
    answer_text,
    chat_field,
    context_fields,
    field,
    is_empty,
    numbers_field,
    pair_grades,
    row_id,
    texts_field,
    tools_field,
    wrong_field,
)
from mr_reward.data.sources import Row
from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.messages.prompts import Message
from mr_reward.templates.images import DecodedImages

Prompt = str | list[Message]
Gather = Callable[[Iterable[tuple[str, Any]]], Iterator[tuple[str, Any]]]


def prompt_field(row: Row, name: str = "prompt", *, at: str = "") -> Prompt:
    """A text or chat messages."""
    value = field(row, name, (str, list), at=at)
    return value if isinstance(value, str) else chat_field(row, name, at=at)


def as_messages(prompt: Prompt) -> list[Message]:
    """A text is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def with_system(row: Row, prompt: Prompt) -> Prompt:
    """The prompt behind the row's system prompt, if it has one."""
    if is_empty(row.get("system")):
        return prompt
    system = {"role": "system", "content": field(row, "system", str)}
    messages = as_messages(prompt)
    return messages if messages[:1] == [system] else [system, *messages]


def pair_of_chats(
    chosen: Sequence[Message], rejected: Sequence[Message], names: str
) -> tuple[list[Message], list[str]]:
    """The turns that two chats share, and their last ones; behind the last question, where one calls tools."""
    chats = [list(chosen), list(rejected)]
    ends = [len(chat) - 1 for chat in chats]
    if chats[0][:-1] != chats[1][:-1] and any(turn["role"] == "tool" for chat in chats for turn in chat):
        ends = [max((i + 1 for i, turn in enumerate(chat) if turn["role"] == "user"), default=0) for chat in chats]
    before = [chat[:end] for chat, end in zip(chats, ends, strict=True)]
    if before[0] != before[1]:
        raise GroupError(f"fields {names} differ before their last turn, expected one prompt")
    return before[0], [answer_text(chat[end:], names) for chat, end in zip(chats, ends, strict=True)]


def gather_by(key: Sequence[str], lists: Sequence[str]) -> Gather:
    """Rows that agree in `key`, wherever they stand, become the first of them, with lists of the columns `lists`."""

    def gather(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        for place, row in rows:
            try:
                answer = {name: field(row, name, object) for name in lists}
                field(row, key[0], (str, list))
            except GroupError as error:
                yield place, row if isinstance(row, GroupError) else error
                continue
            name = json.dumps([row.get(part) for part in key], sort_keys=True, default=_digest)
            _, first = found.setdefault(name, (place, {**row, **{column: [] for column in lists}}))
            for column in lists:
                first[column].append(answer[column])
        yield from found.values()

    return gather


def _digest(value: Any) -> str:
    """Of what is no JSON, by its content: the same pixels in another shape are another picture."""
    if isinstance(value, Image.Image) or hasattr(value, "__array__"):
        return DecodedImages().digest(value)
    return sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def _answers(row: Row, name: str) -> list[str]:
    """A list of answers, each a text or chat messages."""
    return [
        one if isinstance(one, str) else answer_text(chat_field({name: one}, name), f"{name}[{i}]")
        for i, one in enumerate(field(row, name, list))
    ]


def _groups(row: Row) -> ResponseGroup:
    responses = _answers(row, "responses")
    ranked = not is_empty(row.get("rankings"))
    values = numbers_field(row, "rankings" if ranked else "scores", len(responses))
    badness = values if ranked else [-value for value in values]
    return graded_group(prompt_field(row), responses, badness, id=row_id(row), rated=not ranked, **context_fields(row))


def preference(row: Row) -> ResponseGroup:
    """`chosen` and `rejected`: texts or chats, behind a `prompt` or with it inside; lists of texts for N answers."""
    chosen, _ = (field(row, name, (str, list)) for name in ("chosen", "rejected"))
    asked = next((name for name in ("prompt", "question") if not is_empty(row.get(name))), None)
    prompt = None if asked is None else prompt_field(row, asked)
    if isinstance(chosen, list) and chosen and all(isinstance(text, str) for text in chosen):
        return _several(row, prompt)
    grades = pair_grades(row)
    if isinstance(chosen, str):
        texts = [chosen, field(row, "rejected", str)]
        if prompt is None:
            prompt, texts = _common_start(*texts)
        return graded_group(with_system(row, prompt), texts, id=row_id(row), **grades, **context_fields(row))
    names = "'chosen' and 'rejected'"
    before, texts = pair_of_chats(chat_field(row, "chosen"), chat_field(row, "rejected"), names)
    turns = _joined(prompt, before)
    if not turns:
        raise GroupError(
            "field 'chosen' has a single turn and there is no 'prompt', expected a prompt before the answer"
        )
    return graded_group(with_system(row, turns), texts, id=row_id(row), **grades, **context_fields(row))


def _several(row: Row, prompt: Prompt | None) -> ResponseGroup:
    """All the chosen are right, none of the rejected is."""
    if prompt is None:
        raise GroupError("field 'prompt' is missing or empty, expected the question")
    chosen, rejected = texts_field(row, "chosen"), texts_field(row, "rejected")
    badness = [1] * len(chosen) + [2] * len(rejected)
    prompt = with_system(row, prompt)
    return graded_group(prompt, [*chosen, *rejected], badness, id=row_id(row), **context_fields(row))


def _joined(prompt: Prompt | None, before: list[Message]) -> list[Message]:
    """The prompt and the turns before the answers, where these may repeat it."""
    if prompt is None:
        return before
    if not before:
        return as_messages(prompt)
    if isinstance(prompt, str):
        if any(turn["role"] == "user" and str(turn["content"]).strip() == prompt.strip() for turn in before):
            return before
        if before[0]["role"] == "assistant":
            return [*as_messages(prompt), *before]
        raise GroupError("field 'prompt' is no turn of 'chosen', expected the same question; remove one of them")
    return before if before[: len(prompt)] == prompt else [*prompt, *before]


def _common_start(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """TRL's implicit prompt: what two texts share, up to the space before the first difference."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    same -= same > 0 and chosen[same - 1] == " "
    if not chosen[:same].strip():
        raise GroupError("there is no 'prompt' and 'chosen' and 'rejected' share no start, expected one or the other")
    return chosen[:same], [chosen[same:], rejected[same:]]


def _unpaired(row: Row) -> ResponseGroup:
    prompt, texts, labels = prompt_field(row), _answers(row, "completion"), field(row, "label", list)
    for i, label in enumerate(labels):
        if not isinstance(label, bool | int | float):
            raise wrong_field(f"label[{i}]", label, "true, false or a number")
    return _labelled(with_system(row, prompt), texts, labels, row)


def _labelled(prompt: Prompt, texts: list[str], labels: list[Any], row: Row) -> ResponseGroup:
    if len(texts) == 1:
        raise SkippedRow("a single answer to its prompt")
    return graded_group(prompt, texts, [-float(x) for x in labels], id=row_id(row), **context_fields(row))


def _sharegpt(row: Row) -> ResponseGroup:
    """LLaMA-Factory: `conversations`, and the two answers as turns."""
    turns = with_system(row, chat_field(row, "conversations"))
    texts = []
    for name in ("chosen", "rejected"):
        texts.append(answer_text(chat_field({name: [field(row, name, Mapping)]}, name), name))
    return graded_group(turns, texts, id=row_id(row), **pair_grades(row), **context_fields(row))


def _sharegpt_kto(row: Row) -> ResponseGroup:
    """LLaMA-Factory: chats whose last turn is the answer, with a `kto_tag`; gathered by all their other turns."""
    return _labelled(
        with_system(row, chat_field(row, "prompt")), texts_field(row, "answer"), field(row, "kto_tag", list), row
    )


def _gather_kto(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    def split() -> Iterator[tuple[str, Any]]:
        for place, row in rows:
            try:
                name = "messages" if isinstance(row, Mapping) and "messages" in row else "conversations"
                turns = chat_field(row, name)
                if not isinstance(tag := field(row, "kto_tag", (bool, int)), bool | int):
                    raise wrong_field("kto_tag", tag, "true or false")
                rest = {key: value for key, value in row.items() if key != name}
                yield place, {**rest, "prompt": turns[:-1], "answer": answer_text(turns[-1:], name)}
            except GroupError as error:
                yield place, row if isinstance(row, GroupError) else error

    return gather_by(("prompt", "system", "images", "videos", "tools"), ("answer", "kto_tag"))(split())


def _llama_factory_v1(row: Row) -> ResponseGroup:
    names = "'chosen_messages' and 'rejected_messages'"
    chats = [chat_field(row, name) for name in ("chosen_messages", "rejected_messages")]
    turns, texts = pair_of_chats(chats[0], chats[1], names)
    return graded_group(turns, texts, id=row_id(row), **pair_grades(row), **context_fields(row))


def _alpaca(row: Row) -> ResponseGroup:
    """LLaMA-Factory's other form: `instruction`, `input`, `history`, and the two answers as texts."""
    asked = [field(row, "instruction", str), "" if is_empty(row.get("input")) else field(row, "input", str)]
    prompt = _with_history(row, "\n".join(part for part in asked if part))
    texts = [field(row, "chosen", str), field(row, "rejected", str)]
    return graded_group(with_system(row, prompt), texts, id=row_id(row), **pair_grades(row), **context_fields(row))


def _with_history(row: Row, question: str) -> Prompt:
    """The question behind earlier ones and their answers."""
    turns: list[Message] = []
    for exchange in row.get("history") or ():
        if not isinstance(exchange, list | tuple) or [type(part) for part in exchange] != [str, str]:
            raise wrong_field("history", row["history"], "pairs of a question and an answer")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return [*turns, *as_messages(question)] if turns else question


def _ms_swift(row: Row) -> ResponseGroup:
    """`messages` that end with the chosen answer, and what was rejected, one or several; `query` is the older form."""
    if "messages" in row:
        chat = chat_field(row, "messages")
        prompt, chosen = with_system(row, chat[:-1]), answer_text(chat[-1:], "messages")
    else:
        chat = []
        prompt = with_system(row, _with_history(row, field(row, "query", str)))
        chosen = field(row, "response", str)
    if not is_empty(row.get("rejected_messages")):
        rejected = [
            pair_of_chats(chat, other, "'messages' and 'rejected_messages'")[1][1]
            for other in _rejected_chats(row, chat)
        ]
    elif isinstance(row.get("rejected_response"), list):
        rejected = texts_field(row, "rejected_response")
    else:
        rejected = [field(row, "rejected_response", str)]
    grades = pair_grades(row) if len(rejected) == 1 else {"badness": [1, *[2] * len(rejected)]}
    return graded_group(prompt, [chosen, *rejected], id=row_id(row), **grades, **context_fields(row))


def _rejected_chats(row: Row, chat: list[Message]) -> list[list[Message]]:
    """One chat or several; one may hold the answer alone."""
    several = all(isinstance(other, list) for other in field(row, "rejected_messages", list))
    chats = row["rejected_messages"] if several else [row["rejected_messages"]]
    read = [chat_field({"rejected_messages": other}, "rejected_messages") for other in chats]
    return [[*chat[:-1], *other] if len(other) == 1 else other for other in read]


def _openai(row: Row) -> ResponseGroup:
    """OpenAI's preference fine-tuning: a request, the preferred output and the other one."""
    asked = field(row, "input", Mapping)
    turns = chat_field(asked, "messages", at="input")
    outputs = [[*turns, *chat_field(row, name)] for name in ("preferred_output", "non_preferred_output")]
    prompt, texts = pair_of_chats(outputs[0], outputs[1], "'preferred_output' and 'non_preferred_output'")
    return graded_group(prompt, texts, [1, 2], id=row_id(row), tools=tools_field(asked))


def _verl(row: Row) -> ResponseGroup:
    raise GroupError(
        "verl's rows are prompts without responses, so there is nothing to rank; train a policy on them (`dataset: "
        "FILE` of train_policy.py), or collect answers to them and rank those"
    )


def speaks_in_turns(row: Row) -> bool:
    """As HH-RLHF has it: each answer is a whole chat in one text."""
    chosen = row["chosen"]
    return is_empty(row.get("prompt")) and isinstance(chosen, str) and chosen.lstrip().startswith("Human:")


TRAINER_FORMATS = (
    Converter("groups", _groups, columns=alternatives("prompt responses rankings", "prompt responses scores")),
    Converter(
        "preference",
        preference,
        columns=alternatives("chosen rejected"),
        fits=lambda row: not isinstance(row["chosen"], Mapping) and not speaks_in_turns(row),
    ),
    Converter(
        "unpaired",
        _unpaired,
        columns=alternatives("prompt completion label"),
        gather=gather_by(("prompt", "system", "image", "images", "tools"), ("completion", "label")),
    ),
    Converter("sharegpt", _sharegpt, columns=alternatives("conversations chosen rejected")),
    Converter(
        "sharegpt_kto",
        _sharegpt_kto,
        columns=alternatives("conversations kto_tag", "messages kto_tag"),
        gather=_gather_kto,
    ),
    Converter("llama_factory_v1", _llama_factory_v1, columns=alternatives("chosen_messages rejected_messages")),
    Converter("alpaca", _alpaca, columns=alternatives("instruction chosen rejected")),
    Converter(
        "ms_swift",
        _ms_swift,
        columns=alternatives(
            "messages rejected_response", "messages rejected_messages", "query response rejected_response"
        ),
    ),
    Converter("openai", _openai, columns=alternatives("input preferred_output non_preferred_output")),
    Converter("verl", _verl, columns=alternatives("data_source prompt reward_model")),
)
