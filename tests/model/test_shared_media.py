"""Pictures that several groups of a batch show: the vision tower sees each once, and scores and gradients stay."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import (
    LAYOUTS,
    ROUNDING,
    assert_close,
    pack,
    random_group,
    random_image,
    random_video,
    reward_model,
    score,
    score_batch,
)
from torch import Tensor

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.backbones import molmo2, qwen_vl
from mr_reward.backbones.base import concatenate_media, different_pictures
from mr_reward.model.rows import Rows, collate
from mr_reward.training.batches import GroupCollator

TOWERS = {"qwen3_vl": "visual", "qwen2_5_vl": "visual", "molmo2": "vision_tower"}
INDEX_KEYS = {"image_index", "video_index"}

Shown = tuple[Sequence[Any], Sequence[Any]]  # images, videos


def show(seed: int, images: Sequence[Any] = (), videos: Sequence[Any] = (), n: int = 3) -> ResponseGroup:
    """A group of its own text around given pictures."""
    group = random_group(random.Random(seed), n, images=len(images), videos=len(videos), longest=8)
    return replace(group, prompt=group.messages, images=list(images), videos=list(videos))


def shared_batch(name: str) -> tuple[list[ResponseGroup], int]:
    """One picture in three groups, at different places among others, and a video in two; and how many differ."""
    rng = random.Random(name)
    shared, *others = (random_image(rng) for _ in range(4))
    film, other_film = random_video(rng, 6), random_video(rng, 4)
    mixed = name != "molmo2"  # which takes no row with both
    shown: list[Shown] = [
        ([others[0], shared], [film] if mixed else []),
        ([], []),
        ([shared.copy()], []),
        ([], [other_film]),
        ([], [[frame.copy() for frame in film]]),
        ([shared, others[1], others[2], shared], []),
        ([], [film]),
    ]
    return [show(seed, *media) for seed, media in enumerate(shown)], 6


def without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture counts as different from all others, as if nobody had looked."""

    def all_differ(pictures: Sequence[Tensor], grids: Tensor) -> tuple[list[Tensor], list[int]]:
        return list(pictures), list(range(len(pictures)))

    for module in (qwen_vl, molmo2):
        monkeypatch.setattr(module, "different_pictures", all_differ)


@pytest.fixture
def encoded(request: pytest.FixtureRequest) -> Callable[[MultiResponseRewardModel], list[int]]:
    """The number of patches of every pass of a model's vision tower from here on."""

    def watch(model: MultiResponseRewardModel) -> list[int]:
        sizes: list[int] = []
        tower = getattr(model.backbone, TOWERS[model.backbone.config.model_type])
        hook = tower.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0][..., 0].numel()))
        request.addfinalizer(hook.remove)
        return sizes

    return watch


def patches(rows: Sequence[Rows]) -> int:
    """Of all pictures of all rows, those that are the same counted again."""
    return sum(
        tensor[..., 0].numel() for row in rows for name, tensor in row.media.items() if name.startswith("pixel_values")
    )


def different_patches(name: str, groups: Sequence[ResponseGroup], model: MultiResponseRewardModel) -> int:
    """Of all different pictures, each rendered alone."""
    images = {image.tobytes() + bytes(image.size): image for group in groups for image in group.images}
    videos = {b"".join(frame.tobytes() for frame in video): video for group in groups for video in group.videos}
    alone = [([image], []) for image in images.values()] + [([], [video]) for video in videos.values()]
    assert len(alone) == shared_batch(name)[1]
    return patches([pack(model, show(0, *media)) for media in alone])


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TOWERS)
def test_a_picture_of_several_groups_is_encoded_once(
    name: str, layout: str, padding_side: str, encoded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reward_model(name, layout)
    groups, _ = shared_batch(name)
    alone = [score(model, [group])[0] for group in groups]
    expected = different_patches(name, groups, model)
    sizes = encoded(model)
    found = score(model, groups, padding_side)
    assert sum(sizes) == expected < patches([pack(model, group) for group in groups])
    without_sharing(monkeypatch)
    sizes.clear()
    unshared = score(model, groups, padding_side)
    assert sum(sizes) == patches([pack(model, group) for group in groups])
    for one, two, three in zip(found, alone, unshared, strict=True):
        assert_close(one, two, ROUNDING)
        assert_close(one, three, 1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "mr_group"])
@pytest.mark.parametrize("name", TOWERS)
def test_both_ways_of_reading_share(name: str, backend: str, encoded: Any) -> None:
    model = reward_model(name, "set", backend=backend)
    groups, _ = shared_batch(name)
    alone = [score(model, [group])[0] for group in groups]
    expected = different_patches(name, groups, model)
    sizes = encoded(model)
    for one, two in zip(score(model, groups), alone, strict=True):
        assert_close(one, two, ROUNDING)
    assert sum(sizes) == expected


@pytest.mark.parametrize("name", TOWERS)
def test_a_swapped_index_shows(name: str) -> None:
    """So the tests above can fail: the features of another picture of the same size give other scores."""
    model = reward_model(name, "set")
    first, second = (random_image(random.Random(seed), max_tiles=1) for seed in range(2))
    groups = [show(seed, [image]) for seed, image in enumerate((first, second, first))]
    batch = collate([pack(model, group) for group in groups], model.adapter)
    inputs = batch.media
    if name == "molmo2":
        pooling = inputs["image_token_pooling"].chunk(3)
        wrong = {"image_token_pooling": torch.cat([pooling[0], pooling[1], pooling[1]])}
    else:
        assert inputs["image_index"].tolist() == [0, 1, 0]
        wrong = {"image_index": torch.tensor([0, 1, 1])}
    with torch.no_grad():
        change = (model(batch).scores - model(replace(batch, media={**inputs, **wrong})).scores).abs()
    assert change[:2].max() < ROUNDING < change[2].max()


@pytest.mark.parametrize("name", TOWERS)
def test_where_nothing_is_shared_inputs_are_as_before(name: str) -> None:
    model = reward_model(name, "set")
    rng = random.Random(1)
    groups = [show(0, [random_image(rng)]), show(1), show(2, [random_image(rng), random_image(rng)])]
    groups.append(show(3, videos=[random_video(rng, 4)]))
    groups = groups if name != "molmo2" else groups[:3]
    rows = [pack(model, group) for group in groups]
    inputs = collate(rows, model.adapter).media
    assert not INDEX_KEYS & inputs.keys()
    media = [{key: row.media[key] for key in row.media.keys() - {"mm_token_type_ids"}} for row in rows]
    expected = concatenate_media(media)
    if name == "molmo2":  # its indices count on from the patches of the rows before
        ends = torch.tensor([row.media["pixel_values"][..., 0].numel() for row in rows if row.media]).cumsum(0)
        one, two = (row.media["image_token_pooling"] for row in rows if row.media)
        expected["image_token_pooling"] = torch.cat([one, torch.where(two >= 0, two + ends[0], two)]).to(one.dtype)
        del expected["image_num_crops"]
    assert expected.keys() == inputs.keys() & set(model.adapter.media_keys)
    for key, tensor in expected.items():
        assert torch.equal(inputs[key], tensor), key


@pytest.mark.parametrize("name", TOWERS)
def test_gradients_are_those_without_sharing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every weight, the vision tower's too: those of a shared picture are the sum over the rows that show it."""
    model = reward_model(name, "set", fresh=True).train()
    groups, _ = shared_batch(name)
    rows = [pack(model, group) for group in groups]
    weights = torch.randn(3, generator=torch.Generator().manual_seed(0))

    def gradients() -> tuple[dict[str, Tensor], int]:
        model.zero_grad()
        inputs = collate(rows, model.adapter)
        scores = score_batch(model, inputs, [group.num_responses for group in groups], grad=True)
        torch.stack([(one * weights).sum() for one in scores]).sum().backward()
        found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        return found, len(inputs.media["pixel_values"])

    found, few = gradients()
    without_sharing(monkeypatch)
    expected, many = gradients()
    assert few < many and found.keys() == expected.keys()
    assert sum(bool(value.any()) for key, value in found.items() if f".{TOWERS[name]}." in key) > 10
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * max(1.0, float(value.abs().max())))


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("image_shared", "video_shared"), [(True, False), (False, True), (True, True)])
def test_one_kind_shared_beside_another(name: str, image_shared: bool, video_shared: bool) -> None:
    model = reward_model(name, "set")
    rng = random.Random(2)
    images, videos = [random_image(rng) for _ in range(2)], [random_video(rng, 4) for _ in range(2)]
    groups = [
        show(0, images[:1], videos[:1]),
        show(1, [images[not image_shared]], [videos[not video_shared]]),
    ]
    batch = collate([pack(model, group) for group in groups], model.adapter)
    assert ("image_index" in batch.media, "video_index" in batch.media) == (image_shared, video_shared)
    assert len(batch.media["image_grid_thw"]) == len(batch.media["video_grid_thw"]) == 2
    for found, group in zip(score(model, groups), groups, strict=True):
        assert_close(found, score(model, [group])[0], ROUNDING)


@pytest.mark.parametrize("name", TOWERS)
def test_scorer_and_collator_share(name: str, encoded: Any) -> None:
    """Different questions about one picture: what VQA is."""
    model = reward_model(name, "set")
    image = random_image(random.Random(3))
    groups = [show(seed, [image]) for seed in range(4)]
    alone = [score(model, [group])[0] for group in groups]
    one = patches([pack(model, groups[0])])
    sizes = encoded(model)
    scorer = GroupScorer(model)
    for found, expected in zip(scorer.score(groups), alone, strict=True):
        assert_close(torch.tensor(found), expected, ROUNDING)
    assert sizes == [one]
    sizes.clear()
    ranked = [replace(group, prompt=group.messages, rankings=[1, 2, 3]) for group in groups]
    inputs = GroupCollator(scorer.packer)(ranked)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs["rows"]).scores, torch.stack(alone), rtol=0, atol=ROUNDING)
    assert sizes == [one]


@pytest.mark.parametrize("name", TOWERS)
def test_pixels_that_differ_at_one_place_are_not_shared(name: str) -> None:
    """The last value of a picture is not among those that are looked at first."""
    model = reward_model(name, "set")
    row = pack(model, show(0, [random_image(random.Random(4))])).media
    edited = {key: tensor.clone() for key, tensor in row.items()}
    edited["pixel_values"].view(-1)[-1] += 1
    size = len(row["pixel_values"])
    assert len(model.adapter.merge_media([row, edited, row])["pixel_values"]) == 2 * size
    assert len(model.adapter.merge_media([row, row])["pixel_values"]) == size


def test_the_same_pixels_in_another_grid_are_another_picture() -> None:
    pixels = torch.rand(8, 5)
    _, index = different_pictures([pixels, pixels, pixels], torch.tensor([[1, 2, 4], [1, 4, 2], [1, 2, 4]]))
    assert index == [0, 1, 0]


def test_what_is_saved_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = reward_model("qwen3_vl", "set")
    image = random_image(random.Random(5))
    with caplog.at_level(logging.DEBUG, "mr_reward.backbones"):
        collate([pack(model, show(seed, [image])) for seed in range(3)], model.adapter)
    assert caplog.messages == ["1 of the 3 images or videos of a batch are encoded"]
