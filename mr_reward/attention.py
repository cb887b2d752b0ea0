"""Layout -> what the attention backend is given, and which backend can express which layout.

The model hands the row's segments to this file, not a mask, so that a backend which uses the row's structure can be
added here without touching the model.
"""

import torch
from torch import Tensor

from mr_reward.errors import BackendError
from mr_reward.layouts import PADDING_SEGMENT, check_layout, visible

__all__ = ["BACKENDS", "attention_mask", "check_backend"]

# An isolating mask needs a backend that takes a 4-D mask as it is. Flash attention takes none and would ignore it.
_DENSE = ("eager", "sdpa")
_FLASH = ("flash_attention_2", "flash_attention_3")
BACKENDS = {
    "causal": (*_DENSE, *_FLASH, "flex_attention"),
    "isolated": _DENSE,
    "set": _DENSE,
}


def check_backend(layout: str, backend: str | None, media_blocks: bool = False) -> None:
    """Refuse a backend that cannot express the layout.

    Args:
        layout: `causal`, `isolated` or `set`.
        backend: transformers' `attn_implementation`.
        media_blocks: the backbone's image tokens see each other in both directions. transformers asks flash attention
            for that too, and gets a causal row without an error.

    Raises:
        BackendError: with the backends that can.
        ConfigurationError: unknown layout.

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


def attention_mask(
    layout: str,
    backend: str | None,
    segments: Tensor,
    kinds: Tensor,
    dtype: torch.dtype,
    blocks: Tensor | None = None,
) -> Tensor:
    """The mask argument for the backbone's forward.

    Args:
        layout: `causal`, `isolated` or `set`.
        backend: transformers' `attn_implementation` of the backbone.
        segments: (B, L) int64.
        kinds: (B, L) int64.
        dtype: of the hidden states; eager attention adds the mask to its logits.
        blocks: (B, L) int64 or None, see `mr_reward.layouts.visible`.

    Returns:
        For `causal` a padding mask (B, L) int64; causality and blocks are the backbone's own. Otherwise (B, 1, L, L),
        boolean for sdpa and additive for eager; transformers passes a 4-D mask on as it is.

    Raises:
        BackendError: the backend cannot express the layout.
    """
    check_backend(layout, backend, blocks is not None)
    if layout == "causal":
        return (segments != PADDING_SEGMENT).long()
    mask = visible(layout, segments, kinds, blocks)[:, None]
    if backend == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
