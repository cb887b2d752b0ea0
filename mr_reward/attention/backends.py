"""Layout -> what the attention backend is given, and which backend can express which layout.

The model hands the row's segments to this file, not a mask, so that a backend which uses the row's structure can be
added here without touching the model.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from mr_reward.attention.group import GROUP_ATTENTION
from mr_reward.attention.plan import GroupPlan
from mr_reward.errors import BackendError
from mr_reward.layouts import PADDING_SEGMENT, Layout, TokenKind, check_layout, visible

__all__ = [
    "BACKENDS",
    "attention_mask",
    "check_backend",
    "choose_attention",
    "flat_arguments",
    "is_flat",
    "load_attention",
]

logger = logging.getLogger(__name__)

# An isolating mask needs a backend that takes a 4-D mask as it is. Flash attention takes none and would ignore it.
_DENSE = ("sdpa", "eager")
_FLASH = ("flash_attention_2", "flash_attention_3")
_FLEX = "flex_attention"
BACKENDS = {
    "causal": (GROUP_ATTENTION, *_DENSE, *_FLASH, _FLEX),
    "isolated": (GROUP_ATTENTION, *_DENSE, _FLEX),
    "set": (GROUP_ATTENTION, *_DENSE, _FLEX),
}


def check_backend(layout: Layout, backend: str | None, media_blocks: bool = False) -> None:
    """Refuse a backend that cannot express the layout; the error says which can.

    `media_blocks`: the backbone's image tokens see each other in both directions. transformers asks flash attention
    for that too, and gets a causal row without an error.

    Example:
        >>> check_backend("causal", "flash_attention_2")
        >>> check_backend("set", "sdpa", media_blocks=True)
    """
    able = [name for name in BACKENDS[check_layout(layout)] if not (media_blocks and name in _FLASH)]
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
            logger.info("attention of %s: %s", type(backbone).__name__, found)
            return
        requested = GROUP_ATTENTION
    logger.info("attention of %s: %s", type(backbone).__name__, requested)
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
    layout: Layout, backend: str | None, plan: GroupPlan, segments: Tensor, kinds: Tensor, blocks: Tensor | None = None
) -> dict[str, Any]:
    """The attention arguments of the backbone's forward for rows that lie end to end in one row without padding."""
    if backend == GROUP_ATTENTION:
        # The mask only stops transformers from making one: it passes one of four dimensions on as it is.
        return {"group_plan": plan, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=segments.device)}
    if backend == _FLEX:
        return {"attention_mask": _block_mask(layout, plan, segments, kinds, blocks)}
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


def _block_mask(layout: Layout, plan: GroupPlan, segments: Tensor, kinds: Tensor, blocks: Tensor | None) -> BlockMask:
    """`mr_reward.layouts.visible` for rows that lie end to end."""
    row = plan.tokens // segments.shape[1]
    segment, kind = segments.flatten()[plan.tokens], kinds.flatten()[plan.tokens]
    comparison, summary = int(TokenKind.COMPARISON), int(TokenKind.SUMMARY)  # an enum would be lost in tracing
    block = torch.full_like(segment, -1) if blocks is None else blocks.flatten()[plan.tokens]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
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
) -> Tensor:
    """The mask argument for the backbone's forward."""
    if layout == "causal":
        return (segments != PADDING_SEGMENT).long()
    mask = visible(layout, segments, kinds, blocks)[:, None]
    if backend != "eager":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
