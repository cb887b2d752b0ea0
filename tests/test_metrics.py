"""Metrics against hand-computed values, brute force, and chance."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from mr_reward.errors import ConfigurationError, NonFiniteScoreError
from mr_reward.metrics import (
    best_of_n_accuracy,
    kendall_tau_b,
    mean_score_spread,
    ndcg,
    order_flip_rate,
    pairwise_accuracy,
    pairwise_calibration_error,
    ranking_metrics,
    score_length_correlation,
)

Scores = list[list[float]]
Ranks = list[list[int]]


@st.composite
def ranked_groups(draw: st.DrawFn) -> tuple[Scores, Ranks]:
    scores, rankings = [], []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 6))
        scores.append([draw(st.integers(-6, 6)) / 4 for _ in range(n)])
        levels = [draw(st.integers(0, 3)) for _ in range(n)]
        rankings.append([1 + len({o for o in levels if o < v}) for v in levels])
    return scores, rankings


def ordered_pairs(scores: Scores, rankings: Ranks) -> list[float]:
    """Margins, better minus worse, by loops."""
    return [
        s[i] - s[j]
        for s, r in zip(scores, rankings, strict=True)
        for i, j in itertools.permutations(range(len(s)), 2)
        if r[i] < r[j]
    ]


def naive_tau(s: list[float], r: list[int]) -> float | None:
    pairs = list(itertools.combinations(range(len(s)), 2))
    agreement = sum(np.sign(s[i] - s[j]) * np.sign(r[j] - r[i]) for i, j in pairs)
    untied_scores = sum(s[i] != s[j] for i, j in pairs)
    untied_ranks = sum(r[i] != r[j] for i, j in pairs)
    return agreement / math.sqrt(untied_scores * untied_ranks) if untied_scores and untied_ranks else None


def naive_ndcg(s: list[float], r: list[int]) -> float | None:
    """Mean DCG over all orders that sort the scores, over the best DCG."""
    gains = [len({o for o in r if o > v}) for v in r]
    if not any(gains):
        return None

    def dcg(order: tuple[int, ...]) -> float:
        return sum(gains[i] / math.log2(place + 2) for place, i in enumerate(order))

    orders = list(itertools.permutations(range(len(s))))
    sorting = [o for o in orders if all(s[a] >= s[b] for a, b in itertools.pairwise(o))]
    return float(np.mean([dcg(o) for o in sorting])) / max(dcg(o) for o in orders)


def nan_mean(values: list[float | None]) -> float:
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else math.nan


@settings(max_examples=150, deadline=None)
@given(groups=ranked_groups())
def test_metrics_equal_brute_force(groups: tuple[Scores, Ranks]) -> None:
    scores, rankings = groups
    paired = list(zip(scores, rankings, strict=True))
    margins = ordered_pairs(scores, rankings)
    rights = [all(r[i] == min(r) for i in range(len(s)) if s[i] == max(s)) for s, r in paired]
    taus = [naive_tau(s, r) for s, r in paired]
    expected = {
        "best_of_n_accuracy": sum(rights) / len(rights),
        "pairwise_accuracy": nan_mean([float(m > 0) for m in margins]),
        "kendall_tau_b": nan_mean(taus),
        "ndcg": nan_mean([naive_ndcg(s, r) for s, r in paired]),
        "pairwise_calibration_error": naive_calibration_error(margins),
        "mean_score_spread": sum(float(np.std(s)) for s in scores) / len(scores),
    }
    found = ranking_metrics(scores, rankings)
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-9)
    assert list(found) == list(expected)
    assert all(type(value) is float for value in found.values())
    assert kendall_tau_b(scores, rankings).undefined_groups == taus.count(None)


def naive_calibration_error(margins: list[float]) -> float:
    if not margins:
        return math.nan
    bins: list[list[tuple[float, float]]] = [[] for _ in range(10)]
    for margin in margins:
        for sign, outcome in ((1, 1.0), (-1, 0.0)):
            p = 1 / (1 + math.exp(-sign * margin))
            bins[min(int(p * 10), 9)].append((p, outcome))
    gaps = [len(b) * abs(np.mean([p for p, _ in b]) - np.mean([o for _, o in b])) for b in bins if b]
    return float(sum(gaps) / (2 * len(margins)))


@settings(max_examples=60, deadline=None)
@given(groups=ranked_groups(), data=st.data())
def test_order_of_responses_and_groups_does_not_matter(groups: tuple[Scores, Ranks], data: st.DataObject) -> None:
    scores, rankings = groups
    moved: list[tuple[list[float], list[int]]] = []
    for s, r in data.draw(st.permutations(list(zip(scores, rankings, strict=True)))):
        order = data.draw(st.permutations(range(len(s))))
        moved.append(([s[i] for i in order], [r[i] for i in order]))
    found = ranking_metrics([s for s, _ in moved], [r for _, r in moved])
    assert found == pytest.approx(ranking_metrics(scores, rankings), nan_ok=True, abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "ranks", "expected"),
    [
        ([3.0, 2.0, 1.0], [1, 2, 3], 1.0),
        ([1.0, 2.0, 3.0], [1, 2, 3], 0.0),
        ([1.0, 2.0, 0.0], [1, 1, 2], 1.0),  # either of the tied best
        ([2.0, 2.0, 0.0], [1, 1, 2], 1.0),  # both of them
        ([2.0, 2.0, 0.0], [1, 2, 3], 0.0),  # best and worse share the highest score
        ([2.0, 2.0, 2.0], [1, 1, 2], 0.0),
        ([2.0, 2.0, 3.0], [2, 2, 1], 1.0),  # a tie below the first place does not matter
        ([2.0, 2.0], [1, 1], 1.0),
        ([-4.0], [1], 1.0),
    ],
)
def test_best_of_n_tie_rules(scores: list[float], ranks: list[int], expected: float) -> None:
    assert best_of_n_accuracy([scores], [ranks]) == expected


def test_best_of_n_is_a_share_of_groups() -> None:
    assert (
        best_of_n_accuracy([[1.0, 0.0], [0.0, 1.0, 2.0], [5.0], [1.0, 1.0]], [[1, 2], [1, 2, 3], [1], [1, 2]]) == 0.5
    )


@pytest.mark.parametrize(
    ("scores", "rankings", "expected"),
    [
        ([[3.0, 2.0, 1.0]], [[1, 2, 3]], 1.0),
        ([[1.0, 2.0, 3.0]], [[1, 2, 3]], 0.0),
        ([[3.0, 2.0, 2.0]], [[1, 2, 3]], 2 / 3),  # equal scores are wrong
        ([[3.0, 2.0, 2.5]], [[1, 2, 2]], 1.0),  # the tied pair is left out
        ([[1.0, 1.0]], [[1, 2]], 0.0),
        ([[1.0, 0.0], [0.0, 1.0, 2.0]], [[1, 2], [1, 2, 3]], 1 / 4),  # pooled: 1 of 1 and 0 of 3
        ([[1.0, 0.0], [5.0, 6.0], [1.0]], [[1, 2], [1, 1], [1]], 1.0),
        ([[5.0, 6.0], [1.0]], [[1, 1], [1]], math.nan),
    ],
)
def test_pairwise_accuracy_by_hand(scores: Scores, rankings: Ranks, expected: float) -> None:
    assert pairwise_accuracy(scores, rankings) == pytest.approx(expected, nan_ok=True)


def test_kendall_tau_b_by_hand() -> None:
    assert kendall_tau_b([[3.0, 2.0, 1.0]], [[1, 2, 3]]) == (1.0, 0)
    assert kendall_tau_b([[1.0, 2.0, 3.0]], [[1, 2, 3]]) == (-1.0, 0)
    # Pairs: 2 concordant, 1 tied in score; (2 - 0) / sqrt(2 * 3).
    tau = kendall_tau_b([[3.0, 2.0, 2.0]], [[1, 2, 3]])
    assert tau.mean == pytest.approx(2 / math.sqrt(6))
    # The mean is over defined groups; constant scores, constant ranks and N = 1 are counted.
    tau = kendall_tau_b([[2.0, 1.0], [1.0, 1.0], [1.0, 2.0], [4.0]], [[1, 2], [1, 2], [1, 1], [1]])
    assert tau == (1.0, 3)
    tau = kendall_tau_b([[1.0, 1.0]], [[1, 2]])
    assert math.isnan(tau.mean) and tau.undefined_groups == 1


def test_ndcg_by_hand() -> None:
    assert ndcg([[3.0, 2.0, 1.0]], [[1, 2, 3]]) == pytest.approx(1.0)
    # Gains 2, 1, 0 in places 3, 2, 1.
    ideal = 2 + 1 / math.log2(3)
    reversed_order = ndcg([[1.0, 2.0, 3.0]], [[1, 2, 3]])
    assert reversed_order == pytest.approx((1 / math.log2(3) + 2 / 2) / ideal)
    # Equal scores share the mean gain 1 in all three places.
    assert ndcg([[5.0, 5.0, 5.0]], [[1, 2, 3]]) == pytest.approx((1 + 1 / math.log2(3) + 1 / 2) / ideal)
    # Nothing to order: left out, not 0.
    assert ndcg([[3.0, 2.0, 1.0], [1.0, 2.0], [1.0]], [[1, 2, 3], [1, 1], [1]]) == pytest.approx(1.0)
    assert math.isnan(ndcg([[1.0, 2.0], [1.0]], [[1, 1], [1]]))


def test_competition_and_dense_ranks_agree() -> None:
    scores = [[0.5, 0.1, 0.9, 0.4]]
    assert ranking_metrics(scores, [[1, 2, 2, 3]]) == ranking_metrics(scores, [[1, 2, 2, 4]])


@pytest.mark.parametrize(
    ("a", "b", "atol", "expected"),
    [
        ([[1.0, 0.0]], [[0.6, 0.4]], 0.0, 0.0),
        ([[1.0, 0.0]], [[0.4, 0.6]], 0.0, 1.0),
        ([[1.0, 0.0]], [[0.4, 0.6]], 0.2001, 0.0),  # tied in b within atol, and 0 is one of the winners
        ([[1.0, 0.0]], [[0.4, 0.6]], 0.1, 1.0),
        ([[1.0, 0.0]], [[0.5, 0.5]], 0.0, 0.0),  # an exact tie for first place
        ([[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]], 0.5, 1.0),  # tied in a, but not with the winner of b
        ([[1.0, 0.0], [0.0, 1.0, 0.0], [3.0]], [[0.0, 1.0], [0.0, 2.0, 1.0], [-3.0]], 0.0, 1 / 3),
    ],
)
def test_order_flip_rate_by_hand(a: Scores, b: Scores, atol: float, expected: float) -> None:
    assert order_flip_rate(a, b, atol) == pytest.approx(expected)
    assert order_flip_rate(b, a, atol) == pytest.approx(expected)


def test_calibration_error_by_hand() -> None:
    odds = math.log(3)  # sigmoid gives 0.75
    # 3 of 4 right at 0.75: calibrated. All right: off by 0.25. All wrong: off by 0.75.
    group = [odds, 0.0]
    assert pairwise_calibration_error([group] * 4, [[1, 2]] * 3 + [[2, 1]]) == pytest.approx(0.0, abs=1e-12)
    assert pairwise_calibration_error([group] * 4, [[1, 2]] * 4) == pytest.approx(0.25)
    assert pairwise_calibration_error([group] * 4, [[2, 1]] * 4) == pytest.approx(0.75)
    # Two bins, off by 0.25 and by 0.
    both = pairwise_calibration_error([group, [50.0, 0.0]], [[1, 2], [1, 2]])
    assert both == pytest.approx(0.125)
    assert pairwise_calibration_error([[1.0, 1.0]], [[1, 2]]) == 0.0
    assert pairwise_calibration_error([[900.0, -900.0]], [[2, 1]]) == 1.0
    assert math.isnan(pairwise_calibration_error([[1.0, 2.0]], [[1, 1]]))


@pytest.mark.parametrize("far", [3.0, 30.0, 60.0, 700.0])
def test_a_certain_pair_shares_the_last_bin(far: float) -> None:
    """At a margin of 40 the probability is 1.0 in floating point, the upper end of the last bin."""
    scores, rankings = [[far, 0.0], [2.5, 0.0]], [[2, 1], [1, 2]]
    expected = naive_calibration_error(ordered_pairs(scores, rankings))
    assert pairwise_calibration_error(scores, rankings) == pytest.approx(expected)


def test_calibration_of_outcomes_drawn_from_the_model() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(scale=2.0, size=(20_000, 2))
    first_wins = rng.random(20_000) < 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    rankings = [[1, 2] if wins else [2, 1] for wins in first_wins]
    assert pairwise_calibration_error(list(scores), rankings) < 0.01
    assert pairwise_calibration_error(list(3 * scores), rankings) > 0.1


def test_score_length_correlation() -> None:
    assert score_length_correlation([[0.1, 0.2, 0.9]], [[5, 6, 700]]) == pytest.approx(1.0)
    assert score_length_correlation([[0.9, 0.2], [0.0, 1.0]], [[1, 2], [3, 9]]) == pytest.approx(0.0)
    # Constant scores, constant lengths and N = 1 are left out.
    some = score_length_correlation([[2.0, 1.0], [1.0, 1.0], [1.0, 2.0], [4.0]], [[1, 2], [1, 2], [7, 7], [1]])
    assert some == pytest.approx(-1.0)
    assert math.isnan(score_length_correlation([[1.0, 1.0], [2.0]], [[1, 2], [3]]))
    # Within groups: the lengths differ between the groups along with the scores, and that must not count.
    within = score_length_correlation([[1.0, 0.0], [11.0, 10.0]], [[10, 20], [110, 120]])
    assert within == pytest.approx(-1.0)
    rng = np.random.default_rng(0)
    values, lengths = rng.integers(0, 5, size=(2, 20, 8))
    expected = np.mean([spearmanr(v, n).statistic for v, n in zip(values, lengths, strict=True)])
    assert score_length_correlation(list(values), list(lengths)) == pytest.approx(expected)


def test_mean_score_spread() -> None:
    assert mean_score_spread([[1.0, -1.0], [5.0], [3.0, 3.0, 3.0, 3.0]]) == pytest.approx(1 / 3)


def test_random_scores_score_at_chance() -> None:
    rng = np.random.default_rng(0)
    n, b = 4, 4000
    scores = list(rng.normal(size=(b, n)))
    rankings = list(1 + rng.permuted(np.tile(np.arange(n), (b, 1)), axis=1))
    found = ranking_metrics(scores, rankings)
    assert found["best_of_n_accuracy"] == pytest.approx(1 / n, abs=0.03)
    assert found["pairwise_accuracy"] == pytest.approx(0.5, abs=0.02)
    assert found["kendall_tau_b"] == pytest.approx(0.0, abs=0.03)
    discounts = 1 / np.log2(np.arange(n) + 2)
    chance_ndcg = 1.5 * discounts.sum() / (np.arange(n)[::-1] @ discounts)
    assert found["ndcg"] == pytest.approx(chance_ndcg, abs=0.01)
    assert order_flip_rate(scores, list(rng.normal(size=(b, n)))) == pytest.approx(1 - 1 / n, abs=0.03)
    assert score_length_correlation(scores, list(rng.integers(1, 99, size=(b, n)))) == pytest.approx(0.0, abs=0.03)


RANKED: list[Callable[[Scores, Ranks], object]] = [
    best_of_n_accuracy,
    pairwise_accuracy,
    kendall_tau_b,
    ndcg,
    pairwise_calibration_error,
    ranking_metrics,
]


@pytest.mark.parametrize("metric", RANKED)
@pytest.mark.parametrize(
    ("scores", "rankings", "message"),
    [
        ([], [], "scores of 0 groups"),
        ([[1.0, 2.0]], [], "scores of 1 groups and rankings of 0"),
        ([[1.0, 2.0], [1.0, 2.0]], [[1, 2], [1]], "group 1 has 2 scores and 1 rankings"),
        ([[1.0], []], [[1], []], r"scores of group 1 have shape \(0,\)"),
        ([1.0, 2.0], [1, 2], r"scores of group 0 have shape \(\)"),
        ([[1.0], [1.0, 2.0]], [[1], [0, 1]], r"rankings of group 1 are \[0.0, 1.0\]"),
        ([[1.0, 2.0]], [[1.5, 1]], "whole numbers"),
        ([[1.0, 2.0]], [[1, math.nan]], "whole numbers"),
    ],
)
def test_mismatches_are_refused(
    metric: Callable[[Scores, Ranks], object], scores: Scores, rankings: Ranks, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        metric(scores, rankings)


@pytest.mark.parametrize("metric", [*RANKED, order_flip_rate, score_length_correlation])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_refused_by_group(metric: Callable[[Scores, Ranks], object], bad: float) -> None:
    with pytest.raises(NonFiniteScoreError, match="group 1 "):
        metric([[1.0, 2.0], [bad, 2.0]], [[1, 2], [1, 2]])


def test_other_mismatches_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="scores_a of 2 groups and scores_b of 1"):
        order_flip_rate([[1.0], [2.0]], [[1.0]])
    with pytest.raises(ConfigurationError, match="group 0 has 2 scores_a and 1 scores_b"):
        order_flip_rate([[1.0, 2.0]], [[1.0]])
    with pytest.raises(NonFiniteScoreError, match="scores_b of group 0"):
        order_flip_rate([[1.0, 2.0]], [[1.0, math.nan]])
    for atol in (-1.0, math.nan):
        with pytest.raises(ConfigurationError, match="atol"):
            order_flip_rate([[1.0]], [[1.0]], atol)
    with pytest.raises(ConfigurationError, match="group 0 has 2 scores and 1 lengths"):
        score_length_correlation([[1.0, 2.0]], [[3]])
    with pytest.raises(NonFiniteScoreError, match="group 1 "):
        mean_score_spread([[1.0], [math.inf]])
