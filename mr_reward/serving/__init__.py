"""A reward model behind HTTP: a server that scores groups. `mr_reward.scorers` has the scorer that asks it."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.serving.server import ServerLimits, build_app, serve

__all__ = ["ServerLimits", "build_app", "serve"]

__getattr__, __dir__ = lazy_exports(__name__, {"server": __all__})
