"""What keeps the layouts from breaking silently: controls that break them, refusals, duplicates, gradients."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    BACKBONES,
    LAYOUTS,
    ROUNDING,
    VISIBLE_CHANGE,
    assert_close,
    pack,
    random_group,
    reward_model,
    score,
)

from mr_reward import GroupScorer, MultiResponseRewardConfig, MultiResponseRewardModel, ResponseGroup
from mr_reward.errors import BackendError, ConfigurationError
from mr_reward.model.rows import collate

# --- negative controls: ways to break isolation silently ---


def broken_scores(model: MultiResponseRewardModel, group: ResponseGroup, use_cache: bool = False) -> torch.Tensor:
    """The row read by hand with a 2-D mask where the layout's belongs; same tokens, same positions."""
    batch = collate([pack(model, group)], model.adapter)
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
            **model.adapter.forward_arguments(model.backbone, batch.input_ids, media),
        ).last_hidden_state
        return model.head(hidden[:, batch.score_sites[0]])[0]


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
@pytest.mark.parametrize("name", ["qwen3_vl", "molmo2", "llama"])
def test_forward_refuses_arguments_that_would_break_the_layout(name: str, layout: str) -> None:
    model = reward_model(name, layout)
    rows = collate([pack(model, random_group(random.Random(7), 3))], model.adapter)
    shape = rows.input_ids.shape
    forbidden = {
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "position_ids": torch.arange(shape[1])[None],
        "inputs_embeds": torch.zeros(*shape, 64),
        "past_key_values": ((),),
        "use_cache": True,
    }
    for key, value in forbidden.items():
        with pytest.raises(BackendError, match=f"forward got {key}.*{layout}.*leave it out"):
            model(rows, **{key: value})
    # A mask of one zero compares equal to False; it is a mask all the same.
    with pytest.raises(BackendError, match="attention_mask"):
        model(rows, attention_mask=torch.zeros(1, dtype=torch.long))
    # What means "none" is harmless.
    with torch.no_grad():
        model(rows, attention_mask=None, use_cache=False)
    with pytest.raises(ConfigurationError, match="pixel_valuez"):
        model(rows, pixel_valuez=torch.zeros(1))
    with pytest.raises(ConfigurationError, match="pixel_valuez"):
        model(replace(rows, media={"pixel_valuez": torch.zeros(1)}))


@pytest.mark.parametrize("layout", ["isolated", "set"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llama"])
def test_a_backend_changed_after_construction_is_refused(name: str, layout: str) -> None:
    model = reward_model(name, layout, fresh=True)
    group = random_group(random.Random(8), 2)
    before = score(model, [group])[0]
    # Needs packages that are not here, so the choice is written where transformers would write it.
    model.backbone.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(BackendError, match="'flash_attention_2' cannot express.*'mr_group' or 'sdpa'"):
        score(model, [group])
    model.set_attn_implementation("sdpa")
    assert_close(score(model, [group])[0], before, ROUNDING)
    model.set_attn_implementation("eager")  # the mask follows the backend
    assert_close(score(model, [group])[0], before, ROUNDING)


@pytest.mark.parametrize("layout", ["isolated", "set"])
def test_a_backend_that_cannot_is_refused_at_construction(layout: str) -> None:
    shared = reward_model("llama")
    backbone = copy.deepcopy(shared.backbone)
    options = {"layout": layout, "attn_implementation": "paged|eager"}
    with pytest.raises(BackendError, match=f"paged.eager.*{layout}.*'mr_group' or 'sdpa'"):
        MultiResponseRewardModel(MultiResponseRewardConfig(backbone_config=backbone.config, **options), backbone)
    assert shared.attention_backend == "mr_group"


# --- duplicates ---


@pytest.mark.parametrize("num_orders", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "images"), BACKBONES)
def test_identical_responses_share_a_score_bit_for_bit(name: str, images: int, layout: str, num_orders: int) -> None:
    rng = random.Random(num_orders)
    group = random_group(rng, 3, images=images)
    a, b, c = group.responses
    duplicates = replace(group, prompt=group.messages, responses=[b, a, b, c, a, b])
    model = reward_model(name, layout)
    first, second = GroupScorer(model, num_orders=num_orders).score([duplicates, random_group(rng, 4, longest=40)])
    assert first is not None and second is not None
    assert first[0] == first[2] == first[5]
    assert first[1] == first[4]
    assert len({*first}) == 3 and len(first) == 6
    # Scoring one and copying it is scoring the group without the duplicates.
    expected = GroupScorer(model, num_orders=1).score([duplicates.select([0, 1, 3])])[0]
    if layout != "causal" or num_orders == 1:
        assert_close(torch.tensor(first)[[0, 1, 3]], torch.tensor(expected), ROUNDING)
    # Nothing about it is random.
    assert GroupScorer(model, num_orders=num_orders).score([duplicates]) == GroupScorer(
        model, num_orders=num_orders
    ).score([duplicates])


# --- gradients ---


def gradients(model: MultiResponseRewardModel, groups: list[ResponseGroup]) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    batch = collate([pack(model, group) for group in groups], model.adapter)
    scores = model(batch).scores
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
    assert model.reads_flat()  # its check calls the embedding too
    if checkpointing:
        model.gradient_checkpointing_enable()
    row = pack(model, random_group(random.Random(3), 4, images=images))
    batch = collate([row], model.adapter)
    caught: list[torch.Tensor] = []

    def catch(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    handle = model.get_input_embeddings().register_forward_hook(catch)
    scores = model(batch).scores[0]
    handle.remove()
    j = 1
    (gradient,) = torch.autograd.grad(scores[j], caught[0])
    reached = gradient[0].abs().sum(-1) > 0
    segments, text = row.segments[0], row.kinds[0] == 0
    for i in range(4):
        own = reached[(segments == i + 1) & text]
        expected = {"causal": i <= j, "isolated": i == j, "set": True}[layout]
        assert own.any() == (expected and len(own) > 0), f"response {i}"
        assert own.all() == (expected or len(own) == 0), f"response {i}"
    assert reached[segments == 0].any()
