"""Groups as one HTML page that needs nothing else: no server, no font, no script from elsewhere.

Whatever a policy wrote is escaped by the template engine, and the page's own policy (Content-Security-Policy) lets no
script or style run but the two that are in it, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import DictLoader, Environment, StrictUndefined

from mr_reward import __version__
from mr_reward.viewer.views import FILTERS, GroupView, visible_text

__all__ = ["render_page"]


def render_page(views: Sequence[GroupView], title: str) -> str:
    """The HTML, plain Unicode without lone surrogates: a single view is shown open, more as a list with filters."""
    sources = {name: _read(name) for name in ("page.html.j2", "page.css", "page.js")}
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


def _read(name: str) -> str:
    return files("mr_reward.viewer").joinpath(name).read_text(encoding="utf-8")


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
