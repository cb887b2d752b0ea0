"""Group-wise rewards in GRPO: the rollouts of all ranks -> groups -> rewards."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.grpo.reward import MultiResponseReward
    from mr_reward.grpo.telemetry import GroupLog
    from mr_reward.grpo.truth import Truth

__all__ = ["GroupLog", "MultiResponseReward", "Truth"]

__getattr__, __dir__ = lazy_exports(
    __name__, {"reward": ["MultiResponseReward"], "telemetry": ["GroupLog"], "truth": ["Truth"]}
)
