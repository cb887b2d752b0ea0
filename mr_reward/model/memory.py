"""How much memory a run will need, from configurations alone: nothing is loaded.

Estimates, to choose a recipe with; what allocators waste, CUDA's own share and the policy's activations are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from mr_reward.checkpoint.zero3 import outside_zero3

__all__ = [
    "PolicyMemory",
    "RewardMemory",
    "activation_bytes",
    "estimate_policy_memory",
    "estimate_reward_memory",
    "measure_reward_memory",
]

_IMAGE_TEXT = AutoModelForImageTextToText._model_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardMemory:
    """What a reward model needs.

    Args:
        weights: bytes of the weights.
        activations: bytes on top of them at the peak of a forward pass.
    """

    weights: int
    activations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMemory:
    """What training a policy needs on each GPU, activations left out.

    Args:
        weights: bytes of the weights.
        gradients: bytes of the gradients.
        optimizer: bytes of Adam's two moments, and of DeepSpeed's float32 copy of half-precision weights.
    """

    weights: int
    gradients: int
    optimizer: int


def estimate_reward_memory(
    config: PreTrainedConfig, *, dtype: torch.dtype, max_tokens: int, dense_mask: bool = True
) -> RewardMemory:
    """Memory of a reward model's backbone (its head is small) for scoring.

    Weights: parameters * bytes of the dtype. Activations, for L = `max_tokens` in one row, width H and MLP width I:
    L * (6 H + 3 I) * bytes for a layer at work (residual, normed input, query, key, value, output; gate, up and their
    product), and with a dense mask 3 L^2 bytes for it and for what it is made of. Layers are not kept: there is no
    gradient. Attention is taken to store no L x L scores, as sdpa's fused kernels; eager does.

    Args:
        config: of the backbone, or of the reward model.
        dtype: of the backbone.
        max_tokens: token budget of one forward pass.
        dense_mask: whether the layout needs one (`isolated` and `set`).

    Returns:
        The estimate.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=100)
        >>> estimate_reward_memory(config, dtype=torch.bfloat16, max_tokens=1024).activations
        4718592
    """
    backbone = getattr(config, "backbone_config", None) or config
    return RewardMemory(
        weights=_count(_on_meta(AutoModel, backbone)) * dtype.itemsize,
        activations=activation_bytes(backbone.get_text_config(), dtype, max_tokens, dense_mask),
    )


def measure_reward_memory(
    backbone: PreTrainedModel, *, dtype: torch.dtype, max_tokens: int, dense_mask: bool = True
) -> RewardMemory:
    """As `estimate_reward_memory` for a loaded backbone, whose weights are counted as they are.

    Args:
        backbone: the backbone.
        dtype: in which it computes.
        max_tokens: token budget of one forward pass.
        dense_mask: whether the layout needs one (`isolated` and `set`).

    Returns:
        The weights as counted, the activations as estimated.
    """
    return RewardMemory(
        weights=sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters()),
        activations=activation_bytes(backbone.config.get_text_config(), dtype, max_tokens, dense_mask),
    )


def estimate_policy_memory(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    num_processes: int = 1,
    zero_stage: int = 0,
    offload: bool = False,
    lora_rank: int | None = None,
    lora_targets: str | Sequence[str] | None = None,
) -> PolicyMemory:
    """Memory of a policy in training with Adam.

    Adam's two moments have the parameter's dtype; under DeepSpeed they are float32, and half-precision weights have a
    float32 copy beside them (12 bytes in all). ZeRO-1 splits the optimizer over the processes, ZeRO-2 the gradients
    too, ZeRO-3 the weights too. With offload, what is split lies in CPU memory.

    Args:
        config: of the policy.
        dtype: of its weights.
        num_processes: GPUs.
        zero_stage: 0 to 3; 0 is training without DeepSpeed.
        offload: whether DeepSpeed moves optimizer and weights to the CPU.
        lora_rank: r; None for full training.
        lora_targets: names of the adapted modules, as peft takes them; None for all linear layers.

    Returns:
        The estimate, for each GPU.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=100)
        >>> one = estimate_policy_memory(config, dtype=torch.bfloat16, zero_stage=1)
        >>> one.optimizer == 6 * one.weights
        True
    """
    auto = AutoModelForImageTextToText if type(config) in _IMAGE_TEXT else AutoModelForCausalLM
    model = _on_meta(auto, config)
    parameters = _count(model)
    trained = parameters if lora_rank is None else _count_lora(model, lora_rank, lora_targets)
    trained_bytes = dtype.itemsize if lora_rank is None else 4  # peft keeps adapters in float32
    if zero_stage == 0:
        moments = 2 * trained_bytes
    else:
        moments = 8 if trained_bytes == 4 else 12

    def split(size: int, stage: int) -> int:
        if zero_stage < stage:
            return size
        return 0 if offload else size // num_processes

    return PolicyMemory(
        weights=split(parameters * dtype.itemsize, 3),
        gradients=split(trained * trained_bytes, 2),
        optimizer=split(trained * moments, 1),
    )


def activation_bytes(text: PreTrainedConfig, dtype: torch.dtype, max_tokens: int, dense_mask: bool) -> int:
    """Of a forward pass, see `estimate_reward_memory`."""
    layer = max_tokens * (6 * text.hidden_size + 3 * text.intermediate_size) * dtype.itemsize
    return layer + (3 * max_tokens**2 if dense_mask else 0)


def _on_meta(auto: Any, config: PreTrainedConfig) -> nn.Module:
    # In a run under ZeRO-3 transformers would partition and initialise it.
    with torch.device("meta"), outside_zero3():
        return auto.from_config(config)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _count_lora(model: nn.Module, rank: int, targets: str | Sequence[str] | None) -> int:
    total = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not _is_target(name, targets):
            continue
        total += rank * (module.in_features + module.out_features)
    return total


def _is_target(name: str, targets: str | Sequence[str] | None) -> bool:
    """As peft: "all-linear" leaves the output layer alone, a text is a pattern, a list holds ends of names."""
    if targets is None or targets == "all-linear" or targets == ["all-linear"]:
        return not name.endswith("lm_head")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
