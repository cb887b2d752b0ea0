"""Strengths of each question's responses, and how sure they are, with the models' overall strengths as the prior.

From votes, by Bradley-Terry. A question has about one vote per pair at the scale of MR2Bench-Video (94,000 votes, 497
questions, 171 pairs), too few to rank 19 responses. What the other questions say about the models fills the gap.

From several full rankings of a question, by how far annotators disagree. Someone who ranks M responses makes
M (M - 1) / 2 comparisons that are no independent votes: Bradley-Terry on them would be far too sure, the more the less
annotators agree. So a ranking counts once, as normal scores with noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm, rankdata

from mr_reward.errors import GroupError
from mr_reward.mr2bench.judgments import FullRanking

Floats = NDArray[np.float64]
_GLOBAL_VARIANCE = 4.0  # of the models' strengths: hardly binds
_DRAWS = 4000
_LEAST_VARIANCE = 0.01  # of what annotators add; full agreement would leave nothing to divide by
_LOGITS = 1.702  # the logistic function of 1.702 x is nearest to the normal distribution's
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


def ranking_strengths(rankings: Mapping[str, Sequence[FullRanking]], models: Sequence[str]) -> Strengths:
    """Strengths of the responses to each question, and how sure they are.

    A normal score is overall strength of the model + what the question adds + what the annotator adds, the last two
    Gaussian. Their variances are estimated by moments (one-way analysis of variance), the strengths are the posterior
    mean. The scale makes a gap the logit of one annotator's preference, as for votes.
    """
    scores = [np.array([_normal_scores(given, models) for given in rankings[name]]) for name in sorted(rankings)]
    counts = np.array([len(own) for own in scores], dtype=np.float64)
    # Scores of a ranking sum to zero, hence M - 1 of them are free.
    free = len(models) - 1
    repeats = (counts - 1).sum() * free
    if not repeats:
        raise GroupError(
            f"got one ranking for each of {len(scores)} questions, expected two for at least one of them; noise "
            "cannot be estimated without"
        )
    means = np.array([own.mean(axis=0) for own in scores])
    noise = max(sum(float(((own - own.mean(axis=0)) ** 2).sum()) for own in scores) / repeats, _LEAST_VARIANCE)
    overall = means.mean(axis=0)
    spread = float(((means - overall) ** 2).sum()) / (max(len(scores) - 1, 1) * free)
    # A single question tells nothing apart from overall strength: a wide prior around zero instead.
    if len(scores) == 1:
        overall, spread = np.zeros(len(models)), float((means**2).sum()) / free
    own_variance = max(spread - noise * float((1 / counts).mean()), _LEAST_VARIANCE * noise)
    trust = own_variance / (own_variance + noise / counts)
    scale = _LOGITS / math.sqrt(2 * noise)
    covariance = np.eye(len(models)) * (own_variance * (1 - trust) * scale**2)[:, None, None]
    return Strengths(
        mean=scale * (overall + trust[:, None] * (means - overall)),
        covariance=covariance,
        overall=scale * overall,
        variance=own_variance * scale**2,
    )


def _normal_scores(ranking: FullRanking, models: Sequence[str]) -> Floats:
    """Blom's scores, best highest; ties share the score of their mean place."""
    places = rankdata([ranking.ranks[model] for model in models])
    return -norm.ppf((places - 0.375) / (len(models) + 0.25))
