"""DeepSpeed ZeRO-3 keeps a part of every weight on each rank: how to get at whole ones, and how to stay out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from transformers.integrations import deepspeed as hf_deepspeed


def whole_weights(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the weights of a module are whole on every rank; what rank 0 has changed is kept.

    Without ZeRO-3 this does nothing. With it every rank has to take part, and every rank needs room for the weights.
    """
    parameters = list(module.parameters())
    # DeepSpeed's mark on a weight that it has partitioned.
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def partitioned_weights(module: nn.Module) -> list[str]:
    """The names of the weights that are not whole on this rank."""
    return [name for name, weight in module.named_parameters() if hasattr(weight, "ds_id") or not weight.numel()]


def match_partitioned_dtype(model: nn.Module) -> None:
    """Give all trained weights one dtype where ZeRO-3 has partitioned some of them.

    transformers partitions a backbone while it is loaded, in bfloat16 for example; the parts that are added to it
    start in float32, and ZeRO-3 cannot train both in one group. It keeps float32 copies of all for the optimizer, and
    the value head computes in float32 whatever its weights are. With LoRA the partitioned weights are frozen and
    nothing changes, nor does it without ZeRO-3.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtype = next((parameter.dtype for parameter in trained if hasattr(parameter, "ds_id")), None)
    for parameter in trained:
        if dtype is not None and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def outside_zero3() -> Iterator[None]:
    """Hide the process's DeepSpeed config from transformers for the time of the block.

    While a ZeRO-3 config is alive, every model that is built or loaded is partitioned over the ranks, also one that is
    meant for this rank only. The often advised `set_zero3_state` is worse: random weights on every rank but 0, and no
    error. Here transformers forgets the config and gets it back at the end; the whole model has to be built inside.
    Without a DeepSpeed config this does nothing.

    Yields:
        Nothing.

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
