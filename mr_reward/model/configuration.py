"""`MultiResponseRewardConfig`: everything that says how to score, and what follows from it without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from mr_reward.attention.reach import ISOLATING_LAYERS
from mr_reward.errors import BackendError
from mr_reward.templates.rendering import TEMPLATE
from mr_reward.templates.thoughts import THOUGHTS

__all__ = ["MultiResponseRewardConfig", "RewardMemory", "activation_bytes", "check_layers", "context_tokens"]
_ORIGINAL_CONTEXT = "original_max_position_embeddings"


@strict
class MultiResponseRewardConfig(PreTrainedConfig):
    """Everything that says how to score, saved beside the weights.

    Args:
        backbone_config: configuration of the backbone.
        layout: `causal`, `isolated` or `set` (see `mr_reward.layouts`).
        head_hidden_size: width of the value head's hidden layer; None for the backbone's width.
        head_activation: `selu` or a name of transformers' `ACT2FN`.
        head_bias: the head's last layer has a bias.
        score_scale: factor on the head's output.
        template: name of the prompt template (see `mr_reward.templates.rendering`).
        thoughts: what is judged of responses with thoughts: `included`, `stripped` or `refused`.
        template_hash: hash of the template and of the processor's chat template at training time.
        backbone_name_or_path: where the backbone came from.
        backbone_revision: its commit on the hub, if known.
        schema_version: of this configuration.

    Example:
        >>> MultiResponseRewardConfig.from_pretrained("rm").layout  # doctest: +SKIP
        'set'
    """

    model_type = "multi_response_reward"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    layout: str = "set"
    head_hidden_size: int | None = None
    head_activation: str = "silu"
    head_bias: bool = False
    score_scale: float = 1.0
    template: str = TEMPLATE
    thoughts: str = THOUGHTS[0]
    template_hash: str | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    schema_version: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            settings = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The backbone's text configuration, where transformers and DeepSpeed look for the width."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(*args, **kwargs)  # type: ignore[union-attr]


def check_layers(config: MultiResponseRewardConfig) -> None:
    """Refuse layers through which responses would leak into each other whatever the mask says."""
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {*ISOLATING_LAYERS}
    if layers and config.layout != "causal":
        raise BackendError(
            f"the backbone has layers of type {', '.join(sorted(layers))}, which layout {config.layout!r} cannot "
            "isolate; use layout='causal' or a backbone with attention layers only"
        )


def context_tokens(backbone_config: PreTrainedConfig) -> int | None:
    """The largest number of positions a backbone can tell apart.

    Rope of type `longrope` turns to other frequencies for the whole batch at the first position beyond the original
    context, so a longer row would change the scores of the rows beside it: the original context is the limit.

    Example:
        >>> from transformers import LlamaConfig
        >>> context_tokens(LlamaConfig(max_position_embeddings=4096))
        4096
    """
    text = backbone_config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    rope = getattr(text, "rope_parameters", None) or {}
    for one in (rope, *(part for part in rope.values() if isinstance(part, dict))):  # of all layers, or of each type
        if one.get("rope_type") == "longrope":
            limits += [one.get(_ORIGINAL_CONTEXT), getattr(text, _ORIGINAL_CONTEXT, None)]
    return min((limit for limit in limits if limit), default=None)


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


AutoConfig.register(MultiResponseRewardConfig.model_type, MultiResponseRewardConfig)
