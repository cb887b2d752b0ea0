"""How much memory a reward model will need, from its configuration alone: nothing is loaded.

Estimates, to choose a recipe with; what allocators waste and CUDA's own share are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from mr_reward.checkpoint.zero3 import outside_zero3

__all__ = ["RewardMemory", "activation_bytes", "estimate_reward_memory", "measure_reward_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardMemory:
    """What a reward model needs.

    Args:
        weights: bytes of the weights.
        activations: bytes on top of them at the peak of a forward pass.
    """

    weights: int
    activations: int


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
