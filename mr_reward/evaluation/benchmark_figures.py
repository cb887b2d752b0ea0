"""PNG figures of a benchmark's results: metrics with intervals, group sizes, position bias, score against length."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mr_reward.evaluation.items import ItemRecord
from mr_reward.evaluation.statistics import Interval

__all__ = ["plot_items", "plot_metrics", "plot_position_bias", "plot_sizes"]

_BLUE, _GREEN, _GREY = "#2563eb", "#16a34a", "#9ca3af"


def plot_metrics(metrics: Mapping[str, Interval], path: str | Path, *, title: str = "") -> None:
    """Draw each metric as a bar with its 95 % interval.

    Args:
        metrics: by name.
        path: of the PNG file.
        title: above it.
    """
    names = list(metrics)
    figure, axis = _figure((7.0, 0.9 + 0.34 * len(names)), title)
    rows = range(len(names))
    values = [metrics[name].value for name in names]
    errors = [
        [max(metrics[name].value - metrics[name].low, 0.0) for name in names],
        [max(metrics[name].high - metrics[name].value, 0.0) for name in names],
    ]
    axis.barh(rows, values, xerr=errors, color=_BLUE, alpha=0.75, ecolor="#111827", capsize=2)
    axis.set_yticks(rows, names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(min(0.0, *(interval.low for interval in metrics.values())), 1.0)
    axis.grid(axis="x", alpha=0.25)
    _save(figure, path)


def plot_sizes(records: Sequence[ItemRecord], path: str | Path, *, title: str = "") -> None:
    """Draw best-of-N accuracy against N, beside what chance gives.

    Args:
        records: scored items.
        path: of the PNG file.
        title: above it.
    """
    credit: defaultdict[int, list[float]] = defaultdict(list)
    chance: defaultdict[int, list[float]] = defaultdict(list)
    for record in records:
        n = len(record.rankings)
        credit[n].append(statistics.fmean(record.judged(k).best_of_n for k in range(len(record.orders))))
        chance[n].append(record.rankings.count(min(record.rankings)) / n)
    sizes = sorted(credit)
    figure, axis = _figure((5.0, 3.4), title)
    axis.plot(sizes, [statistics.fmean(credit[n]) for n in sizes], color=_BLUE, marker="o", label="model")
    axis.plot(sizes, [statistics.fmean(chance[n]) for n in sizes], color=_GREY, marker=".", label="chance")
    axis.set_xticks(sizes)
    axis.set_xlabel("responses of an item, N")
    axis.set_ylabel("best of N")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_position_bias(records: Sequence[ItemRecord], path: str | Path, *, title: str = "") -> None:
    """Draw how often the winner stood in each slot, beside how often the best response did.

    Args:
        records: scored items, each in several orders.
        path: of the PNG file.
        title: above it.
    """
    most = max(len(record.rankings) for record in records)
    won, best, shown = [0.0] * most, [0.0] * most, [0] * most
    for record in records:
        for order, scores in zip(record.orders, record.scores or (), strict=True):
            highest = [response for response, score in enumerate(scores) if score == max(scores)]
            top = [response for response, rank in enumerate(record.rankings) if rank == min(record.rankings)]
            for slot, response in enumerate(order):
                shown[slot] += 1
                won[slot] += (response in highest) / len(highest)
                best[slot] += (response in top) / len(top)
    slots = [slot for slot in range(most) if shown[slot]]
    figure, axis = _figure((5.0, 3.4), title)
    axis.bar([s + 0.8 for s in slots], [won[s] / shown[s] for s in slots], 0.4, color=_BLUE, label="winner")
    axis.bar([s + 1.2 for s in slots], [best[s] / shown[s] for s in slots], 0.4, color=_GREY, label="best response")
    axis.set_xticks([slot + 1 for slot in slots])
    axis.set_xlabel("slot in the order shown")
    axis.set_ylabel("share of the times shown there")
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_items(records: Sequence[ItemRecord], path: str | Path, *, title: str = "") -> None:
    """Draw the scores against the lengths of the responses, both as differences from their item's mean.

    Args:
        records: scored items.
        path: of the PNG file.
        title: above it.
    """
    points: dict[bool, tuple[list[float], list[float]]] = {True: ([], []), False: ([], [])}
    for record in records:
        scores = (record.scores or ([0.0],))[0]
        mean_score, mean_length = statistics.fmean(scores), statistics.fmean(record.lengths)
        for rank, length, score in zip(record.rankings, record.lengths, scores, strict=True):
            lengths, values = points[rank == min(record.rankings)]
            lengths.append(length - mean_length)
            values.append(score - mean_score)
    figure, axis = _figure((5.0, 3.6), title)
    for is_best, colour, label in ((False, _GREY, "others"), (True, _GREEN, "best")):
        axis.scatter(*points[is_best], s=9, alpha=0.5, color=colour, label=label, linewidths=0)
    axis.set_xlabel("characters, minus the item's mean")
    axis.set_ylabel("score, minus the item's mean")
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _figure(size: tuple[float, float], title: str) -> tuple[Any, Any]:
    # The object interface: no global state of pyplot, no window, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    axis = figure.subplots()
    axis.set_title(title.replace("$", r"\$"), fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _save(figure: Any, path: str | Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
