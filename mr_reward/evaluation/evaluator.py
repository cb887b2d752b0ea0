"""The one evaluator: groups scored in one order or several, put back into their own, and what that says.

`evaluate_groups` gives the metrics of ranked groups at once; `evaluate_benchmark` scores a benchmark item by item into
a file, so that an interrupted run resumes, and reports by its official metric.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice, permutations
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from mr_reward.data.jsonl import ResumableJsonLines
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.evaluation.benchmarks import EvaluationItem, open_benchmark
from mr_reward.evaluation.official import ItemRecord, bad_row
from mr_reward.evaluation.report import ITEMS, Report, make_report, read_records, read_report, write_report
from mr_reward.groups import GroupScores, ResponseGroup, Scorer, score_each
from mr_reward.metrics import ranking_metrics

logger = logging.getLogger(__name__)

ALL_ORDERS = 0
_MOST_ORDERS = 720  # 6!
_CHUNK = 32  # items in memory at a time


class BenchmarkScorer(Scorer, Protocol):
    """What is evaluated: a reward model, a baseline, a file of scores."""

    @property
    def name(self) -> str:
        """What it is and with which options it scores; two runs with the same name give the same scores."""

    @property
    def order_free(self) -> bool:
        """Whether the order of the responses cannot move the scores."""


def score_in_orders(
    scorer: Scorer, groups: Sequence[ResponseGroup], orders: Sequence[Sequence[int]]
) -> list[GroupScores]:
    """Show each group in its order, in one call; the results are in the groups' own order."""
    if _is_stored(scorer):
        return scorer.score_detailed(groups)
    shown = [group.select(order) for group, order in zip(groups, orders, strict=True)]
    results = scorer.score_detailed(shown) if shown else []
    return [result.undo_order(order) for result, order in zip(results, orders, strict=True)]


def _is_stored(scorer: Scorer) -> bool:
    """Whether the scores were made elsewhere, one for each response in the item's own order: nothing is shown then."""
    return getattr(scorer, "is_stored", False)


def evaluate_groups(scorer: Scorer, groups: Sequence[ResponseGroup], *, seed: int = 0) -> dict[str, float]:
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
        >>> evaluate_groups(scorer, groups)["best_of_n_accuracy"]  # doctest: +SKIP
        0.97
    """
    for group in groups:
        if group.rankings is None:
            raise GroupError(f"{group.name}: has no rankings, evaluation needs them; rank it or leave it out")
    rng = random.Random(seed)
    orders = [rng.sample(range(group.num_responses), group.num_responses) for group in groups]
    own = scorer.score_detailed(groups)
    other = score_in_orders(scorer, groups, orders)
    kept = [
        (group, first.scores, second.scores)
        for group, first, second in zip(groups, own, other, strict=True)
        if first.scores is not None and second.scores is not None
    ]
    if not kept:
        raise GroupError(f"all {len(groups)} groups were dropped as over-length; raise max_tokens_per_batch")
    ranked, first_scores, second_scores = zip(*kept, strict=True)
    return {
        **ranking_metrics(
            first_scores,
            [group.rankings or () for group in ranked],
            lengths=[[len(response) for response in group.responses] for group in ranked],
            reordered=second_scores,
        ),
        "num_groups": float(len(kept)),
        "dropped_groups": float(len(groups) - len(kept)),
    }


def evaluate_benchmark(
    benchmark: str,
    scorer: BenchmarkScorer,
    out: str | Path,
    *,
    source: str | Path | None = None,
    split: str | None = None,
    num_orders: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    num_resamples: int = 1000,
    media: str | Path | None = None,
    skip_bad: bool = False,
    fetch_urls: bool = False,
) -> Report:
    """Score a benchmark and write `items.jsonl`, `results.json` and figures; an interrupted run resumes.

    Args:
        benchmark: one of `mr_reward.evaluation.benchmarks.BENCHMARKS`.
        scorer: of `load_scorer`, or your own.
        out: folder for the results.
        source: file, folder or hub id; None for where the benchmark is published.
        split: of the source; None for the published one.
        num_orders: orders of each item's responses, 0 for all; None for 1, or 8 where the order can matter.
        seed: of the orders.
        limit: only so many items; None for all.
        num_resamples: of the intervals.
        media: folder that relative paths in the rows count from; None for the source's, for a hub id the working one.
        skip_bad: go on after a row that is bad or whose media cannot be read or shown; it is listed in
            `Report.bad_rows`, and as long as it is an item it counts as wrong.
        fetch_urls: download images that are http or https URLs; they are bad otherwise.

    Returns:
        The report.

    Raises:
        ConfigurationError: no such benchmark or source, or the folder holds another run.
        GroupError: a row contradicts the published schema, or cannot be scored.
        MediaError: its media cannot be read.

    Example:
        >>> from mr_reward.evaluation import evaluate_benchmark, load_scorer
        >>> scorer = load_scorer("rm", device="cuda")  # doctest: +SKIP
        >>> evaluate_benchmark("vl_rewardbench", scorer, "results").metrics["macro"].value  # doctest: +SKIP
        0.822
    """
    data = open_benchmark(benchmark, source, split, media=media, skip_bad=skip_bad, fetch_urls=fetch_urls)
    settings = {"benchmark": benchmark, "source": data.source, "split": split, "limit": limit}
    score_benchmark(
        scorer,
        islice(data, limit),
        Path(out) / ITEMS,
        settings=settings | ({} if media is None else {"media": str(media)}),
        skip_bad=skip_bad,
        num_orders=num_orders,
        seed=seed,
        total=limit or sum(data.benchmark.counts.values()) or None,
    )
    report = read_report(out, num_resamples=num_resamples)
    report = replace(report, bad_rows=[*data.bad_rows, *report.bad_rows])
    write_report(report, out)
    return report


def report_rollouts(scorer: Scorer, source: str | Path, *, seed: int = 0) -> Report:
    """The benchmark `rollouts` as a run scores its groups, each once and in a drawn order; nothing is written."""
    data = open_benchmark("rollouts", source)
    items = list(data)
    orders = [draw_orders(item.uid, item.group.num_responses, 1, seed)[0] for item in items]
    results = score_in_orders(scorer, [item.group for item in items], orders)
    records = [_record(item, [order], [found]) for item, order, found in zip(items, orders, results, strict=True)]
    return make_report(data.benchmark, {"source": data.source, "seed": seed}, records)


def draw_orders(uid: str, num_responses: int, num_orders: int, seed: int) -> list[tuple[int, ...]]:
    """The K (or `ALL_ORDERS`) different orders in which an item's N responses are shown, drawn at random.

    Data sets tend to store the better response first, so the stored order is not used as it is. The uid is part of the
    seed: an item has its orders whatever else is evaluated. Fewer than K where there are only N! of them.
    """
    possible = math.factorial(num_responses)
    generator = random.Random(f"{seed} {uid}")
    if num_orders == ALL_ORDERS or num_orders >= possible:
        if possible > _MOST_ORDERS:
            raise ConfigurationError(
                f"item {uid}: {num_responses} responses have {possible} orders, expected at most {_MOST_ORDERS} for "
                "all of them; give a number of orders"
            )
        found = list(permutations(range(num_responses)))
        generator.shuffle(found)
        return found
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < num_orders:
        drawn[tuple(generator.sample(range(num_responses), num_responses))] = None
    return list(drawn)


def score_benchmark(
    scorer: BenchmarkScorer,
    items: Iterable[EvaluationItem],
    path: str | Path,
    *,
    settings: dict[str, Any],
    num_orders: int | None = None,
    seed: int = 0,
    total: int | None = None,
    skip_bad: bool = False,
) -> list[ItemRecord]:
    """Score items and write a line for each as soon as it is known; what the file holds already is not scored again.

    The first line of the file says what the run is (`settings`: benchmark, source); another run's file is refused.
    `num_orders` None: 1 where the order cannot matter, else 8. One order where it cannot matter is the stored one.
    Scores from elsewhere have that one, whatever `num_orders` is. An item that cannot be scored is an error behind the
    lines of those before it; with `skip_bad` it has a line with the reason.
    """
    path = Path(path)
    header = {"scorer": scorer.name, "num_orders": num_orders, "seed": seed, **settings}
    stored = _is_stored(scorer) or (scorer.order_free and num_orders in (None, 1))
    if stored and num_orders not in (None, 1):
        asked = "all" if num_orders == ALL_ORDERS else num_orders
        logger.warning("%s: they are in one order, not %s: nobody was shown another one", scorer.name, asked)
    records: dict[str, ItemRecord] = {}
    with ResumableJsonLines(path) as file, tqdm(total=total, desc=path.stem, unit="item") as bar:
        known: dict[str, ItemRecord] = {}
        if next(file.rows(), None):
            known = _resumed(path, header)
        else:
            file.write([header])

        def missing() -> Iterator[EvaluationItem]:
            seen: set[str] = set()
            for item in items:
                if item.uid in seen:
                    raise ConfigurationError(f"two items are called {item.uid!r}, expected one; name them apart")
                seen.add(item.uid)
                if item.uid in known:
                    records[item.uid] = known[item.uid]
                    bar.update()
                else:
                    yield item

        left = missing()
        while chunk := list(islice(left, _CHUNK)):
            orders = [
                [tuple(range(item.group.num_responses))]
                if stored
                else draw_orders(item.uid, item.group.num_responses, 8 if num_orders is None else num_orders, seed)
                for item in chunk
            ]
            shown = [(item, order) for item, own in zip(chunk, orders, strict=True) for order in own if not item.error]
            each = _Each(scorer)
            results = iter(score_in_orders(each, [item.group for item, _ in shown], [order for _, order in shown]))
            for item, own in zip(chunk, orders, strict=True):
                found = [_bad(item.group, item.error)] * len(own) if item.error else list(islice(results, len(own)))
                record = _record(item, own, found)
                if record.bad_row and not skip_bad:
                    raise GroupError(f"{record.bad_row}. Fix it, or give --skip-bad")
                file.write([asdict(record)])
                records[item.uid] = record
            bar.update(len(chunk))
    return list(records.values())


class _Each:
    """A scorer that drops a bad group with the reason, instead of ending the call."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.is_stored = _is_stored(scorer)

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As of the scorer."""
        found = zip(groups, score_each(self.scorer, groups), strict=True)
        return [result if isinstance(result, GroupScores) else _bad(group, result) for group, result in found]


def _bad(group: ResponseGroup, reason: object) -> GroupScores:
    return GroupScores(scores=None, truncated=(False,) * group.num_responses, drop_reason=bad_row(reason))


def _record(item: EvaluationItem, orders: Sequence[Sequence[int]], results: Sequence[GroupScores]) -> ItemRecord:
    """From the results of the K orders, each put back into the item's own; dropped in one is dropped."""
    dropped = [result for result in results if result.scores is None]
    reason = dropped[0].drop_reason if dropped else None
    if reason and item.place:
        reason = reason.replace(bad_row(""), bad_row(f"{item.place}: "), 1)
    return ItemRecord(
        uid=item.uid,
        category=item.category,
        rankings=list(item.group.rankings or ()),
        lengths=[len(response) for response in item.group.responses],
        orders=[list(order) for order in orders],
        scores=None if dropped else [list(result.scores or ()) for result in results],
        drop_reason=reason,
        truncated=max(sum(result.truncated) for result in results),
        facts=dict(item.facts),
    )


def _resumed(path: Path, header: dict[str, Any]) -> dict[str, ItemRecord]:
    """What an earlier, interrupted run left."""
    found, records = read_records(path)
    if found != header:
        differing = sorted(key for key in found.keys() | header.keys() if found.get(key) != header.get(key))
        there, here = (", ".join(f"{key}: {run.get(key)!r:.100}" for key in differing) for run in (found, header))
        raise ConfigurationError(
            f"{path} holds another run ({there}), expected {here}; give another folder, or remove it"
        )
    return {record.uid: record for record in records}
