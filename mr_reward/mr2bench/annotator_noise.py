"""How sure several full rankings of a question are, from how far annotators disagree.

Someone who ranks M responses makes M (M - 1) / 2 comparisons that are no independent votes: Bradley-Terry on them
would be far too sure, the more the less annotators agree. Here a ranking counts once, as normal scores with noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from mr_reward.errors import GroupError
from mr_reward.mr2bench.bradley_terry import Strengths
from mr_reward.mr2bench.judgments import FullRanking

__all__ = ["ranking_strengths"]

Floats = NDArray[np.float64]
_LEAST_VARIANCE = 0.01  # of what annotators add; full agreement would leave nothing to divide by
_LOGITS = 1.702  # the logistic function of 1.702 x is nearest to the normal distribution's


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
