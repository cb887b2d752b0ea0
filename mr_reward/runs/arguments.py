"""`GRPOConfig` with what a run needs to be started under DeepSpeed on the CPU too."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from mr_reward.training.trainer import backend_for_deepspeed

__all__ = ["PolicyTrainingArguments"]


@dataclass
class PolicyTrainingArguments(GRPOConfig):
    """`GRPOConfig`; under DeepSpeed on a machine without a GPU the processes find each other by themselves.

    Args:
        ddp_backend: None for the right one.

    Raises:
        ConfigurationError: `use_cpu` together with DeepSpeed.

    Example:
        >>> PolicyTrainingArguments("out", num_generations=8, bf16=False, use_cpu=True).num_generations
        8
    """

    ddp_backend: str | None = field(default=None, metadata={"help": "gloo without a GPU if DeepSpeed runs"})

    def __post_init__(self) -> None:
        self.ddp_backend = backend_for_deepspeed(self.ddp_backend, use_cpu=self.use_cpu)
        super().__post_init__()
