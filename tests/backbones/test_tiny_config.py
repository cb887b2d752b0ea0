"""Backbones made tiny: the architecture stays, almost nothing of its size."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Molmo2Config, Qwen2_5_VLConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from mr_reward import MultiResponseRewardConfig, MultiResponseRewardModel
from mr_reward.backbones.base import tiny_config


@pytest.mark.parametrize("backbone", [Qwen3VLConfig, Qwen2_5_VLConfig, Molmo2Config, LlamaConfig])
def test_models_of_full_size_are_made_tiny(backbone: type) -> None:
    config = MultiResponseRewardConfig(backbone_config=backbone())
    small = MultiResponseRewardConfig(backbone_config=tiny_config(config.backbone_config))
    model = MultiResponseRewardModel(small)
    with torch.device("meta"):
        full = MultiResponseRewardModel(config)
    sizes = [sum(weight.numel() for weight in one.parameters()) for one in (model, full)]
    vocabulary = small.get_text_config().vocab_size * small.get_text_config().hidden_size
    assert sizes[0] - vocabulary < 10e6 < sizes[1] / 10


def test_a_mixture_of_experts_is_not() -> None:
    assert tiny_config(Qwen3VLMoeConfig()) is None
