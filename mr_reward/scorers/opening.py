"""Build the scorer inside a training process: on this rank's device, and out of DeepSpeed ZeRO-3's reach."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from mr_reward.checkpoint.zero3 import outside_zero3, partitioned_weights
from mr_reward.errors import CheckpointError, ConfigurationError
from mr_reward.model.memory import measure_reward_memory

if TYPE_CHECKING:
    from torch import nn

    from mr_reward.model.scorer import GroupScorer
    from mr_reward.scorers import RemoteScorer
    from mr_reward.scorers.offload import OffloadedScorer

__all__ = ["DTYPES", "build_scorer", "connect_scorer", "default_device", "outside_zero3"]

logger = logging.getLogger(__name__)

# By the names that recipes and the command line take.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_START_SECONDS = 120.0  # that a scoring server may take to come up


def default_device() -> torch.device:
    """The device of this rank: `cuda:LOCAL_RANK` if CUDA is available, else the CPU.

    Returns:
        The device.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def build_scorer(
    model: Any,
    *,
    device: torch.device | str | None = None,
    placement: str = "resident",
    attn_implementation: str | None = None,
    **options: Any,
) -> GroupScorer | OffloadedScorer:
    """Make a scorer from a checkpoint or from a loaded model.

    Args:
        model: folder or hub id (str or path), or a loaded `MultiResponseRewardModel`.
        device: where to score; None for this rank's.
        placement: one of `PLACEMENTS`: the weights stay on the device, or go there for each call only.
        attn_implementation: attention backend of a checkpoint; None for the default. A loaded model has its own.
        options: keyword options of `GroupScorer`.

    Returns:
        The scorer.

    Raises:
        ConfigurationError: `model` is something else, or there is no such placement.
        CheckpointError: the checkpoint cannot be loaded, or the model is partitioned by ZeRO-3.
    """
    from mr_reward.model.model import MultiResponseRewardModel
    from mr_reward.model.scorer import GroupScorer
    from mr_reward.scorers.offload import PLACEMENTS, OffloadedScorer

    if placement not in PLACEMENTS:
        raise ConfigurationError(f"placement is {placement!r}, expected one of {', '.join(PLACEMENTS)}")
    target = torch.device(device) if device is not None else default_device()
    device = torch.device("cpu") if placement == "offload" else target
    if isinstance(model, MultiResponseRewardModel):
        _refuse_partitioned(model)
        if attn_implementation is not None:
            raise ConfigurationError(
                f"got attn_implementation={attn_implementation!r} with a loaded model, expected a folder; choose the "
                "backend when you load the model"
            )
    with outside_zero3():
        if isinstance(model, str | os.PathLike):
            scorer = GroupScorer.from_pretrained(
                os.fspath(model), device=device, attn_implementation=attn_implementation, **options
            )
        elif isinstance(model, MultiResponseRewardModel):
            scorer = GroupScorer(model, device=device, **options)
        else:
            raise ConfigurationError(
                f"model is {type(model).__name__}, expected a folder, a hub id or a loaded MultiResponseRewardModel; "
                "pass the folder that save_pretrained wrote"
            )
    _tell_memory(scorer, target, placement)
    return OffloadedScorer(scorer, target) if placement == "offload" else scorer


def _tell_memory(scorer: GroupScorer, target: torch.device, placement: str) -> None:
    backbone = scorer.model.backbone
    need = measure_reward_memory(
        backbone,
        dtype=backbone.dtype,
        max_tokens=scorer.max_tokens_per_batch,
        dense_mask=scorer.model.config.layout != "causal",
    )
    logger.info(
        "reward model: %.2f GB of weights %s %s, and about %.2f GB more in a forward pass of %d tokens",
        need.weights / 1e9,
        "on" if placement == "resident" else "on the CPU, in calls also on",
        target,
        need.activations / 1e9,
        scorer.max_tokens_per_batch,
    )


def connect_scorer(server: str, *, token: str | None = None, expected_hash: str | None = None) -> RemoteScorer:
    """Make a scorer that asks a scoring server, and see that the server is there.

    Args:
        server: its URL.
        token: of the server; None for the environment's.
        expected_hash: checksum of the model that has to score; None for any.

    Returns:
        The scorer.

    Raises:
        CheckpointError: the server has another model.
        ConfigurationError: the URL is none, or the packages of the extra `serve` are missing.
        ScoringServerError: the server cannot be reached, or refuses the token.
    """
    from mr_reward.scorers import RemoteScorer

    scorer = RemoteScorer(server, token=token, expected_hash=expected_hash)
    scorer.connect(_START_SECONDS)
    return scorer


def _refuse_partitioned(model: nn.Module) -> None:
    """A model with empty weights would score nonsense, or wait for ranks that own no group."""
    names = partitioned_weights(model)
    if names:
        raise CheckpointError(
            f"{len(names)} weights of the reward model are partitioned over the ranks ({names[0]}, ...): it was "
            "loaded while a DeepSpeed ZeRO-3 configuration was alive, expected whole weights on every rank; "
            "pass the folder itself, or load the model inside mr_reward.checkpoint.zero3.outside_zero3()"
        )
