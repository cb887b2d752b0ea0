"""Counts of a set of groups, by hand."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image
from rich.console import Console

from mr_reward import ResponseGroup
from mr_reward.data.stats import group_stats, stats_table

GROUPS = [
    ResponseGroup(prompt="a", responses=["1234", "12"], rankings=[1, 2], source="x"),
    ResponseGroup(prompt="a", responses=["1", "12", "123"], rankings=[2, 1, 1], images=[Image.new("RGB", (2, 2))]),
    ResponseGroup(prompt="b", responses=["1", "2"], rankings=[1, 1], videos=[["f.png"]]),
    ResponseGroup(prompt="c", responses=["1"]),
]


def test_counts_by_hand() -> None:
    found = group_stats(GROUPS, "four")
    assert (found.num_groups, found.sizes) == (4, {1: 1, 2: 2, 3: 1})
    assert (found.with_ties, found.all_tied, found.unranked) == (2, 1, 1)
    assert found.modalities == {"text": 2, "image": 1, "video": 1}
    assert found.repeated_prompts == 0, "the same words about a picture are another prompt"
    assert group_stats([*GROUPS, GROUPS[1]]).repeated_prompts == 1
    assert found.tied_pairs == 2 / 5
    assert found.longest_is_best == 1.0
    assert found.lengths == (15 / 8, 1.5, 3.0)
    assert (found.best_length, found.other_length) == (11 / 5, 3 / 2)
    # The all-tied group has no best place. The tie for first counts half at each of its places.
    assert found.best_positions == {0: 1.0, 1: 0.5, 2: 0.5}
    assert found.expected_positions == {0: 1 / 2 + 1 / 3, 1: 1 / 2 + 1 / 3, 2: 1 / 3}
    assert found.leaking_position is None, "too few groups to say"


@pytest.mark.parametrize(("count", "p95"), [(1, 1), (2, 1), (20, 19), (21, 20), (100, 95), (101, 96)])
def test_the_95th_percentile_by_counting(count: int, p95: int) -> None:
    groups = [ResponseGroup(prompt="p", responses=["x" * (i + 1)]) for i in reversed(range(count))]
    assert group_stats(groups).lengths[2] == p95


def test_ties_and_single_responses_by_hand() -> None:
    """Of equally long responses the first counts as the longest; a group of one response has no order to tie in."""
    first, second = (
        ResponseGroup(prompt="p", responses=["aa", "bb", "c"], rankings=r) for r in ([1, 2, 3], [2, 1, 3])
    )
    assert (group_stats([first]).longest_is_best, group_stats([second]).longest_is_best) == (1.0, 0.0)
    single = group_stats([ResponseGroup(prompt="p", responses=["a"], rankings=[1])])
    assert (single.all_tied, single.with_ties, single.unranked, single.best_positions) == (0, 0, 0, {})


def test_a_picture_in_memory_is_its_pixels_and_their_shape() -> None:
    """A red bar that stands is not one that lies."""
    pictures = [Image.new("RGB", size, "red") for size in ((2, 8), (8, 2), (4, 4), (2, 8))]
    groups = [ResponseGroup(prompt="p", responses=["a"], images=[picture]) for picture in pictures]
    assert group_stats(groups[:3]).repeated_prompts == 0
    assert group_stats(groups).repeated_prompts == 1


def groups_with_best_at(place: int | None, count: int = 60) -> list[ResponseGroup]:
    rng = random.Random(0)
    made = []
    for i in range(count):
        ranks = [2, 3, 4]
        ranks.insert(place if place is not None else rng.randrange(4), 1)
        made.append(ResponseGroup(prompt=str(i), responses=["a", "b", "c", "d"], rankings=ranks))
    return made


def test_an_order_that_gives_the_answer_away_is_seen() -> None:
    for place in range(4):
        assert group_stats(groups_with_best_at(place)).leaking_position == place
    assert group_stats(groups_with_best_at(None)).leaking_position is None


@pytest.mark.parametrize(("first_wins", "leaks"), [(0.5, False), (0.56, False), (0.65, True), (0.35, True)])
def test_a_lean_to_one_side_is_seen_in_pairs(first_wins: float, leaks: bool) -> None:
    ranks = [[1, 2] if i < first_wins * 1000 else [2, 1] for i in range(1000)]
    groups = [ResponseGroup(prompt=str(i), responses=["a", "b"], rankings=r) for i, r in enumerate(ranks)]
    assert (group_stats(groups).leaking_position is not None) == leaks


def test_the_table_shows_it() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(stats_table([group_stats(groups_with_best_at(0), "leaky"), group_stats(GROUPS, "few")]))
    text = console.export_text()
    assert "leaky" in text and "yes, place 1; shuffle" in text and "1: 100%" in text
    assert "image: 1" in text
