"""Tiny backbones, reward models and random groups that the core tests share.

Everything is built once a process. A backbone is shared by the reward models on it; a test that changes one asks for
`fresh=True`.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from mr_reward import MultiResponseRewardModel, ResponseGroup
from mr_reward.attention.backends import GROUP_ATTENTION, choose_attention
from mr_reward.backbones import BackboneAdapter, get_adapter
from mr_reward.model.rows import Packer, Rows, collate
from mr_reward.templates.rendering import TEMPLATE, Renderer
from mr_reward.worlds import tiny

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "molmo2", "llama")
LAYOUTS = ("causal", "isolated", "set")
# Letters of one to four UTF-8 bytes; the tokenizer has one token a byte.
LETTERS = "abcdefghij KLMNO 0123456789.,?!\n<|>éßж漢🙂"

# Two forwards that sum the same numbers in another order differ by a few 1e-7 here, scores differ by 1e-1 between
# responses. 1e-5 therefore tells rounding from a leak; a change that must show has to exceed 1e-4.
ROUNDING = 1e-5
VISIBLE_CHANGE = 1e-4

# family, images, videos
CASES = [
    pytest.param("qwen3_vl", 0, 0, id="qwen3_vl-text"),
    pytest.param("qwen3_vl", 1, 0, id="qwen3_vl-1-image"),
    pytest.param("qwen3_vl", 2, 0, id="qwen3_vl-2-images"),
    pytest.param("qwen3_vl", 1, 1, id="qwen3_vl-image-and-video"),
    pytest.param("qwen2_5_vl", 2, 0, id="qwen2_5_vl-2-images"),
    pytest.param("qwen2_5_vl", 0, 1, id="qwen2_5_vl-video"),
    pytest.param("molmo2", 0, 0, id="molmo2-text"),
    pytest.param("molmo2", 1, 0, id="molmo2-1-image"),
    pytest.param("molmo2", 2, 0, id="molmo2-2-images"),
    pytest.param("molmo2", 0, 1, id="molmo2-video"),
    pytest.param("llama", 0, 0, id="llama"),
]
# family, images
BACKBONES = [
    pytest.param("qwen3_vl", 1, id="qwen3_vl"),
    pytest.param("qwen2_5_vl", 1, id="qwen2_5_vl"),
    pytest.param("molmo2", 1, id="molmo2"),
    ("llama", 0),
]


@dataclass(frozen=True)
class Family:
    """A backbone with its language-model head, and what reads text and images for it."""

    full_model: PreTrainedModel
    processor: Any
    sees_images: bool

    @property
    def adapter(self) -> BackboneAdapter:
        return get_adapter(self.full_model.config)

    def renderer(self, template: str = TEMPLATE) -> Renderer:
        return Renderer(self.processor, template, adapter=self.adapter)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


@functools.cache
def family(name: str) -> Family:
    builders: dict[str, tuple[Any, Any]] = {
        "qwen3_vl": (
            functools.partial(tiny.build_qwen3_vl, hidden_size=64, num_layers=3),
            tiny.build_qwen3_vl_processor,
        ),
        "qwen2_5_vl": (tiny.build_qwen2_5_vl, tiny.build_qwen2_5_vl_processor),
        "molmo2": (tiny.build_molmo2, tiny.build_molmo2_processor),
        "llama": (tiny.build_llama, tiny.build_tokenizer),
    }
    build_model, build_processor = builders[name]
    return Family(build_model(), build_processor(), sees_images=name != "llama")


@functools.cache
def _shared_model(name: str, layout: str, backend: str) -> MultiResponseRewardModel:
    return _build(name, layout, backend)


def _build(name: str, layout: str, backend: str, **options: Any) -> MultiResponseRewardModel:
    members = family(name)
    backbone = members.full_model
    if options or backend != GROUP_ATTENTION:
        backbone = copy.deepcopy(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        options.pop("fresh", None)
        return MultiResponseRewardModel.from_backbone(
            backbone, layout=layout, processor=members.processor, attn_implementation=backend, **options
        ).eval()


def reward_model(
    name: str, layout: str = "set", *, backend: str = GROUP_ATTENTION, fresh: bool = False, **options: Any
) -> MultiResponseRewardModel:
    """A reward model whose head and readout vectors are the same for every layout and backend.

    Args:
        name: one of `FAMILIES`.
        layout: one of `LAYOUTS`.
        backend: attention implementation.
        fresh: one of its own, backbone included, for tests that change it.
        **options: of `from_backbone`; they make a fresh one.
    """
    if fresh or options:
        return _build(name, layout, backend, fresh=True, **options)
    model = _shared_model(name, layout, backend)
    choose_attention(model.backbone, backend)  # whoever makes a configuration of the shared backbone's resets it
    return model


def random_text(rng: random.Random, longest: int = 16, shortest: int = 0) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(shortest, longest)))


def random_image(rng: random.Random, max_tiles: int = 2) -> Image.Image:
    """Noise of random size, a few image tokens."""
    height, width = (tiny.TILE_SIZE * rng.randint(1, max_tiles) for _ in range(2))
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_video(rng: random.Random, num_frames: int = 8) -> list[Image.Image]:
    first = random_image(rng)
    generator = np.random.default_rng(rng.getrandbits(32))
    frames = generator.integers(0, 256, (num_frames, first.height, first.width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in frames]


def random_responses(rng: random.Random, n: int, longest: int = 16) -> list[str]:
    """N different texts, the empty one possibly among them."""
    texts: list[str] = []
    while len(texts) < n:
        text = random_text(rng, longest)
        if text not in texts:
            texts.append(text)
    return texts


def random_group(
    rng: random.Random, n: int, *, images: int = 0, videos: int = 0, longest: int = 16, **options: Any
) -> ResponseGroup:
    """A group with N different responses; one prompt in two has a system turn, media stand between texts."""
    blocks: list[dict[str, Any]] = [{"type": "text", "text": random_text(rng, 10, 1)}]
    for kind, count in (("image", images), ("video", videos)):
        for _ in range(count):
            blocks += [{"type": kind}, {"type": "text", "text": random_text(rng, 10, 1)}]
    prompt = [{"role": "user", "content": blocks}]
    if rng.random() < 0.5:
        prompt.insert(0, {"role": "system", "content": [{"type": "text", "text": random_text(rng, 8, 1)}]})
    return ResponseGroup(
        prompt=prompt,
        responses=random_responses(rng, n, longest),
        images=[random_image(rng) for _ in range(images)],
        videos=[random_video(rng) for _ in range(videos)],
        **options,
    )


def checkpoint_groups(name: str) -> list[ResponseGroup]:
    """Groups of several sizes, with images if the family sees them; the same at every call."""
    rng = random.Random(11)
    images = int(family(name).sees_images)
    return [random_group(rng, 4, images=2 * images), random_group(rng, 2), random_group(rng, 3, images=images)]


def mixed_batch(rng: random.Random, n: int, images: int, videos: int) -> list[ResponseGroup]:
    """The group of interest between a short text-only one and a longer one of another size and with other media."""
    return [
        random_group(rng, 2, longest=3),
        random_group(rng, n, images=images, videos=videos),
        random_group(rng, 3, images=min(images + videos, 1), longest=60),
    ]


def pack(model: MultiResponseRewardModel, group: ResponseGroup) -> Rows:
    row = Packer.of(model, max_tokens=1_000_000).pack(group)
    assert row is not None
    return row


def score_batch(
    model: MultiResponseRewardModel, batch: Rows, lengths: Sequence[int], grad: bool = False
) -> list[torch.Tensor]:
    with torch.set_grad_enabled(grad):
        scores = model(batch).scores
    assert scores.dtype == torch.float32
    return [row[:length] for row, length in zip(scores, lengths, strict=True)]


def score(
    model: MultiResponseRewardModel, groups: Sequence[ResponseGroup], padding_side: str = "right"
) -> list[torch.Tensor]:
    """Scores of all groups from one forward pass, (N,) float32 each."""
    batch = collate([pack(model, group) for group in groups], model.adapter, padding_side)
    return score_batch(model, batch, [group.num_responses for group in groups])


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Absolute tolerance, and a spread of the scores that makes it mean something."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    if len(expected) > 1:
        assert expected.max() - expected.min() > 10 * tolerance, (
            "the scores hardly differ: the comparison would not show a leak"
        )
