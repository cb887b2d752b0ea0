"""A tiny Molmo2 with its real processor, beside the models of `mr_reward.worlds.tiny`.

An image is shown as a low-resolution view, squeezed to a tile of `TILE_SIZE` pixels each way, and as a grid of tiles.
Either is one image token a tile between a start and an end token, with a column token after each row, so an image of
W x H tiles gives `W * H + H + 6` tokens. A video gives three tokens a frame besides its timestamp, whatever its size.

As in the public checkpoints all media stand before the first turn, several images are numbered, and the tokens of
images and frames come after the vocabulary that the language-model head knows.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken
from transformers import (
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    Qwen2Tokenizer,
)

from mr_reward.worlds.tiny import PATCH_SIZE, TILE_SIZE, Sizes, build_tokenizer, check_multiple, decoder_sizes, finish

__all__ = ["MOLMO2_CHAT_TEMPLATE", "MOLMO2_TOKENS", "build_molmo2", "build_molmo2_processor", "build_molmo2_tokenizer"]

# Names and order of the public checkpoints.
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
_ADDED_VOCABULARY = 16  # rows of the embedding for them; some belong to no token

_MEDIA_FIRST = """\
{%- set images = namespace(count=0) %}
{%- set videos = namespace(count=0) %}
{%- for message in messages if message.content is not string %}
    {%- for block in message.content %}
        {%- if block.type == 'image' %}
            {%- set images.count = images.count + 1 %}
        {%- elif block.type == 'video' %}
            {%- set videos.count = videos.count + 1 %}
        {%- endif %}
    {%- endfor %}
{%- endfor %}
{%- for _ in range(images.count) %}
    {{- ('Image ' ~ loop.index if images.count > 1 else '') ~ '<|image|>' }}
{%- endfor %}
{%- for _ in range(videos.count) %}
    {{- '<|video|>' }}
{%- endfor %}
"""
_TURNS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for block in message.content if block.type == 'text' %}
            {{- block.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MOLMO2_CHAT_TEMPLATE = _MEDIA_FIRST + _TURNS

_SIZE = {"height": TILE_SIZE, "width": TILE_SIZE}
_HALF = [0.5, 0.5, 0.5]


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
    sizes: dict[str, Any] = {"size": dict(_SIZE), "patch_size": PATCH_SIZE, "image_mean": _HALF, "image_std": _HALF}
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
    """A tiny Molmo2 with random weights, in float32 on the CPU, in evaluation mode; `tiny.Sizes` by name.

    The features of the last and the first vision layer are pooled by attention, as in the real model. `hidden_size` is
    a multiple of 2 * num_heads, `vision_hidden_size` one of 4.
    """
    chosen, tokenizer = Sizes(**sizes), build_molmo2_tokenizer()
    hidden_size, vision_hidden_size = chosen.hidden_size, chosen.vision_hidden_size
    check_multiple("hidden_size", hidden_size, 2 * chosen.num_heads, "the heads share it evenly")
    check_multiple("vision_hidden_size", vision_hidden_size, 4, "the heads share it evenly")
    attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": vision_hidden_size // 4}
    config = Molmo2Config(
        text_config={
            **decoder_sizes(tokenizer, chosen),
            # The head knows text only; what stands for media comes behind it.
            "vocab_size": len(tokenizer) - len(MOLMO2_TOKENS),
            "additional_vocab_size": _ADDED_VOCABULARY,
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
        image_start_token_id=tokenizer.convert_tokens_to_ids("<im_start>"),
        low_res_image_start_token_id=tokenizer.convert_tokens_to_ids("<low_res_im_start>"),
        image_end_token_id=tokenizer.convert_tokens_to_ids("<im_end>"),
        image_patch_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
        frame_start_token_id=tokenizer.convert_tokens_to_ids("<frame_start>"),
        frame_end_token_id=tokenizer.convert_tokens_to_ids("<frame_end>"),
    )
    return finish(Molmo2ForConditionalGeneration, config, tokenizer, seed)
