"""`mr-reward evaluate` and `mr-reward compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mr_reward.cli.options import Device, Dtype, MaxTokens, OverLength, torch_dtype
from mr_reward.errors import ConfigurationError


def evaluate(
    benchmark: Annotated[str, typer.Argument(help="vl_rewardbench, ..., or groups for ranked groups of your own")],
    scorer: Annotated[
        str,
        typer.Argument(
            help="Reward model (folder or hub id), classifier:FOLDER, scores:FILE, longest, shortest, random, constant"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for items.jsonl, results.json and figures")],
    source: Annotated[str | None, typer.Option(help="File, folder or hub id; else where it is published")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the source; else the published one")] = None,
    orders: Annotated[
        str | None, typer.Option(help="Orders of each item's responses: a number or all; else 1, for causal 8")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the orders")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first items")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Score each response alone")] = False,
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 16384,
    over_length: OverLength = "drop_group",
    resamples: Annotated[int, typer.Option(help="Resamples of the intervals")] = 1000,
) -> None:
    """Evaluate a reward model on a benchmark, by its official metric; an interrupted run resumes.

    Example: mr-reward evaluate vl_rewardbench outputs/rm --out results/vl
    """
    from mr_reward.evaluation.benchmarks import get_benchmark
    from mr_reward.evaluation.evaluator import ALL_ORDERS, evaluate_benchmark
    from mr_reward.evaluation.judges import load_scorer
    from mr_reward.evaluation.report import show_report

    num_orders = ALL_ORDERS if orders == "all" else _number(orders)
    get_benchmark(benchmark)  # a wrong name is told before the model is loaded
    loaded = load_scorer(
        scorer,
        device=device,
        dtype=torch_dtype(dtype),
        max_tokens_per_batch=max_tokens,
        over_length=over_length,
        alone=alone,
    )
    report = evaluate_benchmark(
        benchmark,
        loaded,
        out,
        source=source,
        split=split,
        num_orders=num_orders,
        seed=seed,
        limit=limit,
        num_resamples=resamples,
    )
    show_report(report, Console())


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluation, A")],
    second: Annotated[Path, typer.Argument(help="Folder of another one on the same items, B")],
    resamples: Annotated[int, typer.Option(help="Resamples of the paired bootstrap")] = 1000,
) -> None:
    """Compare two evaluations: differences with 95 % intervals, the same items drawn for both.

    Example: mr-reward compare results/set results/single
    """
    from mr_reward.evaluation.report import compare as compare_reports
    from mr_reward.evaluation.report import read_report, show_comparison

    a, b = (read_report(folder, num_resamples=0) for folder in (first, second))
    show_comparison(a, b, compare_reports(a, b, num_resamples=resamples), Console())


def _number(orders: str | None) -> int | None:
    if orders is None:
        return None
    if not orders.isdecimal() or int(orders) < 1:
        raise ConfigurationError(f"--orders is {orders!r}, expected a number from 1 on, or all")
    return int(orders)
