"""What an evaluation says: a table with a leaderboard row, `results.json` and figures, all from the per-item file."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mr_reward.data.jsonl import ResumableJsonLines
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.evaluation.benchmarks import Benchmark, get_benchmark
from mr_reward.evaluation.official import Interval, ItemRecord, Judged, intervals, paired_interval, reliability
from mr_reward.evaluation.plots import plot_items, plot_metrics, plot_position_bias, plot_reliability, plot_sizes
from mr_reward.metrics import order_flip_rate, score_length_correlation

ITEMS = "items.jsonl"
_SHOWN_BAD_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of one evaluation."""

    benchmark: Benchmark
    header: dict[str, Any]  # scorer, orders, seed and source, as the per-item file has them
    records: Sequence[ItemRecord]  # one for each item
    metrics: dict[str, Interval]  # by name, averaged over the orders, with a 95 % interval by resampling items
    spread: dict[str, float]  # by name, standard deviation over the orders, 0 for one order
    # `orders` (the most that an item was scored in), `flip_rate` (share of items whose winner is not the same in all
    # orders), `score_spread` (standard deviation of a response's score over the orders, mean over all)
    order: dict[str, float]
    equal_scores: int  # items whose highest score several responses have
    bad_rows: Sequence[str] = ()  # place and reason of rows that are no item, or whose item could not be scored

    @property
    def kept(self) -> list[ItemRecord]:
        """Items that were scored."""
        return [record for record in self.records if record.scores is not None]

    @property
    def num_mixed(self) -> int:
        """Items with a best response and a worse one."""
        return sum(len(set(record.rankings)) > 1 for record in self.records)

    @property
    def counts(self) -> dict[str, int]:
        """Items by category."""
        return dict(Counter(record.category for record in self.records))


def make_report(
    benchmark: Benchmark, header: dict[str, Any], records: Sequence[ItemRecord], *, num_resamples: int = 1000
) -> Report:
    """Compute everything from the records of all items."""
    if not records:
        raise ConfigurationError(f"{benchmark.title}: no item, expected at least one; check source and split")
    orders = _orders(records)
    by_order = [benchmark.summarise(items) for items in orders]
    kept = [record for record in records if record.scores is not None]
    return Report(
        benchmark=benchmark,
        header=header,
        records=records,
        metrics=intervals(orders, benchmark.summarise, num_resamples=num_resamples),
        spread={name: float(np.std([summary[name] for summary in by_order])) for name in by_order[0]},
        order={
            "orders": float(len(orders)),
            "flip_rate": statistics.fmean(_flips(record) for record in kept) if kept else 0.0,
            "score_spread": statistics.fmean(_score_spread(record) for record in kept) if kept else 0.0,
        },
        equal_scores=sum(
            list(scores).count(max(scores)) > 1 for record in kept for scores in (record.scores or ())[:1]
        ),
        bad_rows=[record.bad_row for record in records if record.bad_row is not None],
    )


def write_report(report: Report, folder: str | Path) -> None:
    """Write `results.json` and the figures into a folder, made if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = report.kept
    first, lengths = [(record.scores or ())[0] for record in kept], [record.lengths for record in kept]
    content = {
        **report.header,
        "metrics": {name: interval._asdict() for name, interval in report.metrics.items()},
        "spread_over_orders": report.spread,
        "order": report.order,
        "items": len(report.records),
        "items_by_category": report.counts,
        "published_items_by_category": dict(report.benchmark.counts),
        "dropped": {record.uid: record.drop_reason for record in report.records if record.scores is None},
        "bad_rows": list(report.bad_rows),
        "truncated_items": sum(record.truncated > 0 for record in report.records),
        "equal_scores": report.equal_scores,
        "score_length_correlation": score_length_correlation(first, lengths) if kept else math.nan,
        "leaderboard_row": leaderboard_row(report),
    }
    if "calibration_error" in report.metrics:
        content["items_with_right_and_wrong"] = report.num_mixed
        content["reliability"] = reliability(_orders(report.records)[0])
    (folder / "results.json").write_text(json.dumps(_without_nan(content), indent=2) + "\n", encoding="utf-8")
    title = f"{report.benchmark.title}, {report.header['scorer'].split(' ')[0]}"
    plot_metrics(report.metrics, folder / "metrics.png", title=title)
    if kept:
        plot_items(kept, folder / "length.png", title=title)
        plot_sizes(kept, folder / "group_size.png", title=title)
    if content.get("reliability"):
        plot_reliability(content["reliability"], folder / "reliability.png", title=title)
    if report.order["orders"] > 1 and kept:
        plot_position_bias(kept, folder / "position.png", title=title)


def read_records(path: str | Path) -> tuple[dict[str, Any], list[ItemRecord]]:
    """The first line and the records of a per-item file; a last line that is cut off (interruption) is left out."""
    try:
        (_, header), *items = ResumableJsonLines(path).rows()
        if broken := next((number for number, row in items if isinstance(row, GroupError)), None):
            raise ValueError(f"line {broken} is no JSON")
        return dict(header), [ItemRecord(**row) for _, row in items]
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error}), expected a file of mr-reward evaluate") from error
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} is no file of mr-reward evaluate ({error}); remove it") from error


def read_report(folder: str | Path, *, num_resamples: int = 1000) -> Report:
    """Compute a report again from the per-item file that `mr-reward evaluate` wrote, without a model."""
    header, records = read_records(Path(folder) / ITEMS)
    return make_report(get_benchmark(header["benchmark"]), header, records, num_resamples=num_resamples)


def show_report(report: Report, console: Console) -> None:
    """Print the table, what was lost, and the row for a leaderboard."""
    num_orders = int(report.order["orders"])
    table = Table("metric", "value", "95 % interval", title=f"{report.benchmark.title}: {report.header['scorer']}")
    if num_orders > 1:
        table.add_column(f"spread over {num_orders} orders")
    table.add_column("items")
    counts = report.counts
    for name, interval in report.metrics.items():
        cells = [name, f"{interval.value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"]
        if num_orders > 1:
            cells.append(f"{report.spread[name]:.3f}")
        count = counts.get(name, counts.get(name.partition("/")[2]))
        table.add_row(*cells, "" if count is None else str(count))
    console.print(table)
    console.print(
        f"{len(report.records)} items, {len(report.records) - len(report.kept)} dropped (counted as wrong), "
        f"{report.equal_scores} with equal highest scores; in {num_orders} orders the winner changes for "
        f"{report.order['flip_rate']:.1%}, a score by {report.order['score_spread']:.3g}"
    )
    if "right_above_wrong" in report.metrics:
        of_all = f"{report.num_mixed} of {len(report.records)} groups"
        console.print(f"{of_all} have right and wrong responses; the others, all right or all wrong, do not count")
    for row in report.bad_rows[:_SHOWN_BAD_ROWS]:
        console.print(f"bad: {row}", markup=False, highlight=False, soft_wrap=True)
    if report.bad_rows:
        console.print(f"{len(report.bad_rows)} bad rows; those that are items counted as wrong")
    for name, published in report.benchmark.counts.items():
        if counts.get(name, published) != published:
            console.print(f"{name}: {counts[name]} items, the published benchmark has {published}")
    console.print(leaderboard_row(report), soft_wrap=True)


def leaderboard_row(report: Report) -> str:
    """The headline metrics as a row of a Markdown table, `| scorer | 82.2 | ... |`, in percent."""
    cells = [f"{100 * report.metrics[name].value:.1f}" for name in report.benchmark.headline if name in report.metrics]
    return f"| {' | '.join([report.header['scorer'].split(' ')[0], *cells])} |"


def compare(first: Report, second: Report, *, num_resamples: int = 1000) -> dict[str, Interval]:
    """First minus second, by name of the metric, with 95 % intervals, for two evaluations of the same items."""
    if first.benchmark.name != second.benchmark.name:
        raise ConfigurationError(
            f"got results on {first.benchmark.title} and on {second.benchmark.title}, expected one benchmark"
        )
    return paired_interval(
        _orders(first.records), _orders(second.records), first.benchmark.summarise, num_resamples=num_resamples
    )


def show_comparison(first: Report, second: Report, differences: dict[str, Interval], console: Console) -> None:
    """Print both results and their differences, those of `compare`."""
    table = Table("metric", "A", "B", "A - B", "95 % interval", title=f"{first.benchmark.title}")
    table.caption = f"A: {first.header['scorer']}\nB: {second.header['scorer']}"
    for name in first.metrics:
        if name not in differences:
            continue
        found = differences[name]
        clear = "" if found.low <= 0 <= found.high else "[bold]"
        table.add_row(
            name,
            f"{first.metrics[name].value:.3f}",
            f"{second.metrics[name].value:.3f}",
            f"{clear}{found.value:+.3f}",
            f"{found.low:+.3f} to {found.high:+.3f}",
        )
    console.print(table)


def _without_nan(value: Any) -> Any:
    """JSON has no word for "not defined" but null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _orders(records: Sequence[ItemRecord]) -> list[list[Judged]]:
    most = max(len(record.orders) for record in records)
    return [[record.judged(k) for record in records] for k in range(most)]


def _flips(record: ItemRecord) -> float:
    scores = record.scores or ()
    return max((order_flip_rate([scores[0]], [other]) for other in scores[1:]), default=0.0)


def _score_spread(record: ItemRecord) -> float:
    return statistics.fmean(statistics.pstdev(own) for own in zip(*(record.scores or ()), strict=True))
