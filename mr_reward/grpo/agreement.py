"""What has to agree before rewards can be right: the ranks' weights, and the trainer's group size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mr_reward.errors import CheckpointError, ConfigurationError

__all__ = ["check_same_weights", "group_size", "is_evaluating"]


def check_same_weights(digests: Sequence[str]) -> None:
    """Refuse ranks with different reward models, by their checksums; every rank sees the same list, so all raise."""
    if len(set(digests)) <= 1:
        return
    ranks_by_digest: defaultdict[str, list[str]] = defaultdict(list)
    for rank, digest in enumerate(digests):
        ranks_by_digest[digest].append(str(rank))
    found = "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}: {digest}"
        for digest, ranks in ranks_by_digest.items()
    )
    raise CheckpointError(
        f"the ranks hold different reward models (checksums of the weights: {found}), expected the same weights "
        "everywhere. Either the folder differs from machine to machine, or the model was loaded while a DeepSpeed "
        "ZeRO-3 configuration was alive (set_zero3_state gives random weights on every rank but 0), or a new head was "
        "drawn with a different seed on each rank; give MultiResponseReward the folder itself and it keeps out of "
        "ZeRO-3's way, or load the model inside mr_reward.checkpoint.zero3.outside_zero3()"
    )


def group_size(log_metric: Callable[..., None] | None, num_generations: int, num_generations_eval: int) -> int:
    """How many rows a group has in this call: training and evaluation may differ, and TRL does not say which it is.

    The rows do not tell it apart safely (two neighbouring groups of one prompt look like one of twice the size), so
    the trainer is asked: `log_metric`, which TRL hands to reward functions, is a method of it. What it says is also
    held against what the reward was given, in the first call already, not only when the first evaluation comes.
    """
    trainer = getattr(log_metric, "__self__", None)
    configured = tuple(getattr(trainer, name, None) for name in ("num_generations", "num_generations_eval"))
    if any(number is None for number in configured):
        if num_generations == num_generations_eval:
            return num_generations
        raise ConfigurationError(
            f"got num_generations={num_generations} and num_generations_eval={num_generations_eval}, but the caller "
            "is no GRPOTrainer or RLOOTrainer that could say whether this is training or evaluation; pass "
            "the trainer's own log_metric, or make one MultiResponseReward for each size"
        )
    if configured != (num_generations, num_generations_eval):
        raise ConfigurationError(
            f"MultiResponseReward has num_generations={num_generations} and "
            f"num_generations_eval={num_generations_eval}, but the trainer generates {configured[0]} completions per "
            f"prompt in training and {configured[1]} in evaluation; make it with MultiResponseReward(..., "
            f"num_generations={configured[0]}, num_generations_eval={configured[1]})"
        )
    return num_generations_eval if is_evaluating(log_metric) else num_generations


def is_evaluating(log_metric: Callable[..., None] | None) -> bool:
    """Whether the trainer that calls a reward is evaluating: its model's mode tells it. Without a trainer, no."""
    model: Any = getattr(getattr(log_metric, "__self__", None), "model", None)
    return model is not None and not model.training
