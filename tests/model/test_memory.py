"""Estimates of memory against what is counted and measured."""

from __future__ import annotations

import logging
import random
from itertools import accumulate
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import random_group, reward_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mr_reward import GroupScorer, MultiResponseRewardModel
from mr_reward.model.memory import estimate_policy_memory, estimate_reward_memory, measure_reward_memory
from mr_reward.scorers.opening import open_scorer
from mr_reward.worlds import tiny

# Qwen3-VL-4B-Instruct as published: 4.44 billion parameters.
QWEN3_VL_4B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "tie_word_embeddings": True,
}


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_weights_of_a_four_billion_model() -> None:
    config = Qwen3VLConfig(**QWEN3_VL_4B)
    reward = estimate_reward_memory(config, dtype=torch.bfloat16, max_tokens=16384)
    assert 8.7e9 < reward.weights < 9.1e9
    for stage, times in ((0, 2), (1, 6)):
        policy = estimate_policy_memory(config, dtype=torch.bfloat16, zero_stage=stage)
        assert policy.weights == reward.weights == policy.gradients and policy.optimizer == times * policy.weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_as_counted(dtype: torch.dtype) -> None:
    full = tiny.build_qwen3_vl(0, hidden_size=64, num_layers=3).to(dtype)
    found = estimate_policy_memory(full.config, dtype=dtype)
    assert found.weights == size_of(full) and type(full) is Qwen3VLForConditionalGeneration
    model = reward_model("qwen3_vl", fresh=True)
    model.backbone.to(dtype)
    reward = estimate_reward_memory(model.config, dtype=dtype, max_tokens=10)
    assert reward.weights == size_of(model.backbone)
    assert reward == measure_reward_memory(model.backbone, dtype=dtype, max_tokens=10)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*layers\.0.*(up|down)_proj"])
def test_lora_as_peft_counts_it(targets: str | list[str]) -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99
    )
    adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=targets))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    found = estimate_policy_memory(config, dtype=torch.bfloat16, lora_rank=4, lora_targets=targets)
    assert found.gradients == sum(parameter.numel() * 4 for parameter in trained)
    assert found.optimizer == 2 * found.gradients
    assert found.weights == estimate_policy_memory(config, dtype=torch.bfloat16).weights


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_splits(stage: int) -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=100)
    whole = estimate_policy_memory(config, dtype=torch.float32)
    split = estimate_policy_memory(config, dtype=torch.float32, num_processes=8, zero_stage=stage)
    offloaded = estimate_policy_memory(config, dtype=torch.float32, num_processes=8, zero_stage=stage, offload=True)
    for name, first in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
        size = getattr(whole, name)
        assert getattr(split, name) == (size // 8 if stage >= first else size)
        assert getattr(offloaded, name) == (0 if stage >= first else size)


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
    expected = estimate_reward_memory(
        model.config, dtype=torch.float32, max_tokens=row.num_tokens, dense_mask=layout != "causal"
    )
    scorer.score_detailed([group])  # what is made once
    peak = peak_of(scorer, [group])
    assert 0.5 < peak / expected.activations < 2, (peak, expected.activations)


def test_the_estimate_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mr_reward"):
        open_scorer(reward_model("llama"), device="cpu", max_tokens_per_batch=2048)
        open_scorer(reward_model("llama"), device="cpu", placement="offload")
    told = [record.getMessage() for record in caplog.records if "GB of weights" in record.getMessage()]
    assert "GB of weights on cpu, and about 0.02 GB more in a forward pass of 2048 tokens" in told[0]
    assert "on the CPU, in calls also on cpu" in told[1]
