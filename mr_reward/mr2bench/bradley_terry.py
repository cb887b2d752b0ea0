"""Bradley-Terry strengths of each question's responses, with the models' strengths over all questions as the prior.

A question has about one vote per pair at the scale of MR2Bench-Video (94,000 votes, 497 questions, 171 pairs), too
few to rank 19 responses. What the other questions say about the models fills the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

__all__ = ["Strengths", "bradley_terry_map", "solve"]

Floats = NDArray[np.float64]
_GLOBAL_VARIANCE = 4.0  # of the models' strengths: hardly binds
_DRAWS = 4000
_ROUNDS = 20  # of the estimate of the questions' variance


@dataclass(frozen=True, slots=True)
class Strengths:
    """Strengths of M responses to each of Q questions, in logits."""

    mean: Floats  # (Q, M) most probable strengths
    covariance: Floats  # (Q, M, M) of the Gaussian around them (Laplace)
    overall: Floats  # (M,) strengths of the models over all questions
    variance: float  # of a question's strengths around the overall ones, as estimated

    def best_probability(self, question: int, first: int, others: Sequence[int]) -> float:
        """How sure it is that one response is stronger than all others; the same in each call."""
        among = [first, *others]
        spread = np.linalg.cholesky(self.covariance[question][np.ix_(among, among)])
        draws = self.mean[question, among] + np.random.default_rng(0).normal(size=(_DRAWS, len(among))) @ spread.T
        return float((draws[:, 0] > draws[:, 1:].max(axis=1)).mean())


def bradley_terry_map(wins: Sequence[Floats]) -> Strengths:
    """Most probable strengths under a Gaussian prior around the overall ones, whose variance is estimated too (EM).

    For a question: maximise sum_ij wins_ij log sigmoid(s_i - s_j) - sum_i (s_i - overall_i)^2 / (2 variance).
    """
    stacked = np.stack(wins)
    centre = np.zeros(stacked.shape[1])
    overall = solve(stacked.sum(axis=0)[None], centre, _GLOBAL_VARIANCE)[0][0]
    variance = 1.0
    for _ in range(_ROUNDS):
        mean, covariance = solve(stacked, overall, variance)
        expected = (mean - overall) ** 2 + np.diagonal(covariance, axis1=1, axis2=2)
        variance = float(expected.mean())
    mean, covariance = solve(stacked, overall, variance)
    return Strengths(mean, covariance, overall, variance)


def solve(wins: Floats, centre: Floats, variance: float) -> tuple[Floats, Floats]:
    """Newton's method for all questions at once, wins (Q, M, M), prior N(centre (M,), variance); strictly concave.

    Gives the maxima (Q, M) and the inverses of the negative second derivative there (Q, M, M).
    """
    strengths = np.tile(centre, (len(wins), 1))
    total = wins + wins.transpose(0, 2, 1)
    identity = np.eye(len(centre)) / variance
    for _ in range(50):
        chance = expit(strengths[:, :, None] - strengths[:, None, :])
        slope = (wins - total * chance).sum(axis=2) - (strengths - centre) / variance
        curvature = total * chance * (1 - chance)
        bend = identity - curvature
        bend[:, range(len(centre)), range(len(centre))] += curvature.sum(axis=2)
        step = np.linalg.solve(bend, slope[..., None])[..., 0]
        # A long step may overshoot where the votes are one-sided.
        strengths += step * np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return strengths, np.linalg.inv(bend)
