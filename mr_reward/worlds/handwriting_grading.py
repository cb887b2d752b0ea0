"""What is asked about handwritten digits, and how good a text is as an answer.

Pure functions of a question, the digits shown and a text: candidates that were made up and completions of a policy are
graded by the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mr_reward.errors import ConfigurationError

__all__ = ["QUESTIONS", "correct_answer", "grade", "is_correct"]

# Short, because the tiny models read one token per byte.
QUESTIONS = {
    "read": "Number?",
    "sum": "Sum?",
    "largest": "Largest?",
    "even": "How many even?",
}

# How quality is measured, see `grade`.
PARTIAL = 0.45  # the most that a partly right answer can reach: below a right one, however it is worded
REFUSAL = 0.10
WRONG = 0.05
WORDING = {"bare": 1.0, "sentence": 0.8, "rambling": 0.5}
SENTENCE_LENGTH = 30  # characters; a longer text is rambling
TOLERANCE = {"sum": 5, "largest": 4, "even": 2}  # an answer this far off is plainly wrong

_NUMBER = re.compile(r"[0-9]+")
_REFUSAL = re.compile(r"\b(cannot|can't|unable|not sure|no idea)\b", re.IGNORECASE)
_MAX_NUMBER_LENGTH = 18  # digits; int() of a policy's endless digits would be slow, and no answer is as long


def correct_answer(question: str, digits: Sequence[int]) -> str:
    """The right answer to `question` about `digits`.

    Args:
        question: a key of `QUESTIONS`.
        digits: k digits.

    Returns:
        A string of digits; for "read" it has k of them, leading zeros included.

    Example:
        >>> correct_answer("read", (0, 7, 4)), correct_answer("sum", (0, 7, 4))
        ('074', '11')
    """
    if question == "read":
        return "".join(map(str, digits))
    if question == "sum":
        return str(sum(digits))
    if question == "largest":
        return str(max(digits))
    if question == "even":
        return str(sum(digit % 2 == 0 for digit in digits))
    raise ConfigurationError(f"got question {question!r}, expected one of {list(QUESTIONS)}")


def is_correct(question: str, digits: Sequence[int], response: str) -> bool:
    """Whether a response is the right answer and nothing else (white space around it is allowed)."""
    return response.strip() == correct_answer(question, digits)


def grade(question: str, digits: Sequence[int], response: str) -> float:
    """The true quality of any text as an answer. A pure function: candidates and policies are graded alike.

    The claim of a response is the only number in it (repeating it is fine).

    | response | quality |
    |---|---|
    | claim is right | 1 |
    | claim is partly right | `PARTIAL` * similarity |
    | claim is wrong | `WRONG` |
    | no number, at most `SENTENCE_LENGTH` characters, says that it does not know | `REFUSAL` |
    | anything else: two different numbers, waffle, silence | 0 |

    A claim counts in full when it stands alone, less in a sentence, half in a text longer than `SENTENCE_LENGTH`
    characters (`WORDING`). Similarity is, for "read", the share of digits in place (over the longer of the two
    numbers); else `1 - |claim - answer| / TOLERANCE`, 0 at least.

    Args:
        question: a key of `QUESTIONS`.
        digits: the k digits shown.
        response: any text.

    Returns:
        A number in [0, 1], 1 exactly where `is_correct`; texts that are equally wrong have equal ones.

    Example:
        >>> [grade("read", (4, 7, 2), text) for text in ("472", "It is 472.", "475", "I cannot tell.", "865", "")]
        [1.0, 0.8, 0.3, 0.1, 0.05, 0.0]
    """
    answer = correct_answer(question, digits)
    text = response.strip()
    claims = set(_NUMBER.findall(text))
    if not claims and len(text) <= SENTENCE_LENGTH and _REFUSAL.search(text):
        return REFUSAL
    if len(claims) != 1:
        return 0.0
    claim = claims.pop()
    similarity = _similarity(question, claim, answer)
    # "013" says 13, but only the answer itself gets the full mark.
    if text == claim and (claim == answer or similarity < 1.0):
        wording = WORDING["bare"]
    else:
        wording = WORDING["sentence" if len(text) <= SENTENCE_LENGTH else "rambling"]
    content = 1.0 if similarity == 1.0 else max(WRONG, PARTIAL * similarity)
    # Rounded so that equal qualities compare equal, whatever their way through floating point.
    return round(content * wording, 6)


def _similarity(question: str, claim: str, answer: str) -> float:
    """How much of `claim` is right, 1 = all of it."""
    if len(claim) > _MAX_NUMBER_LENGTH:
        return 0.0
    if question == "read":
        return sum(a == b for a, b in zip(claim, answer, strict=False)) / max(len(claim), len(answer))
    return max(0.0, 1.0 - abs(int(claim) - int(answer)) / TOLERANCE[question])
