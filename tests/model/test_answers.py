"""What a model and a scorer say they would do is what they do; a model without weights says the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.errors import BackendError, OverLengthError
from mr_reward.model import model as model_module
from tests.tiny_models import family, random_group, reward_model

ANSWERS = [
    # requested, device, dtype, training, who computes
    (None, "cpu", torch.float32, False, "mr_group"),
    (None, "cpu", torch.float32, True, "mr_group"),
    (None, "cuda", torch.bfloat16, False, "mr_group"),
    (None, "cuda", torch.float32, False, "sdpa"),
    (None, "cuda", torch.bfloat16, True, "sdpa"),
    ("sdpa", "cuda", torch.bfloat16, False, "sdpa"),
    ("eager", "cpu", torch.float32, False, "eager"),
]


@pytest.mark.parametrize(("requested", "device", "dtype", "training", "expected"), ANSWERS)
def test_attention_for(requested: str | None, device: str, dtype: torch.dtype, training: bool, expected: str) -> None:
    config = reward_model("llama", "set").config
    model = MultiResponseRewardModel.without_weights(config, requested)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.attention_for(device, dtype, training) == expected
    loaded = reward_model("llama", "set", backend=requested or "mr_group")
    assert loaded.attention_for(device, dtype, training) == expected


def test_without_weights_refuses_as_a_loaded_model_does() -> None:
    with pytest.raises(BackendError, match="flash_attention_2"):
        MultiResponseRewardModel.without_weights(reward_model("llama", "set").config, "flash_attention_2")


@pytest.mark.parametrize("requested", [None, "sdpa", "eager"])
def test_a_model_without_weights_leaves_its_configuration_as_it_was(requested: str | None) -> None:
    config = reward_model("llama", "set", fresh=True).config
    before = config.to_dict(), config.get_text_config()._attn_implementation
    model = MultiResponseRewardModel.without_weights(config, requested)
    assert model.config is not config and model.attention_backend == (requested or "mr_group")
    assert (config.to_dict(), config.get_text_config()._attn_implementation) == before


def test_attention_for_knows_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "_passes_check", lambda *args: False)
    model = reward_model("llama", "set", fresh=True)
    assert model.attention_for("cpu", torch.float32) == "sdpa"
    assert model.attention_for("cuda", torch.bfloat16) == "mr_group", "it was checked elsewhere only"
    assert not model.reads_flat()


@pytest.mark.parametrize("backend", ["mr_group", "sdpa"])
@pytest.mark.parametrize("layout", ["causal", "isolated", "set"])
def test_would_chunk_as_scoring_does(layout: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reward_model("llama", layout, backend=backend)
    group = random_group(random.Random(0), 8, longest=40)
    whole = GroupScorer(model).packer.pack(group)
    assert whole is not None
    assert not GroupScorer(model, max_tokens_per_batch=whole.num_tokens).would_chunk(group)
    scorer = GroupScorer(model, max_tokens_per_batch=whole.num_tokens - 1)
    passes = []
    monkeypatch.setattr(model.backbone, "forward", counting(model.backbone.forward, passes))
    if layout == "causal" or backend == "sdpa":
        for call in (scorer.would_chunk, lambda one: scorer.score([one])):
            with pytest.raises(OverLengthError, match="do not fit a row"):
                call(group)
    else:
        assert scorer.would_chunk(group)
        passes.clear()
        scorer.score([group])
        assert len(passes) > 1


@pytest.mark.parametrize("policy", ["error", "drop_group", "truncate_responses"])
def test_asking_changes_nothing(policy: str) -> None:
    """Neither an answer nor an error leaves another policy behind."""
    scorer = GroupScorer(reward_model("llama", "causal"), max_tokens_per_batch=60, over_length=policy)
    groups = [ResponseGroup(prompt="p", responses=["a", "x" * size]) for size in (1, 200)]
    before = {key: vars(scorer)[key] for key in vars(scorer)}, dict(vars(scorer.packer))
    assert not scorer.would_chunk(groups[0])
    with pytest.raises(OverLengthError):
        scorer.would_chunk(groups[1])
    assert ({key: vars(scorer)[key] for key in vars(scorer)}, dict(vars(scorer.packer))) == before
    if policy == "error":
        with pytest.raises(OverLengthError):
            scorer.score(groups)
        return
    assert [scores is None for scores in scorer.score(groups)] == [False, policy == "drop_group"]


def counting(forward: Any, passes: list[int]) -> Any:
    def counted(**inputs: Any) -> Any:
        passes.append(1)
        return forward(**inputs)

    return counted


def test_would_chunk_on_another_device() -> None:
    """On CUDA in float32 there is no kernel: nothing is scored in chunks there."""
    model = MultiResponseRewardModel.without_weights(reward_model("llama", "set").config)
    model.processor = family("llama").processor
    scorer = GroupScorer(model, max_tokens_per_batch=300, over_length="drop_group")
    group = random_group(random.Random(0), 8, longest=10)
    assert scorer.would_chunk(group, response_tokens=100, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(OverLengthError, match="do not fit a row"):
        scorer.would_chunk(group, response_tokens=100, device="cuda", dtype=torch.float32)
    with pytest.raises(OverLengthError, match="a response of 400 tokens does not fit"):
        scorer.would_chunk(group, response_tokens=400, device="cuda", dtype=torch.bfloat16)
    assert not scorer.would_chunk(group, response_tokens=1, device="cuda", dtype=torch.float32)


def test_memory_counts_a_dense_mask_only_where_there_is_one() -> None:
    model = MultiResponseRewardModel.without_weights(reward_model("llama", "set").config)
    tokens, dtype = 4096, torch.float32
    without = model.memory(tokens, device="cpu", dtype=dtype)
    dense = model.memory(tokens, device="cuda", dtype=dtype)
    assert dense.activations - without.activations == 3 * tokens**2
    assert dense.weights == without.weights == sum(weight.numel() for weight in model.parameters()) * 4
    causal = MultiResponseRewardModel.without_weights(reward_model("llama", "causal").config, "sdpa")
    assert causal.memory(tokens, device="cuda", dtype=dtype) == without
