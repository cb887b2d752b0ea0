"""PNG figures: training curves, and images beside their ranked responses. Needs the extra `eval` (matplotlib)."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from mr_reward.groups import ResponseGroup
from mr_reward.templates.images import load_image

__all__ = ["plot_bands", "plot_curves", "plot_scored_groups"]

Curve = tuple[Sequence[float], Sequence[float]]
_COLOURS = ("#2563eb", "#16a34a", "#d97706", "#9333ea")


def plot_curves(
    panels: Mapping[str, Mapping[str, Curve]], path: str | Path, *, title: str = "", columns: int = 4
) -> None:
    """Draw line charts side by side.

    Args:
        panels: panel title -> legend -> (steps, values).
        path: of the PNG file.
        title: over all panels.
        columns: panels in a row.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _new_figure(rows, columns, (4.6 * columns, 3.4 * rows))
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, curves) in zip(axes.flat, panels.items(), strict=False):
        for colour, (label, (steps, values)) in zip(cycle(_COLOURS), curves.items(), strict=False):
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axis.plot(steps, _smooth(values), color=colour, linewidth=2, label=label)
        _finish_axis(axis, name)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot_bands(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]],
    path: str | Path,
    *,
    title: str = "",
    x_label: str = "step",
) -> None:
    """Draw line charts side by side, each line the mean of several runs in a band from smallest to largest.

    Args:
        panels: panel title -> legend -> (steps, one list of values for each run).
        path: of the PNG file.
        title: over all panels.
        x_label: of the steps.
    """
    figure, axes = _new_figure(1, len(panels), (5.6 * len(panels), 3.6))
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for colour, (label, (steps, runs)) in zip(cycle(_COLOURS), curves.items(), strict=False):
            points = list(zip(*runs, strict=True))
            axis.fill_between(steps, [min(p) for p in points], [max(p) for p in points], color=colour, alpha=0.15)
            axis.plot(steps, [sum(p) / len(p) for p in points], color=colour, linewidth=2, label=label)
        _finish_axis(axis, name, x_label)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot_scored_groups(
    groups: Sequence[ResponseGroup], scores: Sequence[Sequence[float]], path: str | Path, *, columns: int = 3
) -> None:
    """Draw a grid of images, each above its responses, sorted by score; best-ranked responses are green.

    Args:
        groups: groups with one image each; rankings are optional.
        scores: N scores of each group.
        path: of the PNG file.
        columns: images in a row.
    """
    rows = -(-len(groups) // columns)
    most = max(group.num_responses for group in groups)
    figure, axes = _new_figure(rows, columns, (4.2 * columns, rows * (1.5 + 0.28 * most)))
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
            colour = "#16a34a" if right else "#6b7280"
            axis.barh(y, 0.04 + 0.26 * share, height=0.36 / most, left=0.0, color=colour, alpha=0.8)
            axis.text(
                0.34, y, f"{values[index]:+.2f}  {_printable(group.responses[index])}", va="center", fontsize=8.5
            )
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _new_figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    # The object interface: no global state of pyplot, no window, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish_axis(axis: Any, title: str, x_label: str = "step") -> None:
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


def _printable(text: str) -> str:
    shown = text if text.strip() else "(nothing)"
    return (shown if len(shown) <= 34 else shown[:33] + "…").replace("$", r"\$")
