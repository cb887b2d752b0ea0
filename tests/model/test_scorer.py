"""`GroupScorer`: order, budgets, drops, orders of responses, and what must not go on silently."""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import LAYOUTS, assert_close, pack, random_group, random_image, random_text, reward_model, score

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.errors import ConfigurationError, GroupError, MediaError, NonFiniteScoreError, OverLengthError
from mr_reward.model.rows import Rows

ROUNDING = 1e-5  # as in test_invariances

Spy = Callable[[MultiResponseRewardModel], list[tuple[int, int]]]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """The (rows, tokens without padding) of every forward pass of a model from here on."""

    def watch(model: MultiResponseRewardModel) -> list[tuple[int, int]]:
        sizes: list[tuple[int, int]] = []
        forward = model.forward

        def recorded(rows: Rows, **inputs: Any) -> Any:
            sizes.append((len(rows.segments), int((rows.segments >= 0).sum())))
            assert not torch.is_grad_enabled() and not model.training
            return forward(rows, **inputs)

        monkeypatch.setattr(model, "forward", recorded)
        return sizes

    return watch


def many_groups(rng: random.Random, count: int = 12) -> list[ResponseGroup]:
    return [random_group(rng, rng.randint(1, 5), longest=rng.choice([2, 10, 40])) for _ in range(count)]


def alone(model: MultiResponseRewardModel, group: ResponseGroup) -> torch.Tensor:
    return score(model, [group])[0]


# --- order and shape ---


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_group_and_dicts_are_scored_as_groups_are(seed: int) -> None:
    rng = random.Random(seed)
    scorer = GroupScorer(reward_model("qwen3_vl", "set"))
    picture, other = random_image(rng), random_image(rng)
    rows: list[dict[str, Any]] = [
        {"prompt": random_text(rng), "responses": ["a", random_text(rng)], "image": picture, "rankings": None},
        {"prompt": random_text(rng), "responses": [random_text(rng)] * 3, "images": [picture, other], "id": "mine"},
        {
            "prompt": [{"role": "user", "content": random_text(rng)}],
            "responses": ("", "b"),
            "video": [picture, picture],
        },
    ]
    media = [{"images": [picture]}, {"images": [picture, other]}, {"videos": [[picture, picture]]}]
    groups = [
        ResponseGroup(prompt=row["prompt"], responses=row["responses"], **own)
        for row, own in zip(rows, media, strict=True)
    ]
    expected = [scorer.score([group])[0] for group in groups]
    for group, row, scores in zip(groups, rows, expected, strict=True):
        assert scorer.score(group) == scorer.score(row) == scorer.score([row]) == [scores]
    mixed = scorer.score((rows[0], groups[1], rows[2]))
    assert all(a == pytest.approx(b, abs=ROUNDING) for a, b in zip(mixed, expected, strict=True))
    assert scorer.score([]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "?"}, "row 0 lacks responses, expected prompt, responses and any of images"),
        (
            [{"prompt": "?", "responses": ["a"]}, {"prompt": "?", "response": "a"}],
            "row 1 lacks responses and has response",
        ),
        ({"prompt": "?", "responses": ["a"], "image_path": "a.png"}, "row 0 has image_path, expected"),
        ({"prompt": "?", "responses": ["a"], "image": "a", "images": ["b"]}, "image and images are both given"),
        ("text", "got str, expected groups"),
        (["text"], "row 0 is str, expected a ResponseGroup or a dict"),
    ],
)
def test_what_is_no_group_is_told(given: Any, message: str) -> None:
    with pytest.raises(GroupError, match=message):
        GroupScorer(reward_model("llama")).score(given)


@pytest.mark.parametrize("budget", [200, 600, 16384])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_come_in_input_order(layout: str, budget: int) -> None:
    model = reward_model("llama", layout)
    groups = many_groups(random.Random(budget))
    scores = GroupScorer(model, max_tokens_per_batch=budget, over_length="truncate_responses").score(groups)
    assert [len(row or ()) for row in scores] == [group.num_responses for group in groups]
    for group, row in zip(groups, scores, strict=True):
        assert type(row) is list and all(type(value) is float for value in row)
        if pack(model, group).num_tokens <= budget:
            assert_close(torch.tensor(row), alone(model, group), ROUNDING)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_text_images_and_videos_in_one_batch(name: str, layout: str, spy: Spy) -> None:
    rng = random.Random(4)
    model = reward_model(name, layout)
    groups = [
        random_group(rng, 3, images=2),
        random_group(rng, 4),
        random_group(rng, 2, videos=1),
        random_group(rng, 5, images=1),
        random_group(rng, 1, longest=40),
        random_group(rng, 3, images=1, videos=2),
    ]
    expected = [alone(model, group) for group in groups]
    sizes = spy(model)
    scores = GroupScorer(model).score(groups)
    assert [rows for rows, _ in sizes] == [6], "all in one forward pass"
    for found, one in zip(scores, expected, strict=True):
        assert_close(torch.tensor(found), one, ROUNDING)


def test_no_groups_give_no_scores(spy: Spy) -> None:
    model = reward_model("llama")
    sizes = spy(model)
    assert GroupScorer(model).score([]) == [] and GroupScorer(model).score_detailed([]) == []
    assert sizes == []


def test_one_empty_response() -> None:
    for layout in LAYOUTS:
        (scores,) = GroupScorer(reward_model("llama", layout)).score([ResponseGroup(prompt="", responses=[""])])
        assert scores is not None and len(scores) == 1 and math.isfinite(scores[0])


# --- budgets ---


@pytest.mark.parametrize("budget", [150, 300, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_forward_keeps_the_budget(layout: str, budget: int, spy: Spy) -> None:
    model = reward_model("llama", layout)
    sizes = spy(model)
    groups = [group for group in many_groups(random.Random(1)) if pack(model, group).num_tokens <= budget]
    GroupScorer(model, max_tokens_per_batch=budget).score(groups)
    assert sum(rows for rows, _ in sizes) == len(groups)
    assert all(tokens <= budget for _, tokens in sizes)
    assert max(rows for rows, _ in sizes) > 1, "rows share a forward"
    assert len(sizes) <= 1 + sum(tokens for _, tokens in sizes) / budget * 1.5, "passes are filled"


def test_padded_passes_keep_the_budget_too(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a dense mask the rows are padded, and padding counts."""
    model = reward_model("llama", "set", backend="sdpa")
    shapes: list[tuple[int, int]] = []
    forward = model.backbone.forward

    def recorded(inputs_embeds: torch.Tensor, **inputs: Any) -> Any:
        shapes.append(tuple(inputs_embeds.shape[:2]))
        return forward(inputs_embeds=inputs_embeds, **inputs)

    monkeypatch.setattr(model.backbone, "forward", recorded)
    GroupScorer(model, max_tokens_per_batch=600).score(many_groups(random.Random(1)))
    assert all(rows * tokens <= 600 for rows, tokens in shapes) and max(rows for rows, _ in shapes) > 1
    assert shapes[0][1] == max(tokens for _, tokens in shapes), "running out of memory shows at once"


def test_groups_that_do_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(2)
    model = reward_model("llama")
    short = [random_group(rng, 2, longest=5) for _ in range(3)]
    long = ResponseGroup(prompt="p", responses=["a", random_text(rng, 400, 300)], id="long")
    groups = [short[0], long, short[1], short[2]]

    with pytest.raises(OverLengthError, match="group 'long'"):
        GroupScorer(model, max_tokens_per_batch=200).score(groups)

    with caplog.at_level(logging.WARNING, logger="mr_reward"):
        results = GroupScorer(model, max_tokens_per_batch=200, over_length="drop_group").score_detailed(groups)
    assert caplog.messages == ["dropped 1 of 4 groups: over the token budget"]
    assert [result.scores is None for result in results] == [False, True, False, False]
    assert results[1].drop_reason == "over the token budget" and results[1].truncated == (False, False)
    assert all(results[i].drop_reason is None for i in (0, 2, 3))
    for i, group in ((0, short[0]), (2, short[1]), (3, short[2])):
        assert_close(torch.tensor(results[i].scores), alone(model, group), ROUNDING)
    scorer = GroupScorer(model, max_tokens_per_batch=200, over_length="drop_group")
    assert [row is None for row in scorer.score(groups)] == [False, True, False, False]
    assert scorer.score([long]) == [None]

    caplog.clear()
    scorer = GroupScorer(model, max_tokens_per_batch=200, over_length="truncate_responses")
    results = scorer.score_detailed(groups)
    assert [result.truncated for result in results] == [(False, False), (False, True), (False, False), (False, False)]
    assert all(result.scores is not None and result.drop_reason is None for result in results)
    assert caplog.messages == []


def test_truncated_flags_follow_twins_and_input_order() -> None:
    rng = random.Random(3)
    a, b = random_text(rng, 300, 250), random_text(rng, 300, 250)
    group = ResponseGroup(prompt="p", responses=["x", a, "x", b, a])
    for layout, num_orders in (("set", 1), ("causal", 3)):
        scorer = GroupScorer(
            reward_model("llama", layout),
            max_tokens_per_batch=200,
            over_length="truncate_responses",
            num_orders=num_orders,
        )
        (result,) = scorer.score_detailed([group])
        assert result.truncated == (False, True, False, True, True)
        assert result.scores is not None
        assert result.scores[0] == result.scores[2] and result.scores[1] == result.scores[4]


def test_the_context_of_the_backbone_is_a_limit_too() -> None:
    model = reward_model("llama", "causal", fresh=True)
    model.backbone.config.max_position_embeddings = 100
    assert model.context_tokens == 100
    group = ResponseGroup(prompt="p", responses=["x" * 60, "y" * 60])
    with pytest.raises(OverLengthError, match="a context of 100 positions"):
        GroupScorer(model).score([group])


# --- windows ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_calls_are_prepared_in_windows_beside_the_model(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    model = reward_model("llama", layout)
    scorer = GroupScorer(model, max_tokens_per_batch=3000)
    windows: list[tuple[int, str]] = []
    render_all = scorer.packer.renderer.render_all

    def recorded(groups: Any) -> Any:
        windows.append((len(groups), threading.current_thread().name))
        return render_all(groups)

    monkeypatch.setattr(scorer.packer.renderer, "render_all", recorded)
    groups = many_groups(rng, 300)
    scores = scorer.score(groups)
    assert len(windows) > 2 and sum(count for count, _ in windows) == 300
    assert windows[0] == (64, "MainThread") and all(name.startswith("preparing") for _, name in windows[1:])
    for i in (0, 63, 64, 150, 299):
        assert_close(torch.tensor(scores[i]), alone(model, groups[i]), ROUNDING)
    assert scorer.score(groups) == scores, "windows follow from the groups alone"
    assert {thread.name for thread in threading.enumerate() if thread.name.startswith("preparing")} == set()
    with pytest.raises(OverLengthError, match="group 'late'"):
        scorer.score([*groups, ResponseGroup(prompt="p", responses=["x" * 5000], id="late")])


# --- orders ---


def test_scores_are_averaged_over_orders() -> None:
    """Two responses have two orders: every average is made of the scores of both, in one proportion."""
    model = reward_model("llama", "causal")
    num_orders = 5
    proportions = set()
    for seed in range(6):
        group = random_group(random.Random(seed), 2)
        forward, backward = alone(model, group), alone(model, group.select([1, 0])).flip(0)
        (result,) = GroupScorer(model, num_orders=num_orders).score_detailed([group])
        found = torch.tensor(result.scores)
        candidates = [
            k for k in range(num_orders + 1)
            if torch.allclose(found, (k * forward + (num_orders - k) * backward) / num_orders, rtol=0, atol=ROUNDING)
        ]  # fmt: skip
        assert len(candidates) == 1 and candidates[0] >= 1, "the order of the input is one of them"
        (k,) = candidates
        proportions.add(k)
        share = k / num_orders
        # Standard deviation of a two-valued variable, averaged over the responses.
        spread = (share * (1 - share)) ** 0.5 * (forward - backward).abs().mean()
        assert result.order_spread == pytest.approx(float(spread), abs=ROUNDING)
    assert len(proportions) > 1, "the other orders are random"


def test_orders_are_the_same_in_any_batch_and_independent_of_the_random_state() -> None:
    model = reward_model("llama", "causal")
    groups = many_groups(random.Random(6), 5)
    scorer = GroupScorer(model, num_orders=4)
    together = scorer.score(groups)
    for seed, (group, found) in enumerate(zip(groups, together, strict=True)):
        random.seed(seed)
        torch.manual_seed(seed)
        named = replace(group, prompt=group.messages, id=f"group {seed}")
        assert_close(torch.tensor(found), torch.tensor(scorer.score([named])[0]), ROUNDING)


@pytest.mark.parametrize(("layout", "rows"), [("causal", 4), ("isolated", 1), ("set", 1)])
def test_only_causal_needs_several_orders(layout: str, rows: int, spy: Spy) -> None:
    model = reward_model("llama", layout)
    group = random_group(random.Random(7), 3)
    (single,) = GroupScorer(model).score_detailed([group])
    assert single.order_spread == 0
    sizes = spy(model)
    (result,) = GroupScorer(model, num_orders=4).score_detailed([group])
    assert sum(count for count, _ in sizes) == rows
    assert (result.order_spread > 0) == (layout == "causal")
    assert (result.scores == single.scores) == (layout != "causal")


def test_twins_take_no_room(spy: Spy) -> None:
    model = reward_model("llama")
    sizes = spy(model)
    scorer = GroupScorer(model)
    scorer.score([ResponseGroup(prompt="p", responses=["a", "b"])])
    scorer.score([ResponseGroup(prompt="p", responses=["a", "b", "a", "a", "b"])])
    assert sizes[0] == sizes[1]


# --- what must not go on ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_scores_name_the_group(layout: str, bad: float) -> None:
    model = reward_model("llama", layout, fresh=True)
    (token,) = model.processor("~", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = bad
    groups = [
        ResponseGroup(prompt="p", responses=["a", "b"], id="good"),
        ResponseGroup(prompt="p", responses=["a", "b~"], id="poisoned"),
    ]
    scores = GroupScorer(model).score(groups[:1])
    assert scores[0] is not None
    with pytest.raises(NonFiniteScoreError, match=r"group 'poisoned'.*weights \S*embed_tokens.weight are not finite"):
        GroupScorer(model).score(groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_of_finite_weights_is_told_apart(layout: str) -> None:
    model = reward_model("llama", layout, fresh=True)
    with torch.no_grad():
        model.head.out.weight.fill_(3e38)
    group = ResponseGroup(prompt="p", responses=["a", "b"], id="large")
    with pytest.raises(NonFiniteScoreError, match="group 'large'.*all weights are finite.*overflow in float32"):
        GroupScorer(model).score([group])


def test_unreadable_media_stop_the_call() -> None:
    groups = [random_group(random.Random(0), 2), ResponseGroup(prompt="p", responses=["a"], images=[b"x"], id="bad")]
    with pytest.raises(MediaError, match="'bad'"):
        GroupScorer(reward_model("qwen3_vl")).score(groups)


def test_wrong_options_are_refused() -> None:
    model = reward_model("llama")
    with pytest.raises(ConfigurationError, match="num_orders is 0, expected at least 1"):
        GroupScorer(model, num_orders=0)
    with pytest.raises(ConfigurationError, match="unknown over-length policy 'skip'"):
        GroupScorer(model, over_length="skip")
    with pytest.raises(ConfigurationError, match="token budget is 0"):
        GroupScorer(model, max_tokens_per_batch=0)
    bare = reward_model("llama", fresh=True)
    bare.processor = None
    with pytest.raises(ConfigurationError, match="no processor"):
        GroupScorer(bare)


# --- the model ---


def test_the_model_is_put_into_evaluation_mode() -> None:
    model = reward_model("llama", fresh=True).train()
    GroupScorer(model)
    assert not model.training


def test_dtype_is_of_the_backbone_only() -> None:
    model = reward_model("qwen3_vl", fresh=True)
    groups = [random_group(random.Random(8), 4, images=1)]
    (exact,) = GroupScorer(model).score(groups)
    (rough,) = GroupScorer(model, dtype=torch.bfloat16, device="cpu").score(groups)
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert exact is not None and rough is not None
    assert rough != exact
    # 8 bits of mantissa through three layers; the scores spread over 0.1 to 1.
    torch.testing.assert_close(torch.tensor(rough), torch.tensor(exact), rtol=0, atol=0.1)
