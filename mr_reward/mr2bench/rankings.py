"""From judgments to one ranking per question: several methods, and how sure and how agreed it is.

The paper's denoising is a preference graph ensemble: feedback arc set, then rank by descendants. Source: Hu et al.,
"Language Model Preference Evaluation with Multiple Weak Evaluators" (PGED), arXiv 2410.12869, used by arXiv 2604.10966
for MR2Bench-Video. Each evaluator's graph has an arc u -> v of weight w where they prefer u to v by net w votes; the
ensemble adds the graphs up, and opposite arcs cancel. Added up, that is the net of all votes, however they are divided
among evaluators (or resamples of one), so it is computed from all votes at once.

Strengths say how sure a ranking is, with the models' overall strengths as the prior. From votes, by Bradley-Terry: a
question has about one vote per pair at the scale of MR2Bench-Video (94,000 votes, 497 questions, 171 pairs), too few
to rank 19 responses. What the other questions say about the models fills the gap. From several full rankings of a
question, by how far annotators disagree: someone who ranks M responses makes M (M - 1) / 2 comparisons that are no
independent votes. Bradley-Terry on them would be far too sure, the more the less annotators agree. So a ranking counts
once, as normal scores with noise.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import networkx as nx  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix
from scipy.special import expit
from scipy.stats import kendalltau, norm, rankdata
from tqdm.auto import tqdm

from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import dense_ranks
from mr_reward.mr2bench.judgments import FullRanking, Vote, votes_of, win_counts

Floats = NDArray[np.float64]
METHODS = ("bt_map", "pged_greedy", "pged_exact", "none")
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


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """One ranking per question, and what is known about its noise."""

    method: str  # one of `METHODS`, or `consensus`
    models: Sequence[str]  # M names
    questions: Sequence[str]  # Q ids
    wins: Sequence[Floats]  # Q matrices (M, M), of `win_counts`
    ranks: Sequence[Sequence[int]]  # Q times M ranks, 1 = best, ties share a rank
    strengths: Strengths  # in logits, whatever the method (Bradley-Terry for votes): they say how sure a comparison is

    @cached_property
    def judged(self) -> list[list[int]]:
        """For each question the positions of the models that were judged there; the rest has no rank to rely on."""
        return [np.flatnonzero((matrix + matrix.T).any(axis=1)).tolist() for matrix in self.wins]

    @cached_property
    def cyclic(self) -> float:
        """Share of questions whose votes no ranking agrees with."""
        return statistics.fmean(is_cyclic(net_weights(matrix)) for matrix in self.wins)

    @cached_property
    def contradicted(self) -> float:
        """Share of votes (ties left out) that the ranking contradicts."""
        against = total = 0.0
        for matrix, own in zip(self.wins, self.ranks, strict=True):
            places = np.asarray(own)
            against += matrix[places[:, None] > places[None, :]].sum()
            total += matrix[places[:, None] != places[None, :]].sum()
        return float(against / total) if total else 0.0


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
    questions, wins = zip(*sorted(win_counts(votes, models).items()), strict=True)
    strengths = bradley_terry_map(wins)
    bar = tqdm(range(len(wins)), desc=method, unit="question", disable=not show_progress)
    ranks = [_rank_counts(wins[q], strengths.mean[q], method) for q in bar]
    return Denoised(method=method, models=models, questions=questions, wins=wins, ranks=ranks, strengths=strengths)


def rank_rankings(rankings: Sequence[FullRanking]) -> Denoised:
    """Consensus of several full rankings per question, with strengths that say how sure it is.

    Where no question has two rankings, noise cannot be told from quality: the strengths are then Bradley-Terry on the
    pairs of each ranking, good for comparing gaps, and surer than they should be.
    """
    if not rankings:
        raise GroupError("got no rankings, expected at least one; check the file")
    by_question = _by_question(rankings)
    models = sorted({model for ranking in rankings for model in ranking.ranks})
    questions, wins = zip(*sorted(win_counts(votes_of(rankings), models).items()), strict=True)
    ranks = [consensus_ranks(by_question[question], models) for question in questions]
    repeated = any(len(members) > 1 for members in by_question.values())
    strengths = ranking_strengths(by_question, models) if repeated else bradley_terry_map(wins)
    return Denoised(
        method="consensus", models=models, questions=questions, wins=wins, ranks=ranks, strengths=strengths
    )


def _by_question(rankings: Iterable[FullRanking]) -> dict[str, list[FullRanking]]:
    found: defaultdict[str, list[FullRanking]] = defaultdict(list)
    for ranking in rankings:
        found[ranking.question].append(ranking)
    return found


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
    taus, concordances = [], []
    for members in _by_question(rankings).values():
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


# --- the preference graph ---


def net_weights(wins: Floats) -> Floats:
    """The ensemble's arcs: (M, M) of wins -> (M, M), entry (i, j) > 0 is the weight of i -> j, without an opposite."""
    return np.maximum(wins - wins.T, 0.0)


def greedy_order(weights: Floats) -> list[int]:
    """An order with few backward arcs, by the heuristic of Eades, Lin and Smyth (1993) on each cyclic component."""
    return _by_component(weights, _eades)


def exact_order(weights: Floats) -> list[int]:
    """The order with the least weight of backward arcs, as an integer program (linear ordering)."""
    return _by_component(weights, _linear_ordering)


def descendant_ranks(weights: Floats, order: Sequence[int]) -> tuple[int, ...]:
    """Rank by how many others can be reached once the backward arcs are removed."""
    place = np.argsort(order)
    forward = np.where(place[:, None] < place[None, :], weights, 0.0)
    graph = _graph(forward)
    return dense_ranks([-len(nx.descendants(graph, node)) for node in range(len(weights))])


def is_cyclic(weights: Floats) -> bool:
    """Whether no ranking agrees with all arcs."""
    return not nx.is_directed_acyclic_graph(_graph(weights))


def _by_component(weights: Floats, order_one: Callable[[Floats, list[int]], list[int]]) -> list[int]:
    """No arc between components has to be removed, so each is ordered by itself."""
    components = nx.condensation(_graph(weights))
    order: list[int] = []
    for component in nx.lexicographical_topological_sort(components):
        order += order_one(weights, sorted(components.nodes[component]["members"]))
    return order


def _graph(weights: Floats) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(weights)))
    graph.add_edges_from(zip(*map(np.ndarray.tolist, np.nonzero(weights)), strict=True))
    return graph


def _eades(weights: Floats, members: list[int]) -> list[int]:
    """Sinks to the end, sources to the front, else whoever gives most more than it takes to the front."""
    left: list[int] = []
    right: list[int] = []
    remaining = list(members)
    while remaining:
        part = weights[np.ix_(remaining, remaining)]
        given, taken = part.sum(axis=1), part.sum(axis=0)
        sinks = [node for node, out in zip(remaining, given, strict=True) if out == 0]
        if sinks:
            right = sinks + right
            remaining = [node for node in remaining if node not in sinks]
            continue
        sources = [node for node, into in zip(remaining, taken, strict=True) if into == 0]
        chosen = sources or [remaining[int(np.argmax(given - taken))]]
        left += chosen
        remaining = [node for node in remaining if node not in chosen]
    return left + right


def _linear_ordering(weights: Floats, members: list[int]) -> list[int]:
    """x_ij = 1 puts i before j; any three of them have to agree on an order."""
    size = len(members)
    if size < 3:
        return members
    pairs = {pair: k for k, pair in enumerate(combinations(range(size), 2))}
    part = weights[np.ix_(members, members)]
    cost = np.array([part[j, i] - part[i, j] for i, j in pairs])
    triples = list(combinations(range(size), 3))
    rows = np.repeat(np.arange(len(triples)), 3)
    columns = [pairs[pair] for i, j, k in triples for pair in ((i, j), (j, k), (i, k))]
    matrix = csr_matrix((np.tile([1.0, 1.0, -1.0], len(triples)), (rows, columns)), (len(triples), len(pairs)))
    result = milp(
        cost, integrality=np.ones(len(pairs)), bounds=Bounds(0, 1), constraints=LinearConstraint(matrix, 0, 1)
    )
    before = np.zeros(size)
    for (i, j), value in zip(pairs, result.x, strict=True):
        before[i if value > 0.5 else j] += 1
    return [members[i] for i in np.argsort(-before, kind="stable")]


# --- strengths ---


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
