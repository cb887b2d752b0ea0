"""How much memory a reward model will need, from its configuration alone: `memory` of the model and of its scorer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

__all__ = ["RewardMemory", "activation_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardMemory:
    """What a reward model needs, in bytes; what allocators waste and CUDA's own share are left out."""

    weights: int
    activations: int  # on top of the weights at the peak of a forward pass


def activation_bytes(text: PreTrainedConfig, dtype: torch.dtype, max_tokens: int, dense_mask: bool) -> int:
    """An estimate for a forward pass without gradients, of which one layer at a time is kept.

    For L = `max_tokens` in one row, width H and MLP width I: L * (6 H + 3 I) numbers (residual, normed input, query,
    key, value, output; gate, up and their product), and with a dense mask 3 L^2 bytes for it and for what it is made
    of. Attention is taken to store no L x L scores, as sdpa's fused kernels; eager does.
    """
    layer = max_tokens * (6 * text.hidden_size + 3 * text.intermediate_size) * dtype.itemsize
    return layer + (3 * max_tokens**2 if dense_mask else 0)
