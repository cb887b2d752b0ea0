"""Multi-response reward models: score all N responses to a prompt in one forward pass, and train policies with them.

The public names are loaded on first use, so that `import mr_reward` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mr_reward.groups import ResponseGroup

if TYPE_CHECKING:
    from mr_reward.grpo.reward import MultiResponseReward
    from mr_reward.modeling import MultiResponseRewardConfig, MultiResponseRewardModel
    from mr_reward.scoring import GroupScorer

__version__ = "0.1.0"

__all__ = [
    "GroupScorer",
    "MultiResponseReward",
    "MultiResponseRewardConfig",
    "MultiResponseRewardModel",
    "ResponseGroup",
]

_LAZY_NAMES = {
    "GroupScorer": "mr_reward.scoring",
    "MultiResponseReward": "mr_reward.grpo.reward",
    "MultiResponseRewardConfig": "mr_reward.modeling",
    "MultiResponseRewardModel": "mr_reward.modeling",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(_LAZY_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
