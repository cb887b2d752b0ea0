"""Metrics of an evaluation during training."""

from typing import Any

import numpy as np

from mr_reward.groups import undo_order
from mr_reward.metrics import ranking_metrics
from mr_reward.training.data import EvaluationGroups

__all__ = ["evaluation_metrics"]


def evaluation_metrics(data: EvaluationGroups, predictions: Any) -> dict[str, float]:
    """`ranking_metrics` of the groups in their own order and, where there are two orders, `order_flip_rate`.

    `predictions`: (items, N) scores in the order of `data`; slots beyond an item's responses hold anything.
    """
    rows = np.asarray(predictions, dtype=np.float64)
    scores = [undo_order(row.tolist(), order) for row, order in zip(rows, data.orders, strict=True)]
    count = len(data.groups)
    return ranking_metrics(
        scores[:count],
        [group.rankings or () for group in data.groups],
        lengths=[[len(response) for response in group.responses] for group in data.groups],
        reordered=scores[count:] or None,
    )
