"""Text data sets: Tulu 3 preference mixture, Skywork-Reward, Nectar, PKU-SafeRLHF."""

from __future__ import annotations

from typing import Any

from mr_reward.data.converters.base import Row, SkippedRow, field, graded_group, messages_field
from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup

__all__ = ["AXES", "chat_pair", "nectar", "pku_saferlhf"]

AXES = ("agree", "better", "safer")


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
    return graded_group(chosen[:-1], answers, [1, 2], source=source, id=str(row.get("id", "")))


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
    answers = [
        (field(answer, "answer", str), float(field(answer, "rank", (int, float))))
        for answer in field(row, "answers", list)
    ]
    # Such an answer goes on with the dialogue by itself.
    answers = [(text, rank) for text, rank in answers if "Human:" not in text and "Assistant:" not in text]
    return graded_group(
        turns, [text for text, _ in answers], [rank for _, rank in answers], source="nectar", id=str(row.get("id", ""))
    )


def _dialogue(text: str) -> list[dict[str, Any]]:
    """`Human: ... Assistant: ... Human: ... Assistant:` -> messages."""
    body = text.strip()
    if not body.startswith("Human:") or not body.endswith("Assistant:"):
        raise GroupError(f"field 'prompt' is {text!r:.60}, expected 'Human: ... Assistant:'; check the data set")
    messages = []
    for human in body.removesuffix("Assistant:").split("Human:")[1:]:
        question, *answers = human.split("Assistant:")
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return messages


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
        id=str(row.get("id", "")),
    )
