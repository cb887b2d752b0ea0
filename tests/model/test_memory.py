"""Estimates of memory against what is counted and measured."""

from __future__ import annotations

import logging
import random
from itertools import accumulate
from typing import Any

import pytest
import torch
from large_model import QWEN3_VL_4B
from tiny_models import random_group, reward_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3VLConfig

from mr_reward import GroupScorer, MultiResponseRewardConfig, MultiResponseRewardModel
from mr_reward.scorers.opening import open_scorer
from mr_reward.worlds import tiny


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_weights_of_a_four_billion_model() -> None:
    config = MultiResponseRewardConfig(backbone_config=Qwen3VLConfig(**QWEN3_VL_4B))
    model = MultiResponseRewardModel.without_weights(config)
    reward = model.memory(16384, device="cuda", dtype=torch.bfloat16)
    assert 8.7e9 < reward.weights < 9.1e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_as_counted(dtype: torch.dtype) -> None:
    model = reward_model("qwen3_vl", fresh=True)
    model.backbone.to(dtype)
    beside = (sum(weight.numel() for weight in model.parameters()) - model.backbone.num_parameters()) * dtype.itemsize
    reward = model.memory(10, device="cpu", dtype=dtype)
    assert reward.weights == size_of(model.backbone) + beside
    assert reward == MultiResponseRewardModel.without_weights(model.config).memory(10, device="cpu", dtype=dtype)


def peak_of(scorer: GroupScorer, groups: list[Any]) -> int:
    """The most bytes that scoring holds beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        scorer.score_detailed(groups)
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    assert sizes
    return max(accumulate(sizes))


@pytest.mark.parametrize("layout", ["causal", "isolated", "set"])
def test_activations_as_measured(layout: str) -> None:
    backbone = tiny.build_llama(0, hidden_size=128, num_layers=3)
    model = MultiResponseRewardModel.from_backbone(backbone, layout=layout, processor=tiny.build_tokenizer())
    group = random_group(random.Random(0), 8, longest=400)
    scorer = GroupScorer(model, max_tokens_per_batch=4096)
    row = scorer.packer.pack(group)
    assert row is not None and row.num_tokens > 700
    expected = model.memory(row.num_tokens, device="cpu", dtype=torch.float32)
    scorer.score_detailed([group])  # what is made once
    peak = peak_of(scorer, [group])
    assert 0.5 < peak / expected.activations < 2, (peak, expected.activations)


def test_the_estimate_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mr_reward"):
        open_scorer(reward_model("llama"), device="cpu", max_tokens_per_batch=2048)
        open_scorer(reward_model("llama"), device="cpu", placement="offload")
    told = [record.getMessage() for record in caplog.records if "GB of weights" in record.getMessage()]
    assert "GB of weights on cpu, and about 0.01 GB more in a forward pass of 2048 tokens" in told[0]
    assert "on the CPU, in calls also on cpu" in told[1]
