"""`mr-reward evaluate | compare | attack`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mr_reward.cli.options import BAD_ROWS, Device, Dtype, FetchUrls, MaxTokens, Model, OverLength, torch_dtype
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
    file: Annotated[str | None, typer.Argument(help="The same as --source")] = None,
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
    media: Annotated[
        Path | None, typer.Option(help="Folder that paths of images and videos count from; else the source's")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="List bad rows, count their items as wrong, and go on; exit code 3")
    ] = False,
    fetch_urls: FetchUrls = False,
) -> None:
    """Evaluate a reward model on a benchmark, by its official metric; an interrupted run resumes.

    Example: mr-reward evaluate vl_rewardbench outputs/rm --out results/vl
    """
    from mr_reward.evaluation.benchmarks import locate_benchmark
    from mr_reward.evaluation.evaluator import ALL_ORDERS, evaluate_benchmark
    from mr_reward.evaluation.judges import load_scorer
    from mr_reward.evaluation.report import show_report

    if file is not None and source is not None:
        raise ConfigurationError(f"got {file} and --source {source}, expected one of them")
    source = source if file is None else file
    num_orders = ALL_ORDERS if orders == "all" else _number(orders)
    locate_benchmark(benchmark, source)  # what is wrong there is told before the model is loaded
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
        media=media,
        skip_bad=skip_bad,
        fetch_urls=fetch_urls,
    )
    show_report(report, Console())
    if report.bad_rows:
        raise typer.Exit(BAD_ROWS)


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


def attack(
    model: Model,
    groups: Annotated[Path, typer.Argument(help=".jsonl file of ranked groups")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of an attack; may be given several times")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Groups that are attacked")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the choices")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 16384,
) -> None:
    """Try known tricks on a reward model: how far does each move a bad answer relative to a good one?

    The shift is the mean change of the margin (bad minus good), in standard deviations of the margins without an
    attack; above 0 the attack works. `mr-reward card --attacks` puts the file into the model card.

    Example: mr-reward attack rm test.jsonl --out attacks.json
    """
    from mr_reward.data.groups_file import load_preferences
    from mr_reward.evaluation.attacks import ATTACKS, attack_items, run_attacks
    from mr_reward.scorers.opening import open_scorer, require_local

    items = attack_items(load_preferences(groups), seed=seed)[:limit]
    options: dict[str, Any] = {"max_tokens_per_batch": max_tokens, "over_length": "drop_group"}
    scorer = require_local(open_scorer(model, device=device, dtype=torch_dtype(dtype), **options), "mr-reward attack")
    names = only or list(ATTACKS)
    tokenizer: Any = getattr(scorer.model.processor, "tokenizer", scorer.model.processor)
    with tqdm(total=len(names), unit=" attacks") as bar:

        def next_attack(name: str) -> None:
            bar.set_description(name)
            bar.update()

        results = run_attacks(
            scorer,
            items,
            names=names,
            control_tokens=sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}),
            seed=seed,
            on_attack=next_attack,
        )
    table = Table("attack", "shift of the margin", "bad wins before", "after", "groups", "dropped")
    for one in results:
        shift = f"{one.shift:+.2f} [{one.shift_low:+.2f}, {one.shift_high:+.2f}]"
        wins = f"{one.wins_before:.1%}", f"{one.wins_after:.1%}"
        table.add_row(one.name, shift, *wins, str(one.num_items), str(one.num_dropped))
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model": model, "groups": str(groups), "seed": seed, "layout": scorer.model.config.layout}
        out.write_text(json.dumps({**facts, "attacks": [asdict(result) for result in results]}, indent=1) + "\n")


def _number(orders: str | None) -> int | None:
    if orders is None:
        return None
    if not orders.isdecimal() or int(orders) < 1:
        raise ConfigurationError(f"--orders is {orders!r}, expected a number from 1 on, or all")
    return int(orders)
