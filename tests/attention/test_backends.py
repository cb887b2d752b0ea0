"""Backends that read rows end to end, beside group attention: FlexAttention, flash attention; and compiling."""

from __future__ import annotations

import random
import shutil
from typing import Any

import pytest
import torch
from tiny_models import LAYOUTS, ROUNDING, assert_close, family, mixed_batch, reward_model, score
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from mr_reward import GroupScorer

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
# What a compiler says about itself is not ours.
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@quiet
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "molmo2"])  # transformers does not have it for Qwen-VL
def test_flex_attention_equals_group_attention(name: str, layout: str) -> None:
    """A mask of blocks in place of a dense one; media blocks included.

    Not compiled: for a CPU, torch 2.13 makes a program that does not build when rows of another length follow.
    """
    groups = mixed_batch(random.Random(2), 5, int(family(name).sees_images), 0)
    flex = reward_model(name, layout, backend="flex_attention")
    assert flex.reads_flat()
    expected = score(reward_model(name, layout), groups)
    with torch.compiler.set_stance("force_eager"):
        for padding_side in ("left", "right"):
            for found, one in zip(score(flex, groups, padding_side), expected, strict=True):
                assert_close(found, one, ROUNDING)


@pytest.mark.parametrize("name", ["llama", "qwen3_vl"])
def test_flash_attention_is_told_where_rows_begin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the kernel, which needs a GPU: rows must not see each other, and no padding is computed."""
    starts: list[list[int]] = []

    def stand_in(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        if not module.is_causal:  # the vision tower
            return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
        assert attention_mask is None and query.shape[0] == 1
        bounds = options["cu_seq_lens_q"].tolist()
        assert options["cu_seq_lens_k"].tolist() == bounds and options["cu_seq_lens_q"].dtype == torch.int32
        sizes = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        assert options["max_length_q"] == options["max_length_k"] == max(sizes)
        starts.append(bounds)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        pieces = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["scaling"])
            for q, k, v in zip(*(tensor.split(sizes, 2) for tensor in (query, key, value)), strict=True)
        ]
        return torch.cat(pieces, 2).transpose(1, 2), None

    groups = mixed_batch(random.Random(3), 4, int(family(name).sees_images), 0)
    expected = score(reward_model(name, "causal", backend="sdpa"), groups)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", stand_in)
    model = reward_model(name, "causal", fresh=True)
    # Needs packages that are not here, so the choice is written where transformers would write it.
    model.backbone.config.get_text_config()._attn_implementation = "flash_attention_2"
    for padding_side in ("left", "right"):
        for found, one in zip(score(model, groups, padding_side), expected, strict=True):
            assert_close(found, one, ROUNDING)
    assert starts and all(len(bounds) == len(groups) + 1 for bounds in starts)


@needs_compiler
@quiet
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "qwen3_vl", "molmo2"])
def test_compiled_layers_give_the_same_scores(name: str, layout: str) -> None:
    """Rows of any length, without compiling again for each."""
    model = reward_model(name, layout, fresh=True)
    scorer = GroupScorer(model, compile=True, max_tokens_per_batch=400)
    counted = torch._dynamo.utils.counters["stats"]
    graphs = []
    for seed in range(4):
        groups = mixed_batch(random.Random(seed), 5, int(family(name).sees_images), 0)
        expected = score(reward_model(name, layout), groups)
        for found, one in zip(scorer.score(groups), expected, strict=True):
            assert_close(torch.tensor(found), one, ROUNDING)
        graphs.append(counted["unique_graphs"])
    assert 0 < graphs[0] and graphs[-1] == graphs[1]
