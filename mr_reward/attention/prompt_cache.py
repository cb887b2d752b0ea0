"""Keys and values of a prompt that was read once, for all responses that are read after it.

Legend: P tokens of the prompt, T tokens of a pass over it, S summaries, h' heads of keys, d width of a head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

__all__ = ["PromptCache"]


class PromptCache(DynamicCache):
    """A cache that takes in one prompt and then shows it to every pass without growing.

    Example:
        >>> cache = PromptCache()  # the backbone reads the prompt with `past_key_values=cache` ...
        >>> cache.freeze((), torch.tensor(7))
        >>> cache.frozen
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self._axes: tuple[int, ...] = ()
        self._end: Tensor | None = None
        self._sites: Tensor | None = None
        self._summaries: list[list[tuple[Tensor, Tensor]]] = []

    def freeze(self, axes: tuple[int, ...], end: Tensor) -> None:
        """The prompt is complete.

        Args:
            axes: dimensions before (B, L) of the family's positions.
            end: the position after the prompt.
        """
        self.frozen, self._axes, self._end = True, axes, end

    def positions(self, offsets: Tensor) -> Tensor:
        """Positions of responses, which go on from the end of the prompt.

        Args:
            offsets: (B, L) int64, from the layout.

        Returns:
            (..., B, L) int64, as the family's positions are.
        """
        assert self._end is not None
        return (self._end + offsets).expand(*self._axes, *offsets.shape)

    def collect(self, sites: Tensor) -> None:
        """Keep the keys and values at some tokens of the next pass.

        Args:
            sites: int64 places among the T tokens.
        """
        self._sites = sites
        self._summaries = self._summaries or [[] for _ in self.layers]

    def with_collected(self) -> PromptCache:
        """A cache that shows what was collected behind the prompt, in the order of the passes; this one forgets it."""
        cache = copy.copy(self)
        cache.layers = [copy.copy(layer) for layer in self.layers]
        for layer, pieces in zip(cache.layers, self._summaries, strict=True):
            layer.keys = torch.cat([layer.keys, *(key for key, _ in pieces)], 2)
            layer.values = torch.cat([layer.values, *(value for _, value in pieces)], 2)
        for either in (self, cache):
            either._sites, either._summaries = None, []
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' caches: what the layer's attention sees.

        Args:
            key_states: (1, h', T, d) of the pass.
            value_states: like `key_states`.
            layer_idx: which layer.
            *args: as transformers' caches.
            **kwargs: as transformers' caches.

        Returns:
            Keys and values (1, h', P + S + T, d).
        """
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._sites is not None:
            kept = key_states[:, :, self._sites], value_states[:, :, self._sites]
            self._summaries[layer_idx].append(kept)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], 2), torch.cat([layer.values, value_states], 2)
