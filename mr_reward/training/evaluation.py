"""Metrics of an evaluation during training."""

from typing import Any

import numpy as np

from mr_reward.metrics import order_flip_rate, ranking_metrics, score_length_correlation
from mr_reward.training.data import EvaluationGroups

__all__ = ["evaluation_metrics"]


def evaluation_metrics(data: EvaluationGroups, predictions: Any) -> dict[str, float]:
    """Ranking metrics of the groups in their own order, and how far another order changes the winner.

    Args:
        data: the evaluated groups, in one or two orders.
        predictions: (items, N) scores in the order of `data`; slots beyond an item's responses hold anything.

    Returns:
        `mr_reward.metrics.ranking_metrics`, `score_length_correlation` (length in characters) and, with two orders,
        `order_flip_rate`.

    Example:
        >>> from mr_reward import ResponseGroup
        >>> data = EvaluationGroups([ResponseGroup(prompt="a", responses=["b", "cc"], rankings=[1, 2])], num_orders=1)
        >>> evaluation_metrics(data, [[2.0, 1.0]])["best_of_n_accuracy"]
        1.0
    """
    scores = []
    for order, row in zip(data.orders, np.asarray(predictions, dtype=np.float64), strict=True):
        restored = [0.0] * len(order)
        for slot, position in enumerate(order):
            restored[position] = float(row[slot])
        scores.append(restored)
    count = len(data.groups)
    first, second = scores[:count], scores[count:]
    metrics = {
        **ranking_metrics(first, [group.rankings or () for group in data.groups]),
        "score_length_correlation": score_length_correlation(
            first, [[len(response) for response in group.responses] for group in data.groups]
        ),
    }
    if second:
        metrics["order_flip_rate"] = order_flip_rate(first, second)
    return metrics
