"""LLaVA-Critic-113K: GPT-4o's judgments as text, of pairs and of single answers."""

from __future__ import annotations

import re

from mr_reward.data.converters.base import Row, SkippedRow, exchange, field, graded_group, image_field
from mr_reward.groups import ResponseGroup

__all__ = ["llava_critic"]

_HEADINGS = tuple(
    re.compile(rf"^[ \t]*(?:{heading}):", re.MULTILINE)
    for heading in ("Question", r"Response [1A]|The first response", r"Response [2B]|The second response")
)
_END = re.compile(r"\n\s*ASSISTANT:\s*\Z")
# A letter as a capital only: "The better response: a short one" names none.
_VERDICT = re.compile(r"(?i:The better response):\s*\**\s*\[?\s*((?i:first|second)|[12AB])\b")
_TIE = re.compile(r"equally good|both responses are equal|\btie\b", re.IGNORECASE)
_FIRST = ("first", "1", "a")


def llava_critic(row: Row) -> ResponseGroup:
    """A question with two answers and the verdict, all three inside the text of one exchange.

    The text is cut at its headings (`Question:`, `The first response:`, `The second response:`), each of which must
    stand at the start of one line only: a response that holds such a heading cannot be told from the next one.

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
    image = image_field(row, "image")
    parts = _parts(request)
    if parts is None:
        raise SkippedRow("no question with two answers in the text")
    winners = {word.lower() in _FIRST for word in _VERDICT.findall(judgment)}
    if len(winners) != 1:
        raise SkippedRow("tie" if not winners and _TIE.search(judgment) else "no verdict in the text")
    first_wins = winners.pop()
    question, *answers = parts
    return graded_group(
        question,
        answers,
        [int(not first_wins), int(first_wins)],
        images=[image],
        source="llava_critic",
        id=row["id"],
    )


def _parts(request: str) -> list[str] | None:
    """What stands below each heading, without the brackets around it."""
    found = [list(heading.finditer(request)) for heading in _HEADINGS]
    if any(len(matches) != 1 for matches in found):
        return None
    starts = [matches[0].end() for matches in found]
    ends = [found[1][0].start(), found[2][0].start(), len(request)]
    if not starts[0] <= ends[0] < starts[1] <= ends[1]:
        return None
    texts = [_END.sub("", request[start:end]).strip() for start, end in zip(starts, ends, strict=True)]
    return [text[1:-1].strip() if text.startswith("[") and text.endswith("]") else text for text in texts]
