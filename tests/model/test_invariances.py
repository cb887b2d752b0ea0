"""What the layouts promise about scores, in float32 on whole models.

Tolerances: see `tiny_models.ROUNDING`. What must not break these silently is in `model/test_invariances_guards.py`.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from stock_reference import stock_reference
from tiny_models import (
    BACKBONES,
    CASES,
    LAYOUTS,
    ROUNDING,
    VISIBLE_CHANGE,
    assert_close,
    mixed_batch,
    pack,
    random_group,
    random_text,
    reward_model,
    score,
)

from mr_reward.model.rows import Rows, collate

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
        # A policy's tokens stand where `generate` puts them, which for a video under M-RoPE is not where one forward
        # over prompt and response would (transformers 5.23 leaves out the video's time axis there). Many responses:
        # for speed.
        read = stock.generated if (group.videos and stock.has_axes) or n > 5 else stock.alone
        assert_close(found, read(group), ROUNDING)


@pytest.mark.parametrize(
    ("name", "images", "videos"), [("qwen3_vl", 2, 0), ("qwen2_5_vl", 2, 0), ("molmo2", 2, 0), ("molmo2", 0, 1)]
)
def test_the_two_stock_paths_agree(name: str, images: int, videos: int) -> None:
    """Otherwise the test above would compare images and videos with different things."""
    group = random_group(random.Random(5), 3, images=images, videos=videos)
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
    read = stock.generated if videos and stock.has_axes else stock.alone
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
    batch = collate([pack(model, group) for group in groups], model.adapter, padding_side)
    free = (batch.segments < 0) | (batch.kinds > 0)
    assert (batch.segments < 0).any()
    junk = torch.randint_like(batch.input_ids, 256)
    with torch.no_grad():
        before = model(batch).scores
        after = model(replace(batch, input_ids=torch.where(free, junk, batch.input_ids))).scores
    # Padding attends to itself only and its values are multiplied by exact zeros.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "images"), BACKBONES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "mr_group"])
def test_every_backend_equals_eager(backend: str, layout: str, name: str, images: int) -> None:
    groups = mixed_batch(random.Random(2), 5, images, 0)
    eager, other = (reward_model(name, layout, backend=backend) for backend in ("eager", backend))
    assert (eager.attention_backend, other.attention_backend) == ("eager", backend)
    for padding_side in ("left", "right"):
        for found, expected in zip(
            score(other, groups, padding_side), score(eager, groups, padding_side), strict=True
        ):
            assert_close(found, expected, ROUNDING)
    assert other.fast_path.num_fallbacks == 0


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

    def positions(batch: Rows) -> torch.Tensor:
        return model.adapter.position_ids(
            model.backbone, batch.input_ids, batch.segments, batch.offsets, dict(batch.media)
        )

    batches = {side: collate(rows, model.adapter, side) for side in ("left", "right")}
    for i, row in enumerate(rows):
        expected = positions(collate([row], model.adapter))[..., 0, :]
        assert int(expected.min()) == 0
        for batch in batches.values():
            assert torch.equal(positions(batch)[..., i, :][..., batch.segments[i] >= 0], expected)
        # Every response starts at the position after the prompt, or runs on from the one before it.
        segments, offsets = row.segments[0], row.offsets[0]
        start = expected[..., segments == 0].max() + 1
        assert torch.equal(expected[..., segments > 0], (start + offsets[segments > 0]).expand_as(
            expected[..., segments > 0]
        ))  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa", "mr_group"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_vl", "molmo2", "llama"])
def test_what_the_backbone_is_given(name: str, layout: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reward_model(name, layout, backend=backend)
    model.reads_flat()
    seen: dict[str, Any] = {}
    forward = model.backbone.forward

    def recorded(**arguments: Any) -> Any:
        seen.update(arguments)
        return forward(**arguments)

    monkeypatch.setattr(model.backbone, "forward", recorded)
    score(model, mixed_batch(random.Random(13), 3, int(name != "llama"), 0), "left")
    batch_size, length, _ = seen["inputs_embeds"].shape
    assert seen["use_cache"] is False and seen.get("past_key_values") is None and "input_ids" not in seen
    assert not seen.get("output_hidden_states"), "the hidden states of all layers are not stored"
    if backend == "mr_group":
        # One row without padding, and no mask that would be looked at.
        assert (batch_size, length) == (1, len(seen["group_plan"].tokens))
        assert seen["attention_mask"].shape == (1, 1, 1, 1)
    else:
        shape = (batch_size, length) if layout == "causal" else (batch_size, 1, length, length)
        assert batch_size == 3 and seen["attention_mask"].shape == shape
    # The row of text, then time, height and width.
    assert seen["position_ids"].shape == ((4,) if name == "qwen3_vl" else ()) + (batch_size, length)
