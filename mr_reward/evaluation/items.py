"""What a benchmark consists of: items (a ranked group and where it belongs), and what scoring one gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mr_reward.groups import ResponseGroup
from mr_reward.metrics import kendall_tau_b

__all__ = ["EvaluationItem", "ItemRecord", "Judged"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationItem:
    """A ranked group of a benchmark.

    Args:
        uid: unique in the benchmark; the ids that benchmarks give are not always.
        category: the benchmark's own, by its official rule.
        group: with rankings, 1 = best; its id is the uid.
        facts: what the official metric needs beside them, as JSON values.
    """

    uid: str
    category: str
    group: ResponseGroup
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecord:
    """What scoring one item gave: enough to recompute every number without a model.

    Args:
        uid: of the item.
        category: of the item.
        rankings: N ranks, 1 = best.
        lengths: characters of the N responses.
        orders: K orders in which the responses were shown; `orders[k][slot]` is the response in that slot.
        scores: K times N scores, in the item's own order; None if the item was dropped.
        drop_reason: why, if it was.
        truncated: responses whose end was cut off.
        facts: of the item.
    """

    uid: str
    category: str
    rankings: Sequence[int]
    lengths: Sequence[int]
    orders: Sequence[Sequence[int]]
    scores: Sequence[Sequence[float]] | None
    drop_reason: str | None = None
    truncated: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def judged(self, k: int) -> Judged:
        """As it was scored in its k-th order; items with fewer orders start over.

        Args:
            k: from 0 on.

        Returns:
            What metrics take.
        """
        scores = None if self.scores is None else self.scores[k % len(self.scores)]
        return Judged(self.uid, self.category, self.rankings, scores, self.facts)


@dataclass(frozen=True, eq=False)
class Judged:
    """An item with the scores of one order, as metrics take it. What is computed from them is kept for resampling.

    Args:
        uid: of the item.
        category: of the item.
        rankings: N ranks, 1 = best.
        scores: N scores; None if the item was dropped, which counts as wrong everywhere.
        facts: of the item.
    """

    uid: str
    category: str
    rankings: Sequence[int]
    scores: Sequence[float] | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def strict_pair(self) -> float:
        """1 if the better of two responses scores higher, else 0; equal scores are wrong.

        Example:
            >>> Judged("a", "", (2, 1), (0.1, 0.2)).strict_pair, Judged("a", "", (2, 1), (0.1, 0.1)).strict_pair
            (1.0, 0.0)
        """
        if self.scores is None:
            return 0.0
        best = self.rankings.index(min(self.rankings))
        return float(self.scores[best] > self.scores[1 - best])

    @cached_property
    def best_of_n(self) -> float:
        """The chance that a pick among the highest scores is a best response: a share only where scores are equal.

        Example:
            >>> Judged("a", "", (1, 2, 1), (0.3, 0.3, 0.1)).best_of_n
            0.5
        """
        if self.scores is None:
            return 0.0
        highest, best = max(self.scores), min(self.rankings)
        picked = [rank == best for rank, score in zip(self.rankings, self.scores, strict=True) if score == highest]
        return sum(picked) / len(picked)

    @cached_property
    def pairs(self) -> tuple[int, int, int]:
        """Pairs with different ranks; of them those whose scores agree, and those with equal scores."""
        total = agree = equal = 0
        for i, better in enumerate(self.rankings):
            for j, worse in enumerate(self.rankings):
                if better < worse:
                    total += 1
                    if self.scores is not None:
                        agree += self.scores[i] > self.scores[j]
                        equal += self.scores[i] == self.scores[j]
        return total, agree, equal

    @cached_property
    def tau_b(self) -> float:
        """Kendall's tau-b; NaN where it is not defined or the item was dropped."""
        return math.nan if self.scores is None else kendall_tau_b([self.scores], [self.rankings]).mean
