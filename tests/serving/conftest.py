"""What the tests of the scoring server share."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tiny_models import random_group, reward_model

from mr_reward import GroupScorer, ResponseGroup
from mr_reward.scorers.remote import TOKEN_VARIABLE


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own token stays out of it."""
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture
def scorer() -> GroupScorer:
    """Of texts; groups that do not fit are dropped, as `mr-reward serve` does by default."""
    return GroupScorer(reward_model("llama"), max_tokens_per_batch=2000, over_length="drop_group")


@pytest.fixture
def groups() -> Callable[[int], list[ResponseGroup]]:
    """Random groups of 1 to 5 responses."""

    def draw(count: int, seed: int = 0) -> list[ResponseGroup]:
        rng = random.Random(seed)
        return [random_group(rng, rng.randint(1, 5), longest=30, id=f"row {i}") for i in range(count)]

    return draw
