"""Scored groups as an HTML page or a figure: read them, prepare a view of each, render the views."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.viewer.load import load_source
    from mr_reward.viewer.page import render_page
    from mr_reward.viewer.png import plot_views
    from mr_reward.viewer.views import make_view

__all__ = ["load_source", "make_view", "plot_views", "render_page"]

__getattr__ = lazy_exports(
    __name__, {"load_source": "load", "make_view": "views", "plot_views": "png", "render_page": "page"}
)
