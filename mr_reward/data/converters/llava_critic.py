"""LLaVA-Critic-113K: GPT-4o's judgments as text, of pairs and of single answers."""

from __future__ import annotations

import re

from mr_reward.data.converters.base import Row, SkippedRow, exchange, field, graded_group, image_field
from mr_reward.groups import ResponseGroup

__all__ = ["llava_critic"]

_QUESTION = re.compile(r"Question:\s*\[(.*?)\]\s*(?=(?:\d+\.\s*)?(?:Response|The first response))", re.DOTALL)
_RESPONSES = (
    re.compile(
        r"(?:Response (?:1|A)|The first response):\s*\[(.*?)\]\s*(?=(?:Response (?:2|B)|The second))", re.DOTALL
    ),
    re.compile(r"(?:Response (?:2|B)|The second response):\s*\[(.*?)\]\s*(?=ASSISTANT|$|\n)", re.DOTALL),
)
_VERDICT = re.compile(r"The better response:\s*\[?\s*(first|second|1|2|A|B)\b", re.IGNORECASE)
_TIE = re.compile(r"equally good|both responses are equal|\btie\b", re.IGNORECASE)


def llava_critic(row: Row) -> ResponseGroup:
    """A question with two answers and the verdict, all three inside the text of one exchange.

    Args:
        row: `id`, `image`, `conversations` (human, gpt) of the configuration `pairwise`.

    Returns:
        A group of two.

    Raises:
        GroupError: a field is wrong.
        SkippedRow: single answers (pointwise rows), ties, a text without question, answers or verdict.
    """
    request, judgment = exchange(row, "conversations")
    field(row, "id", str)
    question = _QUESTION.search(request)
    answers = [pattern.search(request) for pattern in _RESPONSES]
    if question is None or any(answer is None for answer in answers):
        raise SkippedRow("no question with two answers in the text")
    verdict = _VERDICT.search(judgment)
    if verdict is None:
        raise SkippedRow("tie" if _TIE.search(judgment) else "no verdict in the text")
    first_wins = verdict.group(1).lower() in ("first", "1", "a")
    return graded_group(
        question.group(1),
        [answer.group(1).strip() for answer in answers if answer is not None],
        [int(not first_wins), int(first_wins)],
        images=[image_field(row, "image")],
        source="llava_critic",
        id=row["id"],
    )
