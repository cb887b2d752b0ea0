"""Attention that does only the visible work of packed rows: an attention implementation of transformers, `mr_group`.

A dense mask computes every pair of tokens and throws most of them away. Here the rows lie end to end in one row
without padding, and its parts are taken one by one: each prompt and each response attends to itself causally, all
responses of a prompt to the prompt, the comparison tokens of `set` to the summaries of the other responses. The parts
are merged by their log-sum-exp, which is exact. The `GroupPlan` travels to the layers as a keyword argument of the
backbone's forward. Without one, `mr_group` is transformers' `sdpa`.

Legend: B rows (one group each), N responses, L tokens of the longest row, T tokens of all rows, h heads, d width of a
head.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mr_reward.attention.plan import Block, Exchange, GroupPlan
from mr_reward.attention.varlen import Part, attend, gradients
from mr_reward.errors import BackendError

__all__ = ["GROUP_ATTENTION", "group_attention"]

GROUP_ATTENTION = "mr_group"

# What some families add to attention and this one has not: the scores would be wrong without an error.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

_States = tuple[Tensor, Tensor, Tensor]


# Compiled layers break their graph here: the parts are many calls of one kernel, whose number changes with the rows.
@torch.compiler.disable
def group_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    group_plan: GroupPlan | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions."""
    # A vision tower is handed the plan of the row too, which does not concern it.
    if group_plan is None or not getattr(module, "is_causal", True):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    wanted = [name for name in _UNSUPPORTED if options.get(name) is not None] + ["dropout"] * (dropout > 0)
    if wanted:
        raise BackendError(
            f"{type(module).__name__} uses {', '.join(wanted)} in attention, which {GROUP_ATTENTION!r} cannot do; use "
            "attn_implementation='sdpa' or 'eager'"
        )
    states = _each(lambda tensor: tensor[0].transpose(0, 1), (query, key, value))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states):
        out = _MergedAttention.apply(*states, group_plan, scaling)
    else:
        out, _ = _merge_parts(states, group_plan, scaling)
    return out[None], None


AttentionInterface.register(GROUP_ATTENTION, group_attention)
AttentionMaskInterface.register(GROUP_ATTENTION, sdpa_mask)


def _each(function: Callable[[Tensor], Tensor], states: Sequence[Tensor]) -> _States:
    """Apply to query, key and value."""
    query, key, value = states
    return function(query), function(key), function(value)


class _MergedAttention(torch.autograd.Function):
    """`_merge_parts` with the gradients of its parts."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: GroupPlan, scale: float | None) -> Tensor:
        out, lse = _merge_parts((query, key, value), plan, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        states = _each(lambda tensor: tensor, inputs)
        grads = _each(lambda tensor: torch.zeros_like(tensor, memory_format=torch.contiguous_format), states)
        grad = grad.contiguous()
        for ragged in (ctx.plan.own, ctx.plan.prompts):
            gradients(grad, states, out, lse, ragged, ctx.scale, grads)
        for block in ctx.plan.blocks:
            _block_gradients(grad, states, block, ctx.scale, grads)
        if ctx.plan.exchange is not None:
            _exchange_gradients(grad, states, out, lse, ctx.plan.exchange, ctx.scale, grads)
        return (*grads, None, None)


def _merge_parts(states: _States, plan: GroupPlan, scale: float | None) -> tuple[Tensor, Tensor]:
    """(T, h, d) and the log-sum-exp (T, h) of all that each query sees; not set where a prompt has media blocks."""
    query, key, value = states
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = torch.zeros(query.shape[:2], dtype=wide, device=query.device)
    for part in attend(query, key, value, plan.own, scale):
        out[part.sites], lse[part.sites] = part.out, part.lse
    for block in plan.blocks:
        site = slice(block.start, block.start + len(block.mask))
        out[site] = _attend_block(_each(operator.itemgetter(site), states), block.mask, scale)
    for part in attend(query, key, value, plan.prompts, scale):
        _merge(out, lse, part)
    if plan.exchange is not None:
        _merge(out, lse, _attend_summaries(states, plan.exchange, scale))
    return out, lse


def _merge(out: Tensor, lse: Tensor, part: Part) -> None:
    """Merge what more keys gave into what was found before."""
    sites = part.sites
    if isinstance(sites, slice):
        before = lse[sites]
        torch.lerp(out[sites], part.out, _weight(part.lse, before, out.dtype), out=out[sites])
        lse[sites] = torch.logaddexp(before, part.lse)
    else:
        before = lse.index_select(0, sites)
        weight = _weight(part.lse, before, out.dtype)
        out.index_copy_(0, sites, torch.lerp(out.index_select(0, sites), part.out, weight))
        lse.index_copy_(0, sites, torch.logaddexp(before, part.lse))


def _weight(lse: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, h, 1), the share of what was found last."""
    return torch.sigmoid(lse - before)[..., None].to(dtype)


def _attend_block(states: _States, mask: Tensor, scale: float | None) -> Tensor:
    """A prompt with a mask, (P, h, d) -> (P, h, d)."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in states)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # with a mask, not every kernel takes fewer heads of keys
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1)


def _block_gradients(grad: Tensor, states: _States, block: Block, scale: float | None, grads: _States) -> None:
    site = slice(block.start, block.start + len(block.mask))
    with torch.enable_grad():
        leaves = _each(lambda tensor: tensor[site].detach().requires_grad_(), states)
        found = torch.autograd.grad(_attend_block(leaves, block.mask, scale), leaves, grad[site])
    for total, part in zip(grads, found, strict=True):
        total[site] += part


def _exchange_states(states: _States, exchange: Exchange) -> _States:
    """(G, N, h', r, d), (G, S, h', d), (G, S, h', d) in float32 or wider, where r query heads share a key head."""
    query, key, value = states
    wide = torch.promote_types(query.dtype, torch.float32)
    groups, _, _, num_queries, num_keys = exchange.bias.shape
    shape = (groups, num_queries, key.shape[1], query.shape[1] // key.shape[1], query.shape[2])
    return (
        query.index_select(0, exchange.comparisons).to(wide).view(shape),
        key.index_select(0, exchange.summaries).to(wide).unflatten(0, (groups, num_keys)),
        value.index_select(0, exchange.summaries).to(wide).unflatten(0, (groups, num_keys)),
    )


def _exchange_logits(query: Tensor, key: Tensor, exchange: Exchange, scale: float | None) -> Tensor:
    """(G, h', r, N, S)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("gnhrd,gshd->ghrns", query * scale, key) + exchange.bias


def _flat_slots(tensor: Tensor, exchange: Exchange) -> Tensor:
    """(G, N, h', r, ...) -> (comparison tokens, h, ...)."""
    tensor = tensor.flatten(2, 3).flatten(0, 1)
    return tensor if exchange.real is None else tensor.index_select(0, exchange.real)


def _attend_summaries(states: _States, exchange: Exchange, scale: float | None) -> Part:
    query, key, value = _exchange_states(states, exchange)
    logits = _exchange_logits(query, key, exchange, scale)
    # A comparison token of a group of one sees nothing here: its log-sum-exp is -inf, and merging leaves it alone.
    lse = logits.logsumexp(-1)
    weights = (logits - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp()
    out = torch.einsum("ghrns,gshd->gnhrd", weights, value)
    lse = _flat_slots(lse.permute(0, 3, 1, 2), exchange)
    return Part(exchange.sites, _flat_slots(out, exchange).to(states[0].dtype), lse)


def _exchange_gradients(
    grad: Tensor,
    states: _States,
    out: Tensor,
    lse: Tensor,
    exchange: Exchange,
    scale: float | None,
    grads: _States,
) -> None:
    """Of the merged softmax: probabilities are exp(logit - lse) with the merged lse, as in `gradients`."""
    query, key, value = _exchange_states(states, exchange)
    shared = query.shape[2:4]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    slots = exchange.comparisons.view(query.shape[:2])
    upstream = grad[slots].to(query.dtype).unflatten(2, shared)
    total = lse[slots].unflatten(2, shared).permute(0, 2, 3, 1)[..., None]
    weights = (_exchange_logits(query, key, exchange, scale) - total).exp()  # (G, h', r, N, S), 0 where unseen
    along = torch.einsum("gnhrd,gnhrd->ghrn", upstream, out[slots].to(query.dtype).unflatten(2, shared))
    slope = weights * (torch.einsum("gnhrd,gshd->ghrns", upstream, value) - along[..., None]) * scale
    of_query = _flat_slots(torch.einsum("ghrns,gshd->gnhrd", slope, key), exchange)
    of_key = torch.einsum("ghrns,gnhrd->gshd", slope, query)
    of_value = torch.einsum("ghrns,gnhrd->gshd", weights, upstream)
    found = (
        (exchange.sites, of_query),
        (exchange.summaries, of_key),
        (exchange.summaries, of_value),
    )
    for total_grad, (sites, part) in zip(grads, found, strict=True):
        part = part if part.ndim == 3 else part.flatten(0, 1)
        total_grad.index_add_(0, sites, part.to(total_grad.dtype))
