"""Group attention against a dense mask, and what guards it."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LAYOUTS, ROUNDING, assert_close, mixed_batch, random_group, reward_model, score
from torch import Tensor, nn
from torch.nn import functional as F

from mr_reward.attention import backends as module
from mr_reward.attention import plan as planning
from mr_reward.attention.backends import group_attention
from mr_reward.attention.plan import GroupPlan
from mr_reward.errors import BackendError, ConfigurationError
from mr_reward.layouts import plan_row, visible

HEADS, WIDTH = 4, 8

# Lengths around everything that the kernel's calls are arranged by: nothing, very short, a bucket, and beyond it.
LENGTHS = st.one_of(st.integers(0, 20), st.sampled_from([0, 1, 15, 16, 17, 31, 64, 255, 256, 257, 300]))
ROWS = st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, min_size=1, max_size=6)), min_size=1, max_size=4)


class Layer(nn.Module):
    """As much of an attention layer as attention functions look at."""

    is_causal = True


def make_rows(layout: str, rows: list[tuple[int, list[int]]], left: bool) -> tuple[Tensor, Tensor]:
    """Segments and kinds (B, L) of rows padded to one length."""
    plans = [plan_row(layout, prompt, lengths) for prompt, lengths in rows]
    longest = max(len(plan.segments) for plan in plans)
    segments = torch.full((len(rows), longest), -1)
    kinds = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, plan in enumerate(plans):
        start = longest - len(plan.segments) if left else 0
        segments[i, start : start + len(plan.segments)] = plan.segments
        kinds[i, start : start + len(plan.segments)] = plan.kinds
    return segments, kinds


def dense(states: tuple[Tensor, ...], mask: Tensor, scale: float | None = None) -> Tensor:
    """(B, L, h, d) -> (B, L, h, d) under a mask (B, L, L)."""
    query, key, value = (tensor.transpose(1, 2) for tensor in states)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scale).transpose(1, 2)


def grouped(states: tuple[Tensor, ...], plan: GroupPlan, scale: float | None = None) -> Tensor:
    """(B, L, h, d) -> (T, h, d)."""
    flat = [tensor.flatten(0, 1)[plan.tokens].transpose(0, 1)[None] for tensor in states]
    out, weights = group_attention(Layer(), *flat, None, scaling=scale, group_plan=plan)
    assert weights is None and out.shape == (1, len(plan.tokens), HEADS, WIDTH)
    return out[0]


def random_states(size: torch.Size, key_heads: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, key_heads, key_heads)
    return tuple(torch.randn(*size, h, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for h in heads)


@settings(max_examples=120, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    rows=ROWS,
    left=st.booleans(),
    key_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 10_000),
)
def test_outputs_and_gradients_are_those_of_the_dense_mask(
    layout: str, rows: list[tuple[int, list[int]]], left: bool, key_heads: int, scale: float | None, seed: int
) -> None:
    segments, kinds = make_rows(layout, rows, left)
    states = random_states(segments.shape, key_heads, torch.float64, seed)
    for tensor in states:
        tensor.requires_grad_()
    plan = GroupPlan.of(layout, segments, kinds)
    expected = dense(states, visible(layout, segments, kinds), scale).flatten(0, 1)[plan.tokens]
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(grouped(states, plan, scale), expected, rtol=0, atol=1e-12)
    found = grouped(states, plan, scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, states, upstream), torch.autograd.grad(expected, states, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_dtype(layout: str, dtype: torch.dtype, tolerance: float) -> None:
    segments, kinds = make_rows(layout, [(70, [20, 300, 20]), (9, [5])], left=False)
    states = random_states(segments.shape, 2, dtype, 0)
    plan = GroupPlan.of(layout, segments, kinds)
    exact = dense(tuple(tensor.double() for tensor in states), visible(layout, segments, kinds))
    found = grouped(states, plan)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact.flatten(0, 1)[plan.tokens], rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_media(layout: str) -> None:
    """Some prompts have tokens that see each other in both directions, one has none."""
    segments, kinds = make_rows(layout, [(12, [3, 4]), (7, [2]), (300, [1, 290])], left=True)
    blocks = torch.full_like(segments, -1)
    for row, ranges in ((0, [(2, 5), (7, 9)]), (2, [(0, 150)])):
        first = int((segments[row] == 0).nonzero()[0])
        for start, end in ranges:
            blocks[row, first + start : first + end] = 0
    states = random_states(segments.shape, 2, torch.float64, 1)
    for tensor in states:
        tensor.requires_grad_()
    plan = GroupPlan.of(layout, segments, kinds, blocks)
    expected = dense(states, visible(layout, segments, kinds, blocks)).flatten(0, 1)[plan.tokens]
    found = grouped(states, plan)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), states),
        torch.autograd.grad(expected.square().sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    without = grouped(states, GroupPlan.of(layout, segments, kinds))
    assert (without - expected).abs().max() > 1e-2, "the blocks matter"


def naive_varlen(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, *sizes: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """What the variable-length kernel of CUDA computes, sequence by sequence: (n, h, d) and (h, n)."""
    assert sizes == (int(query_starts.diff().max()), int(key_starts.diff().max()))
    assert query_starts.dtype == key_starts.dtype == torch.int32
    repeats = query.shape[1] // key.shape[1]
    assert options["enable_gqa"] == (repeats > 1) and options["return_aux"].lse
    outs, sums = [], []
    for i in range(len(query_starts) - 1):
        q = query[query_starts[i] : query_starts[i + 1]]
        k, v = (x[key_starts[i] : key_starts[i + 1]].repeat_interleave(repeats, 1) for x in (key, value))
        logits = torch.einsum("qhd,khd->hqk", q, k) * (options["scale"] or q.shape[-1] ** -0.5)
        if options["window_size"] == (-1, 0):
            logits = logits.masked_fill(~torch.ones(logits.shape[1:], dtype=torch.bool).tril(), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
        sums.append(logits.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_call_for_a_gpu(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arrangement of sequences, with a stand-in for the kernel, which needs a GPU."""
    monkeypatch.setattr(module, "varlen_attn", naive_varlen)
    segments, kinds = make_rows(layout, [(70, [20, 30, 20]), (0, [5, 0]), (9, [5])], left=True)
    states = random_states(segments.shape, 2, torch.float64, 0)
    plan = GroupPlan.of(layout, segments, kinds)
    for ragged in (plan.own, plan.prompts):
        ragged.pieces = []
        if ragged.sequences:
            ragged.lengths = planning._make_lengths(ragged.sequences, torch.device("cpu"))
    expected = dense(states, visible(layout, segments, kinds)).flatten(0, 1)[plan.tokens]
    torch.testing.assert_close(grouped(states, plan, None), expected, rtol=0, atol=1e-12)
    for tensor in states:
        tensor.requires_grad_()
    with pytest.raises(BackendError, match="gradients on the CPU only.*'sdpa' or 'flex_attention'"):
        grouped(states, plan).sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu(layout: str) -> None:
    model = reward_model("llama", layout, fresh=True).to("cuda", torch.bfloat16)
    assert model.reads_flat(), "passes its self-check"


# --- guards ---


def test_a_row_that_is_torn_apart_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="do not lie side by side"):
        GroupPlan.of("set", torch.tensor([[0, 1, 0, 1]]), torch.zeros(1, 4, dtype=torch.long))


def test_other_devices_are_refused() -> None:
    segments, kinds = make_rows("set", [(3, [2])], left=False)
    with pytest.raises(BackendError, match="no kernel for device 'meta'"):
        GroupPlan.of("set", segments, kinds, device=torch.device("meta"))


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": torch.ones(HEADS)}, {"dropout": 0.1}])
def test_what_it_cannot_do_is_refused(option: dict[str, Any]) -> None:
    segments, kinds = make_rows("set", [(3, [2])], left=False)
    states = random_states(segments.shape, 2, torch.float32, 0)
    flat = [tensor.transpose(1, 2) for tensor in states]
    with pytest.raises(BackendError, match=f"{next(iter(option))}.*cannot do"):
        group_attention(Layer(), *flat, None, group_plan=GroupPlan.of("set", segments, kinds), **option)


def _forget_the_prompt(out: Tensor, lse: Tensor, part: Any) -> None:
    """A kernel that is wrong without an error."""


def _break(out: Tensor, lse: Tensor, part: Any) -> None:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("fault", "reason"), [(_forget_the_prompt, "hidden states differ by"), (_break, "no kernel image is available")]
)
@pytest.mark.parametrize("layout", ["isolated", "set"])
def test_a_kernel_that_fails_the_check_is_not_used(
    layout: str, fault: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    groups = mixed_batch(random.Random(1), 3, 1, 0)
    expected = score(reward_model("qwen3_vl", layout, backend="sdpa"), groups)
    model = reward_model("qwen3_vl", layout, fresh=True)
    monkeypatch.setattr(module, "_merge", fault)
    with caplog.at_level(logging.WARNING, logger="mr_reward"):
        for passes in (1, 2):
            for found, one in zip(score(model, groups), expected, strict=True):
                assert_close(found, one, ROUNDING)
            assert model.fast_path.num_fallbacks == passes
    (message,) = caplog.messages
    assert "fails its self-check" in message and reason in message
    assert not model.reads_flat()


def test_the_check_leaves_modes_and_random_numbers_alone() -> None:
    model = reward_model("llama", "set", fresh=True)
    model.train()
    model.backbone.layers[0].eval()
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    assert model.reads_flat()
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_model_in_half_precision_passes_the_check() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = reward_model("llama", "set", fresh=True)
        model.backbone.to(dtype)
        assert model.reads_flat()
        group = random_group(random.Random(0), 4)
        dense_model = reward_model("llama", "set", backend="sdpa", fresh=True)
        dense_model.backbone.to(dtype)
        difference = (score(model, [group])[0] - score(dense_model, [group])[0]).abs().max()
        assert difference < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
