"""Build the scorer inside a training process: on this rank's device, and out of DeepSpeed ZeRO-3's reach."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations import deepspeed as hf_deepspeed

from mr_reward.errors import ConfigurationError

if TYPE_CHECKING:
    from mr_reward.scoring import GroupScorer

__all__ = ["build_scorer", "default_device", "outside_zero3"]


def default_device() -> torch.device:
    """The device of this rank: `cuda:LOCAL_RANK` if CUDA is available, else the CPU.

    Returns:
        The device.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def outside_zero3() -> Iterator[None]:
    """Hide the policy's DeepSpeed config from transformers for the time of the block.

    While a ZeRO-3 config is alive, `from_pretrained` returns empty weights. The often advised `set_zero3_state` is
    worse: random weights on every rank but 0, and no error. Here transformers forgets the config and gets it back at
    the end; the whole reward model has to be built inside. Without a DeepSpeed config this does nothing.

    Example:
        >>> with outside_zero3():
        ...     hf_deepspeed.is_deepspeed_zero3_enabled()
        False
    """
    # transformers offers set and unset but no get; the strong reference keeps the config alive while it is hidden
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    if config is None:
        yield
        return
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed.set_hf_deepspeed_config(config)


def build_scorer(model: Any, **options: Any) -> GroupScorer:
    """Make a `GroupScorer` from a checkpoint or from a loaded model.

    Args:
        model: folder or hub id (str or path), or a loaded `MultiResponseRewardModel`.
        options: keyword options of `GroupScorer`.

    Returns:
        The scorer.

    Raises:
        ConfigurationError: `model` is something else.
        CheckpointError: the checkpoint cannot be loaded.
    """
    from mr_reward.modeling import MultiResponseRewardModel
    from mr_reward.scoring import GroupScorer

    with outside_zero3():
        if isinstance(model, str | os.PathLike):
            return GroupScorer.from_pretrained(os.fspath(model), **options)
        if isinstance(model, MultiResponseRewardModel):
            return GroupScorer(model, **options)
    raise ConfigurationError(
        f"model is {type(model).__name__}, expected a folder, a hub id or a loaded MultiResponseRewardModel; pass the "
        "folder that save_pretrained wrote"
    )
