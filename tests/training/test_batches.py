"""What the Trainer draws: orders, subsets, negatives and mixtures follow from (seed, epoch, index) alone."""

from __future__ import annotations

import logging
import random
from collections import Counter

import pytest

from mr_reward import ResponseGroup
from mr_reward.data.degenerate import MASTER_KEYS, with_degenerate_negative
from mr_reward.errors import ConfigurationError, GroupError, OverLengthError
from mr_reward.model.rows import Packer
from mr_reward.templates.rendering import Renderer
from mr_reward.training.batches import (
    CheckedGroups,
    EvaluationGroups,
    TrainingGroups,
    check_groups,
)
from mr_reward.worlds import tiny


def group(n: int, name: str = "g", ranks: list[int] | None = None, words: int = 4) -> ResponseGroup:
    """Response i holds its rank, so that a label that moved away from its response shows."""
    ranks = ranks if ranks is not None else list(range(1, n + 1))
    texts = [f"rank {rank} of {name} number {i} " + "x" * words for i, rank in enumerate(ranks)]
    return ResponseGroup(prompt=name, responses=texts, rankings=ranks, id=name)


def checked(*groups: ResponseGroup) -> CheckedGroups:
    return [(group, 10) for group in groups]


def packer(max_tokens: int = 4096, over_length: str = "error") -> Packer:
    return Packer(Renderer(tiny.build_tokenizer()), layout="set", max_tokens=max_tokens, over_length=over_length)


def rank_in_text(text: str) -> int:
    return int(text.split()[1])


def test_orders_change_with_the_epoch_and_repeat_with_the_seed() -> None:
    data = TrainingGroups([checked(*(group(5, str(i)) for i in range(20)))], seed=3)
    first = [item.responses for item in data]
    assert [item.responses for item in data] == first, "reading twice draws the same items"
    data.set_epoch(1)
    second = [item.responses for item in data]
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 5
    again = TrainingGroups([checked(*(group(5, str(i)) for i in range(20)))], seed=3)
    again.set_epoch(1)
    # Whatever was read before and in which order: a resumed run starts in the middle.
    assert [again[i].responses for i in reversed(range(20))] == second[::-1]
    other = TrainingGroups([checked(*(group(5, str(i)) for i in range(20)))], seed=4)
    assert [item.responses for item in other] != first


def test_every_order_is_drawn_about_equally_often() -> None:
    data = TrainingGroups([checked(group(3))])
    counts: Counter[tuple[str, ...]] = Counter()
    for epoch in range(1200):
        data.set_epoch(epoch)
        counts[tuple(data[0].responses)] += 1
    assert len(counts) == 6
    # 200 expected each, standard deviation 13.
    assert all(140 < count < 260 for count in counts.values()), counts


@pytest.mark.parametrize("max_responses", [2, 3, 4, 9])
@pytest.mark.parametrize("ranks", [[1, 2, 3, 4, 5], [1, 1, 1, 1, 2], [2, 2, 1, 2, 2]])
def test_subsets_hold_at_least_two_ranks_and_their_own_labels(ranks: list[int], max_responses: int) -> None:
    data = TrainingGroups([checked(group(5, ranks=ranks))], max_responses=max_responses)
    seen = set()
    for epoch in range(60):
        data.set_epoch(epoch)
        item = data[0]
        assert item.num_responses == min(max_responses, 5)
        assert len(set(item.rankings or ())) > 1
        texts = [rank_in_text(text) for text in item.responses]
        pairs = list(zip(texts, item.rankings or (), strict=True))
        assert all((a < c) == (b < d) for a, b in pairs for c, d in pairs), "a label left its response"
        seen |= set(item.responses)
    assert len(seen) == 5, "every response is drawn sooner or later"


@pytest.mark.parametrize("max_responses", [2, 3, 4])
@pytest.mark.parametrize("ranks", [[1, 1, 1, 1, 1, 2], [1, 2, 2, 2, 2, 2, 2]])
def test_where_a_response_stands_gives_nothing_away_in_a_repaired_subset(ranks: list[int], max_responses: int) -> None:
    """Most subsets of these are tied at first, and then get a response of another rank: in any slot."""
    data = TrainingGroups([checked(group(len(ranks), ranks=ranks))], max_responses=max_responses)
    rare = min(set(ranks), key=ranks.count)
    places: Counter[int] = Counter()
    for epoch in range(900):
        data.set_epoch(epoch)
        places.update(i for i, rank in enumerate(map(rank_in_text, data[0].responses)) if rank == rare)
    expected = 900 / max_responses
    assert all(abs(places[slot] - expected) < 4 * expected**0.5 for slot in range(max_responses)), places


def test_a_repair_takes_any_response_of_another_rank() -> None:
    """Not the best, not the worst, not the nearest: those that are alone in their rank come equally often."""
    ranks = [1, 2, 3, 3, 3, 3, 3, 3, 3, 4, 5]
    data = TrainingGroups([checked(group(len(ranks), ranks=ranks))], max_responses=2)
    counts: Counter[int] = Counter()
    for epoch in range(2000):
        data.set_epoch(epoch)
        counts.update(map(rank_in_text, data[0].responses))
    rare = [counts[rank] for rank in (1, 2, 4, 5)]
    mean = sum(rare) / 4
    assert all(abs(count - mean) < 4 * mean**0.5 for count in rare), counts


def test_degenerate_negatives_rank_last_and_come_as_often_as_asked() -> None:
    source = group(4)
    data = TrainingGroups([checked(source)], degenerate_negatives=0.3)
    kinds: Counter[str] = Counter()
    positions: Counter[int] = Counter()
    for epoch in range(400):
        data.set_epoch(epoch)
        item = data[0]
        added = [i for i, text in enumerate(item.responses) if text not in source.responses]
        assert len(added) == item.num_responses - 4 <= 1
        for i in added:
            text = item.responses[i]
            assert item.rankings is not None and item.rankings[i] == 5 == max(item.rankings)
            positions[i] += 1
            kinds["empty" if not text else "opener" if text in MASTER_KEYS else "truncated"] += 1
            if text and text not in MASTER_KEYS:
                assert any(whole.startswith(text) and len(text) <= len(whole) / 4 for whole in source.responses)
    assert 85 < sum(kinds.values()) < 155  # 120 expected, standard deviation 9
    assert set(kinds) == {"empty", "opener", "truncated"}
    assert len(positions) == 5, "its place must not give it away"


def test_a_group_that_already_holds_the_text_stays_as_it_is() -> None:
    source = ResponseGroup(prompt="a", responses=["", "", *MASTER_KEYS], rankings=[1, 1, 2, 2, 2, 2, 2, 2])
    for seed in range(20):
        added = with_degenerate_negative(source, random.Random(seed))
        assert added is source or added.responses[-1] not in source.responses


def test_mixture_has_the_asked_shares_and_loses_no_group() -> None:
    small, large = checked(*(group(2, f"s{i}") for i in range(5))), checked(*(group(2, f"l{i}") for i in range(60)))
    data = TrainingGroups([small, large], weights=[1, 3])
    names = Counter((item.id or "")[0] for item in data)
    assert names == {"s": 20, "l": 60}
    assert {item.id for item in data} == {g.id for g, _ in [*small, *large]}
    repeats = {tuple(item.responses) for item in data if item.id == "s0"}
    assert len(repeats) == 2, "a repeated group comes in other orders"
    assert len(TrainingGroups([small, large])) == 65


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1.0]}, "1.0.*2 data sets"),
        ({"weights": [1.0, 0.0]}, "positive"),
        ({"max_responses": 1}, "max_responses=1"),
        ({"degenerate_negatives": 1.5}, "degenerate_negatives=1.5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        TrainingGroups([checked(group(2)), checked(group(2))], **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="eval_orders=3"):
        EvaluationGroups([group(2)], num_orders=3)


def test_all_tied_groups_are_dropped_from_training_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    tied = group(3, ranks=[1, 1, 1])
    with caplog.at_level(logging.WARNING):
        kept = check_groups([group(3), tied], packer(), "training", show_progress=False)
    assert len(kept) == 1
    assert "dropped 1 of 2 groups, all their responses are tied" in caplog.text
    assert len(check_groups([tied], packer(), "val", training=False, show_progress=False)) == 1
    with pytest.raises(GroupError, match="1 all tied"):
        check_groups([tied], packer(), "training", show_progress=False)


def test_a_subset_is_measured_by_its_longest_responses() -> None:
    """A group that does not fit whole is kept if every subset fits."""
    wide = group(6, words=50)
    whole = packer().pack(wide)
    assert whole is not None
    limit = packer(whole.num_tokens - 1)
    with pytest.raises(OverLengthError):
        check_groups([wide], limit, "training", show_progress=False)
    kept = check_groups([wide], limit, "training", max_responses=5, show_progress=False)
    assert [g for g, _ in kept] == [wide]


@pytest.mark.parametrize("max_responses", [None, 2])
def test_no_drawn_row_is_longer_than_the_check_said(max_responses: int | None) -> None:
    rng = random.Random(0)
    groups = [group(4, str(i), words=rng.randint(0, 40)) for i in range(6)]
    groups.append(ResponseGroup(prompt="short", responses=["a", "b"], rankings=[1, 2]))  # a master key is longer
    # Tokens count and not characters; a quarter of a long response is longer than any master key.
    groups.append(
        ResponseGroup(prompt="wide", responses=["\N{GRINNING FACE}" * 8, "a" * 20, "b" * 9], rankings=[1, 2, 3])
    )
    groups.append(ResponseGroup(prompt="long", responses=["word " * 200, "a"], rankings=[1, 2]))
    kept = check_groups(
        groups, packer(), "training", max_responses=max_responses, degenerate_negatives=True, show_progress=False
    )
    data = TrainingGroups([kept], max_responses=max_responses, degenerate_negatives=1.0)
    longest = [0] * len(data)
    for epoch in range(40):
        data.set_epoch(epoch)
        for i, item in enumerate(data):
            row = packer().pack(item)
            assert row is not None
            longest[i] = max(longest[i], row.num_tokens)
    assert all(found <= said for found, said in zip(longest, data.num_tokens, strict=True))
    assert longest[6] == data.num_tokens[6], "the bound is reached"


def test_evaluation_orders() -> None:
    data = EvaluationGroups([group(5, str(i)) for i in range(8)], num_orders=2)
    assert len(data) == 16
    assert [data[i].responses for i in range(8)] == [g.responses for g in data.groups]
    assert any(data[8 + i].responses != data[i].responses for i in range(8))
    assert all(sorted(data[8 + i].responses) == sorted(data[i].responses) for i in range(8))
    orders = [EvaluationGroups(data.groups, num_orders=2, seed=seed).orders for seed in (0, 0, 1)]
    assert orders[0] == orders[1] == data.orders and orders[0][:8] == orders[2][:8] and orders[0][8:] != orders[2][8:]


def test_a_prompt_that_fills_the_row_is_dropped_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing to cut: under `truncate_responses` the group goes, counted."""
    long = ResponseGroup(prompt="p" * 500, responses=["a", "b"], rankings=[1, 2], id="long")
    with caplog.at_level(logging.WARNING):
        kept = check_groups([group(2), long], packer(200, "truncate_responses"), "training", show_progress=False)
    assert [g.id for g, _ in kept] == ["g"]
    assert "dropped 1 of 2 groups" in caplog.text
    with pytest.raises(OverLengthError, match="long"):
        check_groups([group(2), long], packer(200), "training", show_progress=False)
