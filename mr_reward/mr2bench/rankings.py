"""From judgments to one ranking per question: several methods, and how sure and how agreed it is."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata
from tqdm.auto import tqdm

from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import dense_ranks
from mr_reward.mr2bench.judgments import FullRanking, Vote, votes_of, win_counts
from mr_reward.mr2bench.preference_graph import (
    descendant_ranks,
    exact_order,
    greedy_order,
    is_cyclic,
    net_weights,
)
from mr_reward.mr2bench.strengths import Strengths, bradley_terry_map, ranking_strengths

__all__ = ["METHODS", "Denoised", "agreement", "consensus_ranks", "rank_rankings", "rank_votes"]

Floats = NDArray[np.float64]
METHODS = ("bt_map", "pged_greedy", "pged_exact", "none")


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """One ranking per question."""

    method: str  # one of `METHODS`, or `consensus`
    models: Sequence[str]  # M names
    questions: Sequence[str]  # Q ids
    ranks: Sequence[Sequence[int]]  # Q times M ranks, 1 = best, ties share a rank
    strengths: Strengths  # in logits, whatever the method (Bradley-Terry for votes): they say how sure a comparison is
    # for each question the positions of the models that were judged there; the rest has no rank to rely on
    judged: Sequence[Sequence[int]]
    cyclic: float  # share of questions whose votes no ranking agrees with
    contradicted: float  # share of votes (ties left out) that the ranking contradicts


def rank_votes(votes: Sequence[Vote], *, method: str = "bt_map", show_progress: bool = False) -> Denoised:
    """Rank the responses to each question by votes; questions and models in alphabetical order.

    `bt_map`: Bradley-Terry with the models' overall strengths as prior, the strongest in tests with known truth;
    `pged_greedy`, `pged_exact`: the paper's preference graph, with the heuristic or the least feedback arc set;
    `none`: share of votes won.
    """
    if method not in METHODS:
        raise ConfigurationError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if not votes:
        raise GroupError("got no votes, expected at least one; check the file")
    models = sorted({name for vote in votes for name in (vote.model_a, vote.model_b)})
    counts = win_counts(votes, models)
    questions = sorted(counts)
    wins = [counts[question] for question in questions]
    strengths = bradley_terry_map(wins)
    bar = tqdm(range(len(wins)), desc=method, unit="question", disable=not show_progress)
    ranks = [_rank_counts(wins[q], strengths.mean[q], method) for q in bar]
    return _describe(method, models, questions, wins, ranks, strengths)


def rank_rankings(rankings: Sequence[FullRanking]) -> Denoised:
    """Consensus of several full rankings per question, with strengths that say how sure it is.

    Where no question has two rankings, noise cannot be told from quality: the strengths are then Bradley-Terry on the
    pairs of each ranking, good for comparing gaps, and surer than they should be.
    """
    if not rankings:
        raise GroupError("got no rankings, expected at least one; check the file")
    by_question: defaultdict[str, list[FullRanking]] = defaultdict(list)
    for ranking in rankings:
        by_question[ranking.question].append(ranking)
    models = sorted({model for ranking in rankings for model in ranking.ranks})
    questions = sorted(by_question)
    ranks = [consensus_ranks(by_question[question], models) for question in questions]
    counts = win_counts(votes_of(rankings), models)
    wins = [counts[question] for question in questions]
    repeated = any(len(members) > 1 for members in by_question.values())
    strengths = ranking_strengths(by_question, models) if repeated else bradley_terry_map(wins)
    return _describe("consensus", models, questions, wins, ranks, strengths)


def _describe(
    method: str,
    models: Sequence[str],
    questions: Sequence[str],
    wins: Sequence[Floats],
    ranks: Sequence[Sequence[int]],
    strengths: Strengths,
) -> Denoised:
    """Rankings (Q times M) with what is known about their noise; `wins` are Q matrices (M, M)."""
    against = total = 0.0
    for matrix, own in zip(wins, ranks, strict=True):
        places = np.asarray(own)
        different = places[:, None] != places[None, :]
        against += matrix[places[:, None] > places[None, :]].sum()
        total += matrix[different].sum()
    return Denoised(
        method=method,
        models=models,
        questions=questions,
        ranks=ranks,
        strengths=strengths,
        judged=[np.flatnonzero((matrix + matrix.T).any(axis=1)).tolist() for matrix in wins],
        cyclic=statistics.fmean(is_cyclic(net_weights(matrix)) for matrix in wins),
        contradicted=float(against / total) if total else 0.0,
    )


def _rank_counts(wins: Floats, strengths: Floats, method: str) -> tuple[int, ...]:
    """The ranking of one question, from wins (M, M) and, for `bt_map`, strengths (M,)."""
    if method == "bt_map":
        return dense_ranks((-strengths).tolist())
    if method == "none":
        compared = (wins + wins.T).sum(axis=1)
        share = np.divide(wins.sum(axis=1), compared, out=np.full(len(wins), 0.5), where=compared > 0)
        return dense_ranks((-share).tolist())
    weights = net_weights(wins)
    order = greedy_order(weights) if method == "pged_greedy" else exact_order(weights)
    return descendant_ranks(weights, order)


def consensus_ranks(rankings: Sequence[FullRanking], models: Sequence[str]) -> tuple[int, ...]:
    """The ranking by mean rank (Borda) over annotators; equal means share a rank."""
    for ranking in rankings:
        if missing := [model for model in models if model not in ranking.ranks]:
            raise GroupError(
                f"question {ranking.question!r}: a ranking leaves out {missing[0]!r}, expected all "
                f"{len(models)} models; complete or remove it"
            )
    midranks = [rankdata([ranking.ranks[model] for model in models]) for ranking in rankings]
    return dense_ranks(np.mean(midranks, axis=0).round(9).tolist())


def agreement(rankings: Iterable[FullRanking]) -> dict[str, float]:
    """How far annotators agree about the same questions; NaN where no question has two rankings.

    `tau_b`: Kendall's tau-b between two annotators, mean over pairs and questions; `kendall_w`: coefficient of
    concordance with the correction for ties, mean over questions.
    """
    by_question: defaultdict[str, list[FullRanking]] = defaultdict(list)
    for ranking in rankings:
        by_question[ranking.question].append(ranking)
    taus, concordances = [], []
    for members in by_question.values():
        models = sorted(members[0].ranks)
        if len(members) < 2:
            continue
        if other := next((ranking for ranking in members if sorted(ranking.ranks) != models), None):
            raise GroupError(
                f"question {other.question!r}: one ranking is of {len(models)} models, another of {len(other.ranks)} "
                "or of others, expected the same; complete or remove one"
            )
        ranks = [[ranking.ranks[model] for model in models] for ranking in members]
        taus += [kendalltau(a, b).statistic for a, b in combinations(ranks, 2)]
        concordances.append(_kendall_w(np.array([rankdata(own) for own in ranks])))
    return {"tau_b": _mean(taus), "kendall_w": _mean(concordances)}


def _kendall_w(midranks: Floats) -> float:
    """12 S / (m^2 (n^3 - n) - m T), with T = sum over annotators and ties of t^3 - t."""
    m, n = midranks.shape
    sums = midranks.sum(axis=0)
    spread = float(((sums - sums.mean()) ** 2).sum())
    ties = sum(
        count**3 - count for ranks in midranks for count in np.unique(ranks, return_counts=True)[1].astype(float)
    )
    scale = m**2 * (n**3 - n) - m * ties
    return 12 * spread / scale if scale else float("nan")


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return statistics.fmean(defined) if defined else float("nan")
