"""The benchmarks' official metrics, each with its own tie rule.

Pure functions from judged items to named numbers; nothing here knows a model. A dropped item is wrong. A category that
no item has is left out, so that parts of a benchmark can be looked at; the counts tell.

Every metric also takes weights (R, n), how often each of n items counts in each of R resamples, and gives R numbers
for each name, NaN where a resample holds no item of a category. Legend: R resamples, n items.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from mr_reward.evaluation.items import Judged

__all__ = [
    "Metric",
    "mm_rlhf_rewardbench",
    "multimodal_rewardbench",
    "n_way",
    "rewardbench_2",
    "video_rewardbench",
    "vl_rewardbench",
]

Array = NDArray[np.float64]
Credit = Callable[[Judged], float]
_strict_pair, _best_of_n, _tau_b, _category = map(attrgetter, ("strict_pair", "best_of_n", "tau_b", "category"))


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
    spread: dict[str, float] = {}  # between the right answers of a tied prompt
    # Prompt -> margin from the worst right answer to the best wrong one, and the item's position.
    margin: dict[str, dict[str, tuple[float, int]]] = {"tied": {}, "ref": {}}
    for i, item in enumerate(part.items):
        right, wrong = [-math.inf], [math.inf]
        if item.scores is not None:
            right = [s for s, rank in zip(item.scores, item.rankings, strict=True) if rank == 1]
            wrong = [s for s, rank in zip(item.scores, item.rankings, strict=True) if rank != 1]
        kind, prompt = item.facts["kind"], str(item.facts["prompt"])
        margin[kind][prompt] = min(right) - max(wrong), i
        if kind == "tied":
            spread[prompt] = max(right) - min(right) if item.scores is not None else math.inf

    def share(values: Iterable[float], positions: list[int]) -> Array:
        """Nothing counts 0: the shares are added up, and what is missing must not help."""
        weights = part.weights[:, positions]
        return np.nan_to_num(_divide(weights @ np.array(list(values), dtype=np.float64), weights.sum(1)))

    def ahead(kind: str) -> Array:
        return share((value > 0 for value, _ in margin[kind].values()), [i for _, i in margin[kind].values()])

    both = sorted(margin["tied"].keys() & margin["ref"].keys())
    positions = [margin["tied"][prompt][1] for prompt in both]
    among = np.array([spread[prompt] for prompt in both])
    tied = np.array([margin["tied"][prompt][0] for prompt in both])
    hard = np.minimum(tied, [margin["ref"][prompt][0] for prompt in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        larger = np.nan_to_num(np.tanh(hard / among - 1), nan=0.0)
    score = (
        0.3 * ahead("tied")
        + 0.3 * ahead("ref")
        + 0.2 * share(tied > among, positions)
        + 0.2 * share(hard > among, positions)
        + 0.01 * share(larger, positions)
    )
    return np.where(part.weights.sum(1) > 0, score, np.nan)


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
