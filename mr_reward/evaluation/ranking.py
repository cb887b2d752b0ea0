"""How well a reward model ranks: the metrics of `mr_reward.metrics` and how much they depend on the order.

Legend: B groups, N responses.
"""

import random
from collections.abc import Sequence

from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.metrics import order_flip_rate, ranking_metrics, score_length_correlation
from mr_reward.model.scorer import GroupScorer

__all__ = ["evaluate_ranking"]


def evaluate_ranking(scorer: GroupScorer, groups: Sequence[ResponseGroup], *, seed: int = 0) -> dict[str, float]:
    """Score ranked groups in their own order and once more in a random one.

    Args:
        scorer: the scorer.
        groups: B ranked groups.
        seed: of the random orders.

    Returns:
        `ranking_metrics` in the given order, and `order_flip_rate` (share of groups whose winner changes with the
        order), `score_length_correlation`, `num_groups` and `dropped_groups`.

    Raises:
        GroupError: a group without rankings, or every group dropped.

    Example:
        >>> evaluate_ranking(scorer, groups)["best_of_n_accuracy"]  # doctest: +SKIP
        0.97
    """
    for group in groups:
        if group.rankings is None:
            raise GroupError(f"{group.name}: has no rankings, evaluation needs them; rank it or leave it out")
    generator = random.Random(seed)
    orders = [generator.sample(range(group.num_responses), group.num_responses) for group in groups]
    scores = scorer.score(groups)
    reordered = scorer.score([group.select(order) for group, order in zip(groups, orders, strict=True)])
    first, second, kept = [], [], []
    for group, order, own, other in zip(groups, orders, scores, reordered, strict=True):
        if own is None or other is None:
            continue
        restored = [0.0] * len(other)
        for slot, score in zip(order, other, strict=True):
            restored[slot] = score
        first.append(own)
        second.append(restored)
        kept.append(group)
    if not kept:
        raise GroupError(f"all {len(groups)} groups were dropped as over-length; raise max_tokens_per_batch")
    return {
        **ranking_metrics(first, [group.rankings or () for group in kept]),
        "order_flip_rate": order_flip_rate(first, second),
        "score_length_correlation": score_length_correlation(
            first, [[len(response) for response in group.responses] for group in kept]
        ),
        "num_groups": float(len(kept)),
        "dropped_groups": float(len(groups) - len(kept)),
    }
