"""What the speed benchmarks measure on: cells of a sweep, random models of the usual sizes, random groups.

All competitors of a cell (`speed_competitors.py`) share one backbone, one value head and one set of readout vectors,
and read the same tokens.

Legend: P tokens of the prompt, R of a response, N responses, G groups, L tokens of a row.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mr_reward.layouts import readout_kinds
from mr_reward.model.model import ReadoutVectors, ValueHead
from mr_reward.templates.rendering import RenderedGroup

# (width, layers, heads, key-value heads, width of the feed-forward layers, vocabulary); embeddings are tied.
MODELS = {
    "tiny": (64, 2, 4, 2, 192, 1_024),
    "10M": (256, 10, 4, 2, 768, 8_192),
    "135M": (576, 30, 9, 3, 1_536, 49_152),  # the shape of SmolLM2-135M
    "0.5B": (1_024, 28, 16, 4, 4_096, 49_152),
    "vocabulary": (256, 4, 4, 2, 768, 150_000),
}
_PAD = 0
# The last tokens of the vocabulary: image, video, start and end of vision.
_NUM_SPECIAL = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a sweep."""

    model: str = "135M"  # a name of `MODELS`
    prompt_tokens: int = 1024  # P, the image's tokens included
    response_tokens: int = 128  # R; the mean of ragged responses
    num_responses: int = 8  # N
    num_groups: int = 1  # G, groups of a batch
    image: bool = False  # the backbone is a Qwen3-VL and a quarter of the prompt is an image

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read MODEL:P:R:N:G, with `:image` at the end for an image."""
        parts = text.removesuffix(":image").split(":")
        if len(parts) != 5 or parts[0] not in MODELS or not all(part.isdecimal() and int(part) for part in parts[1:]):
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected MODEL:PROMPT:RESPONSE:N:GROUPS[:image] with a model out of "
                f"{', '.join(MODELS)} and positive numbers, such as 135M:1024:128:16:1"
            )
        cell = cls(parts[0], *map(int, parts[1:]), image=text.endswith(":image"))  # type: ignore[arg-type]
        if cell.image and cell.prompt_tokens < 16:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a prompt of at least 16 tokens for an image")
        return cell

    def __str__(self) -> str:
        *parts, image = asdict(self).values()
        return ":".join(map(str, parts)) + (":image" if image else "")


def build_model(cell: Cell, seed: int) -> PreTrainedModel:
    """The language model with its head over the vocabulary, weights drawn at random."""
    torch.manual_seed(seed)
    width, layers, heads, key_heads, inner, vocabulary = MODELS[cell.model]
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131_072,
    }
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": _PAD}
    if not cell.image:
        return LlamaForCausalLM(LlamaConfig(**sizes, **special, tie_word_embeddings=True)).eval()
    half = width // heads // 2
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_interleaved": True}
    rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    vision = {
        "depth": max(2, layers // 3),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_heads": heads,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config={**sizes, **special, "head_dim": width // heads, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 3,
        vision_end_token_id=vocabulary - 4,
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def draw_groups(cell: Cell, config: PreTrainedConfig, *, ragged: bool, seed: int) -> list[RenderedGroup]:
    """G groups of random tokens."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)

    def tokens(length: int) -> Tensor:
        last = config.get_text_config().vocab_size - _NUM_SPECIAL
        return torch.randint(_PAD + 1, last, (length,), generator=generator)

    def length() -> int:
        mean = cell.response_tokens
        return rng.randint(max(1, mean // 2), mean + mean // 2) if ragged else mean

    groups = []
    for _ in range(cell.num_groups):
        prompt, media, types = tokens(cell.prompt_tokens), {}, None
        if cell.image:
            media, types = _put_image(prompt, config, generator)
        responses = [tokens(length()).tolist() for _ in range(cell.num_responses)]
        groups.append(RenderedGroup(prompt_ids=prompt, response_ids=responses, media=media, mm_token_type_ids=types))
    return groups


def _put_image(
    prompt: Tensor, config: PreTrainedConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Write the tokens of a square image into the prompt; returns its tensors and the types of the tokens."""
    vision = config.vision_config
    side = math.isqrt(len(prompt) // 4)
    prompt[0] = config.vision_start_token_id
    prompt[1 : side * side + 1] = config.image_token_id
    prompt[side * side + 1] = config.vision_end_token_id
    patches = side * vision.spatial_merge_size
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(patches * patches, numbers, generator=generator)
    grid = torch.tensor([[1, patches, patches]])
    return {"pixel_values": pixels, "image_grid_thw": grid}, (prompt == config.image_token_id).long()


@dataclass(slots=True)
class Shared:
    """The weights that all competitors of a cell share."""

    full: PreTrainedModel  # the language model
    readouts: ReadoutVectors  # the readout vectors
    head: ValueHead  # the value head

    @classmethod
    def make(cls, cell: Cell, device: torch.device, dtype: torch.dtype, seed: int) -> Shared:
        """Draw them."""
        full = build_model(cell, seed)
        width = full.config.get_text_config().hidden_size
        return cls(full.to(device, dtype), ReadoutVectors(width).to(device), ValueHead(width, width).to(device))

    @property
    def backbone(self) -> PreTrainedModel:
        """The language model without its head."""
        return self.full.base_model

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""
        for module in (self.full, self.readouts, self.head):
            yield from module.parameters()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a competitor has to compute and what it does compute."""

    tokens: int  # that go through the layers, without padding
    pairs: int  # of a query and a key that it sees
    computed_tokens: int  # with padding
    computed_pairs: int  # with those that a mask throws away
    head_tokens: int = 0  # for which logits over the vocabulary are computed

    def flops(self, config: PreTrainedConfig) -> float:
        """Floating point operations of what has to be computed, without embeddings and vision tower."""
        return _flops(config, self.tokens, self.pairs)

    def computed_flops(self, config: PreTrainedConfig) -> float:
        """The same of what is computed."""
        text = config.get_text_config()
        head = 2.0 * text.hidden_size * text.vocab_size * self.head_tokens
        return head + _flops(config, self.computed_tokens, self.computed_pairs)


def _flops(config: PreTrainedConfig, tokens: int, pairs: int) -> float:
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query, key = head_dim * text.num_attention_heads, head_dim * text.num_key_value_heads
    weights = text.hidden_size * (2 * query + 2 * key + 3 * text.intermediate_size)
    # Two operations for each weight and token; for each pair two products of a vector, two operations each.
    return text.num_hidden_layers * (2.0 * weights * tokens + 4.0 * query * pairs)


def triangle(length: int) -> int:
    """Pairs of a causal mask."""
    return length * (length + 1) // 2


def visible_pairs(group: RenderedGroup, layout: str) -> int:
    """Pairs of tokens of a row that see each other."""
    prompt = len(group.prompt_ids)
    sizes = [len(ids) + len(readout_kinds(layout)) for ids in group.response_ids]
    if layout == "causal":
        return triangle(prompt + sum(sizes))
    exchanged = len(sizes) * (len(sizes) - 1) if layout == "set" else 0
    return triangle(prompt) + sum(size * prompt + triangle(size) for size in sizes) + exchanged
