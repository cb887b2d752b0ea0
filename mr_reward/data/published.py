"""Published preference data beside the paper's mixture, written against the schemas of their pages."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from mr_reward.data.conversion import Converter, SkippedRow, alternatives, graded_group, leave_out
from mr_reward.data.fields import chat_field, field, image_field, numbers_field, row_id, texts_field, wrong_field
from mr_reward.data.paper_mixture import arena_battle, dialogue
from mr_reward.data.sources import Row
from mr_reward.data.trainer_formats import Prompt, gather_by, preference, prompt_field, speaks_in_turns
from mr_reward.groups import ResponseGroup
from mr_reward.messages.prompts import Message


def _ultrafeedback(row: Row) -> ResponseGroup:
    """Four answers with GPT-4's `overall_score`."""
    responses, badness = [], []
    for i, completion in enumerate(field(row, "completions", list)):
        at = f"completions[{i}]"
        response = field(completion, "response", str, at=at)
        score = completion.get("overall_score")
        if score is None:
            score = completion.get("fine-grained_score")
        number = _number(score)
        if number is None:
            leave_out(row, "without a score")
        else:
            responses.append(response)
            badness.append(-number)
    return graded_group(field(row, "instruction", str), responses, badness, id=row_id(row), rated=True)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):  # None, "N/A"
        return None
    return number if math.isfinite(number) else None


_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _nemo_prompt(row: Row) -> Prompt:
    """A text, in which NeMo's markers part the turns of a chat that has several."""
    prompt = prompt_field(row)
    if not isinstance(prompt, str) or not _TURN.search(prompt):
        return prompt
    first, *parts = _TURN.split(prompt.removesuffix("\n<extra_id_1>Assistant\n"))
    turns: list[Message] = [{"role": "user", "content": first.removeprefix("<extra_id_1>User\n")}]
    turns += [{"role": who.lower(), "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return turns


def _helpsteer2(row: Row) -> ResponseGroup:
    """Two rows of a prompt, each an answer with people's ratings, of which helpfulness counts."""
    responses = texts_field(row, "response")
    ratings = numbers_field(row, "helpfulness", len(responses))
    if len(responses) == 1:
        raise SkippedRow("a single answer to its prompt")
    return graded_group(_nemo_prompt(row), responses, [-rating for rating in ratings], id=row_id(row), rated=True)


def _helpsteer2_preference(row: Row) -> ResponseGroup:
    return _by_strength(row, _nemo_prompt(row), ("response_1", "response_2"), "preference_strength")


def _helpsteer3(row: Row) -> ResponseGroup:
    return _by_strength(row, chat_field(row, "context"), ("response1", "response2"), "overall_preference")


def _by_strength(row: Row, prompt: Prompt, names: tuple[str, str], strength: str) -> ResponseGroup:
    """-3: the first is much better; 0: none is; 3: the second is much better."""
    value = field(row, strength, (int, float))
    if not -3 <= value <= 3:
        raise wrong_field(strength, value, "a number from -3 to 3")
    return graded_group(prompt, [field(row, name, str) for name in names], [value, 0], id=row_id(row), rated=True)


def _rlhf_v(row: Row) -> ResponseGroup:
    """An image, and question and answers as JSON in one field."""
    pair = _rlhf_v_pair(row)
    return graded_group(
        field(pair, "question", str, at="text"),
        [field(pair, name, str, at="text") for name in ("chosen", "rejected")],
        [1, 2],
        images=[image_field(row, "image")],
        # As VL-RewardBench calls the rows of this data set that it holds.
        id=f"RLHF-V-{row['idx']}" if row_id(row, "idx") else None,
    )


def _rlhf_v_pair(row: Row) -> Mapping[str, Any]:
    text = field(row, "text", (str, Mapping))
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        raise wrong_field("text", text, "JSON with question, chosen and rejected") from None


def _hh_rlhf(row: Row) -> ResponseGroup:
    """Two texts of turns, `Human: ... Assistant: ...`, that part in their last answer."""
    chosen, rejected = dialogue(row, "chosen"), dialogue(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise SkippedRow("the chats part before their last turn")
    return graded_group(chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]], [1, 2], id=row_id(row))


PUBLISHED = (
    Converter(
        "ultrafeedback",
        _ultrafeedback,
        hub_id="openbmb/UltraFeedback",
        licence="mit",
        columns=alternatives("instruction completions"),
    ),
    Converter(
        "helpsteer2",
        _helpsteer2,
        hub_id="nvidia/HelpSteer2",
        licence="cc-by-4.0",
        columns=alternatives("prompt response helpfulness"),
        gather=gather_by(("prompt",), ("response", "helpfulness")),
    ),
    Converter(
        "helpsteer2_preference",
        _helpsteer2_preference,
        hub_id="nvidia/HelpSteer2",
        licence="cc-by-4.0",
        columns=alternatives("prompt response_1 response_2 preference_strength"),
    ),
    Converter(
        "helpsteer3",
        _helpsteer3,
        hub_id="nvidia/HelpSteer3",
        licence="cc-by-4.0",
        columns=alternatives("context response1 response2 overall_preference"),
    ),
    Converter(
        "rlhf_v",
        _rlhf_v,
        hub_id="openbmb/RLHF-V-Dataset",
        licence="cc-by-nc-4.0",
        columns=alternatives("image text"),
        fits=lambda row: {"question", "chosen", "rejected"} <= set(_rlhf_v_pair(row)),
    ),
    Converter(
        "arena",
        arena_battle,
        hub_id="lmarena-ai/VisionArena-Battle",
        columns=alternatives("conversation_a conversation_b winner"),
    ),
    Converter(
        "hh_rlhf",
        _hh_rlhf,
        hub_id="Anthropic/hh-rlhf",
        licence="mit",
        columns=alternatives("chosen rejected"),
        fits=speaks_in_turns,
    ),
    Converter(
        "rewardbench",
        preference,
        hub_id="allenai/reward-bench",
        licence="odc-by, with terms of its parts",
        split="filtered",
        columns=alternatives("prompt chosen rejected subset chosen_model rejected_model"),
    ),
)
