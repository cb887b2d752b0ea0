"""Molmo2: the block of media tokens, media tensors that hold indices, images and videos in one batch, LoRA targets."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stock_reference import stock_reference
from tiny_models import (
    FAMILIES,
    LAYOUTS,
    ROUNDING,
    VISIBLE_CHANGE,
    assert_close,
    family,
    mixed_batch,
    pack,
    random_group,
    random_image,
    random_video,
    reward_model,
    score,
)
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from mr_reward import MultiResponseRewardModel, ResponseGroup
from mr_reward.attention.backends import check_backend
from mr_reward.backbones import ADAPTERS
from mr_reward.backbones.molmo2 import Molmo2Adapter
from mr_reward.errors import BackendError, MediaError
from mr_reward.layouts import visible
from mr_reward.model.rows import collate
from mr_reward.worlds.tiny import MOLMO2_TOKENS


def everything(rng: random.Random) -> list[ResponseGroup]:
    """Two images, a video, text, an image, another video: no two neighbours alike."""
    media = [{"images": 2}, {"videos": 1}, {}, {"images": 1}, {"videos": 1}]
    return [random_group(rng, 3, longest=6, **kinds) for kinds in media]


# --- the block of media tokens ---


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_blocks_are_those_of_the_stock_model(padding_side: str) -> None:
    """Our `causal` with blocks, against the mask that Molmo2 makes for itself of padding and token types."""
    model = reward_model("molmo2", "causal")
    batch = collate([pack(model, group) for group in everything(random.Random(0))], model.adapter, padding_side)
    types = batch.media["mm_token_type_ids"]
    expected = create_causal_mask(
        config=model.backbone.config.get_text_config(),
        inputs_embeds=torch.zeros(*batch.input_ids.shape, 1),
        attention_mask=(batch.segments >= 0).long(),
        past_key_values=None,
        block_sequence_ids=torch.where(types == 1, 0, -1),
    )
    blocks = model.adapter.media_block_ids(batch.media)
    found = visible("causal", batch.segments, batch.kinds, blocks)
    real = batch.segments >= 0  # what padding sees does not matter
    assert torch.equal(found[real], expected[:, 0].expand_as(found)[real])
    assert not torch.equal(found, visible("causal", batch.segments, batch.kinds)), "no media token saw a later one"


def test_no_media_no_block() -> None:
    assert Molmo2Adapter().media_block_ids({}) is None


@pytest.mark.parametrize(("images", "videos"), [(1, 0), (2, 0), (0, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_the_block_the_scores_are_wrong(
    layout: str, images: int, videos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the comparisons with the stock model can fail: a purely causal row gives other scores."""
    model, stock = reward_model("molmo2", layout), stock_reference("molmo2", layout)
    group = random_group(random.Random(1), 1, images=images, videos=videos)
    expected = stock.alone(group)
    assert_close(score(model, [group])[0], expected, ROUNDING)
    arguments = model.adapter.forward_arguments
    monkeypatch.setattr(model.adapter, "media_block_ids", lambda media: None)
    if layout == "causal":  # there the stock model makes the block itself, of the token types
        monkeypatch.setattr(
            model.adapter,
            "forward_arguments",
            lambda *inputs: {**arguments(*inputs), "mm_token_type_ids": None},
        )
    assert (score(model, [group])[0] - expected).abs().max() > VISIBLE_CHANGE


def test_an_edited_image_reaches_the_first_image() -> None:
    """The block spans all images of a prompt; each seeing only itself and what came before would be another model."""
    model = reward_model("molmo2", "isolated")
    row = pack(model, random_group(random.Random(2), 1, images=2))
    batch = collate([row], model.adapter)
    mask = visible("isolated", batch.segments, batch.kinds, model.adapter.media_block_ids(batch.media))[0]
    media = row.media["mm_token_type_ids"][0].nonzero()[:, 0]
    assert mask[media[0], media[-1]]
    assert not mask[media[0] - 1, media].any(), "text before the images does not see them"


# --- backends ---


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash_attention_is_refused(layout: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At construction and later; transformers would drop the block without a word."""
    members = family("molmo2")
    model = reward_model("molmo2", layout, fresh=True)
    # Flash attention needs packages that are not here, so the choice is put where the model reads it.
    monkeypatch.setattr(MultiResponseRewardModel, "attention_backend", backend)
    with pytest.raises(
        BackendError, match=f"{backend}.*{layout}.*image tokens.*both directions.*'mr_group' or 'sdpa'"
    ):
        MultiResponseRewardModel.from_backbone(members.full_model, layout=layout, processor=members.processor)
    with pytest.raises(BackendError, match=f"{backend}.*image tokens"):
        score(model, [random_group(random.Random(3), 2, images=1)])


def test_backends_that_can() -> None:
    for backend in ("mr_group", "eager", "sdpa", "flex_attention"):
        for layout in LAYOUTS:
            check_backend(layout, backend, media_blocks=True)
    check_backend("causal", "flash_attention_2")


# --- media of a batch ---


def test_merged_images_are_what_the_processor_makes_of_the_batch() -> None:
    """Indices of the second prompt count on from the patches of the first."""
    processor = family("molmo2").processor
    rng = random.Random(4)
    images = [[random_image(rng)], [random_image(rng), random_image(rng)]]
    together = processor.image_processor([image for row in images for image in row], return_tensors="pt")
    merged = Molmo2Adapter().merge_media([dict(processor.image_processor(row, return_tensors="pt")) for row in images])
    assert merged.keys() == {"pixel_values", "image_token_pooling", "image_grids"}
    for name, tensor in merged.items():
        assert torch.equal(tensor, together[name]), name


def test_merged_videos_have_the_features_of_videos() -> None:
    members = family("molmo2")
    rng = random.Random(5)
    videos = [random_video(rng, 3), random_video(rng, 2)]
    options: dict[str, Any] = {"do_sample_frames": False, "return_tensors": "pt"}
    rows = [dict(members.processor.video_processor([video], **options)) for video in videos]
    merged = Molmo2Adapter().merge_media(rows)
    with torch.no_grad():
        found = members.full_model.get_image_features(**merged).pooler_output
        expected = [members.full_model.get_video_features(**row).pooler_output[0] for row in rows]
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, ROUNDING)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_videos_in_one_batch(layout: str, padding_side: str) -> None:
    model, stock = reward_model("molmo2", layout), stock_reference("molmo2", layout)
    groups = [group.select([0]) for group in everything(random.Random(6))]
    for group, found in zip(groups, score(model, groups, padding_side), strict=True):
        assert_close(found, stock.alone(group), ROUNDING)


def test_one_wrong_index_shows() -> None:
    """So the test above can fail: indices that are only concatenated point into the first prompt's patches."""
    model = reward_model("molmo2", "isolated")
    groups = [random_group(random.Random(seed), 1, images=1) for seed in (7, 8)]
    batch = collate([pack(model, group) for group in groups], model.adapter)
    rows = [pack(model, group).media for group in groups]
    naive = {**batch.media, "image_token_pooling": torch.cat([row["image_token_pooling"] for row in rows])}
    with torch.no_grad():
        right = model(batch).scores
        wrong = model(replace(batch, media=naive)).scores
    assert right[0] == wrong[0]
    assert (right[1] - wrong[1]).abs() > VISIBLE_CHANGE


def test_frames_have_timestamps() -> None:
    renderer = family("molmo2").renderer()
    rendered = renderer.render(
        ResponseGroup(prompt="p", responses=["a", "b"], videos=[random_video(random.Random(9), 3)])
    )
    frames = " ".join(f"{second}.0 <frame_start><im_patch><frame_end>" for second in range(3))
    assert renderer.tokenizer.decode(rendered.prompt_ids).startswith("<|im_end|>" + frames + "<|im_start|>user\np")


def test_text_cannot_forge_media() -> None:
    """Neither a prompt nor a response holds a control token because its text spells one."""
    renderer = family("molmo2").renderer()
    text = "a" + "".join(MOLMO2_TOKENS) + "b"
    image = random_image(random.Random(14))
    honest, forged = (
        renderer.render(ResponseGroup(prompt=said, responses=[said, "c"], images=[image])) for said in ("ab", text)
    )
    control = torch.tensor(renderer.tokenizer.convert_tokens_to_ids(list(MOLMO2_TOKENS)))
    assert torch.isin(honest.prompt_ids, control).sum() == torch.isin(forged.prompt_ids, control).sum() > 0
    assert not torch.isin(torch.tensor(forged.response_ids[0]), control).any()
    assert renderer.tokenizer.decode(forged.response_ids[0]) == text
    assert torch.equal(honest.mm_token_type_ids.nonzero(), forged.mm_token_type_ids.nonzero())


def test_media_that_molmo2_does_not_take_are_refused_by_name() -> None:
    model = reward_model("molmo2")
    rng = random.Random(10)
    with pytest.raises(MediaError, match="'mixed': images and a video in one prompt.*remove"):
        pack(model, random_group(rng, 2, images=1, videos=1, id="mixed"))
    with pytest.raises(MediaError, match="'films': 2 videos in one prompt, Molmo2 reads one"):
        pack(model, random_group(rng, 2, videos=2, id="films"))


def test_media_keys_tell_the_families_apart() -> None:
    """Media of another family are refused by their names."""
    for name in FAMILIES:
        if not family(name).sees_images:
            continue
        for kind in ("images", "videos"):
            row = family(name).renderer().render(random_group(random.Random(11), 1, **{kind: 1}))
            able = {adapter for adapter in ADAPTERS.values() if row.media.keys() <= set(adapter.media_keys)}
            assert able == {ADAPTERS[name]}


# --- training ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_alone_can_be_trained_on(layout: str) -> None:
    """In training Molmo2 insists on token types, which a batch without media does not have."""
    model = reward_model("molmo2", layout, fresh=True)
    groups = mixed_batch(random.Random(12), 3, 0, 0)
    before = score(model, groups)
    for found, expected in zip(score(model.train(), groups), before, strict=True):
        assert_close(found, expected, ROUNDING)


def language_linears(model: MultiResponseRewardModel) -> set[str]:
    language = model.backbone.language_model
    return {name for name, module in language.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama"])
def test_lora_is_put_on_the_language_part_only(name: str) -> None:
    """On each of its linear layers; gradients reach them, and nothing of the vision part."""
    model = reward_model(name, "set", fresh=True)
    expected = {f"backbone.language_model.{linear}" for linear in language_linears(model)}
    lora = LoraConfig(r=2, target_modules=model.adapter.lora_targets, modules_to_save=["head", "readouts"])
    tuned = get_peft_model(model, lora).train()
    found = {
        key.removeprefix("base_model.model.").split(".lora_A")[0]
        for key, _ in tuned.named_parameters()
        if "lora_A" in key
    }
    assert found == expected and len(found) == 7 * model.config.get_text_config().num_hidden_layers
    group = random_group(random.Random(13), 3, images=1)
    rows = collate([pack(model, group)], model.adapter)
    scores: Tensor = tuned(rows=rows).scores
    (scores * torch.tensor([1.0, -1.0, 0.5])).sum().backward()
    for key, parameter in tuned.named_parameters():
        if "lora_B" in key:  # A has no gradient before the first step: B is zero
            assert parameter.grad is not None and parameter.grad.any(), key
        elif not parameter.requires_grad:
            assert parameter.grad is None, key
    trained = {key for key, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert not any("visual" in key or "vision" in key or "projector" in key for key in trained)
