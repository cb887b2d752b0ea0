"""Evaluate from Python: what `mr-reward evaluate` does, in one call."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from mr_reward.evaluation.benchmarks import open_benchmark
from mr_reward.evaluation.protocol import BenchmarkScorer, score_benchmark
from mr_reward.evaluation.report import ITEMS, Report, read_report, write_report

__all__ = ["evaluate_benchmark"]


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
) -> Report:
    """Score a benchmark and write `items.jsonl`, `results.json` and figures; an interrupted run goes on.

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

    Returns:
        The report.

    Raises:
        ConfigurationError: no such benchmark or source, or the folder holds another run.
        GroupError: a row contradicts the published schema.

    Example:
        >>> from mr_reward.evaluation.scorers import load_scorer
        >>> scorer = load_scorer("rm", device="cuda")  # doctest: +SKIP
        >>> evaluate_benchmark("vl_rewardbench", scorer, "results").metrics["macro"].value  # doctest: +SKIP
        0.822
    """
    data = open_benchmark(benchmark, source, split)
    score_benchmark(
        scorer,
        islice(data, limit),
        Path(out) / ITEMS,
        settings={"benchmark": benchmark, "source": data.source, "split": split, "limit": limit},
        num_orders=num_orders,
        seed=seed,
        total=limit or sum(data.benchmark.counts.values()) or None,
    )
    report = read_report(out, num_resamples=num_resamples)
    write_report(report, out)
    return report
