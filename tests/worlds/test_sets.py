"""The set worlds against their definition; their bounds against every order there is and judges that know the law."""

import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mr_reward.errors import ConfigurationError
from mr_reward.groups import ResponseGroup
from mr_reward.worlds.handwriting import SPLITS, TILE_SIZE, split_scans
from mr_reward.worlds.sets import (
    MAX_RESPONSES,
    SET_WORLDS,
    SetTask,
    answer_law,
    answer_levels,
    bounds,
    joint_bounds,
    make_set_groups,
    make_set_tasks,
    separate_bounds,
)

LABELS = load_digits().target
SIZES = (4, 8, 16)
RESULTS = Path(__file__).parents[2] / "docs" / "results.md"


def naive_law(world: str, digits: Sequence[int]) -> list[float]:
    """The table of the module, written down a second time."""
    if world == "consensus":
        return [0.6 if v == digits[0] else 0.4 / 9 for v in range(10)]
    if world == "novelty":
        return [0.2 if v in digits else 0.4 / 7 for v in range(10)]
    if world == "control":
        return [0.1] * 10
    weights = [{0: 2, 1: 2, 2: 1}.get(abs(v - digits[0]), 0) for v in range(10)]
    return [weight / sum(weights) for weight in weights]


def naive_ranks(world: str, digits: Sequence[int], said: Sequence[int]) -> list[int]:
    costs = []
    for value in said:
        if world == "closest":
            costs.append(abs(value - digits[0]))
        elif value not in digits:
            costs.append(9)
        else:
            costs.append(0 if world != "novelty" or Counter(said)[value] == 1 else 1)
    return [1 + len({other for other in costs if other < cost}) for cost in costs]


def said_in(group: ResponseGroup) -> list[int]:
    return [int(response[0]) for response in group.responses]


def weak_orders(values: Sequence[int]) -> list[dict[int, int]]:
    """Every order of the values, ties allowed: value -> place, 0 = top; the places have no gaps."""
    found = []
    for places in itertools.product(range(len(values)), repeat=len(values)):
        if set(places) == set(range(max(places) + 1)):
            found.append(dict(zip(values, places, strict=True)))
    return found


def picked(said: Sequence[int], ranks: Sequence[int], place: Callable[[int], float]) -> float:
    """Best of N of a judge that takes the lowest place and draws lots among equals."""
    top = min(map(place, said))
    chosen = [rank for value, rank in zip(said, ranks, strict=True) if place(value) == top]
    return sum(rank == 1 for rank in chosen) / len(chosen)


def pairs_right(said: Sequence[int], ranks: Sequence[int], place: Callable[[int], float]) -> tuple[float, int]:
    """How many ordered pairs the judge orders rightly, half for an equal place; and how many there are."""
    right, total = 0.0, 0
    for i, j in itertools.permutations(range(len(said)), 2):
        if ranks[i] < ranks[j]:
            total += 1
            right += (place(said[i]) < place(said[j])) + 0.5 * (place(said[i]) == place(said[j]))
    return right, total


@pytest.mark.parametrize("world", SET_WORLDS)
@pytest.mark.parametrize("size", [2, 5, 16])
def test_groups_follow_the_definition(world: str, size: int) -> None:
    tasks = make_set_tasks(world, "train", 60, seed=4)
    groups = make_set_groups(world, "train", 60, num_responses=size, seed=4)
    for task, group in zip(tasks, groups, strict=True):
        assert group.id == task.id and group.num_responses == size
        assert len(task.digits) == len(set(task.digits)) == (3 if world == "novelty" else 1)
        assert all(re.fullmatch("[0-9][a-zA-Z]{2}", response) for response in group.responses)
        assert len({response[1:] for response in group.responses}) == size, "no two texts are the same"
        said = said_in(group)
        assert list(group.rankings or ()) == naive_ranks(world, task.digits, said)
        assert max(group.rankings or ()) > 1
        assert world == "closest" or min(answer_levels(world, task.digits, said)) == 0, "somebody is right"
        assert answer_law(world, task.digits).tolist() == pytest.approx(naive_law(world, task.digits))
        assert group.images[0].tobytes() == task.image().tobytes()
        assert group.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": SET_WORLDS[world]}]


@pytest.mark.parametrize("world", SET_WORLDS)
def test_a_readable_picture_shows_scans_of_its_split_and_a_blurred_one_nothing(world: str) -> None:
    for split in SPLITS:
        for task in make_set_tasks(world, split, 40, seed=1):
            assert task.image().size == (max(len(task.scans), 1) * TILE_SIZE, TILE_SIZE)
            if world in ("novelty", "control"):
                assert task.digits == tuple(LABELS[list(task.scans)])
                assert set(task.scans) <= set(split_scans(split).tolist())
            else:
                other = replace(task, digits=((task.digits[0] + 1) % 10,))
                assert task.scans == () and task.image().tobytes() == other.image().tobytes()


@pytest.mark.parametrize("world", SET_WORLDS)
def test_without_pictures_the_prompt_says_what_can_be_read(world: str) -> None:
    tasks = make_set_tasks(world, "test", 30, seed=5)
    shown = make_set_groups(world, "test", 30, num_responses=6, seed=5)
    groups = make_set_groups(world, "test", 30, num_responses=6, seed=5, pictures=False)
    for task, picture, group in zip(tasks, shown, groups, strict=True):
        assert (group.responses, group.rankings, group.id) == (picture.responses, picture.rankings, picture.id)
        written = tuple(map(int, re.findall("[0-9]", str(group.prompt))))
        assert not group.images and written == (task.digits if world in ("novelty", "control") else ())


@pytest.mark.parametrize("world", SET_WORLDS)
def test_splits_share_no_picture_and_a_seed_gives_one_list(world: str) -> None:
    shown = {}
    for split in SPLITS:
        tasks = make_set_tasks(world, split, 100, seed=2)
        shown[split] = {scan for task in tasks for scan in (task.scans or (task.image().tobytes(),))}
        assert make_set_tasks(world, split, 130, seed=2)[:100] == tasks
    assert (
        not shown["train"] & shown["test"] | shown["train"] & shown["validation"] | shown["validation"] & shown["test"]
    )
    first, again, longer, other = (
        [group.responses for group in make_set_groups(world, "test", count, seed=seed)]
        for count, seed in ((20, 0), (20, 0), (25, 0), (20, 1))
    )
    assert first == again == longer[:20] and first != other


@pytest.mark.parametrize("world", SET_WORLDS)
def test_the_worlds_digits_and_marks_are_drawn_evenly(world: str) -> None:
    tasks = make_set_tasks(world, "train", 2000, seed=3)
    counts = Counter(digit for task in tasks for digit in task.digits)
    expected = sum(counts.values()) / 10
    assert all(abs(counts[digit] - expected) < 5 * expected**0.5 for digit in range(10)), counts
    groups = make_set_groups(world, "train", 1000, seed=3)
    best = Counter(
        response[1]
        for group in groups
        for response, rank in zip(group.responses, group.rankings or (), strict=True)
        if rank == 1
    )
    expected = sum(best.values()) / 52
    assert all(abs(best[mark] - expected) < 5 * expected**0.5 for mark in string.ascii_letters), best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [2, 3, 4])
def test_bounds_equal_the_best_of_all_orders_that_there_are(size: int, seed: int) -> None:
    """Three answers and truths with any law: all groups, all orders of a separate judge, all of a joint one."""
    rng = np.random.default_rng(seed)
    law = rng.dirichlet(np.ones(3), size=3)
    levels = np.abs(np.arange(3)[:, None] - np.arange(3)) if seed % 2 else 1 - np.eye(3, dtype=np.int64)
    groups = []  # (chance, what is said, ranks)
    for truth in range(3):
        own = []
        for said in itertools.product(range(3), repeat=size):
            ranks = [1 + int(levels[truth][v]) - int(min(levels[truth][list(said)])) for v in said]
            if len(set(ranks)) > 1:
                own.append((prod(law[truth][v] for v in said), said, ranks))
        groups += [(chance / sum(c for c, _, _ in own) / 3, said, ranks) for chance, said, ranks in own]

    def reached(order: dict[int, int], some: list) -> tuple[float, float]:
        pairs = [(chance, *pairs_right(said, ranks, order.__getitem__)) for chance, said, ranks in some]
        return (
            sum(chance * picked(said, ranks, order.__getitem__) for chance, said, ranks in some),
            sum(chance * right for chance, right, _ in pairs),
        )

    total = sum(chance * pairs_right(said, ranks, float)[1] for chance, said, ranks in groups)
    orders = weak_orders(range(3))
    separate = separate_bounds(law, levels, size)
    found = [reached(order, groups) for order in orders]
    assert separate.best_of_n == pytest.approx(max(best for best, _ in found), abs=1e-12)
    assert separate.pairwise == pytest.approx(max(right for _, right in found) / total, abs=1e-12)

    by_counts: dict[tuple[int, ...], list] = {}
    for group in groups:
        by_counts.setdefault(tuple(group[1].count(v) for v in range(3)), []).append(group)
    counts = np.array(sorted(by_counts))
    joint = joint_bounds(law, levels, counts, np.ones(1))
    each = [[reached(order, some) for order in orders] for some in by_counts.values()]
    assert joint.best_of_n == pytest.approx(sum(max(best for best, _ in one) for one in each), abs=1e-12)
    assert joint.pairwise == pytest.approx(sum(max(right for _, right in one) for one in each) / total, abs=1e-12)
    assert joint.best_of_n > separate.best_of_n - 1e-12 and joint.pairwise > separate.pairwise - 1e-12


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_separate_bound_of_novelty_is_the_best_of_all_orders(size: int) -> None:
    """0, 1, 2 are shown, 3 stands for everything else."""
    best = dict.fromkeys(range(75), 0.0)
    right = dict(best)
    chances, total = 0.0, 0.0
    for said in itertools.product(range(4), repeat=size):
        chance = prod(0.2 if v < 3 else 0.4 for v in said)
        ranks = naive_ranks("novelty", (0, 1, 2), said)
        if (
            1 not in [rank for rank, v in zip(ranks, said, strict=True) if v < 3 and said.count(v) == 1]
            or max(ranks) == 1
        ):
            continue
        chances += chance
        total += chance * pairs_right(said, ranks, float)[1]
        for i, order in enumerate(weak_orders(range(4))):
            best[i] += chance * picked(said, ranks, order.__getitem__)
            right[i] += chance * pairs_right(said, ranks, order.__getitem__)[0]
    separate = bounds("novelty", size)["separate"]
    assert separate.best_of_n == pytest.approx(max(best.values()) / chances, abs=1e-12)
    assert separate.pairwise == pytest.approx(max(right.values()) / total, abs=1e-12)


def bayes_places(world: str, said: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
    """Of a judge that knows the law: minus the chance to be a best answer, and minus the number of answers beaten."""
    values = sorted(set(said))
    best, ahead = dict.fromkeys(values, 0.0), dict.fromkeys(itertools.permutations(values, 2), 0.0)
    for truth in range(10):
        law, ranks = naive_law(world, [truth]), naive_ranks(world, [truth], said)
        if len(set(ranks)) == 1:
            continue
        level = [abs(v - truth) if world == "closest" else int(v != truth) for v in range(10)]
        tied = sum(sum(p for p, own in zip(law, level, strict=True) if own == m) ** len(said) for m in set(level))
        chance = prod(law[v] for v in said) / (1 - tied)
        for v in values:
            best[v] += chance * (ranks[list(said).index(v)] == 1)
        for u, v in ahead:
            ahead[u, v] += chance * (level[u] < level[v])
    beaten = {u: sum(ahead[u, v] > ahead[v, u] * (1 + 1e-9) for v in values if v != u) for u in values}
    return {v: -chance for v, chance in best.items()}, {u: -count for u, count in beaten.items()}


@pytest.mark.parametrize("world", ["consensus", "closest"])
@pytest.mark.parametrize("size", SIZES)
def test_a_bayes_judge_reaches_the_joint_bound(world: str, size: int) -> None:
    groups = make_set_groups(world, "test", 500, num_responses=size, seed=7)
    hits, right, total = [], [], []
    for group in groups:
        said, ranks = said_in(group), list(group.rankings or ())
        best, place = bayes_places(world, said)
        hits.append(picked(said, ranks, best.__getitem__))
        one, of = pairs_right(said, ranks, place.__getitem__)
        right.append(one)
        total.append(of)
    joint = bounds(world, size)["joint"]
    assert abs(np.mean(hits) - joint.best_of_n) < 4 * (joint.best_of_n * (1 - joint.best_of_n) / len(hits)) ** 0.5
    off = np.array(right) - joint.pairwise * np.array(total)
    assert abs(off.mean()) < 4 * off.std() / len(off) ** 0.5 + 1e-9


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("world", ["consensus", "novelty"])
def test_a_separate_judge_reaches_its_bound(world: str, size: int) -> None:
    """In `consensus` lots, drawn by the marks; in `novelty` an order of the digits, those that are shown first."""
    tasks = make_set_tasks(world, "test", 1000, seed=9)
    groups = make_set_groups(world, "test", 1000, num_responses=size, seed=9)
    hits = []
    for task, group in zip(tasks, groups, strict=True):
        scores = [
            (int(response[0]) in task.digits, int(response[0])) if world == "novelty" else response[1:]
            for response in group.responses
        ]
        hits.append((group.rankings or ())[scores.index(max(scores))] == 1)
    separate = bounds(world, size)["separate"]
    assert abs(np.mean(hits) - separate.best_of_n) < 4 * np.std(hits) / len(hits) ** 0.5


@pytest.mark.parametrize(
    ("world", "size", "more"), [("consensus", 4, 1e-6), ("consensus", 8, 1e-6), ("closest", 4, 0.003)]
)
def test_lots_that_are_not_fair_help_a_separate_judge_by_no_more_than_is_said(
    world: str, size: int, more: float
) -> None:
    """Gradient ascent over judges that draw the score of an answer from any distribution over 16 values."""
    law = torch.tensor([naive_law(world, [truth]) for truth in range(10)], dtype=torch.float64)
    away = torch.tensor([[abs(v - truth) for v in range(10)] for truth in range(10)])
    kinds = away if world == "closest" else away.clamp(max=1)
    bound, reached = bounds(world, size)["separate"].best_of_n, 0.0
    logits = (
        2 * torch.randn(10, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(120):
        said = law[:, :, None] * logits.softmax(1)  # [truths, answers, values]; the first value is the highest
        lower = said.flip(2).cumsum(2).flip(2) - said
        value = torch.zeros((), dtype=torch.float64)
        for kind in range(int(kinds.max()) + 1):
            best = (said * (kinds == kind)[:, :, None]).sum(1)
            at, below = ((x * (kinds >= kind)[:, :, None]).sum(1) for x in (said, lower))
            # Everybody is at this value or below, not all below; the winner is drawn from those at the value.
            won = best * sum((at + below) ** i * below ** (size - 1 - i) for i in range(size))
            same = (law * (kinds == kind)).sum(1) ** size  # all equally good: no such groups
            ranked = 1 - sum((law * (kinds == other)).sum(1) ** size for other in range(int(kinds.max()) + 1))
            value = value + ((won.sum(1) - same) / ranked).mean()
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
        reached = max(reached, value.item())
    assert bound - 0.005 < reached < bound + more


@pytest.mark.parametrize("size", SIZES)
def test_what_is_known_of_the_bounds(size: int) -> None:
    lots = (0.6 - 0.6**size) / (1 - 0.6**size - 0.4**size)
    assert bounds("consensus", size)["separate"].best_of_n == pytest.approx(lots, abs=1e-12)
    assert bounds("consensus", size)["separate"].pairwise == pytest.approx(0.5, abs=1e-12)
    assert bounds("control", size)["separate"] == bounds("control", size)["joint"]
    for world in ("consensus", "novelty", "closest"):
        found = bounds(world, size)
        for key in ("best_of_n", "pairwise"):
            assert getattr(found["joint"], key) - getattr(found["separate"], key) > 0.05
            assert getattr(found["joint"], key) < 1 + 1e-12
        assert size != 8 or found["joint"].best_of_n - found["separate"].best_of_n > 0.1


def test_the_documentation_has_these_bounds() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    for world in SET_WORLDS:
        for size in SIZES:
            found = bounds(world, size)
            cells = [
                f"{getattr(found[who], key):.3f}" for key in ("best_of_n", "pairwise") for who in ("separate", "joint")
            ]
            assert f"| `{world}` | {size} | {' | '.join(cells)} |" in text


@pytest.mark.parametrize(
    "call",
    [
        lambda: make_set_groups("weather", "train", 1),
        lambda: make_set_tasks("weather", "train", 1),
        lambda: make_set_groups("control", "dev", 1),
        lambda: make_set_groups("control", "train", -1),
        lambda: make_set_groups("control", "train", 1, num_responses=1),
        lambda: make_set_groups("control", "train", 1, num_responses=MAX_RESPONSES + 1),
        lambda: bounds("weather", 4),
        lambda: bounds("control", 1),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        call()


def test_most_responses() -> None:
    group = make_set_groups("consensus", "train", 1, num_responses=MAX_RESPONSES)[0]
    assert len(set(group.responses)) == MAX_RESPONSES
    assert isinstance(make_set_tasks("consensus", "train", 1)[0], SetTask)
