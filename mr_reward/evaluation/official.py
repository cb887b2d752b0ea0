"""The benchmarks' official metrics, each with its own tie rule.

Pure functions from judged items to named numbers; nothing here knows a model. A dropped item is wrong. A category that
no item has is left out, so that parts of a benchmark can be looked at; the counts tell.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mr_reward.evaluation.items import Judged

__all__ = [
    "mm_rlhf_rewardbench",
    "multimodal_rewardbench",
    "n_way",
    "rewardbench_2",
    "ties_score",
    "video_rewardbench",
    "vl_rewardbench",
]

Metrics = dict[str, float]


def vl_rewardbench(items: Sequence[Judged]) -> Metrics:
    """VL-RewardBench: accuracy over all items, and the mean of the three categories (`cal.py`).

    Args:
        items: pairs.

    Returns:
        `macro`, `overall`, and one number for each category.
    """
    by_category = _by_category(items, "strict_pair")
    return {
        "macro": _mean(by_category.values()),
        "overall": _mean(item.strict_pair for item in items),
        **by_category,
    }


def multimodal_rewardbench(items: Sequence[Judged]) -> Metrics:
    """Multimodal RewardBench: accuracy over all items, and for each category (`2_get_accuracy.py`).

    Args:
        items: pairs.

    Returns:
        `overall`, and one number for each category.
    """
    return {"overall": _mean(item.strict_pair for item in items), **_by_category(items, "strict_pair")}


def mm_rlhf_rewardbench(items: Sequence[Judged]) -> Metrics:
    """MM-RLHF-RewardBench: Acc over pairs, Acc+ over ids of which all pairs are right.

    Args:
        items: pairs, with the fact `id`.

    Returns:
        `acc`, `acc_plus`, both also for each category (`acc/mcq`, `acc_plus/mcq`).
    """
    found = {"acc": _mean(item.strict_pair for item in items), "acc_plus": _all_right(items)}
    for name, members in _categories(items).items():
        found[f"acc/{name}"] = _mean(item.strict_pair for item in members)
        found[f"acc_plus/{name}"] = _all_right(members)
    return found


def video_rewardbench(items: Sequence[Judged]) -> Metrics:
    """VideoRewardBench: accuracy over all items; the means of its dimensions, and with perception as one, beside it.

    Args:
        items: pairs.

    Returns:
        `overall`, `macro` (five dimensions), `macro_4` (long and short perception together), and each dimension.
    """
    by_category = _by_category(items, "strict_pair")
    perception = [item for item in items if "perception" in item.category]
    merged = [value for name, value in by_category.items() if "perception" not in name]
    if perception:
        merged.append(_mean(item.strict_pair for item in perception))
    return {
        "overall": _mean(item.strict_pair for item in items),
        "macro": _mean(by_category.values()),
        "macro_4": _mean(merged),
        **by_category,
    }


def n_way(items: Sequence[Judged]) -> Metrics:
    """MR2Bench, and ranked groups of any kind: how well N responses are ordered.

    Args:
        items: groups of any sizes.

    Returns:
        `best_of_n`, see `Judged`; `pairwise`, over all pairs with different ranks, equal scores half;
        `pairwise_strict`, where they are wrong; `tau_b`; the first two for each category and each N, if several.
    """
    total, agree = (sum(item.pairs[i] for item in items) for i in (0, 1))
    taus = [item.tau_b for item in items if not math.isnan(item.tau_b)]
    found = {
        "best_of_n": _mean(item.best_of_n for item in items),
        "pairwise": _pairwise(items),
        "pairwise_strict": agree / total if total else math.nan,
        "tau_b": _mean(taus) if taus else math.nan,
    }
    parts = _categories(items)
    sizes = _grouped(items, lambda item: f"N={len(item.rankings)}")
    for members_by_name in (parts, dict(sorted(sizes.items(), key=lambda entry: len(entry[1][0].rankings)))):
        if len(members_by_name) > 1:
            for name, members in members_by_name.items():
                found[f"best_of_n/{name}"] = _mean(item.best_of_n for item in members)
                found[f"pairwise/{name}"] = _pairwise(members)
    return found


def _pairwise(items: Sequence[Judged]) -> float:
    total, agree, equal = (sum(counts) for counts in zip(*(item.pairs for item in items), strict=True))
    return (agree + equal / 2) / total if total else math.nan


def rewardbench_2(items: Sequence[Judged]) -> Metrics:
    """RewardBench 2: best of 4 for five domains, its own formula for Ties, and the mean of the domains.

    Ties: each prompt has a version with several right answers (`tied`) and a reference with one (`ref`). 30 % each for
    the share of both whose worst right answer beats the best wrong one, 20 % each for the share of prompts where this
    margin is larger than that among the right answers (of `tied`; of both), 1 % for how much larger.

    Args:
        items: groups, the right answers first; of Ties with the facts `kind` (`tied` or `ref`) and `prompt`.

    Returns:
        `average`, and one number for each domain. Source: arXiv 2506.01937 and its `rewardbench` package.
    """
    found = {
        name: ties_score(members) if name == "ties" else _mean(item.best_of_n for item in members)
        for name, members in _categories(items).items()
    }
    return {"average": _mean(found.values()), **found}


def ties_score(items: Sequence[Judged]) -> float:
    """The score of RewardBench 2's Ties, see `rewardbench_2`.

    Args:
        items: of Ties.

    Returns:
        From 0 to about 1.01.
    """
    spread: dict[str, float] = {}  # between the right answers of a tied prompt
    margin: dict[str, dict[str, float]] = {"tied": {}, "ref": {}}  # from the worst right answer to the best wrong one
    for item in items:
        if item.scores is None:
            right, wrong = [-math.inf], [math.inf]
        else:
            right = [s for s, rank in zip(item.scores, item.rankings, strict=True) if rank == 1]
            wrong = [s for s, rank in zip(item.scores, item.rankings, strict=True) if rank != 1]
        kind, prompt = item.facts["kind"], str(item.facts["prompt"])
        margin[kind][prompt] = min(right) - max(wrong)
        if kind == "tied":
            spread[prompt] = max(right) - min(right) if item.scores is not None else math.inf
    both = sorted(margin["tied"].keys() & margin["ref"].keys())
    among = np.array([spread[prompt] for prompt in both])
    tied = np.array([margin["tied"][prompt] for prompt in both])
    hard = np.minimum(tied, [margin["ref"][prompt] for prompt in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        larger = np.nan_to_num(np.tanh(hard / among - 1), nan=0.0)
    return (
        0.3 * _mean(value > 0 for value in margin["tied"].values())
        + 0.3 * _mean(value > 0 for value in margin["ref"].values())
        + 0.2 * _mean(tied > among)
        + 0.2 * _mean(hard > among)
        + 0.01 * _mean(larger)
    )


def _all_right(items: Sequence[Judged]) -> float:
    """The share of ids of which every pair is right."""
    return _mean(
        all(item.strict_pair for item in members)
        for members in _grouped(items, lambda item: str(item.facts["id"])).values()
    )


def _by_category(items: Sequence[Judged], credit: str) -> Metrics:
    return {name: _mean(getattr(item, credit) for item in members) for name, members in _categories(items).items()}


def _categories(items: Sequence[Judged]) -> Mapping[str, list[Judged]]:
    return dict(sorted(_grouped(items, lambda item: item.category).items()))


def _grouped(items: Sequence[Judged], key: Callable[[Judged], str]) -> dict[str, list[Judged]]:
    found: defaultdict[str, list[Judged]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)


def _mean(values: Iterable[float]) -> float:
    """0 for nothing: the formulas above add means up, and what is missing must not help."""
    numbers = [float(value) for value in values]
    return statistics.fmean(numbers) if numbers else 0.0
