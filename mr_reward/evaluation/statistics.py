"""How sure a number is: intervals by resampling items, for one run and for the difference of two."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np

from mr_reward.errors import ConfigurationError
from mr_reward.evaluation.items import Judged

__all__ = ["Interval", "intervals", "paired_interval"]

Summarise = Callable[[Sequence[Judged]], dict[str, float]]
Draw = tuple[int, int]  # position of an item, and how often its unit was drawn before
_TOGETHER = ("id", "prompt")  # facts: items that share one are drawn together


class Interval(NamedTuple):
    """A number and where 95 % of its resampled values lie.

    Args:
        value: for the items themselves.
        low: 2.5 % of the resampled values lie below.
        high: 2.5 % lie above.
    """

    value: float
    low: float
    high: float


def intervals(
    orders: Sequence[Sequence[Judged]], summarise: Summarise, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Each metric, averaged over the orders, with a 95 % percentile bootstrap over items.

    Items that belong together (the facts `id`, as in Acc+, or `prompt`, as in Ties) are drawn together.

    Args:
        orders: the same items as scored in each of K orders.
        summarise: the benchmark's metrics.
        num_resamples: how often items are drawn; 0 gives intervals of no width.
        seed: of the draws.

    Returns:
        By name of the metric.

    Example:
        >>> pair = Judged("a", "", (1, 2), (0.4, 0.1))
        >>> intervals([[pair]], lambda items: {"acc": items[0].strict_pair}, num_resamples=10)["acc"]
        Interval(value=1.0, low=1.0, high=1.0)
    """
    units = _units(orders[0])
    values = _averaged(orders, _once(orders[0]), summarise)
    draws = [_averaged(orders, drawn, summarise) for drawn in _draws(units, num_resamples, seed)]
    found = {}
    for name, value in values.items():
        found[name] = _interval(value, [draw[name] for draw in draws if name in draw])
    return found


def paired_interval(
    first: Sequence[Sequence[Judged]],
    second: Sequence[Sequence[Judged]],
    summarise: Summarise,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """The difference of two runs, the same items drawn for both.

    Args:
        first: items of a run, for each of its orders.
        second: the same items of another run.
        summarise: the benchmark's metrics.
        num_resamples: how often items are drawn.
        seed: of the draws.

    Returns:
        First minus second, by name of the metric.

    Raises:
        ConfigurationError: the runs hold other items.
    """
    position = {item.uid: i for i, item in enumerate(second[0])}
    uids = [item.uid for item in first[0]]
    if position.keys() != set(uids):
        differing = sorted(position.keys() ^ set(uids))
        raise ConfigurationError(
            f"the runs have {len(uids)} and {len(position)} items and differ in {len(differing)} ({differing[0]}, "
            "...), expected the same items; evaluate both on the same data"
        )
    aligned = [[items[position[uid]] for uid in uids] for items in second]

    def difference(drawn: Iterable[Draw]) -> dict[str, float]:
        mine, other = _averaged(first, drawn, summarise), _averaged(aligned, drawn, summarise)
        return {name: mine[name] - other[name] for name in mine.keys() & other.keys()}

    values = difference(_once(uids))
    draws = [difference(drawn) for drawn in _draws(_units(first[0]), num_resamples, seed)]
    found = {}
    for name in sorted(values):
        found[name] = _interval(values[name], [draw[name] for draw in draws if name in draw])
    return found


def _once(items: Sequence[Any]) -> list[Draw]:
    return [(i, 0) for i in range(len(items))]


def _interval(value: float, resampled: Sequence[float]) -> Interval:
    """A metric may be undefined for some draws, or for all."""
    defined = [number for number in resampled if not math.isnan(number)]
    if not defined:
        return Interval(value, value, value)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _averaged(orders: Sequence[Sequence[Judged]], drawn: Iterable[Draw], summarise: Summarise) -> dict[str, float]:
    drawn = list(drawn)
    summaries = [summarise([_again(items[i], time) for i, time in drawn]) for items in orders]
    return {name: sum(summary[name] for summary in summaries) / len(summaries) for name in summaries[0]}


def _again(item: Judged, time: int) -> Judged:
    """An item that is drawn a second time belongs to a second id, or Acc+ would take both for one."""
    names = item.facts.keys() & set(_TOGETHER)
    if not time or not names:
        return item
    twin = copy(item)
    object.__setattr__(twin, "facts", {**item.facts, **{name: f"{item.facts[name]} #{time}" for name in names}})
    return twin


def _units(items: Sequence[Judged]) -> list[list[int]]:
    """Positions that are drawn together."""
    found: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        name = next((item.facts[name] for name in _TOGETHER if name in item.facts), item.uid)
        found.setdefault(str(name), []).append(i)
    return list(found.values())


def _draws(units: Sequence[Sequence[int]], num_resamples: int, seed: int) -> list[list[Draw]]:
    generator = random.Random(seed)
    found = []
    for _ in range(num_resamples):
        times: Counter[int] = Counter()
        drawn = []
        for unit in generator.choices(range(len(units)), k=len(units)):
            drawn += [(i, times[unit]) for i in units[unit]]
            times[unit] += 1
        found.append(drawn)
    return found
