"""The check of a backbone's attention on a small copy: it leaves nothing behind, and each family has a copy."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_features import backbone, groups, reward_model
from tiny_models import score
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel

from mr_reward import MultiResponseRewardModel
from mr_reward.model import features
from mr_reward.worlds import tiny


def test_the_check_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No random state, on CUDA either; no module; no hook. So a head has the weights that it has without a check."""
    stock = backbone("mistral", sliding_window=16)

    def head() -> list[Tensor]:
        torch.manual_seed(3)
        model = MultiResponseRewardModel.from_backbone(stock, layout="set", processor=tiny.build_tokenizer())
        return [*model.head.parameters(), *model.readouts.parameters()]

    def traces() -> list[Any]:
        gc.collect()
        modules = sum(issubclass(type(each), torch.nn.Module) for each in gc.get_objects())
        hooks = len(torch.nn.modules.module._global_forward_hooks)
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), modules, hooks]

    def seeds_cuda(seed: int) -> None:
        raise AssertionError("CUDA's random state is touched")

    model = reward_model(stock, "set")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", seeds_cuda)
        for backend in ("mr_group", "sdpa", "eager", "flex_attention"):
            features._try.cache_clear()
            before = traces()
            features.why_not(type(model), model.config, backend)
            assert features._try.cache_info().misses == (backend != "mr_group")
            assert traces() == before
    features._try.cache_clear()
    checked = head()
    monkeypatch.setattr(features, "_try", lambda *_: None)
    assert all(torch.equal(one, other) for one, other in zip(checked, head(), strict=True))


@pytest.mark.parametrize(
    "surrounding",
    [
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        lambda: torch.set_grad_enabled(False),
        lambda: default_dtype(torch.bfloat16),
    ],
    ids=["meta", "autocast", "inference", "no_grad", "bfloat16"],
)
@pytest.mark.parametrize(("family", "expected"), [("llama", "mr_group"), ("gemma2", "eager"), ("mistral", "sdpa")])
def test_the_check_does_not_depend_on_where_a_model_is_loaded(
    surrounding: Callable[[], AbstractContextManager[Any]],
    family: str,
    expected: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = reward_model(backbone(family), "set").config
    features._try.cache_clear()
    with surrounding():
        model = MultiResponseRewardModel.without_weights(config)
    assert model.attention_backend == expected
    assert "not compared" not in caplog.text


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"hidden_size": 36, "head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}),
        (
            "llama",
            {"rope_parameters": {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        ),
        (
            "phi3",
            {
                "rope_parameters": {
                    **ROPE,
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                },
                "sliding_window": None,
            },
        ),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}),
        ("diffllama", {}),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
        (
            "cwm",
            {"bos_token_id": 1, "eos_token_id": [2, 300], "pad_token_id": 400, "layer_types": ["full_attention"] * 4},
        ),
        ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    ],
    ids=lambda given: given if isinstance(given, str) else ",".join(map(str, given)),
)
def test_odd_sizes_are_compared(family: str, settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = reward_model(backbone(family, **settings), "set")
    assert model.attention_for() == "mr_group"
    assert "not compared" not in caplog.text
    assert score(model, groups(0))[0].isfinite().all()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128}),
        ("llama4_text", {"num_hidden_layers": 48}),
        ("molmo2_text", {}),
        ("lfm2", {}),
        ("qwen3_5_text", {}),
        ("gemma4_text", {}),
        ("gemma3n_text", {}),
    ],
)
def test_the_copy_is_small_and_has_each_kind_of_layer(family: str, settings: dict[str, Any]) -> None:
    config = CONFIG_MAPPING[family](**settings)
    small = features.small_config(config)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModel.from_config(small).parameters())
    assert weights < 4e7 and small.num_hidden_layers <= 8
    kinds = getattr(config, "layer_types", None) or ()
    assert {*kinds} == {*(getattr(small, "layer_types", None) or ())}
