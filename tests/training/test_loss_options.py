"""Margin, label smoothing and centring against naive loops in float64."""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from mr_reward.errors import ConfigurationError
from mr_reward.training.losses import LOSSES, centring_penalty, get_loss


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def naive_best_of_n(scores: list[float], ranks: list[int], smoothing: float) -> float:
    log_total = math.log(sum(map(math.exp, scores)))
    best = [i for i, rank in enumerate(ranks) if rank == min(ranks)]
    target = [(1 - smoothing) * (i in best) / len(best) + smoothing / len(ranks) for i in range(len(ranks))]
    return -sum(weight * (score - log_total) for weight, score in zip(target, scores, strict=True))


def naive_plackett_luce(scores: list[float], ranks: list[int], smoothing: float) -> float:
    total = 0.0
    for score, rank in zip(scores, ranks, strict=True):
        left = [other for other, r in zip(scores, ranks, strict=True) if r >= rank]
        log_total = math.log(sum(map(math.exp, left)))
        total -= (1 - smoothing) * (score - log_total) + smoothing * sum(s - log_total for s in left) / len(left)
    return total / len(scores)


def naive_bradley_terry(scores: list[float], ranks: list[int], smoothing: float, margin: float = 0.0) -> float:
    losses = []
    for i, j in itertools.permutations(range(len(ranks)), 2):
        if ranks[i] < ranks[j]:
            gap = scores[i] - scores[j] - margin * (ranks[j] - ranks[i])
            losses.append(-(1 - smoothing) * log_sigmoid(gap) - smoothing * log_sigmoid(-gap))
    return sum(losses) / len(losses)


NAIVE = {"best_of_n": naive_best_of_n, "plackett_luce": naive_plackett_luce, "bradley_terry": naive_bradley_terry}


def random_batch(seed: int) -> tuple[list[list[float]], list[list[int]], Tensor, Tensor, Tensor]:
    """Groups of 2 to 5 responses with ties, at least two ranks each, padded to 6."""
    rng = random.Random(seed)
    scores, rankings = [], []
    for _ in range(4):
        n = rng.randint(2, 5)
        scores.append([rng.uniform(-3, 3) for _ in range(n)])
        rankings.append([1, 2, *(rng.randint(1, 3) for _ in range(n - 2))])
    padded, ranks = torch.full((4, 6), 7.0), torch.zeros(4, 6, dtype=torch.long)
    for b in range(4):
        padded[b, : len(scores[b])] = torch.tensor(scores[b])
        ranks[b, : len(rankings[b])] = torch.tensor(rankings[b])
    return scores, rankings, padded, ranks, ranks > 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("name", list(LOSSES))
def test_label_smoothing_equals_naive_loops(name: str, smoothing: float, seed: int) -> None:
    scores, rankings, padded, ranks, mask = random_batch(seed)
    expected = sum(NAIVE[name](s, r, smoothing) for s, r in zip(scores, rankings, strict=True)) / len(scores)
    found = get_loss(name, label_smoothing=smoothing)(padded, ranks, mask)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("margin", "smoothing"), [(0.5, 0.0), (1.5, 0.2)])
def test_margins_grow_with_the_distance_in_rank(margin: float, smoothing: float, seed: int) -> None:
    scores, rankings, padded, ranks, mask = random_batch(seed)
    expected = sum(naive_bradley_terry(s, r, smoothing, margin) for s, r in zip(scores, rankings, strict=True)) / len(
        scores
    )
    loss = get_loss("bradley_terry", margin=margin, label_smoothing=smoothing)
    assert loss(padded, ranks, mask).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_centring_adds_the_mean_square_of_the_group_means(name: str) -> None:
    scores, _, padded, ranks, mask = random_batch(0)
    penalty = sum((sum(s) / len(s)) ** 2 for s in scores) / len(scores)
    assert centring_penalty(padded, mask).item() == pytest.approx(penalty, rel=1e-5)
    plain, centred = get_loss(name), get_loss(name, centring_coefficient=0.3)
    difference = centred(padded, ranks, mask) - plain(padded, ranks, mask)
    assert difference.item() == pytest.approx(0.3 * penalty, rel=1e-4)
    # The one term that a common offset moves.
    shifted = centred(padded + 1.0, ranks, mask) - centred(padded, ranks, mask)
    expected = 0.3 * (sum((sum(s) / len(s) + 1.0) ** 2 for s in scores) / len(scores) - penalty)
    assert shifted.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_smoothing_keeps_the_scores_bounded(name: str) -> None:
    """Without it the optimum is at infinity; with it there is a finite one, in the right order."""
    ranks, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    loss = get_loss(name, label_smoothing=0.2)
    scores = torch.zeros(1, 3, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=2.0)
    for _ in range(400):
        optimizer.zero_grad()
        loss(scores, ranks, mask).backward()
        optimizer.step()
    (gradient,) = torch.autograd.grad(loss(scores, ranks, mask), scores)
    assert gradient.abs().max() < 1e-4
    assert scores.detach()[0].argmax() == 0
    assert scores.detach().abs().max() < 5


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("best_of_n", {"margin": 1.0}, "margin 1.0 with loss 'best_of_n'"),
        ("bradley_terry", {"margin": -1.0}, "margin -1.0"),
        ("bradley_terry", {"label_smoothing": 0.5}, "below 0.5"),
        ("plackett_luce", {"label_smoothing": -0.1}, "smoothing -0.1"),
        ("best_of_n", {"centring_coefficient": -1.0}, "coefficient -1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        get_loss(name, **options)
