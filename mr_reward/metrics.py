"""How well scores order the responses of a group, with every tie rule named.

Pure functions: one sequence of numbers per group in, groups of any sizes, plain floats out. Legend: B groups, N
responses (its own for each group). `scores` are B sequences of N floats, `rankings` B sequences of N whole numbers
from 1 on, 1 = best. Other sizes and other ranks raise ConfigurationError, scores that are not finite
NonFiniteScoreError.

Throughout: higher scores are better, lower ranks are better, ties share a rank. Ranks count by their order only, so
dense (1, 2, 2, 3) and competition (1, 2, 2, 4) counting agree. The accuracies are strict: where the ranks differ and
the scores do not, the model did not tell the responses apart and is wrong. A group or pair for which a metric has no
value is left out of its mean, and a mean over nothing is NaN, never 0.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import kendalltau, rankdata
from sklearn.metrics import ndcg_score

from mr_reward.errors import ConfigurationError, NonFiniteScoreError

__all__ = [
    "GroupNumbers",
    "KendallTau",
    "best_of_n_accuracy",
    "kendall_tau_b",
    "mean_score_spread",
    "ndcg",
    "order_flip_rate",
    "pairwise_accuracy",
    "pairwise_calibration_error",
    "ranking_metrics",
    "right_above_wrong",
    "score_length_correlation",
]

logger = logging.getLogger(__name__)

GroupNumbers = Sequence[Sequence[float] | NDArray[Any]]
"""B sequences of N numbers each; N may differ from group to group."""

_NUM_CALIBRATION_BINS = 10


class KendallTau(NamedTuple):
    """Kendall's tau-b over groups."""

    mean: float  # over the groups where it is defined; NaN if there is none
    undefined_groups: int  # left out


def best_of_n_accuracy(scores: GroupNumbers, rankings: GroupNumbers) -> float:
    """Share of groups whose highest score belongs to a best response.

    Tie rules: picking any of several tied best responses is right. Where a best and a worse response share the highest
    score the group is wrong. A group whose responses are all tied best (N = 1 included) is right, as no pick is wrong.
    Random scores give 1/N with one best response.

    Example:
        >>> best_of_n_accuracy([[0.9, 0.1], [0.2, 0.2]], [[1, 2], [1, 2]])
        0.5
    """
    groups = _checked(scores=scores, rankings=rankings)
    return _mean(float(np.all(ranks[values == values.max()] == ranks.min())) for values, ranks in groups)


def pairwise_accuracy(scores: GroupNumbers, rankings: GroupNumbers) -> float:
    """Share of strictly ordered pairs whose better response has the higher score.

    Tie rules: pairs that share a rank are left out; an ordered pair with equal scores is wrong. The pairs of all
    groups are pooled, so a group counts with its number of ordered pairs. Random scores give 0.5.

    Example:
        >>> pairwise_accuracy([[3.0, 2.0, 2.0]], [[1, 2, 3]])
        0.6666666666666666
    """
    return _mean(margin > 0 for margin in _pair_margins(scores, rankings))


def right_above_wrong(scores: Sequence[float], truth: Sequence[float]) -> float:
    """Of one group: share of its pairs of a right and a wrong response of which the right one has the higher score.

    Right is what has the group's highest truth (a verifier's reward, or minus the rank), wrong is the rest. Tie rules:
    equal scores count half; NaN where the truth is the same for all, as there is no such pair. Random scores give 0.5.

    Example:
        >>> right_above_wrong([0.9, 0.1, 0.1], [1.0, 1.0, 0.0])
        0.75
    """
    values, right = np.asarray(scores), np.equal(truth, np.max(truth))
    margins = np.subtract.outer(values[right], values[~right])
    return float(((margins > 0) + 0.5 * (margins == 0)).mean()) if margins.size else float("nan")


def kendall_tau_b(scores: GroupNumbers, rankings: GroupNumbers) -> KendallTau:
    """Kendall's tau-b between scores and ranking, averaged over groups.

    Kendall (1945): concordant minus discordant pairs, with the ties on either side taken out of the denominator. It is
    undefined where all scores or all ranks of a group are equal. Read `undefined_groups` beside the mean: a model that
    gives one score to everything is left out here, while the accuracies count it as wrong. Random scores give 0.

    Example:
        >>> kendall_tau_b([[3.0, 2.0, 1.0], [0.5, 0.5]], [[1, 2, 3], [1, 2]])
        KendallTau(mean=1.0, undefined_groups=1)
    """
    groups = _checked(scores=scores, rankings=rankings)
    defined = [(values, ranks) for values, ranks in groups if not _constant(values) and not _constant(ranks)]
    taus = (float(kendalltau(values, -ranks, variant="b").statistic) for values, ranks in defined)
    return KendallTau(_mean(taus), len(groups) - len(defined))


def ndcg(scores: GroupNumbers, rankings: GroupNumbers) -> float:
    """Normalised discounted cumulative gain, averaged over groups.

    Järvelin and Kekäläinen (2002) with linear gain and log2 discount: the gain of a response is the number of distinct
    ranks after its own, 0 for the worst. Tie rules: responses with equal scores share the mean gain of the places they
    fill; groups with one rank only (N = 1 included) have no gain to order and are left out. Random scores are far
    from 0: compare with a random baseline.

    Example:
        >>> ndcg([[3.0, 2.0, 1.0]], [[1, 2, 3]])
        1.0
    """

    def gains(ranks: NDArray[np.float64]) -> NDArray[np.int64]:
        levels, level = np.unique(ranks, return_inverse=True)
        return len(levels) - 1 - level

    groups = _checked(scores=scores, rankings=rankings)
    return _mean(float(ndcg_score([gains(ranks)], [values])) for values, ranks in groups if not _constant(ranks))


def order_flip_rate(scores_a: GroupNumbers, scores_b: GroupNumbers, atol: float = 1e-6) -> float:
    """Share of groups whose winner differs between two orders of the same responses.

    `scores_b` are those under the other order, **put back into the order of `scores_a`**: one response at place i.
    Tie rule: the winners of a group are all responses within `atol` of its highest score; it has flipped if the two
    orders have no winner in common. 0 for a permutation-equivariant model; independent random scores give 1 - 1/N.

    Example:
        >>> order_flip_rate([[1.0, 0.0], [1.0, 0.0]], [[0.9, 0.1], [0.1, 0.9]])
        0.5
    """
    if not atol >= 0:
        raise ConfigurationError(f"got atol={atol}, expected 0 or more; it is how far apart tied scores may be")
    groups = _checked(scores_a=scores_a, scores_b=scores_b)
    return _mean(float(not np.any((a >= a.max() - atol) & (b >= b.max() - atol))) for a, b in groups)


def pairwise_calibration_error(scores: GroupNumbers, rankings: GroupNumbers) -> float:
    """Expected calibration error of sigmoid(s_i - s_j) as the probability that response i beats response j.

    Guo et al. (arXiv 1706.04599): mean gap between predicted and observed frequency over 10 equal bins of [0, 1],
    weighted by the bins' counts. Every strictly ordered pair enters twice, as (i, j) and (j, i), since an arbitrary
    choice of one would change the result; tied pairs are left out. The pairs of all groups are pooled. Unlike the
    accuracies, tau-b and NDCG this depends on the scale of the scores. 0 is calibrated; constant scores give 0 too,
    as they claim nothing.

    Example:
        >>> round(pairwise_calibration_error([[2.0, 0.0]], [[1, 2]]), 4)
        0.1192
    """
    margins = _pair_margins(scores, rankings)
    if not margins.size:
        return float("nan")
    predicted = np.concatenate([expit(margins), expit(-margins)])
    observed = np.repeat([1.0, 0.0], margins.size)
    bins = np.minimum((predicted * _NUM_CALIBRATION_BINS).astype(np.int64), _NUM_CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=predicted - observed, minlength=_NUM_CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / predicted.size)


def score_length_correlation(scores: GroupNumbers, lengths: GroupNumbers) -> float:
    """Spearman correlation of score and length within a group, averaged over groups.

    Spearman, not Pearson: one rambling response must not decide it. Within groups, since prompts that call for long
    answers say nothing about a preference for length. Groups whose scores or lengths are all equal are left out.
    Random scores give 0.

    Example:
        >>> round(score_length_correlation([[0.1, 0.2, 0.9]], [[5, 6, 700]]), 6)
        1.0
    """
    groups = _checked(scores=scores, lengths=lengths)
    defined = [(v, n) for v, n in groups if not _constant(v) and not _constant(n)]
    return _mean(float(np.corrcoef(rankdata(v), rankdata(n))[0, 1]) for v, n in defined)


def mean_score_spread(scores: GroupNumbers) -> float:
    """Standard deviation of the scores within a group, averaged over groups.

    The population's (division by N), so that a group of one response has spread 0. It falls to 0 when a model stops
    telling responses apart, and grows without bound when it overfits.

    Example:
        >>> mean_score_spread([[1.0, -1.0], [5.0]])
        0.5
    """
    return _mean(float(values.std()) for (values,) in _checked(scores=scores))


def ranking_metrics(
    scores: GroupNumbers,
    rankings: GroupNumbers,
    *,
    lengths: GroupNumbers | None = None,
    reordered: GroupNumbers | None = None,
) -> dict[str, float]:
    """All metrics of ranked groups, under fixed keys.

    Example:
        >>> ranking_metrics([[1.0, -1.0]], [[1, 2]])["kendall_tau_b"]
        1.0
    """
    tau = kendall_tau_b(scores, rankings)
    if tau.undefined_groups:
        logger.info("kendall_tau_b leaves out %d of %d groups: constant", tau.undefined_groups, len(scores))
    found = {
        "best_of_n_accuracy": best_of_n_accuracy(scores, rankings),
        "pairwise_accuracy": pairwise_accuracy(scores, rankings),
        "kendall_tau_b": tau.mean,
        "ndcg": ndcg(scores, rankings),
        "pairwise_calibration_error": pairwise_calibration_error(scores, rankings),
        "mean_score_spread": mean_score_spread(scores),
    }
    if lengths is not None:
        found["score_length_correlation"] = score_length_correlation(scores, lengths)
    if reordered is not None:
        found["order_flip_rate"] = order_flip_rate(scores, reordered)
    return found


def _mean(values: Any) -> float:
    """Mean of an iterable of numbers; NaN, without numpy's warning, if there are none."""
    array = np.fromiter(values, dtype=np.float64)
    return float(array.mean()) if array.size else float("nan")


def _constant(values: NDArray[Any]) -> bool:
    return bool(np.all(values == values[0]))


def _pair_margins(scores: GroupNumbers, rankings: GroupNumbers) -> NDArray[np.float64]:
    """Score of the better minus score of the worse response, for the strictly ordered pairs of all groups."""
    margins = []
    for values, ranks in _checked(scores=scores, rankings=rankings):
        better, worse = np.nonzero(ranks[:, None] < ranks[None, :])
        margins.append(values[better] - values[worse])
    return np.concatenate(margins)


def _checked(**given: GroupNumbers) -> list[tuple[NDArray[np.float64], ...]]:
    """For each group its numbers of every name given; the first name is that of scores."""
    found = {name: [_as_vector(group, i, name) for i, group in enumerate(groups)] for name, groups in given.items()}
    (name, first), *_ = found.items()
    if not first:
        raise ConfigurationError(f"got {name} of 0 groups, expected at least 1; check what the data was filtered by")
    for other, vectors in found.items():
        if len(first) != len(vectors):
            raise ConfigurationError(
                f"got {name} of {len(first)} groups and {other} of {len(vectors)}, expected as many; "
                "pass both for all groups"
            )
        for index, vector in enumerate(vectors):
            if first[index].size != vector.size:
                raise ConfigurationError(
                    f"group {index} has {first[index].size} {name} and {vector.size} {other}, expected one each per "
                    "response; leave padding slots out"
                )
            if other.startswith("scores") and not np.isfinite(vector).all():
                raise NonFiniteScoreError(
                    f"{other} of group {index} are {vector.tolist()}, expected finite numbers; "
                    "look for an overflow in the model (try float32) before measuring it"
                )
            # Not `vector < 1`: a NaN must not pass.
            if other == "rankings" and not np.all((vector >= 1) & (vector == np.floor(vector))):
                raise ConfigurationError(
                    f"rankings of group {index} are {vector.tolist()}, expected whole numbers from 1 (best) on; "
                    "leave padding slots out, and turn values into ranks with mr_reward.groups.dense_ranks"
                )
    return list(zip(*found.values(), strict=True))


def _as_vector(group: Any, index: int, name: str) -> NDArray[np.float64]:
    vector = np.asarray(group, dtype=np.float64)
    if vector.ndim != 1 or not vector.size:
        raise ConfigurationError(
            f"{name} of group {index} have shape {vector.shape}, expected (N,) with N of at least 1; "
            "pass one sequence of numbers per group and drop empty groups"
        )
    return vector
