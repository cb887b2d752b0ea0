"""Train a reward model on ranked groups: transformers' Trainer, its arguments, the losses."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments

__all__ = ["RewardTrainer", "RewardTrainingArguments"]

__getattr__, __dir__ = lazy_exports(__name__, {"trainer": ["RewardTrainer", "RewardTrainingArguments"]})
