"""Groups as one HTML page that needs nothing else (no server, no font, no script from elsewhere), and as a PNG figure.

Whatever a policy wrote is escaped by the template engine, and the page's own policy (Content-Security-Policy) lets no
script or style run but the two that are in it, by their hashes. The figure needs the extra `eval` (matplotlib), no
browser.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from PIL import Image

from mr_reward import __version__
from mr_reward.errors import ConfigurationError
from mr_reward.evaluation.plots import new_figure, one_line
from mr_reward.viewer.views import FILTERS, GroupView, visible_text

_BLUE, _TRACK = "#0072b2", "#e3e8ed"
_SHOWN_IMAGES, _SHOWN_TEXT = 6, 70


def render_page(views: Sequence[GroupView], title: str) -> str:
    """The HTML, plain Unicode without lone surrogates: a single view is shown open, more as a list with filters."""
    folder = files("mr_reward.viewer")
    sources = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css", "page.js")}
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    points, ranges = _scatter(views)
    return environment.get_template("page.html.j2").render(
        views=views,
        title=visible_text(title),
        version=__version__,
        layout=next((view.layout for view in views if view.layout), None),
        filters=FILTERS,
        counts={name: sum(name in view.filters for view in views) for name in FILTERS},
        points=points,
        ranges=ranges,
        style=sources["page.css"],
        script=sources["page.js"],
        style_hash=_hash(sources["page.css"]),
        script_hash=_hash(sources["page.js"]),
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _scatter(views: Sequence[GroupView]) -> tuple[list[tuple[str, str]], tuple[str, str, str, str]]:
    """Places of the responses in the figure, and the smallest and largest length and score."""
    pairs = [
        (response.length, response.score)
        for view in views
        for response in view.responses
        if response.score is not None
    ]
    if not pairs:
        return [], ("", "", "", "")
    lengths, scores = zip(*pairs, strict=True)
    (short, long), (low, high) = ((min(values), max(values)) for values in (lengths, scores))

    def place(value: float, least: float, most: float, start: float, size: float) -> str:
        share = 0.5 if most == least else (value - least) / (most - least)
        return f"{start + size * share:.1f}"

    points = [(place(x, short, long, 48, 574), place(y, low, high, 160, -144)) for x, y in pairs]
    return points, (str(short), str(long), f"{low:+.2f}", f"{high:+.2f}")


def plot_views(views: Sequence[GroupView], path: Path, title: str) -> None:
    """Draw one group (images, responses with bars, the layout), or of several score against length and the spreads."""
    if find_spec("matplotlib") is None:
        raise ConfigurationError("--png needs matplotlib; install mr-reward[eval]")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = _group(views[0], title) if len(views) == 1 else _step(views, title)
    figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white")


def _group(view: GroupView, title: str) -> Any:
    from matplotlib.figure import Figure

    images = [piece["uri"] for _, pieces in view.turns for piece in pieces if "uri" in piece][:_SHOWN_IMAGES]
    rows = len(view.responses)
    figure = Figure(figsize=(10, 1.4 + (1.6 if images else 0) + 0.34 * rows + (2.6 if view.matrix else 0)))
    heights = [1.6] * bool(images) + [0.34 * rows + 0.4] + [2.6] * bool(view.matrix)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=0.25)
    figure.suptitle(one_line(f"{title}: {view.name}", 100), fontsize=11)
    part = 0
    if images:
        cells = grid[0].subgridspec(1, max(3, len(images)))
        for i, uri in enumerate(images):
            axis = figure.add_subplot(cells[i])
            axis.imshow(Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))))
            axis.axis("off")
        part = 1
    axis = figure.add_subplot(grid[part])
    axis.set_xlim(0, 1)
    axis.set_ylim(rows - 0.5, -0.5)
    axis.axis("off")
    for i, response in enumerate(view.responses):
        axis.barh(i, 0.18, height=0.5, color=_TRACK)
        if response.score is not None:
            axis.barh(i, 0.18 * (0.02 + 0.98 * response.share), height=0.5, color=_BLUE)
        score = "dropped" if response.score is None else f"{response.score:+.2f}"
        advantage = "" if response.advantage is None else f"{response.advantage:+.2f}"
        axis.text(0.2, i, score, va="center", fontsize=9, family="monospace")
        axis.text(0.29, i, advantage, va="center", fontsize=9, family="monospace", color="#59636e")
        flags = "".join(f" [{flag}]" for flag in response.flags)
        axis.text(0.38, i, one_line(f"{response.text or '(nothing)'}{flags}", _SHOWN_TEXT), va="center", fontsize=9)
    if view.matrix:
        axis = figure.add_subplot(grid[part + 1])
        axis.imshow([[int(cell) for cell in row] for row in view.matrix.cells], cmap="Blues", vmin=0, vmax=1.3)
        axis.set_xticks(range(len(view.matrix.labels)), view.matrix.labels, fontsize=6)
        axis.set_yticks(range(len(view.matrix.labels)), view.matrix.labels, fontsize=6)
        axis.set_title(f"who sees whom, layout {view.layout}", fontsize=9, loc="left")
    return figure


def _step(views: Sequence[GroupView], title: str) -> Any:
    figure, ((left, right),) = new_figure(1, 2, (10, 3.6))
    points = [(r.length, r.score) for view in views for r in view.responses if r.score is not None]
    if points:
        left.scatter(*zip(*points, strict=True), s=9, alpha=0.5, color=_BLUE)
    left.set_xlabel(f"length ({views[0].unit})")
    left.set_ylabel("score")
    right.hist([view.spread for view in views if view.spread is not None], bins=20, color=_BLUE)
    right.set_xlabel("spread of the scores in a group")
    right.set_ylabel("groups")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(one_line(f"{title}: {len(views)} groups", 100), fontsize=11)
    return figure
