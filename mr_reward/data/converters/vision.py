"""Image and video data sets: RLAIF-V, VLFeedback, POVID, WildVision, MM-RLHF."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

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
    strip_placeholders,
)
from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup

__all__ = ["make_mm_rlhf", "povid", "rlaif_v", "vlfeedback", "wildvision"]

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
        id=str(row.get("idx", "")),
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
    completions = field(row, "completions", (list, Mapping))
    if isinstance(completions, Mapping):
        columns = {name: field(completions, name, list) for name in ("response", "annotations")}
        completions = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    responses, badness = [], []
    for completion in completions:
        annotations = field(completion, "annotations", Mapping)
        ratings = [field(field(annotations, aspect, Mapping), "Rating", str) for aspect in _ASPECTS]
        try:
            badness.append(-statistics.fmean(map(float, ratings)))
        except ValueError:  # "N/A"
            continue
        responses.append(field(completion, "response", str))
    return graded_group(
        field(row, "prompt", str),
        responses,
        badness,
        images=[image_field(row, "image" if "image" in row else "img_path")],
        source="vlfeedback",
        id=str(row.get("id", "")),
    )


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
    (question, chosen), (_, rejected) = (exchange(row, name) for name in ("conversations", "rejected_conversations"))
    return graded_group(
        question,
        [chosen, rejected],
        [1, 2],
        images=[image_field(row, "image")],
        source="povid",
        id=str(row.get("id", "")),
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
        id=str(field(row, "question_id", str)),
    )


def make_mm_rlhf(rows: Iterable[Row]) -> Convert:
    """MM-RLHF: three to five answers with human scores and a final ranking.

    Whether 1 is the best or the worst in `final_ranking` is not documented, so all rows are looked at first: ranks
    follow the direction that agrees with the mean of the humans' scores.

    Args:
        rows: all rows of the data set.

    Returns:
        The function from a row to a group.

    Raises:
        GroupError: a field is wrong, or ranking and scores agree in neither direction.
    """
    correlations = []
    for row in rows:
        ranking, means = field(row, "final_ranking", list), _mean_scores(row)
        if len(set(ranking)) > 1 and len(set(means)) > 1:
            correlations.append(float(spearmanr(ranking, means).statistic))
    agreement = statistics.fmean(correlations) if correlations else 0.0
    if abs(agreement) < _LEAST_AGREEMENT:
        raise GroupError(
            f"field 'final_ranking' and the mean scores correlate by {agreement:.2f} over {len(correlations)} rows, "
            f"expected at least {_LEAST_AGREEMENT} in one direction; check data set and version"
        )
    # Scores grow with quality: ranks that fall with them have 1 as the best.
    sign = 1 if agreement < 0 else -1

    def convert(row: Row) -> ResponseGroup:
        images, videos = [], []
        if row.get("video"):
            frames = field(row, "video", (str, list))
            videos = [frames if isinstance(frames, list) else [frames]]
        else:
            images = [image_field(row, "image")]
        return graded_group(
            field(row, "question", str),
            [field({"models_output": text}, "models_output", str) for text in field(row, "models_output", list)],
            [sign * rank for rank in field(row, "final_ranking", list)],
            images=images,
            videos=videos,
            source="mm_rlhf",
            id=str(row.get("id", "")),
        )

    return convert


def _mean_scores(row: Row) -> list[float]:
    columns = [field(row, aspect, list) for aspect in _MM_RLHF_ASPECTS]
    size = len(field(row, "models_output", list))
    for aspect, column in zip(_MM_RLHF_ASPECTS, columns, strict=True):
        if len(column) != size or not all(isinstance(value, (int, float)) for value in column):
            raise GroupError(f"field {aspect!r} is {column!r:.60}, expected {size} numbers, one per answer")
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]
