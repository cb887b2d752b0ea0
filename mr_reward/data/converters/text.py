"""Text data sets: Tulu 3 preference mixture, Skywork-Reward, Nectar, PKU-SafeRLHF."""

from __future__ import annotations

import math
import re
from typing import Any

from mr_reward.data.converters.base import Row, SkippedRow, field, graded_group, messages_field, row_id
from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup

__all__ = ["AXES", "chat_pair", "nectar", "pku_saferlhf"]

AXES = ("agree", "better", "safer")
_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")


def chat_pair(row: Row, *, source: str) -> ResponseGroup:
    """`chosen` and `rejected` chats that differ in their last turn (Tulu, Skywork).

    Args:
        row: a row with `chosen` and `rejected`, lists of messages, and maybe `id`.
        source: name of the data set.

    Returns:
        A group of two.

    Raises:
        GroupError: the chats differ before their last turn, or a field is wrong.
        SkippedRow: the two answers are equal or empty.
    """
    chosen, rejected = messages_field(row, "chosen"), messages_field(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise GroupError("fields 'chosen' and 'rejected' differ before their last turn, expected one prompt")
    if not chosen[:-1]:
        raise GroupError("field 'chosen' has a single turn, expected a prompt before the answer")
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    return graded_group(chosen[:-1], answers, [1, 2], source=source, id=row_id(row))


def nectar(row: Row) -> ResponseGroup:
    """Nectar: seven answers with GPT-4's ranks, 1 is best.

    Args:
        row: `prompt` ("Human: ... Assistant:"), `answers` with `answer` and `rank`.

    Returns:
        A group of up to seven.

    Raises:
        GroupError: a field is wrong.
        SkippedRow: a turn marker inside an answer, or no preference.
    """
    turns = _dialogue(field(row, "prompt", str))
    answers = []
    for i, answer in enumerate(field(row, "answers", list)):
        rank = float(field(answer, "rank", (int, float), at=f"answers[{i}]"))
        if not math.isfinite(rank):
            raise GroupError(f"field 'answers[{i}].rank' is {rank}, expected a finite number; check the data set")
        answers.append((field(answer, "answer", str, at=f"answers[{i}]"), rank))
    # Such an answer goes on with the dialogue by itself.
    answers = [(text, rank) for text, rank in answers if "Human:" not in text and "Assistant:" not in text]
    return graded_group(
        turns, [text for text, _ in answers], [rank for _, rank in answers], source="nectar", id=row_id(row)
    )


def _dialogue(text: str) -> list[dict[str, Any]]:
    """`Human: ... Assistant: ... Human: ... Assistant:` -> messages."""
    # Only at the start of a paragraph: a question may speak of "Human:" itself.
    opening, *parts = _SPEAKER.split(text)
    speakers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    in_turns = bool(speakers) and speakers == ["Human", "Assistant"] * (len(speakers) // 2)
    if opening.strip() or not in_turns or texts[-1] or not all(texts[:-1]):
        raise GroupError(
            f"field 'prompt' is {text!r:.80}, expected 'Human: ... Assistant:', in turns, the last one empty; "
            "check the data set"
        )
    pairs = zip(speakers[:-1], texts[:-1], strict=True)
    return [{"role": "user" if speaker == "Human" else "assistant", "content": said} for speaker, said in pairs]


def pku_saferlhf(row: Row, *, axis: str = "agree") -> ResponseGroup:
    """PKU-SafeRLHF: two answers, judged apart for helpfulness and for harmlessness.

    Args:
        row: `prompt`, `response_0`, `response_1`, `better_response_id`, `safer_response_id`.
        axis: `better`, `safer`, or `agree` for rows on which both say the same.

    Returns:
        A group of two.

    Raises:
        GroupError: a field is wrong.
        SkippedRow: the judgments disagree (axis `agree`), or no preference.
    """
    ids = {name: field(row, f"{name}_response_id", int) for name in ("better", "safer")}
    for name, value in ids.items():
        if value not in (0, 1):
            raise GroupError(f"field '{name}_response_id' is {value}, expected 0 or 1; check data set and version")
    if axis == "agree" and ids["better"] != ids["safer"]:
        raise SkippedRow("the more helpful answer is not the safer one")
    winner = ids["better" if axis == "agree" else axis]
    return graded_group(
        field(row, "prompt", str),
        [field(row, "response_0", str), field(row, "response_1", str)],
        [int(winner != 0), int(winner != 1)],
        source="pku_saferlhf",
        id=row_id(row),
    )
