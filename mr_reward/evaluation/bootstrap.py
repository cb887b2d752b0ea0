"""How sure a number is: percentile bootstraps over items, for one run and for the difference of two.

A resample is a vector of weights, how often each item was drawn, so that all resamples are one matrix product.
Legend: R resamples, n items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mr_reward.errors import ConfigurationError
from mr_reward.evaluation.items import Judged
from mr_reward.evaluation.official import Metric

__all__ = ["Interval", "intervals", "paired_interval"]

_TOGETHER = ("id", "prompt")  # facts: items that share one are drawn together
_BLOCK = 1 << 22  # weights in memory at a time
_Weighted = Callable[[NDArray[np.float64]], Mapping[str, NDArray[np.float64]]]


class Interval(NamedTuple):
    """A number and where 95 % of its resampled values lie."""

    value: float
    low: float
    high: float


def intervals(
    orders: Sequence[Sequence[Judged]], metric: Metric, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Each number of a metric, averaged over K orders of the same items, with a 95 % percentile bootstrap over items.

    Items that belong together (the facts `id`, as in Acc+, or `prompt`, as in Ties) are drawn together.
    """
    return _resampled(orders[0], lambda weights: _averaged(orders, metric, weights), num_resamples, seed)


def paired_interval(
    first: Sequence[Sequence[Judged]],
    second: Sequence[Sequence[Judged]],
    metric: Metric,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """The difference of two runs, first minus second, the same items drawn for both."""
    position = {item.uid: i for i, item in enumerate(second[0])}
    uids = [item.uid for item in first[0]]
    if position.keys() != set(uids):
        differing = sorted(position.keys() ^ set(uids))
        raise ConfigurationError(
            f"the runs have {len(uids)} and {len(position)} items and differ in {len(differing)} ({differing[0]}, "
            "...), expected the same items; evaluate both on the same data"
        )
    aligned = [[items[position[uid]] for uid in uids] for items in second]

    def difference(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        mine, other = _averaged(first, metric, weights), _averaged(aligned, metric, weights)
        return {name: mine[name] - other[name] for name in sorted(mine.keys() & other.keys())}

    return _resampled(first[0], difference, num_resamples, seed)


def _averaged(
    orders: Sequence[Sequence[Judged]], metric: Metric, weights: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    by_order = [metric.weighted(items, weights) for items in orders]
    return {name: np.mean([found[name] for found in by_order], axis=0) for name in by_order[0]}


def _resampled(items: Sequence[Judged], numbers: _Weighted, num_resamples: int, seed: int) -> dict[str, Interval]:
    """A number may be undefined (NaN) for some resamples, or for all."""
    values = numbers(np.ones((1, len(items))))
    blocks = [numbers(weights) for weights in _draws(items, num_resamples, seed)]
    found = {}
    for name, (value,) in values.items():
        drawn = np.concatenate([block[name] for block in blocks]) if blocks else np.array([value])
        drawn = drawn[~np.isnan(drawn)]
        low, high = np.percentile(drawn, [2.5, 97.5]) if drawn.size else (value, value)
        found[name] = Interval(float(value), float(low), float(high))
    return found


def _draws(items: Sequence[Judged], num_resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of weights (at most R, n): how often the unit of each item was drawn."""
    names = [next((f"{key} {item.facts[key]}" for key in _TOGETHER if key in item.facts), item.uid) for item in items]
    units, unit_of_item = np.unique(names, return_inverse=True)
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(items))
    for start in range(0, num_resamples, rows):
        size = min(rows, num_resamples - start)
        counts = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), size=size)
        yield counts[:, unit_of_item].astype(np.float64)
