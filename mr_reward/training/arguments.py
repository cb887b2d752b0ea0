"""Arguments of reward-model training: transformers' `TrainingArguments` and the few that N-way preferences add."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from mr_reward.errors import ConfigurationError
from mr_reward.model.rows import OVER_LENGTH_POLICIES
from mr_reward.training.losses import get_loss

__all__ = ["RewardTrainingArguments", "backend_for_deepspeed"]


@dataclass
class RewardTrainingArguments(TrainingArguments):
    """Arguments of `RewardTrainer`.

    transformers' own fields cover the rest: `label_smoothing_factor` (for the losses of `mr_reward.training.losses`),
    `train_sampling_strategy` (`batch_rebalance` forms micro-batches of equal cost in tokens, `group_by_length` batches
    of equal length), `gradient_checkpointing`, `bf16`, `deepspeed`, `metric_for_best_model`, `resume_from_checkpoint`.

    Args:
        loss: `best_of_n`, `plackett_luce` or `bradley_terry`, see `mr_reward.training.losses`.
        margin: score difference that `bradley_terry` asks for per rank of difference.
        center_rewards_coefficient: weight of the penalty on the groups' mean scores; the name is TRL's.
        max_tokens: largest number of tokens of a training row (prompt, media and all responses of a group).
        eval_max_tokens: the same in evaluation, where groups are whole; None for `max_tokens`.
        over_length: `error`, `drop_group` or `truncate_responses`, applied and counted before the first step.
        max_responses: train on random subsets of at most so many responses per row, drawn anew every epoch; None for
            all responses.
        degenerate_negatives: probability with which a training row gets one worthless response, ranked last.
        mixture_weights: share of each training set, in their order; None for their sizes.
        eval_orders: 2 scores every evaluation group in a second order and reports `order_flip_rate`; 1 saves the time.
    """

    loss: str = field(default="best_of_n", metadata={"help": "best_of_n, plackett_luce or bradley_terry"})
    margin: float = field(default=0.0, metadata={"help": "Score difference per rank that bradley_terry asks for"})
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of the penalty on the groups' mean scores"}
    )
    max_tokens: int = field(default=16384, metadata={"help": "Largest number of tokens of a group's row"})
    eval_max_tokens: int | None = field(default=None, metadata={"help": "The same in evaluation, None for max_tokens"})
    over_length: str = field(default="error", metadata={"help": "error, drop_group or truncate_responses"})
    max_responses: int | None = field(default=None, metadata={"help": "Responses of a training row, None for all"})
    degenerate_negatives: float = field(
        default=0.0, metadata={"help": "Probability of a worthless response in a training row"}
    )
    mixture_weights: list[float] | None = field(
        default=None, metadata={"help": "Share of each training set, None for their sizes"}
    )
    eval_orders: int = field(default=2, metadata={"help": "2 measures order flips in evaluation, 1 saves the time"})
    ddp_backend: str | None = field(default=None, metadata={"help": "gloo without a GPU if DeepSpeed runs"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Groups are no columns; keep False"})
    label_names: list[str] | None = field(default_factory=lambda: ["rankings"], metadata={"help": "Keep as it is"})

    def __post_init__(self) -> None:
        self.ddp_backend = backend_for_deepspeed(self.ddp_backend, use_cpu=self.use_cpu)
        super().__post_init__()
        get_loss(
            self.loss,
            margin=self.margin,
            label_smoothing=self.label_smoothing_factor,
            centring_coefficient=self.center_rewards_coefficient or 0.0,
        )
        if self.over_length not in OVER_LENGTH_POLICIES:
            raise ConfigurationError(
                f"unknown over-length policy {self.over_length!r}, expected one of {', '.join(OVER_LENGTH_POLICIES)}"
            )


def backend_for_deepspeed(ddp_backend: str | None, *, use_cpu: bool) -> str | None:
    """The backend of a run that may have been launched with DeepSpeed on a machine without a GPU.

    accelerate knows none for it, and then every process takes itself for a whole run.

    Args:
        ddp_backend: what the configuration says; None for nothing.
        use_cpu: of the training arguments.

    Returns:
        `gloo` where DeepSpeed runs on the CPU and nothing else is asked for, else `ddp_backend`.

    Raises:
        ConfigurationError: `use_cpu` together with DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return ddp_backend
    if use_cpu:
        raise ConfigurationError(
            "got use_cpu=true in a run that was launched with DeepSpeed; accelerate would leave DeepSpeed "
            "out. Remove use_cpu: on a machine without a GPU DeepSpeed runs on the CPU by itself"
        )
    return "gloo" if ddp_backend is None and not torch.accelerator.is_available() else ddp_backend
