"""How far layers see and which blocks see each other, as masks have it; and dropout, by whatever name it goes."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import CONFIG_MAPPING

from mr_reward.attention.backends import attention_mask, flat_arguments
from mr_reward.attention.plan import GroupPlan
from mr_reward.attention.reach import Reach, has_attention_dropout
from mr_reward.layouts import LAYOUTS, plan_row, visible


def test_a_window_does_not_part_media_that_see_each_other() -> None:
    plan = plan_row("isolated", 6, [2])
    segments, kinds = plan.segments[None], plan.kinds[None]
    blocks = torch.tensor([[-1, 0, 0, 0, 0, -1, -1, -1, -1]])
    masks = attention_mask(
        "isolated", "sdpa", segments, kinds, torch.float32, blocks, torch.arange(9)[None], {"x": Reach(window=2)}
    )
    found = masks["x"][0, 0].int()
    assert found[1].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert found[4].tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert found[5].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0], "text behind them has its window"


def test_a_window_does_not_part_comparisons_from_summaries() -> None:
    """Of the other responses, however short they are: what stands before its own summary it sees by its window."""
    plan = plan_row("set", 1, [3, 1])
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 2, 3]])
    mask = attention_mask(
        "set", "sdpa", plan.segments[None], plan.kinds[None], torch.float32, None, places, Reach(window=2)
    )
    found = mask[0, 0].int()
    assert found[5].tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 0], "the summary of a response that ended long before"
    assert found[8].tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 1]
    assert found[4].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0], "a summary has its window"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "attention_dropout"),
        ("gpt2", "attn_pdrop"),
        ("bert", "attention_probs_dropout_prob"),
        ("opt", "attention_dropout"),
        ("codegen", "attn_pdrop"),
    ],
)
def test_dropout_of_attention_by_every_name(family: str, name: str) -> None:
    others = {key for key in CONFIG_MAPPING[family]().to_dict() if re.search(r"drop|layerdrop", key)} - {name}
    assert has_attention_dropout(CONFIG_MAPPING[family](**{name: 0.1}, **dict.fromkeys(others, 0.0)))
    assert not has_attention_dropout(CONFIG_MAPPING[family](**{name: 0.0}, **dict.fromkeys(others, 0.1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_blocks_are_seen_as_the_dense_mask_has_them(layout: str) -> None:
    """By group attention and by FlexAttention, in a padded batch: two blocks side by side, and one in another row."""
    plans = [plan_row(layout, 7, [2, 0]), plan_row(layout, 3, [1]), plan_row(layout, 2, [3])]
    longest = max(len(plan.segments) for plan in plans)
    shape = (len(plans), longest)
    segments, kinds, blocks = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for i, plan in enumerate(plans):
        segments[i, longest - len(plan.segments) :] = plan.segments
        kinds[i, longest - len(plan.segments) :] = plan.kinds
    blocks[0, 1:6] = torch.tensor([0, 0, 1, 1, -1])
    start = longest - len(plans[1].segments)
    blocks[1, start : start + 2] = 0
    expected = visible(layout, segments, kinds, blocks)

    plan = GroupPlan.of(layout, segments, kinds, blocks)
    masks = {block.start: block.mask for block in plan.blocks}
    assert list(masks) == [0, len(plans[0].segments)], "the last row has no block"
    for i, mask in enumerate(masks.values()):
        prompt = (segments[i] == 0).nonzero()[:, 0]
        assert torch.equal(mask, expected[i][prompt][:, prompt])

    flex = flat_arguments(layout, "flex_attention", plan, segments, kinds, blocks)["attention_mask"]
    query, key = torch.arange(len(plan.tokens))[:, None], torch.arange(len(plan.tokens))[None]
    found = flex.mask_mod(torch.tensor(0), torch.tensor(0), query, key)
    rows, places = plan.tokens // longest, plan.tokens % longest
    same_row = rows[:, None] == rows[None, :]
    assert torch.equal(found, same_row & expected[rows[:, None], places[:, None], places[None, :]])
