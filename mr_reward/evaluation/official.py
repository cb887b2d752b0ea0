"""What scoring an item gave, the benchmarks' official metrics, each with its own tie rule, and how sure they are.

Metrics are pure functions from judged items to named numbers; nothing here knows a model. A dropped item is wrong. A
category that no item has is left out, so that parts of a benchmark can be looked at; the counts tell.

Every metric also takes weights (R, n), how often each of n items counts in each of R resamples, and gives R numbers
for each name, NaN where a resample holds no item of a category. That makes an interval (a percentile bootstrap over
items, for one run or for the difference of two) a matrix product. Legend: R resamples, n items.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mr_reward.errors import ConfigurationError
from mr_reward.metrics import kendall_tau_b, right_above_wrong

Array = NDArray[np.float64]
_TOGETHER = ("id", "prompt")  # facts: items that share one are drawn together
_BAD = "bad row: "
_BLOCK = 1 << 22  # weights in memory at a time
_NUM_BINS = 10  # of the probabilities whose calibration is looked at
_strict_pair, _best_of_n, _tau_b, _category = map(attrgetter, ("strict_pair", "best_of_n", "tau_b", "category"))


def bad_row(reason: object) -> str:
    """The `drop_reason` of an item whose row is at fault."""
    return f"{_BAD}{reason}"


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

    @property
    def bad_row(self) -> str | None:
        """Where it stands and why it could not be scored, if that was its row's fault."""
        reason = self.drop_reason or ""
        return reason.removeprefix(_BAD) if reason.startswith(_BAD) else None

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
        better, worse = np.nonzero(np.less.outer(self.rankings, self.rankings))
        if self.scores is None:
            return len(better), 0, 0
        margins = np.subtract.outer(self.scores, self.scores)[better, worse]
        return len(better), int((margins > 0).sum()), int((margins == 0).sum())

    @cached_property
    def tau_b(self) -> float:
        """Kendall's tau-b; NaN where it is not defined or the item was dropped."""
        return math.nan if self.scores is None else kendall_tau_b([self.scores], [self.rankings]).mean

    @cached_property
    def is_mixed(self) -> bool:
        """Whether some responses are right (of the best rank) and others wrong."""
        return min(self.rankings) < max(self.rankings)

    @cached_property
    def right_above_wrong(self) -> float:
        """Of a mixed item, see `mr_reward.metrics.right_above_wrong`."""
        return 0.0 if self.scores is None else right_above_wrong(self.scores, [-rank for rank in self.rankings])

    @cached_property
    def claim(self) -> tuple[float, float]:
        """What the softmax gives the highest score, and what it should have given: 1 / (right ones) if it is right."""
        assert self.scores is not None
        right = list(self.rankings).count(min(self.rankings))
        return 1.0 / float(np.exp(np.subtract(self.scores, max(self.scores))).sum()), self.best_of_n / right


Credit = Callable[[Judged], float]


class _Part:
    """Some of the items, with their columns of the weights."""

    def __init__(self, items: Sequence[Judged], weights: Array) -> None:
        self.items, self.weights = items, weights

    def by(self, key: Callable[[Judged], str]) -> dict[str, _Part]:
        """Parts by a name, sorted."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for i, item in enumerate(self.items):
            found[key(item)].append(i)
        return {name: self.only(found[name]) for name in sorted(found)}

    def only(self, positions: list[int]) -> _Part:
        return _Part([self.items[i] for i in positions], self.weights[:, positions])

    def sum(self, credit: Credit) -> Array:
        return self.weights @ np.array([credit(item) for item in self.items], dtype=np.float64)

    def mean(self, credit: Credit) -> Array:
        return _divide(self.sum(credit), self.weights.sum(1))


class Metric:
    """An official metric: called with items it gives numbers, `weighted` gives those of many resamples at once."""

    def __init__(self, function: Callable[[_Part], dict[str, Array]]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __call__(self, items: Sequence[Judged]) -> dict[str, float]:
        return {name: float(value) for name, (value,) in self.weighted(items, np.ones((1, len(items)))).items()}

    def weighted(self, items: Sequence[Judged], weights: Array) -> dict[str, Array]:
        """By name, R numbers for weights (R, n)."""
        return self._function(_Part(items, weights))


@Metric
def vl_rewardbench(part: _Part) -> dict[str, Array]:
    """VL-RewardBench: accuracy over all pairs (`overall`), the mean of the three categories (`macro`) (`cal.py`)."""
    by_category = _by_category(part, _strict_pair)
    return {"macro": _mean_of(by_category.values()), "overall": part.mean(_strict_pair), **by_category}


@Metric
def multimodal_rewardbench(part: _Part) -> dict[str, Array]:
    """Multimodal RewardBench: accuracy over all pairs, and for each category (`2_get_accuracy.py`)."""
    return {"overall": part.mean(_strict_pair), **_by_category(part, _strict_pair)}


@Metric
def mm_rlhf_rewardbench(part: _Part) -> dict[str, Array]:
    """MM-RLHF-RewardBench: Acc over pairs, Acc+ over ids (a fact) of which all pairs are right, also by category."""
    found = {"acc": part.mean(_strict_pair), "acc_plus": _all_right(part)}
    for name, members in part.by(_category).items():
        found[f"acc/{name}"] = members.mean(_strict_pair)
        found[f"acc_plus/{name}"] = _all_right(members)
    return found


@Metric
def video_rewardbench(part: _Part) -> dict[str, Array]:
    """VideoRewardBench: accuracy over all pairs and for each of five dimensions.

    `macro` is the mean of the dimensions; in `macro_4` long and short perception are one.
    """
    by_category = _by_category(part, _strict_pair)
    merged = part.by(lambda item: "perception" if "perception" in item.category else item.category)
    return {
        "overall": part.mean(_strict_pair),
        "macro": _mean_of(by_category.values()),
        "macro_4": _mean_of(members.mean(_strict_pair) for members in merged.values()),
        **by_category,
    }


@Metric
def n_way(part: _Part) -> dict[str, Array]:
    """MR2Bench, and ranked groups of any kind: how well N responses are ordered.

    `best_of_n`, see `Judged`; `pairwise`, over all pairs with different ranks, equal scores half; `pairwise_strict`,
    where they are wrong; `tau_b`; the first two for each category and each N, if several.
    """
    defined = part.only([i for i, item in enumerate(part.items) if not math.isnan(item.tau_b)])
    found = {
        "best_of_n": part.mean(_best_of_n),
        "pairwise": _pairwise(part, 0.5),
        "pairwise_strict": _pairwise(part, 0.0),
        "tau_b": defined.mean(_tau_b),
    }
    sizes = part.by(lambda item: f"N={len(item.rankings)}")
    by_size = dict(sorted(sizes.items(), key=lambda entry: len(entry[1].items[0].rankings)))
    for parts in (part.by(_category), by_size):
        if len(parts) > 1:
            for name, members in parts.items():
                found[f"best_of_n/{name}"] = members.mean(_best_of_n)
                found[f"pairwise/{name}"] = _pairwise(members, 0.5)
    return found


@Metric
def rollouts(part: _Part) -> dict[str, Array]:
    """Is a judge fit for a policy? Its rollouts in groups with right and wrong ones; the others do not count.

    Right is what shares the best rank of its group. `right_above_wrong`: mean over groups, equal scores half (also for
    each category, if several); `best_of_n`, see `Judged`; `calibration_error`, see `reliability`.
    """
    mixed = part.only([i for i, item in enumerate(part.items) if item.is_mixed])
    found = {
        "right_above_wrong": mixed.mean(attrgetter("right_above_wrong")),
        "best_of_n": mixed.mean(_best_of_n),
        "calibration_error": _calibration_error(mixed),
    }
    by_category = mixed.by(_category)
    if len(by_category) > 1:
        for name, members in by_category.items():
            found[f"right_above_wrong/{name}"] = members.mean(attrgetter("right_above_wrong"))
    return found


def _calibration_error(part: _Part) -> Array:
    """Expected calibration error (Guo et al., arXiv 1706.04599): the mean gap of the bins of `reliability`."""
    part = part.only([i for i, item in enumerate(part.items) if item.scores is not None])
    gaps = np.zeros((len(part.items), _NUM_BINS))
    for own, item in zip(gaps, part.items, strict=True):
        own[_bin(item)] = np.subtract(*item.claim)
    return _divide(np.abs(part.weights @ gaps).sum(1), part.weights.sum(1))


def _bin(item: Judged) -> int:
    return min(int(item.claim[0] * _NUM_BINS), _NUM_BINS - 1)


def reliability(items: Sequence[Judged]) -> list[dict[str, float]]:
    """Ten equal bins of the probability that the softmax over a group's scores gives its highest one.

    Of each that is not empty `groups`, the mean `probability`, and `right`: how often that response is the best one.
    Where several are right, each is it with the same chance, as in the target of the loss `best_of_n`. Only groups
    with right and wrong responses that were scored are looked at.
    """
    bins: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for item in items:
        if item.is_mixed and item.scores is not None:
            bins[_bin(item)].append(item.claim)
    found = []
    for _, claims in sorted(bins.items()):
        probability, right = np.mean(claims, axis=0)
        found.append({"groups": len(claims), "probability": float(probability), "right": float(right)})
    return found


@Metric
def rewardbench_2(part: _Part) -> dict[str, Array]:
    """RewardBench 2: best of 4 for five domains, its own formula for Ties, and the mean of the domains (`average`).

    Items are groups, the right answers first; those of Ties have the facts `kind` (`tied` or `ref`) and `prompt`: each
    prompt has a version with several right answers (`tied`) and a reference with one (`ref`). 30 % each for the share
    of both whose worst right answer beats the best wrong one, 20 % each for the share of prompts where this margin is
    larger than that among the right answers (of `tied`; of both), 1 % for how much larger.

    Source: arXiv 2506.01937 and its `rewardbench` package.
    """
    found = {
        name: _ties(members) if name == "ties" else members.mean(_best_of_n)
        for name, members in part.by(_category).items()
    }
    return {"average": _mean_of(found.values()), **found}


def _ties(part: _Part) -> Array:
    """From 0 to about 1.01."""
    margin, spread = np.array([_margin_and_spread(item) for item in part.items]).T
    place: dict[str, dict[str, int]] = {"tied": {}, "ref": {}}  # of a prompt's two versions among the items
    for i, item in enumerate(part.items):
        place[item.facts["kind"]][str(item.facts["prompt"])] = i
    both = sorted(place["tied"].keys() & place["ref"].keys())
    tied, ref = ([place[kind][prompt] for prompt in both] for kind in ("tied", "ref"))

    def share(values: NDArray[Any], positions: list[int]) -> Array:
        """Nothing counts 0: the shares are added up, and what is missing must not help."""
        weights = part.weights[:, positions]
        return np.nan_to_num(_divide(weights @ values.astype(np.float64), weights.sum(1)))

    def ahead(kind: str) -> Array:
        positions = list(place[kind].values())
        return share(margin[positions] > 0, positions)

    among, hard = spread[tied], np.minimum(margin[tied], margin[ref])
    with np.errstate(divide="ignore", invalid="ignore"):
        larger = np.nan_to_num(np.tanh(hard / among - 1), nan=0.0)
    score = (
        0.3 * ahead("tied")
        + 0.3 * ahead("ref")
        + 0.2 * share(margin[tied] > among, tied)
        + 0.2 * share(hard > among, tied)
        + 0.01 * share(larger, tied)
    )
    return np.where(part.weights.sum(1) > 0, score, np.nan)


def _margin_and_spread(item: Judged) -> tuple[float, float]:
    """From the worst right answer to the best wrong one, and among the right ones."""
    if item.scores is None:
        return -math.inf, math.inf
    right = [score for score, rank in zip(item.scores, item.rankings, strict=True) if rank == 1]
    wrong = [score for score, rank in zip(item.scores, item.rankings, strict=True) if rank != 1]
    return min(right) - max(wrong), max(right) - min(right)


def _pairwise(part: _Part, credit_of_equal: float) -> Array:
    right = part.sum(lambda item: item.pairs[1] + credit_of_equal * item.pairs[2])
    return _divide(right, part.sum(lambda item: item.pairs[0]))


def _all_right(part: _Part) -> Array:
    """The share of ids of which every pair is right; the items of an id are drawn together."""
    members = part.by(lambda item: str(item.facts["id"])).values()
    right = np.array([all(item.strict_pair for item in ids.items) for ids in members], dtype=np.float64)
    weights = np.stack([ids.weights[:, 0] for ids in members], axis=1)
    return _divide(weights @ right, weights.sum(1))


def _by_category(part: _Part, credit: Credit) -> dict[str, Array]:
    return {name: members.mean(credit) for name, members in part.by(_category).items()}


def _mean_of(numbers: Iterable[Array]) -> Array:
    """The mean of those that a resample has."""
    return np.nanmean(np.stack(list(numbers)), axis=0)


def _divide(total: Array, count: Array) -> Array:
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


# --- intervals ---


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

    def difference(weights: Array) -> dict[str, Array]:
        mine, other = _averaged(first, metric, weights), _averaged(aligned, metric, weights)
        return {name: mine[name] - other[name] for name in sorted(mine.keys() & other.keys())}

    return _resampled(first[0], difference, num_resamples, seed)


def _averaged(orders: Sequence[Sequence[Judged]], metric: Metric, weights: Array) -> dict[str, Array]:
    by_order = [metric.weighted(items, weights) for items in orders]
    return {name: np.mean([found[name] for found in by_order], axis=0) for name in by_order[0]}


def _resampled(
    items: Sequence[Judged], numbers: Callable[[Array], dict[str, Array]], num_resamples: int, seed: int
) -> dict[str, Interval]:
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


def _draws(items: Sequence[Judged], num_resamples: int, seed: int) -> Iterator[Array]:
    """Blocks of weights (at most R, n): how often the unit of each item was drawn."""
    names = [next((f"{key} {item.facts[key]}" for key in _TOGETHER if key in item.facts), item.uid) for item in items]
    units, unit_of_item = np.unique(names, return_inverse=True)
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(items))
    for start in range(0, num_resamples, rows):
        size = min(rows, num_resamples - start)
        counts = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), size=size)
        yield counts[:, unit_of_item].astype(np.float64)
