"""Multi-response reward models: score all N responses to a prompt in one forward pass, and train policies with them.

The public names are loaded on first use, so that `import mr_reward` stays light.
"""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports
from mr_reward.groups import ResponseGroup
from mr_reward.moved import Finder

if TYPE_CHECKING:
    from mr_reward.grpo.reward import MultiResponseReward
    from mr_reward.model.configuration import MultiResponseRewardConfig
    from mr_reward.model.model import MultiResponseRewardModel
    from mr_reward.model.scorer import GroupScorer

__version__ = "0.1.0"

__all__ = [
    "GroupScorer",
    "MultiResponseReward",
    "MultiResponseRewardConfig",
    "MultiResponseRewardModel",
    "ResponseGroup",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "grpo.reward": ["MultiResponseReward"],
        "model.configuration": ["MultiResponseRewardConfig"],
        "model.model": ["MultiResponseRewardModel"],
        "model.scorer": ["GroupScorer"],
    },
)

Finder.install()
