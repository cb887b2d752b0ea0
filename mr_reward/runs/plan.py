"""A GRPO run as its recipe describes it: what the checks before a run look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from mr_reward.groups import ResponseGroup
from mr_reward.runs.launch import Launch

__all__ = ["RunPlan", "planned_arguments"]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run as its recipe describes it.

    Args:
        args: the trainer's configuration, made with `planned_arguments`.
        policy: folder or hub id.
        reward_model: folder or hub id; None with a scoring server.
        reward_server: URL of a scoring server, or None.
        reward_server_hash: checksum of the model that it has to score with, or None.
        reward_placement: resident or offload.
        reward_dtype: of the reward model's backbone; None for float32.
        reward_max_tokens: token budget of one forward pass.
        reward_over_length: drop_group, truncate_responses or error.
        reward_attention: attention backend of the reward model; None for its default.
        num_reward_funcs: reward functions, this one included.
        launch: how the run is started.
        policy_dtype: of the policy's weights.
        policy_bits: 4 or 8 for a quantized policy; None for others.
        lora_rank: r; None for full training.
        lora_targets: see `estimate_policy_memory`.
        use_cpu: whether the recipe asks for the CPU.
        eval_dataset: held-out prompts, or None.
        unread: data sets that are not on this machine.
        prompts: a few prompts as groups with any one response; to measure their length and to see that they exist.
    """

    args: GRPOConfig
    policy: str
    reward_model: str | None
    reward_server: str | None = None
    reward_server_hash: str | None = None
    reward_placement: str = "resident"
    reward_dtype: torch.dtype | None = None
    reward_max_tokens: int = 16384
    reward_over_length: str = "drop_group"
    reward_attention: str | None = None
    num_reward_funcs: int = 1
    launch: Launch = field(default_factory=Launch)
    policy_dtype: torch.dtype = torch.float32
    policy_bits: int | None = None
    lora_rank: int | None = None
    lora_targets: str | Sequence[str] | None = None
    use_cpu: bool = False
    eval_dataset: str | None = None
    unread: Sequence[str] = ()
    prompts: Sequence[ResponseGroup] = ()


def planned_arguments(base: type[GRPOConfig], num_processes: int) -> type[GRPOConfig]:
    """A configuration class that checks itself as if it ran on so many processes.

    Args:
        base: `GRPOConfig` or a subclass.
        num_processes: of the planned run.

    Returns:
        A subclass; give it `use_cpu=True` on a machine without a GPU, or bf16 is refused.
    """
    return type(base.__name__, (base,), {"world_size": property(lambda self: num_processes), "__doc__": base.__doc__})
