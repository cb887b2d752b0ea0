"""Tables and figures of the speed benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from speed_common import Quartiles

_COLOURS = ("#2563eb", "#16a34a", "#d97706", "#9333ea", "#dc2626", "#0891b2", "#6b7280")
_WIDTH = 150


def spread(found: Quartiles | None, digits: int = 2, factor: float = 1.0) -> str:
    """Quartiles for a table.

    Args:
        found: of `quartiles`; None if there are none.
        digits: behind the point.
        factor: on the numbers.

    Returns:
        "median (lower-upper)".
    """
    if found is None:
        return ""
    median, lower, upper = (f"{found[key] * factor:.{digits}f}" for key in ("median", "lower", "upper"))
    return f"{median} ({lower}-{upper})"


def megabytes(size: int | None) -> str:
    """Bytes for a table.

    Args:
        size: the number, or None.

    Returns:
        MB.
    """
    return "" if size is None else f"{size / 2**20:,.0f}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table.

    Args:
        title: over it.
        columns: their names.
        rows: a cell for each column.
    """
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    # The tables are wider than what rich takes a pipe for.
    Console(width=max(_WIDTH, Console().width)).print(table)


def plot_lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence[Any], Sequence[Quartiles]]]],
    path: Path,
    y_label: str,
    *,
    logarithmic: bool = True,
) -> None:
    """Panels of lines with their spread.

    Args:
        panels: x label -> legend -> (places, values).
        path: of the PNG.
        y_label: of all panels.
        logarithmic: both axes; places that are no numbers stand side by side.
    """
    figure = Figure(figsize=(4.8 * len(panels), 3.8))
    axes = figure.subplots(1, len(panels), squeeze=False)
    scale = {"value": "log", "base": 2} if logarithmic else {"value": "linear"}
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
        for colour, (label, (places, values)) in zip(_COLOURS, lines.items(), strict=False):
            middle = [value["median"] for value in values]
            axis.plot(places, middle, "o-", color=colour, label=label, markersize=4)
            if all(isinstance(place, int | float) for place in places):
                bounds = [[value[key] for value in values] for key in ("lower", "upper")]
                axis.fill_between(places, *bounds, color=colour, alpha=0.2, linewidth=0)
                axis.set_xscale(**scale)
        axis.set_yscale(**scale)
        axis.set(xlabel=name, ylabel=y_label)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    _save(figure, path)


def plot_bars(bars: Mapping[str, Quartiles], path: Path, label: str) -> None:
    """Horizontal bars with their spread.

    Args:
        bars: name -> value.
        path: of the PNG.
        label: of the values.
    """
    figure = Figure(figsize=(7, 0.8 + 0.5 * len(bars)))
    axis = figure.subplots()
    middle = [value["median"] for value in bars.values()]
    errors = [
        [value["median"] - value["lower"] for value in bars.values()],
        [value["upper"] - value["median"] for value in bars.values()],
    ]
    axis.barh(list(bars), middle, xerr=errors, color=_COLOURS[0], alpha=0.8)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.grid(alpha=0.3, axis="x")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"figure: {path}")
