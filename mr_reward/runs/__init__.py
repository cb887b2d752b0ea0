"""A GRPO run around the reward: its recipe, what watches it, resuming, and rollouts by vLLM."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.runs.average import EMACallback
    from mr_reward.runs.callbacks import PolicyValidation, RunFigure, ShownGroups, WarningSigns
    from mr_reward.runs.judge_guard import JudgeGuard
    from mr_reward.runs.refresh_callback import RefreshCallback

__all__ = [
    "EMACallback",
    "JudgeGuard",
    "PolicyValidation",
    "RefreshCallback",
    "RunFigure",
    "ShownGroups",
    "WarningSigns",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "average": ["EMACallback"],
        "callbacks": ["PolicyValidation", "RunFigure", "ShownGroups", "WarningSigns"],
        "judge_guard": ["JudgeGuard"],
        "refresh_callback": ["RefreshCallback"],
    },
)
