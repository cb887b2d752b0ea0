"""Image and video data sets: RLAIF-V, VLFeedback, POVID, WildVision, MM-RLHF."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from scipy.stats import spearmanr

from mr_reward.data.converters.base import (
    Convert,
    Row,
    SkippedRow,
    exchange,
    field,
    graded_group,
    image_field,
    messages_field,
    numbers_field,
    row_id,
    strip_placeholders,
)
from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup

__all__ = ["make_mm_rlhf", "povid", "rlaif_v", "vlfeedback", "wildvision"]

logger = logging.getLogger(__name__)

_ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
_MM_RLHF_ASPECTS = ("faithfulness", "helpfulness", "ethical")
_LEAST_AGREEMENT = 0.3


def rlaif_v(row: Row) -> ResponseGroup:
    """RLAIF-V: a chosen and a rejected answer to a question about an image.

    Args:
        row: `question`, `chosen`, `rejected`, `image`.

    Returns:
        A group of two.

    Raises:
        GroupError: a field is wrong.
        SkippedRow: no preference.
    """
    return graded_group(
        field(row, "question", str),
        [field(row, "chosen", str), field(row, "rejected", str)],
        [1, 2],
        images=[image_field(row, "image")],
        source="rlaif_v",
        # As VL-RewardBench calls the rows of this data set that it holds.
        id=f"RLAIF-V-{row['idx']}" if row_id(row, "idx") else None,
    )


def vlfeedback(row: Row) -> ResponseGroup:
    """VLFeedback: four answers, each with GPT-4V's ratings of three aspects, whose mean counts (official reduction).

    Args:
        row: `prompt`, `completions` (a list of structs, or columns as `datasets` gives a sequence of structs) and
            `image` or `img_path`.

    Returns:
        A group of up to four; an answer with a rating that is no number is left out.

    Raises:
        GroupError: a field is wrong.
        SkippedRow: no preference.
    """
    responses, badness = [], []
    for i, completion in enumerate(_completions(row)):
        at = f"completions[{i}]"
        response = field(completion, "response", str, at=at)
        rating = _mean_rating(field(completion, "annotations", Mapping, at=at), f"{at}.annotations")
        if rating is not None:
            responses.append(response)
            badness.append(-rating)
    return graded_group(
        field(row, "prompt", str),
        responses,
        badness,
        images=[image_field(row, "img_path" if row.get("image") is None else "image")],
        source="vlfeedback",
        id=row_id(row),
    )


def _completions(row: Row) -> list[Any]:
    completions = field(row, "completions", (list, Mapping))
    if isinstance(completions, list):
        return completions
    columns = {name: field(completions, name, list, at="completions") for name in ("response", "annotations")}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise GroupError(
            f"field 'completions' has columns of lengths {lengths}, expected equal ones; check the data set"
        )
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _mean_rating(annotations: Mapping[str, Any], at: str) -> float | None:
    ratings = [
        field(field(annotations, aspect, Mapping, at=at), "Rating", str, at=f"{at}.{aspect}") for aspect in _ASPECTS
    ]
    try:
        mean = statistics.fmean(map(float, ratings))
    except ValueError:  # "N/A"
        return None
    return mean if math.isfinite(mean) else None  # float("nan") is a float


def povid(row: Row) -> ResponseGroup:
    """POVID: an answer, and the same with hallucinations put in.

    Args:
        row: `image`, `conversations` and `rejected_conversations`, each a human and a gpt turn.

    Returns:
        A group of two.

    Raises:
        GroupError: a field is wrong.
        SkippedRow: no preference.
    """
    (question, chosen), (other, rejected) = (
        exchange(row, name) for name in ("conversations", "rejected_conversations")
    )
    if strip_placeholders(other) != strip_placeholders(question):
        raise GroupError("fields 'conversations' and 'rejected_conversations' ask different things, expected the same")
    return graded_group(
        question,
        [chosen, rejected],
        [1, 2],
        images=[image_field(row, "image")],
        source="povid",
        id=row_id(row),
    )


def wildvision(row: Row) -> ResponseGroup:
    """WildVision: two models' chats about an image and the user's vote.

    Args:
        row: `question_id`, `conversation_a`, `conversation_b`, `image`, `winner`.

    Returns:
        A group of two; the prompt is everything before the last answers.

    Raises:
        GroupError: a field is wrong.
        SkippedRow: a tie, or chats that part before their last turn.
    """
    winner = field(row, "winner", str)
    if winner in ("tie", "tie (bothbad)"):
        raise SkippedRow(winner)
    if winner not in ("model_a", "model_b"):
        raise GroupError(
            f"field 'winner' is {winner!r}, expected model_a, model_b, tie or tie (bothbad); check the data set"
        )
    first, second = messages_field(row, "conversation_a"), messages_field(row, "conversation_b")
    if [turn for turn in first if turn["role"] == "user"] != [turn for turn in second if turn["role"] == "user"]:
        raise GroupError("fields 'conversation_a' and 'conversation_b' ask different questions, expected the same")
    if first[:-1] != second[:-1]:
        raise SkippedRow("the chats part before their last turn")
    prompt = [{**turn, "content": strip_placeholders(turn["content"])} for turn in first[:-1]]
    return graded_group(
        prompt,
        [first[-1]["content"], second[-1]["content"]],
        [int(winner != "model_a"), int(winner != "model_b")],
        images=[image_field(row, "image")],
        source="wildvision",
        id=row_id(row, "question_id"),
    )


def make_mm_rlhf(rows: Iterable[Row]) -> Convert:
    """MM-RLHF: three to five answers with human scores and a final ranking.

    Whether 1 is the best or the worst in `final_ranking` is not documented, so all rows are looked at first: ranks
    follow the direction that agrees with the mean of the humans' scores.

    Args:
        rows: all rows of the data set; wrong ones are left to the returned function.

    Returns:
        The function from a row to a group.

    Raises:
        GroupError: ranking and scores agree in neither direction.
    """
    correlations = []
    for row in rows:
        try:
            ranking, means = _final_ranking(row), _mean_scores(row)
        except GroupError:
            continue
        if len(set(ranking)) > 1 and len(set(means)) > 1:
            correlations.append(float(spearmanr(ranking, means).statistic))
    agreement = statistics.fmean(correlations) if correlations else 0.0
    if abs(agreement) < _LEAST_AGREEMENT:
        raise GroupError(
            f"field 'final_ranking' and the mean scores correlate by {agreement:.2f} over {len(correlations)} rows, "
            f"expected at least {_LEAST_AGREEMENT} in one direction; check data set and version"
        )
    logger.info("final_ranking and the mean scores correlate by %.2f over %d rows", agreement, len(correlations))
    # Scores grow with quality: ranks that fall with them have 1 as the best.
    sign = 1 if agreement < 0 else -1

    def convert(row: Row) -> ResponseGroup:
        outputs = _outputs(row)
        images, videos = [], []
        if row.get("video"):
            videos = [[field(row, "video", str)]]
        else:
            images = [image_field(row, "image")]
        return graded_group(
            field(row, "question", str),
            outputs,
            [sign * rank for rank in _final_ranking(row)],
            images=images,
            videos=videos,
            source="mm_rlhf",
            id=row_id(row),
        )

    return convert


def _outputs(row: Row) -> list[str]:
    outputs = field(row, "models_output", list)
    for i, text in enumerate(outputs):
        if not isinstance(text, str):
            raise GroupError(f"field 'models_output[{i}]' is {text!r:.60}, expected str; check data set and version")
    return outputs


def _final_ranking(row: Row) -> list[float]:
    return numbers_field(row, "final_ranking", len(_outputs(row)))


def _mean_scores(row: Row) -> list[float]:
    size = len(_outputs(row))
    columns = [numbers_field(row, aspect, size) for aspect in _MM_RLHF_ASPECTS]
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]
