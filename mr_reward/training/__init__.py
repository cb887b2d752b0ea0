"""Train a reward model on ranked groups: transformers' Trainer, its arguments, the losses."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.training.losses import best_of_n_cross_entropy, pairwise_bradley_terry, plackett_luce
    from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments

__all__ = [
    "RewardTrainer",
    "RewardTrainingArguments",
    "best_of_n_cross_entropy",
    "pairwise_bradley_terry",
    "plackett_luce",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "losses": ["best_of_n_cross_entropy", "pairwise_bradley_terry", "plackett_luce"],
        "trainer": ["RewardTrainer", "RewardTrainingArguments"],
    },
)
