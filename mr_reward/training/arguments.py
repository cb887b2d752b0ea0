"""Arguments of reward-model training: transformers' `TrainingArguments` and the few that N-way preferences add."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from mr_reward.errors import ConfigurationError
from mr_reward.losses import get_loss
from mr_reward.packing import OVER_LENGTH_POLICIES

__all__ = ["RewardTrainingArguments"]


@dataclass
class RewardTrainingArguments(TrainingArguments):
    """Arguments of `RewardTrainer`.

    Args:
        loss: `best_of_n`, `plackett_luce` or `bradley_terry`, see `mr_reward.losses`.
        max_tokens: largest number of tokens of a row (prompt, media and all responses of a group).
        over_length: `error`, `drop_group` or `truncate_responses`, applied and counted before the first step.
    """

    loss: str = field(default="best_of_n", metadata={"help": "best_of_n, plackett_luce or bradley_terry"})
    max_tokens: int = field(default=16384, metadata={"help": "Largest number of tokens of a group's row"})
    over_length: str = field(default="error", metadata={"help": "error, drop_group or truncate_responses"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Groups are no columns; keep False"})
    label_names: list[str] | None = field(default_factory=lambda: ["rankings"], metadata={"help": "Keep as it is"})

    def __post_init__(self) -> None:
        super().__post_init__()
        get_loss(self.loss)
        if self.over_length not in OVER_LENGTH_POLICIES:
            raise ConfigurationError(
                f"unknown over-length policy {self.over_length!r}, expected one of {', '.join(OVER_LENGTH_POLICIES)}"
            )
