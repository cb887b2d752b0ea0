"""A synthetic crowd with known truth: to see how well a builder recovers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from mr_reward.errors import ConfigurationError
from mr_reward.groups import dense_ranks
from mr_reward.mr2bench.judgments import FullRanking, Vote

__all__ = ["Crowd", "draw_rankings", "draw_strengths", "draw_votes", "model_names"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """How the crowd votes."""

    num_votes: int = 94_000  # over all questions; the pairs are drawn evenly
    # None: the stronger response wins with the Bradley-Terry chance; else the chance that a vote goes to the weaker
    # one, however far apart they are
    flip: float | None = None
    ties: float = 0.05  # chance that a vote is a tie instead
    annotators: int = 200  # they take turns at random
    blind: float = 0.0  # share of the annotators who vote at random
    first_bias: float = 0.0  # share of the annotators who prefer what is shown first

    def __post_init__(self) -> None:
        for name in ("flip", "ties", "blind", "first_bias"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigurationError(f"{name} is {value}, expected a share from 0 to 1")


def draw_strengths(
    num_questions: int = 497, num_models: int = 19, *, overall: float = 0.8, own: float = 0.8, seed: int = 0
) -> Floats:
    """True strengths: what a model can do in general, and how its response to this question turned out."""
    generator = np.random.default_rng([seed, 0])
    general = generator.normal(0, overall, num_models)
    return general + generator.normal(0, own, (num_questions, num_models))


def draw_votes(strengths: Floats, crowd: Crowd, *, seed: int = 0) -> list[Vote]:
    """`crowd.num_votes` votes on random pairs, from true strengths (Q, M)."""
    generator = np.random.default_rng([seed, 1])
    num_questions, num_models = strengths.shape
    pairs = np.array(list(combinations(range(num_models), 2)))
    count = crowd.num_votes
    # As even as the number allows, so that no question is left out by chance.
    questions = generator.permutation(np.arange(count) % num_questions)
    drawn = pairs[generator.integers(len(pairs), size=count)]
    swapped = generator.random(count) < 0.5
    drawn[swapped] = drawn[swapped][:, ::-1]
    gaps = strengths[questions, drawn[:, 0]] - strengths[questions, drawn[:, 1]]
    chance = expit(gaps) if crowd.flip is None else np.where(gaps > 0, 1 - crowd.flip, crowd.flip)
    annotators = generator.integers(crowd.annotators, size=count)
    kind = generator.random(crowd.annotators)[annotators]
    chance = np.where(kind < crowd.blind, 0.5, chance)
    chance = np.where((kind >= crowd.blind) & (kind < crowd.blind + crowd.first_bias), 0.9, chance)
    shares = (generator.random(count) < chance).astype(float)
    shares[generator.random(count) < crowd.ties] = 0.5
    names = model_names(num_models)
    return [
        Vote(f"q{q:04d}", names[a], names[b], float(share), f"annotator-{who}")
        for q, (a, b), share, who in zip(questions, drawn, shares, annotators, strict=True)
    ]


def draw_rankings(strengths: Floats, *, annotators: int = 3, noise: float = 0.5, seed: int = 0) -> list[FullRanking]:
    """Full rankings by several annotators, who see the strengths with noise and do not tell near ones apart."""
    generator = np.random.default_rng([seed, 2])
    names = model_names(strengths.shape[1])
    found = []
    for q, own in enumerate(strengths):
        for k in range(annotators):
            seen = own + generator.normal(0, noise, len(own))
            ranks = dense_ranks((-np.round(seen / 0.4)).tolist())  # closer than 0.4 logits: often a tie
            found.append(FullRanking(f"q{q:04d}", dict(zip(names, ranks, strict=True)), f"annotator-{k}"))
    return found


def model_names(count: int) -> Sequence[str]:
    """Names whose alphabetical order is that of the columns."""
    return [f"model-{i:02d}" for i in range(count)]
