"""How far layers see, as masks have it; and dropout, by whatever name a family has it."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import CONFIG_MAPPING

from mr_reward.attention.backends import attention_mask
from mr_reward.attention.reach import Reach, has_attention_dropout
from mr_reward.layouts import plan_row


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
