"""What the layouts promise about scores, in float32 on whole models.

Tolerances: two forwards that sum the same numbers in another order differ by a few 1e-7 here, scores differ by 1e-1
between responses. 1e-5 therefore tells rounding from a leak; a change that must show has to exceed 1e-4.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from stock_reference import stock_reference
from tiny_models import LAYOUTS, assert_close, pack, random_group, random_text, reward_model, score

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.errors import BackendError, ConfigurationError
from mr_reward.packing import PackedBatch, collate

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
    pytest.param("llama", 0, 0, id="llama"),
]
BACKBONES = [pytest.param("qwen3_vl", 1, id="qwen3_vl"), pytest.param("qwen2_5_vl", 1, id="qwen2_5_vl"), ("llama", 0)]


def mixed_batch(rng: random.Random, n: int, images: int, videos: int) -> list[ResponseGroup]:
    """The group of interest between a short text-only one and a longer one of another size and with other media."""
    return [
        random_group(rng, 2, longest=3),
        random_group(rng, n, images=images, videos=videos),
        random_group(rng, 3, images=min(images, 1), longest=60),
    ]


# --- isolated: as if each response were scored alone ---


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize(("name", "images", "videos"), CASES)
def test_isolated_equals_the_stock_model_on_each_response_alone(
    name: str, images: int, videos: int, n: int, padding_side: str
) -> None:
    rng = random.Random(f"{name}{images}{videos}{n}{padding_side}")
    model = reward_model(name, "isolated")
    stock = stock_reference(name, "isolated")
    groups = mixed_batch(rng, n, images, videos)
    for group, found in zip(groups, score(model, groups, padding_side), strict=True):
        # A policy's tokens stand where `generate` puts them, which for a video is not where one forward over prompt
        # and response would (transformers 5.23 leaves out the video's time axis there). Many responses: for speed.
        read = stock.generated if group.videos or n > 5 else stock.alone
        assert_close(found, read(group), ROUNDING)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_the_two_stock_paths_agree_on_images(name: str) -> None:
    """Otherwise the test above would compare images and videos with different things."""
    group = random_group(random.Random(5), 3, images=2)
    stock = stock_reference(name, "isolated")
    assert_close(stock.generated(group), stock.alone(group), ROUNDING)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(("name", "images"), BACKBONES)
def test_isolated_holds_for_every_n_up_to_16_in_one_batch(name: str, images: int, padding_side: str) -> None:
    rng = random.Random(16)
    model = reward_model(name, "isolated")
    groups = [random_group(rng, n, images=images * (n % 3), longest=8) for n in range(1, 17)]
    for group, found in zip(groups, score(model, groups, padding_side), strict=True):
        alone = score(model, [group.select([i]) for i in range(group.num_responses)])
        assert_close(found, torch.cat(alone), ROUNDING)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "images", "videos"), CASES)
def test_one_response_is_scored_as_by_the_stock_model_in_every_layout(
    name: str, images: int, videos: int, layout: str
) -> None:
    model = reward_model(name, layout)
    stock = stock_reference(name, layout)
    group = random_group(random.Random(9), 1, images=images, videos=videos)
    read = stock.generated if videos else stock.alone
    assert_close(score(model, [group])[0], read(group), ROUNDING)


# --- set: the order of the responses does not matter, their company does ---


@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize(("name", "images", "videos"), CASES)
def test_set_equals_caches_put_together_by_hand(name: str, images: int, videos: int, n: int) -> None:
    model = reward_model(name, "set")
    group = random_group(random.Random(n), n, images=images, videos=videos)
    assert_close(score(model, [group])[0], stock_reference(name, "set").set_scores(group), ROUNDING)


@pytest.mark.parametrize("n", [2, 3, 7, 16])
@pytest.mark.parametrize(("name", "images", "videos"), CASES)
def test_set_is_permutation_equivariant(name: str, images: int, videos: int, n: int) -> None:
    rng = random.Random(n)
    model = reward_model(name, "set")
    group = random_group(rng, n, images=images, videos=videos)
    orders = [list(range(n)), list(range(n))[::-1], *(rng.sample(range(n), n) for _ in range(3))]
    before, *after = score(model, [group.select(order) for order in orders])
    for order, found in zip(orders[1:], after, strict=True):
        assert_close(found, before[order], ROUNDING)


@pytest.mark.parametrize(("name", "images"), BACKBONES)
def test_causal_is_not_permutation_equivariant(name: str, images: int) -> None:
    """So the test above can fail."""
    group = random_group(random.Random(0), 5, images=images)
    before, after = score(reward_model(name, "causal"), [group, group.select([4, 3, 2, 1, 0])])
    assert (after.flip(0) - before).abs().max() > VISIBLE_CHANGE


@pytest.mark.parametrize("edited", [0, 2, 4])
@pytest.mark.parametrize(("name", "images"), BACKBONES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_reaches_whom_the_layout_says(layout: str, name: str, images: int, edited: int) -> None:
    """`causal`: the edited response and those behind it; `isolated`: it alone; `set`: all."""
    rng = random.Random(edited)
    model = reward_model(name, layout)
    group = random_group(rng, 5, images=images)
    responses = list(group.responses)
    responses[edited] = random_text(rng, 20, 17)  # another length too
    before, after = score(model, [group, replace(group, prompt=group.messages, responses=responses)])
    reached = {
        "causal": [i >= edited for i in range(5)],
        "isolated": [i == edited for i in range(5)],
        "set": [True] * 5,
    }[layout]
    change = (after - before).abs()
    for i in range(5):
        # 1e-6: the same sums in the same order but for the length of the row.
        assert (change[i] > 1e-6) == reached[i], f"response {i} changed by {change[i]:.1e}"
    assert change[edited] > VISIBLE_CHANGE


# --- padding, batch composition, backend ---


@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize(("name", "images", "videos"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_side_and_batch_composition_do_not_matter(
    layout: str, name: str, images: int, videos: int, n: int
) -> None:
    model = reward_model(name, layout)
    groups = mixed_batch(random.Random(n), n, images, videos)
    right = score(model, groups, "right")
    for other in (score(model, groups, "left"), score(model, groups[::-1])[::-1]):
        for found, expected in zip(other, right, strict=True):
            assert_close(found, expected, ROUNDING)
    for group, expected in zip(groups, right, strict=True):
        assert_close(score(model, [group])[0], expected, ROUNDING)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_stands_at_padding_and_readout_sites_does_not_matter(layout: str, padding_side: str) -> None:
    rng = random.Random(3)
    model = reward_model("qwen3_vl", layout)
    groups = mixed_batch(rng, 4, 1, 0)
    batch = collate([pack(model, group) for group in groups], padding_side)
    free = (batch.segments < 0) | (batch.kinds > 0)
    assert (batch.segments < 0).any()
    junk = torch.randint_like(batch.input_ids, 256)
    with torch.no_grad():
        before = model(**batch.model_inputs()).scores
        after = model(**{**batch.model_inputs(), "input_ids": torch.where(free, junk, batch.input_ids)}).scores
    # Padding attends to itself only and its values are multiplied by exact zeros.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "images"), BACKBONES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eager_equals_sdpa(layout: str, name: str, images: int) -> None:
    groups = mixed_batch(random.Random(2), 5, images, 0)
    eager = reward_model(name, layout, backend="eager")
    sdpa = reward_model(name, layout)
    assert (eager.attention_backend, sdpa.attention_backend) == ("eager", "sdpa")
    for padding_side in ("left", "right"):
        for found, expected in zip(score(eager, groups, padding_side), score(sdpa, groups, padding_side), strict=True):
            assert_close(found, expected, ROUNDING)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_mode_keeps_the_layout(layout: str) -> None:
    """No dropout is on in these backbones, so training mode must not change a score."""
    model = reward_model("qwen3_vl", layout, fresh=True)
    groups = mixed_batch(random.Random(4), 4, 1, 0)
    before = score(model, groups)
    for found, expected in zip(score(model.train(), groups), before, strict=True):
        assert_close(found, expected, ROUNDING)


@pytest.mark.parametrize(("name", "images", "videos"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_do_not_depend_on_padding(layout: str, name: str, images: int, videos: int) -> None:
    """Rotary scores hide a shift of a whole row; a position past the trained context, or a learned one, would not."""
    model = reward_model(name, layout)
    rows = [pack(model, group) for group in mixed_batch(random.Random(12), 4, images, videos)]

    def positions(batch: PackedBatch) -> torch.Tensor:
        return model.adapter.position_ids(
            model.backbone, batch.input_ids, batch.segments, batch.offsets, dict(batch.media)
        )

    batches = {side: collate(rows, side) for side in ("left", "right")}
    for i, row in enumerate(rows):
        expected = positions(collate([row]))[..., 0, :]
        assert int(expected.min()) == 0
        for batch in batches.values():
            assert torch.equal(positions(batch)[..., i, :][..., batch.segments[i] >= 0], expected)
        # Every response starts at the position after the prompt, or runs on from the one before it.
        start = expected[..., row.segments == 0].max() + 1
        assert torch.equal(expected[..., row.segments > 0], (start + row.offsets[row.segments > 0]).expand_as(
            expected[..., row.segments > 0]
        ))  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_vl", "llama"])
def test_what_the_backbone_is_given(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reward_model(name, layout)
    seen: dict[str, Any] = {}
    forward = model.backbone.forward

    def recorded(**arguments: Any) -> Any:
        seen.update(arguments)
        return forward(**arguments)

    monkeypatch.setattr(model.backbone, "forward", recorded)
    score(model, mixed_batch(random.Random(13), 3, int(name == "qwen3_vl"), 0), "left")
    batch_size, length, _ = seen["inputs_embeds"].shape
    assert seen["use_cache"] is False and seen.get("past_key_values") is None and "input_ids" not in seen
    assert not seen.get("output_hidden_states"), "the hidden states of all layers are not stored"
    shape = (batch_size, length) if layout == "causal" else (batch_size, 1, length, length)
    assert seen["attention_mask"].shape == shape
    # The row of text, then time, height and width.
    assert seen["position_ids"].shape == ((4,) if name == "qwen3_vl" else ()) + (batch_size, length)


# --- negative controls: ways to break isolation silently ---


def broken_scores(model: MultiResponseRewardModel, group: ResponseGroup, use_cache: bool = False) -> torch.Tensor:
    """The row read by hand with a 2-D mask where the layout's belongs; same tokens, same positions."""
    batch = collate([pack(model, group)])
    media = dict(batch.media)
    with torch.no_grad():
        embeds = model.readouts(model.get_input_embeddings()(batch.input_ids), batch.kinds)
        hidden = model.backbone(
            inputs_embeds=embeds,
            attention_mask=(batch.segments >= 0).long(),
            position_ids=model.adapter.position_ids(
                model.backbone, batch.input_ids, batch.segments, batch.offsets, media
            ),
            use_cache=use_cache,
            **model.adapter.forward_arguments(media),
        ).last_hidden_state
        return model.head(hidden[:, list(pack(model, group).score_sites)])[0]


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("layout", ["isolated", "set"])
@pytest.mark.parametrize(("name", "images"), BACKBONES)
def test_a_2d_mask_breaks_isolation_visibly(name: str, images: int, layout: str, use_cache: bool) -> None:
    model = reward_model(name, layout)
    group = random_group(random.Random(6), 4, images=images)
    change = (broken_scores(model, group, use_cache) - score(model, [group])[0]).abs()
    assert change.max() > VISIBLE_CHANGE
    if layout == "isolated":
        # The first response has nobody before it. If it changed too, the control would be broken by something else.
        assert change[0] < ROUNDING


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_vl", "llama"])
def test_forward_refuses_arguments_that_would_break_the_layout(name: str, layout: str) -> None:
    model = reward_model(name, layout)
    inputs = collate([pack(model, random_group(random.Random(7), 3))]).model_inputs()
    shape = inputs["input_ids"].shape
    forbidden = {
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "position_ids": torch.arange(shape[1])[None],
        "inputs_embeds": torch.zeros(*shape, 64),
        "past_key_values": ((),),
        "use_cache": True,
    }
    for key, value in forbidden.items():
        with pytest.raises(BackendError, match=f"forward got {key}.*{layout}.*leave it out"):
            model(**inputs, **{key: value})
    # A mask of one zero compares equal to False; it is a mask all the same.
    with pytest.raises(BackendError, match="attention_mask"):
        model(**inputs, attention_mask=torch.zeros(1, dtype=torch.long))
    # What means "none" is harmless.
    with torch.no_grad():
        model(**inputs, attention_mask=None, use_cache=False)
    with pytest.raises(ConfigurationError, match="pixel_valuez"):
        model(**inputs, pixel_valuez=torch.zeros(1))


@pytest.mark.parametrize("layout", ["isolated", "set"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llama"])
def test_a_backend_changed_after_construction_is_refused(name: str, layout: str) -> None:
    model = reward_model(name, layout, fresh=True)
    group = random_group(random.Random(8), 2)
    before = score(model, [group])[0]
    if name == "llama":
        model.set_attn_implementation("flex_attention")
    else:  # needs packages that are not here, so the choice is written where transformers would write it
        model.backbone.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(BackendError, match="'fl[a-z0-9_]+' cannot express.*'eager' or 'sdpa'"):
        score(model, [group])
    model.set_attn_implementation("sdpa")
    assert torch.equal(score(model, [group])[0], before)
    model.set_attn_implementation("eager")  # the mask follows the backend
    assert_close(score(model, [group])[0], before, ROUNDING)


@pytest.mark.parametrize("layout", ["isolated", "set"])
def test_a_backend_that_cannot_is_refused_at_construction(layout: str) -> None:
    shared = reward_model("llama")
    backbone = copy.deepcopy(shared.backbone)
    backbone.set_attn_implementation("flex_attention")
    with pytest.raises(BackendError, match=f"flex_attention.*{layout}.*'eager' or 'sdpa'"):
        MultiResponseRewardModel.from_backbone(backbone, layout=layout, processor=shared.processor)
    causal = MultiResponseRewardModel.from_backbone(backbone, layout="causal", processor=shared.processor)
    assert causal.attention_backend == "flex_attention"


# --- twins ---


@pytest.mark.parametrize("num_orders", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "images"), BACKBONES)
def test_identical_responses_share_a_score_bit_for_bit(name: str, images: int, layout: str, num_orders: int) -> None:
    rng = random.Random(num_orders)
    group = random_group(rng, 3, images=images)
    a, b, c = group.responses
    twins = replace(group, prompt=group.messages, responses=[b, a, b, c, a, b])
    model = reward_model(name, layout)
    first, second = GroupScorer(model, num_orders=num_orders).score([twins, random_group(rng, 4, longest=40)])
    assert first is not None and second is not None
    assert first[0] == first[2] == first[5]
    assert first[1] == first[4]
    assert len({*first}) == 3 and len(first) == 6
    # Scoring one and copying it is scoring the group without the twins.
    expected = GroupScorer(model, num_orders=1).score([twins.select([0, 1, 3])])[0]
    if layout != "causal" or num_orders == 1:
        assert_close(torch.tensor(first)[[0, 1, 3]], torch.tensor(expected), ROUNDING)
    # Nothing about it is random.
    assert GroupScorer(model, num_orders=num_orders).score([twins]) == GroupScorer(model, num_orders=num_orders).score(
        [twins]
    )


# --- gradients ---


def gradients(model: MultiResponseRewardModel, groups: list[ResponseGroup]) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    batch = collate([pack(model, group) for group in groups])
    scores = model(**batch.model_inputs()).scores
    weights = torch.linspace(-1, 1, scores.numel()).view_as(scores)
    (scores * weights).sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "images"), BACKBONES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_every_part(layout: str, name: str, images: int) -> None:
    model = reward_model(name, layout, fresh=True).train()
    groups = [random_group(random.Random(1), 3, images=images), random_group(random.Random(2), 2)]
    found = gradients(model, groups)
    # No comparison token stands in a row of the other layouts.
    silent = set() if layout == "set" else {"readouts.comparison"}
    for parameter, gradient in found.items():
        assert gradient is not None, f"{parameter} has no gradient"
        assert gradient.isfinite().all(), f"{parameter} has a gradient that is not finite"
        assert gradient.any() == (parameter not in silent), parameter

    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.backbone.modules())
    again = gradients(model, groups)
    for parameter, gradient in found.items():
        # The same operations run a second time: equal but for the order of accumulation.
        torch.testing.assert_close(again[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "images"), BACKBONES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_flow_only_where_the_layout_says(layout: str, name: str, images: int, checkpointing: bool) -> None:
    """The score of one response as a function of the input embeddings, with recomputed layers too."""
    model = reward_model(name, layout, fresh=True).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    row = pack(model, random_group(random.Random(3), 4, images=images))
    batch = collate([row])
    caught: list[torch.Tensor] = []

    def catch(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    handle = model.get_input_embeddings().register_forward_hook(catch)
    scores = model(**batch.model_inputs()).scores[0]
    handle.remove()
    j = 1
    (gradient,) = torch.autograd.grad(scores[j], caught[0])
    reached = gradient[0].abs().sum(-1) > 0
    text = row.kinds == 0
    for i in range(4):
        own = reached[(row.segments == i + 1) & text]
        expected = {"causal": i <= j, "isolated": i == j, "set": True}[layout]
        assert own.any() == (expected and len(own) > 0), f"response {i}"
        assert own.all() == (expected or len(own) == 0), f"response {i}"
    assert reached[row.segments == 0].any()
