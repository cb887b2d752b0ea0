"""Tiny real models, tokenizers and processors, made in code: nothing is downloaded.

The architectures are the real ones of transformers (Qwen3-VL with DeepStack and interleaved M-RoPE, Qwen2.5-VL with
window attention, Molmo2, Llama with grouped queries), made small enough to be trained from scratch on a CPU in a
minute. Tests and the quickstart share them. The tokenizer is byte-level BPE with merges for a few dozen words only:
the frequent words of the handwriting world are one token each, any other text is about one token per UTF-8 byte.

Everything can be written by `save_pretrained` and read back by `AutoModelForImageTextToText`, `AutoProcessor` and
`AutoTokenizer` from the folder.

Shapes: an image of W x H pixels gives `(W / TILE_SIZE) * (H / TILE_SIZE)` image tokens, TILE_SIZE = patch size * merge
size = 32 pixels; a video of F frames gives `ceil(F / 2)` times as many. Molmo2 shows an image as a low-resolution
view, squeezed to one tile, and as a grid of tiles. Either is one image token a tile between a start and an end token,
with a column token after each row, so an image of W x H tiles gives `W * H + H + 6` tokens; a video gives three tokens
a frame besides its timestamp, whatever its size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from mr_reward.errors import ConfigurationError

Model = TypeVar("Model", bound=PreTrainedModel)

PATCH_SIZE = 16  # pixels; what Qwen3-VL uses
MERGE_SIZE = 2
TILE_SIZE = PATCH_SIZE * MERGE_SIZE  # pixels per image token, each way
TEMPORAL_PATCH_SIZE = 2  # frames

# Names and kinds follow the public Qwen checkpoints: the first are special, the second are added but *not* special, so
# `split_special_tokens=True` alone does not keep them out of user text. Tests need both kinds.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

# Names and order of the public Molmo2 checkpoints. They come after the vocabulary that the language-model head knows.
MOLMO2_TOKENS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
)
_MOLMO2_VOCABULARY = 16  # rows of the embedding for them; some belong to no token

# Words of the handwriting world that are one token each: they keep its rows short.
_FIRST_WORDS = "user assistant system Number Sum Largest How Answer Well Digits Some Not No So It".split()
_INNER_WORDS = (
    "a about again and are at but can cannot curved even guess here I idea is it let lines look lovely many me not or "
    "read say see so some sure tell they thing think to would"
).split()
_WORDS = (*_FIRST_WORDS, *(" " + word for word in _INNER_WORDS))

# ChatML as Qwen3-VL renders it for turns without tools; media are placed where their block stands.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for block in message.content %}
            {%- if block.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif block.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif block.type == 'text' %}
                {{- block.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_MEDIA_FIRST = """\
{%- set blocks = messages | map(attribute='content') | reject('string') | sum(start=[]) %}
{%- set images = blocks | selectattr('type', 'equalto', 'image') | list %}
{%- for _ in images %}
    {{- ('Image ' ~ loop.index if images | length > 1 else '') ~ '<|image|>' }}
{%- endfor %}
{%- for _ in blocks | selectattr('type', 'equalto', 'video') %}
    {{- '<|video|>' }}
{%- endfor %}
"""
# As in the public Molmo2 checkpoints all media stand before the first turn, and several images are numbered.
MOLMO2_CHAT_TEMPLATE = _MEDIA_FIRST + re.sub(r"<\|vision_start.*vision_end\|>", "", CHAT_TEMPLATE)

_COLOURS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a tiny model. There are half as many key-value heads as query heads."""

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    vision_hidden_size: int = 64
    vision_layers: int = 2
    initializer_range: float = 0.05  # small models want more than the usual 0.02


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer with Qwen's control tokens and ChatML template, of the class that `AutoTokenizer` gives.

    Ids 0..255 are the 256 bytes (in the order of the byte-level alphabet), then come `SPECIAL_TOKENS`, the merges of
    `_WORDS`, and `ADDED_TOKENS`. Padding is `<|endoftext|>`, end of sequence is `<|im_end|>`; there is no start token.

    >>> build_tokenizer().tokenize("I see 42.")
    ['I', 'Ġsee', 'Ġ', '4', '2', '.']
    """
    # Each word is built from the left, and longer words come first, so that no short word cuts them.
    words = sorted(_WORDS, key=lambda word: (-len(word), word))
    spelled = [word.replace(" ", "\u0120") for word in words]  # how byte-level BPE writes a space
    merges = list(dict.fromkeys((word[:i], word[i]) for word in spelled for i in range(1, len(word))))
    # The special tokens stand in the vocabulary too, which fixes their ids; no merge leads to them.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *SPECIAL_TOKENS, *dict.fromkeys(left + right for left, right in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={entry: index for index, entry in enumerate(entries)},
        merges=merges,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_qwen3_vl_processor() -> Qwen3VLProcessor:
    """The real Qwen3-VL processor around `build_tokenizer`, with patches of 16 pixels and no resizing of small media.

    Videos are lists of frames and are not sampled; pass `video_metadata` with the frame rate to have right timestamps.
    """
    return Qwen3VLProcessor(**_processor_parts(Qwen3VLVideoProcessor))


def build_qwen2_5_vl_processor() -> Qwen2_5_VLProcessor:
    """The real Qwen2.5-VL processor around `build_tokenizer`, same sizes as `build_qwen3_vl_processor`."""
    return Qwen2_5_VLProcessor(**_processor_parts(Qwen2VLVideoProcessor))


def _processor_parts(video_class: type[Any]) -> dict[str, Any]:
    patches = {"patch_size": PATCH_SIZE, "merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE}
    # Wide enough that no image or video of the handwriting world is ever resized, whatever its number of digits.
    pixels = {"shortest_edge": TILE_SIZE * TILE_SIZE, "longest_edge": 256 * TILE_SIZE * TILE_SIZE}
    sizes: dict[str, Any] = {"size": pixels, **patches, **_COLOURS}
    return {
        "image_processor": Qwen2VLImageProcessor(**sizes),
        "tokenizer": build_tokenizer(),
        # Frames are the caller's choice: sampling would drop or repeat digits. The cap is stated to keep transformers'
        # warning about its changing default quiet.
        "video_processor": video_class(**sizes, do_sample_frames=False, cap_pixels_per_frame=False),
        "chat_template": CHAT_TEMPLATE,
    }


def build_qwen3_vl(seed: int = 0, **sizes: Any) -> Qwen3VLForConditionalGeneration:
    """A tiny Qwen3-VL with random weights, in float32 on the CPU, in evaluation mode; `Sizes` by name.

    Unlike the others it is 128 wide and has four layers, if not said otherwise.

    Embeddings are tied and DeepStack is on: the features of the first vision layer are added to the output of the
    first decoder layer. `hidden_size` is a multiple of 8 * num_heads (interleaved M-RoPE splits a head in three),
    `vision_hidden_size` one of 16. The global random state is left as it was.
    """
    chosen = Sizes(**{"hidden_size": 128, "num_layers": 4, **sizes})
    head_dim = chosen.hidden_size // chosen.num_heads
    third = head_dim // 6
    return _build_qwen_vl(
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        seed,
        chosen,
        rope={"mrope_section": [head_dim // 2 - 2 * third, third, third], "mrope_interleaved": True},
        text={"head_dim": head_dim},
        vision={"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    )


def build_qwen2_5_vl(seed: int = 0, **sizes: Any) -> Qwen2_5_VLForConditionalGeneration:
    """A tiny Qwen2.5-VL with random weights; what its sizes divide by is as in `build_qwen3_vl`.

    The last vision layer attends fully, the others within windows of 64 pixels.
    """
    chosen = Sizes(**sizes)
    half = chosen.hidden_size // chosen.num_heads // 2
    section = 3 * half // 8
    return _build_qwen_vl(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        seed,
        chosen,
        rope={"mrope_section": [half - 2 * section, section, section]},
        vision={"window_size": 2 * TILE_SIZE, "fullatt_block_indexes": [chosen.vision_layers - 1]},
    )


def _build_qwen_vl(
    model_class: type[Model],
    config_class: type[PreTrainedConfig],
    seed: int,
    sizes: Sizes,
    *,
    rope: dict[str, Any],
    vision: dict[str, Any],
    text: dict[str, Any] | None = None,
) -> Model:
    """What the two Qwen families have in common."""
    _check_multiple("hidden_size", sizes.hidden_size, 8 * sizes.num_heads, "M-RoPE splits each of its heads in three")
    _check_multiple("vision_hidden_size", sizes.vision_hidden_size, 16, "4 heads, two-dimensional RoPE")
    tokenizer = build_tokenizer()
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokens |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    config = config_class(
        text_config={
            **_decoder_sizes(tokenizer, sizes),
            **(text or {}),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **rope},
        },
        vision_config={
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": 2 * sizes.vision_hidden_size,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "out_hidden_size": sizes.hidden_size,
            "initializer_range": sizes.initializer_range,
            **vision,
        },
        tie_word_embeddings=True,
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()},
    )
    return _finish(model_class, config, tokenizer, seed)


def build_molmo2_tokenizer() -> Qwen2Tokenizer:
    """`build_tokenizer` with `MOLMO2_TOKENS` behind it, special; the ids of the other tokens stay."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in MOLMO2_TOKENS])
    tokenizer.chat_template = MOLMO2_CHAT_TEMPLATE
    return tokenizer


def build_molmo2_processor() -> Molmo2Processor:
    """The real Molmo2 processor around `build_molmo2_tokenizer`.

    Images whose sides are multiples of `TILE_SIZE` are not resized for their crops. Videos are lists of frames and are
    not sampled; pass `video_metadata` with the frame rate to have right timestamps.
    """
    size = {"height": TILE_SIZE, "width": TILE_SIZE}
    sizes: dict[str, Any] = {"size": size, "patch_size": PATCH_SIZE, **_COLOURS}
    # Crops that overlap would cut digits; the released processor pools frames more than images, and so does this one.
    image = Molmo2ImageProcessor(**sizes, overlap_margins=[0, 0], max_crops=32, pooling_size=[2, 2])
    # The class leaves these steps to the configuration of a checkpoint; without them frames are 0..255.
    steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    video = Molmo2VideoProcessor(**sizes, **steps, do_sample_frames=False, pooling_size=[3, 3])
    return Molmo2Processor(
        image_processor=image,
        video_processor=video,
        tokenizer=build_molmo2_tokenizer(),
        chat_template=MOLMO2_CHAT_TEMPLATE,
    )


def build_molmo2(seed: int = 0, **sizes: Any) -> Molmo2ForConditionalGeneration:
    """A tiny Molmo2 with random weights, in float32 on the CPU, in evaluation mode; `Sizes` by name.

    The features of the last and the first vision layer are pooled by attention, as in the real model. `hidden_size` is
    a multiple of 2 * num_heads, `vision_hidden_size` one of 4.
    """
    chosen, tokenizer = Sizes(**sizes), build_molmo2_tokenizer()
    hidden_size, vision_hidden_size = chosen.hidden_size, chosen.vision_hidden_size
    tokens = {"image_start": "<im_start>", "low_res_image_start": "<low_res_im_start>", "image_end": "<im_end>"}
    tokens |= {"frame_start": "<frame_start>", "frame_end": "<frame_end>"}
    _check_multiple("hidden_size", hidden_size, 2 * chosen.num_heads, "the heads share it evenly")
    _check_multiple("vision_hidden_size", vision_hidden_size, 4, "the heads share it evenly")
    attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": vision_hidden_size // 4}
    config = Molmo2Config(
        text_config={
            **_decoder_sizes(tokenizer, chosen),
            # The head knows text only; what stands for media comes behind it.
            "vocab_size": len(tokenizer) - len(MOLMO2_TOKENS),
            "additional_vocab_size": _MOLMO2_VOCABULARY,
            "head_dim": hidden_size // chosen.num_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        vision_config={
            **attention,
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_hidden_layers": chosen.vision_layers,
            "image_size": [TILE_SIZE, TILE_SIZE],
            "patch_size": PATCH_SIZE,
            "initializer_range": chosen.initializer_range,
        },
        adapter_config={
            **attention,
            "vision_feature_layer": [chosen.vision_layers - 1, 0],
            "hidden_size": vision_hidden_size,
            "intermediate_size": 3 * hidden_size,
            "text_hidden_size": hidden_size,
            # A product of small numbers ends it: with twice the spread features are no smaller than embeddings.
            "initializer_range": 2 * chosen.initializer_range,
        },
        initializer_range=chosen.initializer_range,
        image_patch_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()},
    )
    return _finish(Molmo2ForConditionalGeneration, config, tokenizer, seed)


def build_llama(seed: int = 0, **sizes: Any) -> LlamaForCausalLM:
    """A tiny text-only Llama with random weights, matching `build_tokenizer`; see `build_qwen3_vl`."""
    chosen, tokenizer = Sizes(**sizes), build_tokenizer()
    _check_multiple("hidden_size", chosen.hidden_size, 2 * chosen.num_heads, "its heads have an even width")
    config = LlamaConfig(**_decoder_sizes(tokenizer, chosen), tie_word_embeddings=True)
    return _finish(LlamaForCausalLM, config, tokenizer, seed)


def _check_multiple(name: str, size: int, divisor: int, reason: str) -> None:
    """Refuse a size that does not divide."""
    if size % divisor:
        raise ConfigurationError(f"got {name}={size}, expected a multiple of {divisor}: {reason}")


def _finish(model_class: type[Model], config: PreTrainedConfig, tokenizer: Qwen2Tokenizer, seed: int) -> Model:
    """Draw the weights from `seed` without touching the caller's random state, and set the generation defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed CUDA too
        model = model_class(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model.eval()


def _decoder_sizes(tokenizer: Qwen2Tokenizer, sizes: Sizes) -> dict[str, Any]:
    """What the decoders of all families have in common."""
    return {
        # Rounded up to a multiple of 16, as real checkpoints do for their kernels: a few rows belong to no token.
        "vocab_size": -(-len(tokenizer) // 16) * 16,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": 3 * sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": max(1, sizes.num_heads // 2),
        "max_position_embeddings": 4096,
        "initializer_range": sizes.initializer_range,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
