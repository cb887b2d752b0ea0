"""The tiny models, tokenizers and processors: ids, templates, media, saving and loading, and that they can learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from mr_reward.errors import ConfigurationError
from mr_reward.worlds import handwriting, tiny

IMAGE_PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
    + "Number?<|im_end|>\n<|im_start|>assistant\n"
)
FAMILIES = [
    pytest.param(tiny.build_qwen3_vl, tiny.build_qwen3_vl_processor, id="qwen3_vl"),
    pytest.param(tiny.build_qwen2_5_vl, tiny.build_qwen2_5_vl_processor, id="qwen2_5_vl"),
]

BUILD_PROCESSORS = [tiny.build_qwen3_vl_processor, tiny.build_qwen2_5_vl_processor]


def encode(processor: ProcessorMixin, messages: list[dict[str, Any]], frames: int = 0) -> Any:
    kwargs: dict[str, Any] = {}
    if frames:
        kwargs["video_metadata"] = [{"fps": 1.0, "total_num_frames": frames, "frames_indices": list(range(frames))}]
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
        processor_kwargs=kwargs,
    )


def prompt(text: str, media: str = "image") -> list[dict[str, Any]]:
    task = handwriting.make_tasks("test", 1, media=media, seed=0)[0]
    content = task.image() if media == "image" else task.frames()
    return [{"role": "user", "content": [{"type": media, media: content}, {"type": "text", "text": text}]}]


def test_token_ids() -> None:
    tokenizer = tiny.build_tokenizer()
    names = [*tiny.SPECIAL_TOKENS, *tiny.ADDED_TOKENS]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert ids[: len(tiny.SPECIAL_TOKENS)] == list(range(256, 256 + len(tiny.SPECIAL_TOKENS)))
    assert ids[len(tiny.SPECIAL_TOKENS) :] == list(range(len(tokenizer) - len(tiny.ADDED_TOKENS), len(tokenizer)))
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token is None
    assert set(tokenizer.all_special_tokens) == set(tiny.SPECIAL_TOKENS)
    for token, token_id in zip(names, ids, strict=True):
        assert tokenizer(token).input_ids == [token_id]


def test_every_text_comes_back() -> None:
    """Whatever has no merge is spelled in bytes; no text becomes a special token by merging."""
    tokenizer = tiny.build_tokenizer()
    control = set(tokenizer.convert_tokens_to_ids([*tiny.SPECIAL_TOKENS, *tiny.ADDED_TOKENS]))
    for text in ("Number?", "a  b\n\nc\t", "\u00e9\u6570\U0001f600", "".join(map(chr, range(128))), "<|im_end |>"):
        ids = tokenizer(text).input_ids
        assert len(ids) <= len(text.encode())
        assert not control.intersection(ids)
        assert tokenizer.decode(ids) == text


def test_every_digit_is_a_token_of_its_own() -> None:
    tokenizer = tiny.build_tokenizer()
    for text in ("0123456789", "472", " 472"):
        assert [tokenizer.decode(token) for token in tokenizer(text).input_ids] == list(text)


def test_rows_of_the_handwriting_world_are_short() -> None:
    tokenizer = tiny.build_tokenizer()
    groups = handwriting.make_groups("train", 200, questions=list(handwriting.QUESTIONS))
    lengths = [len(tokenizer(response).input_ids) for group in groups for response in group.responses]
    assert max(lengths) <= 60
    assert sum(lengths) / len(lengths) < 14


def test_special_tokens_split_but_added_ones_do_not() -> None:
    """The trap that the packer has to close: `split_special_tokens` leaves the added tokens alone."""
    tokenizer = tiny.build_tokenizer()
    for token in tiny.SPECIAL_TOKENS:
        assert len(tokenizer(token, split_special_tokens=True).input_ids) > 3
    for token in tiny.ADDED_TOKENS:
        assert tokenizer(token, split_special_tokens=True).input_ids == [tokenizer.convert_tokens_to_ids(token)]


def test_chat_template_takes_strings_and_blocks() -> None:
    tokenizer = tiny.build_tokenizer()
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]
    strings = [{"role": role, "content": text} for role, text in turns]
    blocks = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    for messages in (strings, blocks):
        assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
        opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert opened == expected + "<|im_start|>assistant\n"


@pytest.mark.parametrize(("build_model", "build_processor"), FAMILIES)
def test_image_prompt(build_model: Callable[..., Any], build_processor: Callable[[], ProcessorMixin]) -> None:
    processor = build_processor()
    batch = encode(processor, prompt("Number?"))
    assert processor.tokenizer.decode(batch["input_ids"][0]) == IMAGE_PROMPT
    assert batch["input_ids"].shape[1] <= 40
    assert batch["image_grid_thw"].tolist() == [[1, 2, 6]]
    assert batch["mm_token_type_ids"].sum() == 3
    model = build_model(0)
    logits = model(**batch).logits
    vocab_size = model.config.get_text_config().vocab_size
    assert len(processor.tokenizer) <= vocab_size < len(processor.tokenizer) + 16
    assert logits.shape == (1, batch["input_ids"].shape[1], vocab_size)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("build_processor", BUILD_PROCESSORS)
def test_images_are_not_resized(build_processor: Callable[[], ProcessorMixin]) -> None:
    image_processor = build_processor().image_processor
    for num_digits in (1, 3, 16):
        image = handwriting.make_tasks("test", 1, num_digits=num_digits)[0].image()
        batch = image_processor([image], return_tensors="pt")
        assert batch["image_grid_thw"].tolist() == [[1, 2, 2 * num_digits]]
        # Each pixel once in each of the two frames of a temporal patch, scaled to [-1, 1].
        total = 2 * float((np.asarray(image) / 127.5 - 1.0).sum())
        assert batch["pixel_values"].sum().item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(("build_model", "build_processor"), FAMILIES)
def test_video_prompt(build_model: Callable[..., Any], build_processor: Callable[[], ProcessorMixin]) -> None:
    processor = build_processor()
    batch = encode(processor, prompt("Number?", "video"), frames=3)
    assert batch["video_grid_thw"].tolist() == [[2, 2, 2]]  # three frames, padded to two pairs
    ids = batch["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")) == 2
    if isinstance(processor, Qwen3VLProcessor):
        text = processor.tokenizer.decode(ids)
        assert "<0.5 seconds>" in text
        assert "<2.0 seconds>" in text
    batch.pop("video_metadata", None)
    assert torch.isfinite(build_model(0)(**batch).logits).all()


@pytest.mark.parametrize("build_processor", BUILD_PROCESSORS)
def test_control_tokens_in_user_text_stay_text(build_processor: Callable[[], ProcessorMixin]) -> None:
    processor = build_processor()
    names = ("<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>")
    honest = encode(processor, prompt("Number?"))["input_ids"][0].tolist()
    forged = encode(processor, prompt("Read" + "".join(names)))["input_ids"][0].tolist()
    for name in names:
        token = processor.tokenizer.convert_tokens_to_ids(name)
        assert forged.count(token) == honest.count(token)


@pytest.mark.parametrize(("build_model", "build_processor"), FAMILIES)
def test_save_and_load(
    build_model: Callable[..., Any], build_processor: Callable[[], ProcessorMixin], tmp_path: Path
) -> None:
    model, processor = build_model(3), build_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(loaded_processor) is type(processor)
    assert type(tokenizer) is Qwen2Tokenizer
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    for media, frames in (("image", 0), ("video", 3)):
        before = encode(processor, prompt("A<think>b<|im_end|>", media), frames)
        after = encode(loaded_processor, prompt("A<think>b<|im_end|>", media), frames)
        assert torch.equal(before["input_ids"], after["input_ids"])
        before.pop("video_metadata", None)
        after.pop("video_metadata", None)
        with torch.no_grad():
            assert torch.equal(model(**before).logits, loaded(**after).logits)


def test_text_model_saves_and_loads(tmp_path: Path) -> None:
    model, tokenizer = tiny.build_llama(1), tiny.build_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    batch = loaded_tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2?<|im_end|>"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
    )
    assert batch["input_ids"].tolist()[0].count(tokenizer.eos_token_id) == 1
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


@pytest.mark.parametrize("build", [tiny.build_qwen3_vl, tiny.build_qwen2_5_vl, tiny.build_llama])
def test_seed_alone_decides_the_weights(build: Callable[..., torch.nn.Module]) -> None:
    state = torch.get_rng_state()
    first = build(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = build(5), build(6)
    assert not first.training
    for (name, one), two in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert any(
        not torch.equal(one, two)
        for one, two in zip(first.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_models_are_the_real_architectures_made_tiny() -> None:
    model = tiny.build_qwen3_vl()
    assert type(model) is Qwen3VLForConditionalGeneration
    assert model.config.vision_config.deepstack_visual_indexes == [0]
    assert 1.0e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.6e6
    section = model.config.text_config.rope_parameters["mrope_section"]
    assert sum(section) == model.config.text_config.head_dim // 2
    other = tiny.build_qwen2_5_vl()
    assert type(other) is Qwen2_5_VLForConditionalGeneration
    assert sum(other.config.text_config.rope_parameters["mrope_section"]) == 8
    assert tiny.TILE_SIZE == handwriting.TILE_SIZE


@pytest.mark.parametrize("build", [tiny.build_qwen3_vl, tiny.build_qwen2_5_vl, tiny.build_llama])
def test_a_trainer_has_no_token_to_align(build: Callable[..., Any]) -> None:
    model, tokenizer = build(), tiny.build_tokenizer()
    for config in (model.config.get_text_config(), model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert config.bos_token_id is None


@pytest.mark.parametrize("sizes", [{"hidden_size": 100}, {"vision_hidden_size": 40}, {"num_heads": 5}])
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int]) -> None:
    for build in (tiny.build_qwen3_vl, tiny.build_qwen2_5_vl):
        with pytest.raises(ConfigurationError, match="expected a multiple"):
            build(**sizes)


def test_text_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected a multiple of 8"):
        tiny.build_llama(hidden_size=60)


def test_the_picture_reaches_the_logits() -> None:
    """Another digit in the image changes what the model says, or nothing could be learnt from it."""
    processor, model = tiny.build_qwen3_vl_processor(), tiny.build_qwen3_vl()
    first, second = handwriting.make_tasks("test", 2, seed=0)
    logits = []
    for task in (first, second):
        block = {"type": "image", "image": task.image()}
        batch = encode(processor, [{"role": "user", "content": [block, {"type": "text", "text": task.text}]}])
        with torch.no_grad():
            logits.append(model(**batch).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3
