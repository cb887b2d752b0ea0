"""PNG figures: training curves, images beside their ranked responses, and a benchmark's results.

Needs the extra `eval` (matplotlib).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from mr_reward.evaluation.official import Interval, ItemRecord
from mr_reward.groups import ResponseGroup
from mr_reward.templates.images import load_image

Curve = tuple[Sequence[float], Sequence[float]]
_BLUE, _GREEN, _GREY = "#2563eb", "#16a34a", "#9ca3af"
_COLOURS = (_BLUE, _GREEN, "#d97706", "#9333ea")


def plot_curves(
    panels: Mapping[str, Mapping[str, Curve]], path: str | Path, *, title: str = "", columns: int = 4
) -> None:
    """Draw line charts side by side; `panels`: panel title -> legend -> (steps, values)."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, (4.6 * columns, 3.4 * rows))
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, curves) in zip(axes.flat, panels.items(), strict=False):
        for colour, (label, (steps, values)) in zip(cycle(_COLOURS), curves.items(), strict=False):
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axis.plot(steps, _smooth(values), color=colour, linewidth=2, label=label)
        finish_axis(axis, name)
    figure.suptitle(title, fontsize=12)
    _save(figure, path)


def plot_scored_groups(groups: Sequence[ResponseGroup], scores: Sequence[Sequence[float]], path: str | Path) -> None:
    """Draw images, three side by side, each above its responses, sorted by score; best-ranked responses are green.

    Every group has one image; rankings are optional.
    """
    rows = -(-len(groups) // 3)
    most = max(group.num_responses for group in groups)
    figure, axes = new_figure(rows, 3, (12.6, rows * (1.5 + 0.28 * most)))
    for axis in axes.flat:
        axis.axis("off")
    for axis, group, values in zip(axes.flat, groups, scores, strict=False):
        box = axis.inset_axes((0.0, 0.62, 1.0, 0.36))
        box.imshow(load_image(group.images[0]))
        box.set_xticks([])
        box.set_yticks([])
        low, high = min(values), max(values)
        for line, index in enumerate(sorted(range(len(values)), key=lambda i: -values[i])):
            y = 0.52 - line * 0.52 / most
            share = (values[index] - low) / (high - low) if high > low else 0.5
            right = group.rankings is not None and group.rankings[index] == 1
            colour = _GREEN if right else "#6b7280"
            axis.barh(y, 0.04 + 0.26 * share, height=0.36 / most, left=0.0, color=colour, alpha=0.8)
            axis.text(
                0.34, y, f"{values[index]:+.2f}  {one_line(group.responses[index], 34)}", va="center", fontsize=8.5
            )
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
    _save(figure, path)


def plot_metrics(metrics: Mapping[str, Interval], path: str | Path, *, title: str = "") -> None:
    """Draw each metric as a bar with its 95 % interval."""
    figure, axis = _single((7.0, 0.9 + 0.34 * len(metrics)), title)
    rows = range(len(metrics))
    values, low, high = zip(*metrics.values(), strict=True)
    errors = np.maximum([np.subtract(values, low), np.subtract(high, values)], 0.0)
    axis.barh(rows, values, xerr=errors, color=_BLUE, alpha=0.75, ecolor="#111827", capsize=2)
    axis.set_yticks(rows, list(metrics), fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(min(0.0, *low), 1.0)
    axis.grid(axis="x", alpha=0.25)
    _save(figure, path)


def plot_sizes(records: Sequence[ItemRecord], path: str | Path, *, title: str = "") -> None:
    """Draw best-of-N accuracy against N, beside what chance gives."""
    credit: defaultdict[int, list[float]] = defaultdict(list)
    chance: defaultdict[int, list[float]] = defaultdict(list)
    for record in records:
        n = len(record.rankings)
        credit[n].append(statistics.fmean(record.judged(k).best_of_n for k in range(len(record.orders))))
        chance[n].append(record.rankings.count(min(record.rankings)) / n)
    sizes = sorted(credit)
    figure, axis = _single((5.0, 3.4), title)
    axis.plot(sizes, [statistics.fmean(credit[n]) for n in sizes], color=_BLUE, marker="o", label="model")
    axis.plot(sizes, [statistics.fmean(chance[n]) for n in sizes], color=_GREY, marker=".", label="chance")
    axis.set_xticks(sizes)
    axis.set_ylim(0, 1)
    _save_labelled(figure, axis, path, "responses of an item, N", "best of N")


def plot_reliability(bins: Sequence[Mapping[str, float]], path: str | Path, *, title: str = "") -> None:
    """Draw how often the highest-scored response is the best one, against the probability that its score claims."""
    figure, axis = _single((4.2, 4.0), title)
    claimed, right = [one["probability"] for one in bins], [one["right"] for one in bins]
    most = max(one["groups"] for one in bins)
    axis.plot([0, 1], [0, 1], color=_GREY, linestyle="--", label="calibrated")
    axis.scatter(claimed, right, s=[20 + 180 * one["groups"] / most for one in bins], color=_BLUE, label="groups")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    _save_labelled(figure, axis, path, "probability of the highest-scored response", "share where it is the best")


def plot_position_bias(records: Sequence[ItemRecord], path: str | Path, *, title: str = "") -> None:
    """Draw how often the winner stood in each slot, beside how often the best response did."""
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
    figure, axis = _single((5.0, 3.4), title)
    axis.bar([s + 0.8 for s in slots], [won[s] / shown[s] for s in slots], 0.4, color=_BLUE, label="winner")
    axis.bar([s + 1.2 for s in slots], [best[s] / shown[s] for s in slots], 0.4, color=_GREY, label="best response")
    axis.set_xticks([slot + 1 for slot in slots])
    _save_labelled(figure, axis, path, "slot in the order shown", "share of the times shown there")


def plot_items(records: Sequence[ItemRecord], path: str | Path, *, title: str = "") -> None:
    """Draw the scores against the lengths of the responses, both as differences from their item's mean."""
    points: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for record in records:
        scores = (record.scores or ([0.0],))[0]
        mean_score, mean_length = statistics.fmean(scores), statistics.fmean(record.lengths)
        for rank, length, score in zip(record.rankings, record.lengths, scores, strict=True):
            points[rank == min(record.rankings)].append((length - mean_length, score - mean_score))
    figure, axis = _single((5.0, 3.6), title)
    for is_best, colour, label in ((False, _GREY, "others"), (True, _GREEN, "best")):
        x, y = np.reshape(points[is_best], (-1, 2)).T
        axis.scatter(x, y, s=9, alpha=0.5, color=colour, label=label, linewidths=0)
    _save_labelled(figure, axis, path, "characters, minus the item's mean", "score, minus the item's mean")


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    """A figure and its grid of axes."""
    # The object interface: no global state of pyplot, no window, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _single(size: tuple[float, float], title: str) -> tuple[Any, Any]:
    figure, axes = new_figure(1, 1, size)
    axis = axes[0, 0]
    axis.set_title(title.replace("$", r"\$"), fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _save(figure: Any, path: str | Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _save_labelled(figure: Any, axis: Any, path: str | Path, x_label: str, y_label: str) -> None:
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def finish_axis(axis: Any, title: str, x_label: str = "step") -> None:
    """Title, grid and legend of a line chart."""
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(x_label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, fontsize=9)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a tenth of the curve; a curve of a few points stays as it is."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def one_line(text: str, length: int) -> str:
    """The start of a text, so that a figure shows it as it is."""
    text = " ".join(text.split()) or "(nothing)"
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")
