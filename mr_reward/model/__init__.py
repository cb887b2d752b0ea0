"""The core: configuration, rows, the model, how it is loaded, and the scorer around it."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.model.configuration import MultiResponseRewardConfig
    from mr_reward.model.model import MultiResponseRewardModel
    from mr_reward.model.scorer import GroupScorer

__all__ = ["GroupScorer", "MultiResponseRewardConfig", "MultiResponseRewardModel"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {"configuration": ["MultiResponseRewardConfig"], "model": ["MultiResponseRewardModel"], "scorer": ["GroupScorer"]},
)
