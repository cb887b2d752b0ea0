"""Line charts of several runs each, for the figures of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from mr_reward.evaluation.plots import finish_axis, new_figure

__all__ = ["plot_bands"]

COLOURS = ("#2563eb", "#16a34a", "#d97706", "#9333ea")


def plot_bands(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]],
    path: str | Path,
    *,
    title: str = "",
    x_label: str = "step",
) -> None:
    """Draw line charts side by side, each line the mean of several runs in a band from smallest to largest.

    `panels`: panel title -> legend -> (steps, one list of values for each run).
    """
    figure, axes = new_figure(1, len(panels), (5.6 * len(panels), 3.6))
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for colour, (label, (steps, runs)) in zip(cycle(COLOURS), curves.items(), strict=False):
            points = list(zip(*runs, strict=True))
            axis.fill_between(steps, [min(p) for p in points], [max(p) for p in points], color=colour, alpha=0.15)
            axis.plot(steps, [sum(p) / len(p) for p in points], color=colour, linewidth=2, label=label)
        finish_axis(axis, name, x_label)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
