"""What a benchmark consists of: items (a ranked group and where it belongs), and what scoring one gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mr_reward.groups import GroupScores, ResponseGroup
from mr_reward.metrics import kendall_tau_b


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationItem:
    """A ranked group of a benchmark."""

    uid: str  # unique in the benchmark; the ids that benchmarks give are not always
    category: str  # the benchmark's own, by its official rule
    group: ResponseGroup  # with rankings, 1 = best; its id is the uid
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the official metric needs beside them, JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecord:
    """What scoring one item in K orders gave, a line of `items.jsonl`: every number is computed from these."""

    uid: str
    category: str
    rankings: Sequence[int]  # N ranks, 1 = best
    lengths: Sequence[int]  # characters of the N responses
    orders: Sequence[Sequence[int]]  # K orders that were shown; orders[k][slot] is the response in that slot
    scores: Sequence[Sequence[float]] | None  # K times N scores, in the item's own order; None if it was dropped
    drop_reason: str | None = None
    truncated: int = 0  # responses whose end was cut off
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, item: EvaluationItem, orders: Sequence[Sequence[int]], results: Sequence[GroupScores]) -> ItemRecord:
        """From the results of the K orders, each put back into the item's own; dropped in one is dropped."""
        dropped = [result for result in results if result.scores is None]
        return cls(
            uid=item.uid,
            category=item.category,
            rankings=list(item.group.rankings or ()),
            lengths=[len(response) for response in item.group.responses],
            orders=[list(order) for order in orders],
            scores=None if dropped else [list(result.scores or ()) for result in results],
            drop_reason=dropped[0].drop_reason if dropped else None,
            truncated=max(sum(result.truncated) for result in results),
            facts=dict(item.facts),
        )

    def judged(self, k: int) -> Judged:
        """As it was scored in its k-th order; items with fewer orders start over."""
        scores = None if self.scores is None else self.scores[k % len(self.scores)]
        return Judged(self.uid, self.category, self.rankings, scores, self.facts)


@dataclass(frozen=True, eq=False)
class Judged:
    """An item with the scores of one order, as metrics take it."""

    uid: str
    category: str
    rankings: Sequence[int]  # N ranks, 1 = best
    scores: Sequence[float] | None  # N scores; None if the item was dropped, which counts as wrong everywhere
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def strict_pair(self) -> float:
        """1 if the better of two responses scores higher, else 0; equal scores are wrong."""
        if self.scores is None:
            return 0.0
        best = self.rankings.index(min(self.rankings))
        return float(self.scores[best] > self.scores[1 - best])

    @cached_property
    def best_of_n(self) -> float:
        """The chance that a pick among the highest scores is a best response: a share only where scores are equal."""
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
