"""A GRPO run around the reward: its recipe, what watches it, resuming, and rollouts by vLLM."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.runs.callbacks import PolicyValidation, RunFigure, ShownGroups, WarningSigns

__all__ = ["PolicyValidation", "RunFigure", "ShownGroups", "WarningSigns"]

__getattr__, __dir__ = lazy_exports(__name__, {"callbacks": __all__})
