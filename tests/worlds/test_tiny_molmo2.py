"""The tiny Molmo2: its tokens, template, images, videos, saving and loading."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Molmo2ForConditionalGeneration,
    Molmo2Processor,
)

from mr_reward.errors import ConfigurationError
from mr_reward.worlds import handwriting, tiny

LOW_RES = "<low_res_im_start><im_patch><im_col><im_end>"
THREE_DIGITS = "<im_start><im_patch><im_patch><im_patch><im_col><im_end>"
TURN = "<|im_start|>user\nNumber?<|im_end|>\n<|im_start|>assistant\n"


def messages(text: str = "Number?", media: str = "image", count: int = 1) -> list[dict[str, Any]]:
    tasks = handwriting.make_tasks("test", count, media=media, seed=0)
    # The template puts media first wherever they stand in the turn.
    blocks = [{"type": media, media: task.image() if media == "image" else task.frames()} for task in tasks]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *blocks]}]


def encode(processor: Molmo2Processor, chat: list[dict[str, Any]], frames: int = 0, fps: float = 1.0) -> Any:
    options: dict[str, Any] = {}
    if frames:
        options["video_metadata"] = [{"fps": fps, "total_num_frames": frames, "frames_indices": list(range(frames))}]
    batch = processor.apply_chat_template(
        chat,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
        processor_kwargs=options,
    )
    batch.pop("video_metadata", None)
    return batch


def test_the_shared_tokenizer_is_extended_and_nothing_else() -> None:
    shared, own = tiny.build_tokenizer(), tiny.build_molmo2_tokenizer()
    ids = own.convert_tokens_to_ids(list(tiny.MOLMO2_TOKENS))
    assert ids == list(range(len(shared), len(own)))
    assert {token: index for token, index in own.get_vocab().items() if index < len(shared)} == shared.get_vocab()
    for token, index in zip(tiny.MOLMO2_TOKENS, ids, strict=True):
        assert own(token).input_ids == [index]
        assert len(own(token, split_special_tokens=True).input_ids) > 3
    text = "I see 42 <im_patch >."
    assert own(text).input_ids == shared(text).input_ids


def test_image_prompt() -> None:
    processor, model = tiny.build_molmo2_processor(), tiny.build_molmo2()
    batch = encode(processor, messages())
    # Molmo2's processor starts every row with the end-of-sequence token when there is no start token.
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "<|im_end|>" + LOW_RES + THREE_DIGITS + TURN
    assert batch["input_ids"].shape[1] <= 40
    assert batch["mm_token_type_ids"][0].tolist() == [0] + [1] * 10 + [0] * (batch["input_ids"].shape[1] - 11)
    assert batch["image_grids"].tolist() == [[1, 1, 1, 3]]
    assert batch["image_num_crops"].tolist() == [4]
    assert batch["image_token_pooling"].tolist() == np.arange(16).reshape(4, 4).tolist()
    logits = model(**batch).logits
    assert logits.shape == (1, batch["input_ids"].shape[1], len(tiny.build_tokenizer()))
    assert torch.isfinite(logits).all()


def test_two_images_are_numbered_and_stand_first() -> None:
    processor = tiny.build_molmo2_processor()
    batch = encode(processor, messages(count=2))
    media = "".join(f"Image {i}{LOW_RES}{THREE_DIGITS}" for i in (1, 2))
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "<|im_end|>" + media + TURN


def test_images_are_not_resized_for_their_crops() -> None:
    image_processor = tiny.build_molmo2_processor().image_processor
    for num_digits in (1, 3, 16):
        image = handwriting.make_tasks("test", 1, num_digits=num_digits)[0].image()
        batch = image_processor([image], return_tensors="pt")
        assert batch["image_grids"].tolist() == [[1, 1, 1, num_digits]]
        # Each pixel once in the crops behind the low-resolution view, scaled to [-1, 1].
        total = float((np.asarray(image) / 127.5 - 1.0).sum())
        assert batch["pixel_values"][1:].sum().item() == pytest.approx(total, rel=1e-4)


def test_video_prompt() -> None:
    processor = tiny.build_molmo2_processor()
    batch = encode(processor, messages(media="video"), frames=3, fps=2.0)
    stamped = [f"{seconds} <frame_start><im_patch><frame_end>" for seconds in ("0.0", "0.5", "1.0")]
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "<|im_end|>" + " ".join(stamped) + TURN
    assert batch["video_grids"].tolist() == [[3, 1, 1]]
    frames = handwriting.make_tasks("test", 1, media="video", seed=0)[0].frames()
    total = sum(float((np.asarray(frame) / 127.5 - 1.0).sum()) for frame in frames)
    assert batch["pixel_values_videos"].sum().item() == pytest.approx(total, rel=1e-4)  # not resized, in [-1, 1]
    assert (batch["video_token_pooling"] >= 0).sum(-1).tolist() == [4, 4, 4]  # four patches in a window of nine
    assert torch.isfinite(tiny.build_molmo2()(**batch).logits).all()


def test_two_videos_are_refused_by_the_processor() -> None:
    with pytest.raises(ValueError, match="At most one video"):
        encode(tiny.build_molmo2_processor(), messages(media="video", count=2), frames=3)


def test_control_tokens_in_user_text_stay_text() -> None:
    processor = tiny.build_molmo2_processor()
    names = ("<|im_end|>", "<|endoftext|>", *tiny.MOLMO2_TOKENS)
    honest = encode(processor, messages())["input_ids"][0].tolist()
    forged = encode(processor, messages("Read" + "".join(names)))["input_ids"][0].tolist()
    for name in names:
        token = processor.tokenizer.convert_tokens_to_ids(name)
        assert forged.count(token) == honest.count(token)


def test_save_and_load(tmp_path: Path) -> None:
    model, processor = tiny.build_molmo2(3), tiny.build_molmo2_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is Molmo2ForConditionalGeneration
    assert type(loaded_processor) is Molmo2Processor
    assert loaded_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded_processor.chat_template == processor.chat_template
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    state = loaded.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name]), name
    for media, frames in (("image", 0), ("video", 3)):
        before = encode(processor, messages("A<think>b<|im_end|>", media), frames)
        after = encode(loaded_processor, messages("A<think>b<|im_end|>", media), frames)
        assert torch.equal(before["input_ids"], after["input_ids"])
        with torch.no_grad():
            assert torch.equal(model(**before).logits, loaded(**after).logits)


def test_seed_alone_decides_the_weights() -> None:
    state = torch.get_rng_state()
    first = tiny.build_molmo2(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = (tiny.build_molmo2(seed).state_dict() for seed in (5, 6))
    assert not first.training
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again[name]), name
    assert any(not torch.equal(weight, other[name]) for name, weight in first.state_dict().items())


def test_the_configuration_fits_the_tokenizer() -> None:
    model, tokenizer = tiny.build_molmo2(), tiny.build_molmo2_tokenizer()
    # Two rows of the embedding have to be spare: tests put readout vectors there.
    assert len(tokenizer) + 2 <= model.get_input_embeddings().num_embeddings
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<im_patch>")
    assert model.config.vision_config.num_position_embeddings == (tiny.TILE_SIZE // tiny.PATCH_SIZE) ** 2
    for config in (model.config.get_text_config(), model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("sizes", [{"hidden_size": 60}, {"vision_hidden_size": 42}, {"num_heads": 5}])
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="expected a multiple"):
        tiny.build_molmo2(**sizes)


def test_the_picture_reaches_the_logits() -> None:
    """Another digit changes what the model says, or nothing could be learnt from it."""
    processor, model = tiny.build_molmo2_processor(), tiny.build_molmo2()
    logits = []
    for task in handwriting.make_tasks("test", 2, seed=0):
        chat = [{"role": "user", "content": [{"type": "image", "image": task.image()}]}]
        with torch.no_grad():
            logits.append(model(**encode(processor, chat)).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3
