"""Attention backends: which can express which layout, what each is told, and our own, `mr_group`.

The model hands the row's segments to this file, not a mask, so that a backend which uses the row's structure can be
added here without touching the model.

A dense mask computes every pair of tokens and throws most of them away. In `mr_group` the rows lie end to end in one
row without padding, and its parts are taken one by one: each prompt and each response attends to itself causally, all
responses of a prompt to the prompt, the comparison tokens of `set` to the summaries of the other responses. The parts
are merged by the log-sum-exp of each query's logits, which is exact. The `GroupPlan` travels to the layers as a
keyword argument of the backbone's forward. Without one, `mr_group` is transformers' `sdpa`.

Legend: B rows (one group each), N responses, L tokens of the longest row, T tokens of all rows, S sequences, h heads,
d width of a head.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mr_reward.attention.plan import Block, ComparisonPlan, GroupPlan, KernelCall, Ragged
from mr_reward.attention.reach import Reach, each_reach
from mr_reward.errors import BackendError
from mr_reward.layouts import PADDING_SEGMENT, Layout, TokenKind, check_layout, visible

GROUP_ATTENTION = "mr_group"
# An isolating mask needs a backend that takes a 4-D mask as it is. Flash attention takes none and would ignore it.
_DENSE = ("sdpa", "eager")
_FLASH = ("flash_attention_2", "flash_attention_3")
_FLEX = "flex_attention"
BACKENDS = {
    "causal": (GROUP_ATTENTION, *_DENSE, *_FLASH, _FLEX),
    "isolated": (GROUP_ATTENTION, *_DENSE, _FLEX),
    "set": (GROUP_ATTENTION, *_DENSE, _FLEX),
}
# What some families add to attention and this one has not: the scores would be wrong without an error.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

_States = tuple[Tensor, Tensor, Tensor]


def check_backend(layout: Layout, backend: str | None, media_blocks: bool = False, reach: str = "") -> None:
    """Refuse a backend that cannot express the layout; the error says which can.

    `media_blocks`: the backbone's image tokens see each other in both directions. transformers asks flash attention
    for that too, and gets a causal row without an error. `reach`: the limits of `describe_reach`; ours has none.

    Example:
        >>> check_backend("causal", "flash_attention_2")
        >>> check_backend("set", "sdpa", media_blocks=True)
    """
    able = [name for name in BACKENDS[check_layout(layout)] if not (media_blocks and name in _FLASH)]
    if reach and backend in able:
        able = [name for name in able if name != GROUP_ATTENTION]
        if backend not in able:
            raise BackendError(
                f"attention backend {backend!r} cannot express the backbone's {reach}; use attn_implementation="
                f"{' or '.join(map(repr, able))}"
            )
    if backend not in able:
        blocks = " over image tokens that see each other in both directions" if media_blocks else ""
        otherwise = "" if media_blocks else ", or layout 'causal' if the backend must stay"
        raise BackendError(
            f"attention backend {backend!r} cannot express layout {layout!r}{blocks}; use attn_implementation="
            f"{' or '.join(map(repr, able))}{otherwise}"
        )


def choose_attention(backbone: PreTrainedModel, requested: str | None) -> None:
    """Set the attention implementation of the part of a backbone that reads the row."""
    found = backbone.config.get_text_config()._attn_implementation
    if requested is None:
        if found != "sdpa" or not backbone._can_set_attn_implementation():
            return
        requested = GROUP_ATTENTION
    if requested == found:
        return
    text = backbone.config.get_text_config()
    parts = [name for name in backbone.config.sub_configs if getattr(backbone.config, name) is text]
    backbone.set_attn_implementation({parts[0]: requested} if parts else requested)


def load_attention(requested: str | None) -> dict[str, str]:
    """What transformers is told when it makes a model or a configuration, before `choose_attention`."""
    if requested is None:
        return {}
    return {"attn_implementation": "sdpa" if requested == GROUP_ATTENTION else requested}


def is_flat(backend: str | None) -> bool:
    """Whether the backend reads all rows of a batch end to end in one row without padding."""
    return backend not in _DENSE


def flat_arguments(
    layout: Layout,
    backend: str | None,
    plan: GroupPlan,
    segments: Tensor,
    kinds: Tensor,
    blocks: Tensor | None = None,
    places: Tensor | None = None,
    reaches: dict[str, Reach] | Reach | None = None,
) -> dict[str, Any]:
    """The attention arguments of the backbone's forward for rows that lie end to end in one row without padding."""
    if backend == GROUP_ATTENTION:
        # The mask only stops transformers from making one: it passes one of four dimensions on as it is.
        return {"group_plan": plan, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=segments.device)}
    if backend == _FLEX:
        return {
            "attention_mask": each_reach(
                reaches, lambda reach: _block_mask(layout, plan, segments, kinds, blocks, places, reach)
            )
        }
    lengths = torch.tensor([0, *plan.row_lengths])
    starts = lengths.cumsum(0).to(segments.device, torch.int32, non_blocking=True)
    longest = max(plan.row_lengths)
    return {
        "attention_mask": None,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _block_mask(
    layout: Layout,
    plan: GroupPlan,
    segments: Tensor,
    kinds: Tensor,
    blocks: Tensor | None,
    places: Tensor | None,
    reach: Reach,
) -> BlockMask:
    """`mr_reward.layouts.visible` for rows that lie end to end."""
    row = plan.tokens // segments.shape[1]
    segment, kind = segments.flatten()[plan.tokens], kinds.flatten()[plan.tokens]
    comparison, summary = int(TokenKind.COMPARISON), int(TokenKind.SUMMARY)  # an enum would be lost in tracing
    block = torch.full_like(segment, -1) if blocks is None else blocks.flatten()[plan.tokens]
    place = torch.zeros_like(segment) if places is None else places.flatten()[plan.tokens]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & reach.covers(place[query], place[key])
        if layout != "causal":
            seen = seen & ((segment[key] == 0) | (segment[key] == segment[query]))
        if layout == "set":
            seen = seen | ((kind[query] == comparison) & (kind[key] == summary))
        seen = seen | ((block[query] == block[key]) & (block[query] >= 0))
        return seen & (row[query] == row[key])

    length = len(plan.tokens)
    return create_block_mask(sees, B=None, H=None, Q_LEN=length, KV_LEN=length, device=str(segments.device))


def attention_mask(
    layout: Layout,
    backend: str | None,
    segments: Tensor,
    kinds: Tensor,
    dtype: torch.dtype,
    blocks: Tensor | None = None,
    places: Tensor | None = None,
    reaches: dict[str, Reach] | Reach | None = None,
) -> Any:
    """The mask argument for the backbone's forward; one for each type of layer if its layers see differently far.

    `places` (B, L): of each token as if its response stood alone. For `causal` transformers makes the masks.
    """
    if layout == "causal":
        return (segments != PADDING_SEGMENT).long()
    mask = visible(layout, segments, kinds, blocks)

    def limited(reach: Reach) -> Tensor:
        seen = mask
        if places is not None and reach != Reach():
            far = ~reach.covers(places[:, :, None], places[:, None, :])
            # What is not limited: the summaries that a comparison sees, and blocks.
            far &= ~((kinds == TokenKind.COMPARISON)[:, :, None] & (kinds == TokenKind.SUMMARY)[:, None, :])
            if blocks is not None:
                far &= ~((blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None])
            seen = mask & ~far
        seen = seen[:, None]
        if backend != "eager":
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)

    return each_reach(reaches, limited)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What some queries found among some keys."""

    sites: slice | Tensor  # of the queries in the row
    out: Tensor  # (n, h, d)
    lse: Tensor  # (n, h) float32 or float64


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
            _gradients(grad, states, out, lse, ragged, ctx.scale, grads)
        for block in ctx.plan.blocks:
            _block_gradients(grad, states, block, ctx.scale, grads)
        if ctx.plan.comparison is not None:
            _comparison_gradients(grad, states, out, lse, ctx.plan.comparison, ctx.scale, grads)
        return (*grads, None, None)


def _merge_parts(states: _States, plan: GroupPlan, scale: float | None) -> tuple[Tensor, Tensor]:
    """(T, h, d) and the log-sum-exp (T, h) of all that each query sees; not set where a prompt has media blocks."""
    query, key, value = states
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = torch.zeros(query.shape[:2], dtype=wide, device=query.device)
    for part in _attend(query, key, value, plan.own, scale):
        out[part.sites], lse[part.sites] = part.out, part.lse
    for block in plan.blocks:
        site = slice(block.start, block.start + len(block.mask))
        out[site] = _attend_block(_each(operator.itemgetter(site), states), block.mask, scale)
    for part in _attend(query, key, value, plan.prompts, scale):
        _merge(out, lse, part)
    if plan.comparison is not None:
        _merge(out, lse, _attend_summaries(states, plan.comparison, scale))
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


def _attend(query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, scale: float | None) -> Iterator[Part]:
    """Attention of each sequence."""
    for piece in ragged.pieces:
        parts = [_take(states, piece, is_query=i == 0) for i, states in enumerate((query, key, value))]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, ragged.causal, scale=scale)
        out, lse = out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        if piece.sites is None:
            yield Part(_sites(piece, is_query=True), out, lse)
        else:
            yield Part(piece.sites, out.index_select(0, piece.real), lse.index_select(0, piece.real))
    if ragged.lengths is not None:
        sizes = ragged.lengths
        out, lse = varlen_attn(
            query.index_select(0, sizes.queries),
            key.index_select(0, sizes.keys),
            value.index_select(0, sizes.keys),
            sizes.query_starts,
            sizes.key_starts,
            sizes.max_queries,
            sizes.max_keys,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0) if ragged.causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        yield Part(sizes.queries, out, lse.transpose(0, 1))  # the kernel gives (h, n)


def _gradients(
    grad: Tensor, states: _States, out: Tensor, lse: Tensor, ragged: Ragged, scale: float | None, grads: _States
) -> None:
    """Add the gradients of this part of a merged softmax.

    Given the merged output and its log-sum-exp, the kernel's backward gives what this part contributes: its
    probabilities are exp(logit - lse), whichever keys the sum ran over (as in ring attention, arXiv 2310.01889).
    """
    if ragged.lengths is not None:
        raise BackendError(
            f"group attention has gradients on the CPU only, the tensors are on {grad.device}; train with "
            "attn_implementation='sdpa' or 'flex_attention'"
        )
    for piece in ragged.pieces:
        parts = [_take(tensor, piece, is_query=i == 0) for i, tensor in enumerate(states)]
        upstream = _take(grad, piece, is_query=True)
        if piece.real is not None:  # padding repeats a real query, whose gradient must count once
            upstream = upstream.transpose(1, 2).flatten(0, 1)
            cleared = torch.zeros_like(upstream).index_copy_(0, piece.real, upstream.index_select(0, piece.real))
            upstream = cleared.unflatten(0, (piece.count, -1)).transpose(1, 2)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream,
            *parts,
            _take(out, piece, is_query=True),
            _take(lse[..., None], piece, is_query=True)[..., 0],
            0.0,
            ragged.causal,
            scale=scale,
        )
        for i, (total, part) in enumerate(zip(grads, found, strict=True)):
            _add(total, part.transpose(1, 2).flatten(0, 1), piece, is_query=i == 0)


def _sites(piece: KernelCall, is_query: bool) -> slice | Tensor:
    """Where queries or keys are in the row: a slice if the sequences lie side by side, else as many as the longest."""
    if piece.gather is not None:
        return piece.gather if is_query else piece.gather + piece.shift
    one = piece.first
    start, size = (one.query, one.num_queries) if is_query else (one.key, one.num_keys)
    return slice(start, start + piece.count * size)


def _take(states: Tensor, piece: KernelCall, is_query: bool) -> Tensor:
    """(T, h, d) -> (S, h, longest, d); a view of the row where the sequences lie side by side."""
    sites = _sites(piece, is_query)
    chosen = states[sites] if isinstance(sites, slice) else states.index_select(0, sites)
    return chosen.unflatten(0, (piece.count, -1)).transpose(1, 2)


def _add(total: Tensor, part: Tensor, piece: KernelCall, is_query: bool) -> None:
    """Add (S * longest, h, d) where `_take` took it from; what padding got goes to the token that it repeats."""
    sites = _sites(piece, is_query)
    if isinstance(sites, slice):
        total[sites] += part
    else:
        total.index_add_(0, sites, part)


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


def _comparison_states(states: _States, comparison: ComparisonPlan) -> _States:
    """(G, N, h', r, d), (G, S, h', d), (G, S, h', d) in float32 or wider, where r query heads share a key head."""
    query, key, value = states
    wide = torch.promote_types(query.dtype, torch.float32)
    groups, _, _, num_queries, num_keys = comparison.bias.shape
    shape = (groups, num_queries, key.shape[1], query.shape[1] // key.shape[1], query.shape[2])
    return (
        query.index_select(0, comparison.comparisons).to(wide).view(shape),
        key.index_select(0, comparison.summaries).to(wide).unflatten(0, (groups, num_keys)),
        value.index_select(0, comparison.summaries).to(wide).unflatten(0, (groups, num_keys)),
    )


def _comparison_logits(query: Tensor, key: Tensor, comparison: ComparisonPlan, scale: float | None) -> Tensor:
    """(G, h', r, N, S)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("gnhrd,gshd->ghrns", query * scale, key) + comparison.bias


def _flat_slots(tensor: Tensor, comparison: ComparisonPlan) -> Tensor:
    """(G, N, h', r, ...) -> (comparison tokens, h, ...)."""
    tensor = tensor.flatten(2, 3).flatten(0, 1)
    return tensor if comparison.real is None else tensor.index_select(0, comparison.real)


def _attend_summaries(states: _States, comparison: ComparisonPlan, scale: float | None) -> Part:
    query, key, value = _comparison_states(states, comparison)
    logits = _comparison_logits(query, key, comparison, scale)
    # A comparison token of a group of one sees nothing here: its log-sum-exp is -inf, and merging leaves it alone.
    lse = logits.logsumexp(-1)
    weights = (logits - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp()
    out = torch.einsum("ghrns,gshd->gnhrd", weights, value)
    lse = _flat_slots(lse.permute(0, 3, 1, 2), comparison)
    return Part(comparison.sites, _flat_slots(out, comparison).to(states[0].dtype), lse)


def _comparison_gradients(
    grad: Tensor,
    states: _States,
    out: Tensor,
    lse: Tensor,
    comparison: ComparisonPlan,
    scale: float | None,
    grads: _States,
) -> None:
    """Of the merged softmax: probabilities are exp(logit - lse) with the merged lse, as in `_gradients`."""
    query, key, value = _comparison_states(states, comparison)
    shared = query.shape[2:4]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    slots = comparison.comparisons.view(query.shape[:2])
    upstream = grad[slots].to(query.dtype).unflatten(2, shared)
    total = lse[slots].unflatten(2, shared).permute(0, 2, 3, 1)[..., None]
    weights = (_comparison_logits(query, key, comparison, scale) - total).exp()  # (G, h', r, N, S), 0 where unseen
    along = torch.einsum("gnhrd,gnhrd->ghrn", upstream, out[slots].to(query.dtype).unflatten(2, shared))
    slope = weights * (torch.einsum("gnhrd,gshd->ghrns", upstream, value) - along[..., None]) * scale
    of_query = _flat_slots(torch.einsum("ghrns,gshd->gnhrd", slope, key), comparison)
    of_key = torch.einsum("ghrns,gnhrd->gshd", slope, query)
    of_value = torch.einsum("ghrns,gnhrd->gshd", weights, upstream)
    found = (
        (comparison.sites, of_query),
        (comparison.summaries, of_key),
        (comparison.summaries, of_value),
    )
    for total_grad, (sites, part) in zip(grads, found, strict=True):
        part = part if part.ndim == 3 else part.flatten(0, 1)
        total_grad.index_add_(0, sites, part.to(total_grad.dtype))
