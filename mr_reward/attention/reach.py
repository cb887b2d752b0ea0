"""How far the layers of a backbone see: sliding windows and chunks, as the configuration names them; and dropout.

transformers counts a window by the place of a token in its row. Here it is the place that the token has when its
response stands alone behind the prompt, so `isolated` stays equal to scoring each response alone. What a layout or a
family adds to a causal mask (summaries that a comparison token of `set` sees, media tokens that see each other) is
seen at any distance: a comparison must not depend on how long the responses are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

# Layers that a 4-D mask can isolate. A recurrent layer carries one response into the next whatever the mask says.
ISOLATING_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
_WINDOWS = ("sliding_window", "sliding_window_size")
_CHUNK = "attention_chunk_size"
_DROPOUT = re.compile(r"^(attention_dropout|attn_dropout|attn_pdrop|attention_(probs_)?dropout_prob)$")


@dataclass(frozen=True, slots=True)
class Reach:
    """What a query sees of the tokens before it: the last `window` ones, itself included, or those of its chunk."""

    window: int | None = None
    chunk: int | None = None

    def covers(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a key at a place is within the reach of a query at a place; bool, broadcast."""
        near = key == key
        if self.window is not None:
            near = near & (key > query - self.window)
        if self.chunk is not None:
            near = near & (key // self.chunk == query // self.chunk)
        return near


def layer_reaches(config: PreTrainedConfig) -> dict[str, Reach] | Reach | None:
    """The reach of each type of layer, one for all layers, or None without any limit, by transformers' own rule.

    Where `layer_types` exists, a backbone takes one mask for each type of layer, else one for all.

    Example:
        >>> from transformers import LlamaConfig, MistralConfig
        >>> layer_reaches(MistralConfig(sliding_window=16))
        Reach(window=16, chunk=None)
        >>> layer_reaches(LlamaConfig())
    """
    text: Any = config.get_text_config()
    window = next((getattr(text, name) for name in _WINDOWS if getattr(text, name, None)), None)
    chunk = getattr(text, _CHUNK, None)
    types = getattr(text, "layer_types", None)
    if types:
        known = {
            "full_attention": Reach(),
            "sliding_attention": Reach(window=window),
            "chunked_attention": Reach(chunk=chunk),
        }
        found = {name: known.get(name, Reach()) for name in dict.fromkeys(types)}
        return found if any(reach != Reach() for reach in found.values()) else None
    if window is not None:
        return Reach(window=window)
    return None if chunk is None else Reach(chunk=chunk)


def each_reach(reaches: dict[str, Reach] | Reach | None, mask: Callable[[Reach], Any]) -> Any:
    """One mask for all layers, or for each type of layer, as the backbone's forward takes them."""
    if isinstance(reaches, dict):
        return {name: mask(reach) for name, reach in reaches.items()}
    return mask(Reach() if reaches is None else reaches)


def describe_reach(config: PreTrainedConfig) -> str:
    """For messages: the limits by their names in the configuration; empty without any."""
    if layer_reaches(config) is None:
        return ""
    text = config.get_text_config()
    limits = {name: getattr(text, name, None) for name in (*_WINDOWS, _CHUNK)}
    return ", ".join(f"{name}={limit}" for name, limit in limits.items() if limit)


def has_attention_dropout(config: PreTrainedConfig) -> bool:
    """Whether attention drops some of its weights in training, by whatever name a family has it."""
    return any(_DROPOUT.match(name) and value for name, value in config.get_text_config().to_dict().items())
