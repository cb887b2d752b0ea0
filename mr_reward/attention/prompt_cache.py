"""Keys and values of a prompt that was read once, for all responses that are read after it.

Legend: P tokens of the prompt, T tokens of a pass over it, S summaries, h' heads of keys, d width of a head.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mr_reward.attention.plan import Cached

__all__ = ["PromptCache"]


class PromptCache(DynamicCache):
    """A cache that takes in one prompt and then shows it to every pass without growing."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self.cached = Cached()  # what it shows, for the plan of the rows that are read over it
        self._axes: tuple[int, ...] = ()
        self._end: Tensor | None = None
        self._sites: Tensor | None = None
        self._summaries: list[list[tuple[Tensor, Tensor]]] = []

    def freeze(self, positions: Tensor) -> None:
        """The prompt is complete; its tokens had these positions (..., 1, P) in the family's form."""
        self.frozen, self._axes, self._end = True, positions.shape[:-2], positions.amax() + 1
        self.cached = Cached(prompt=positions.shape[-1])

    def positions(self, offsets: Tensor) -> Tensor:
        """Positions (..., B, L) of responses with offsets (B, L): they run on from the end of the prompt."""
        assert self._end is not None
        return (self._end + offsets).expand(*self._axes, *offsets.shape)

    def collect(self, sites: Tensor) -> None:
        """Keep the keys and values at some of the T tokens of the next pass."""
        self._sites = sites
        self._summaries = self._summaries or [[] for _ in self.layers]

    def with_collected(self) -> PromptCache:
        """A cache that shows what was collected behind the prompt, in the order of the passes; this one forgets it."""
        cache = copy.copy(self)
        cache.layers = [copy.copy(layer) for layer in self.layers]
        for layer, pieces in zip(cache.layers, self._summaries, strict=True):
            layer.keys = torch.cat([layer.keys, *(key for key, _ in pieces)], 2)
            layer.values = torch.cat([layer.values, *(value for _, value in pieces)], 2)
        count = sum(key.shape[2] for key, _ in self._summaries[0])
        for either in (self, cache):
            either._sites, either._summaries = None, []
        cache.cached = replace(self.cached, summaries=count)
        return cache

    def starting_at(self, first: int) -> PromptCache:
        """For the rows whose first response has that place among the responses with collected summaries."""
        cache = copy.copy(self)
        cache.cached = replace(self.cached, first=first)
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' caches: what the layer's attention sees, (1, h', P + S + T, d)."""
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._sites is not None:
            kept = key_states[:, :, self._sites], value_states[:, :, self._sites]
            self._summaries[layer_idx].append(kept)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], 2), torch.cat([layer.values, value_states], 2)
