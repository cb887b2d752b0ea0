"""The benchmark builder: graphs beside brute force, strengths beside a plain optimiser, files, and a known truth."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crowd import Crowd, draw_rankings, draw_strengths, draw_votes, model_names
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from published_schemas import write_jsonl
from scipy.optimize import minimize
from scipy.stats import kendalltau
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.data.groups_file import load_preferences
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.mr2bench.build import build_benchmark, sample_variants
from mr_reward.mr2bench.judgments import (
    FullRanking,
    Question,
    Vote,
    read_questions,
    read_rankings,
    read_votes,
    votes_of,
    win_counts,
)
from mr_reward.mr2bench.rankings import (
    METHODS,
    agreement,
    bradley_terry_map,
    consensus_ranks,
    descendant_ranks,
    exact_order,
    greedy_order,
    is_cyclic,
    net_weights,
    rank_votes,
    solve,
)

Floats = NDArray[np.float64]


def random_wins(size: int, seed: int, most: int = 4) -> Floats:
    wins = np.random.default_rng(seed).integers(0, most, (size, size)).astype(float)
    np.fill_diagonal(wins, 0)
    return wins


# --- preference graph ---


def removed_weight(weights: Floats, order: Sequence[int]) -> float:
    """The weight of the arcs that an order removes, those that point backwards."""
    return float(np.tril(weights[np.ix_(order, order)]).sum())


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 6), seed=st.integers(0, 10_000), most=st.integers(2, 5))
def test_exact_removes_as_little_as_any_order(size: int, seed: int, most: int) -> None:
    weights = net_weights(random_wins(size, seed, most))
    least = min(removed_weight(weights, order) for order in permutations(range(size)))
    exact, greedy = exact_order(weights), greedy_order(weights)
    assert sorted(exact) == sorted(greedy) == list(range(size))
    assert removed_weight(weights, exact) == least
    assert removed_weight(weights, greedy) >= least
    assert (least > 0) == is_cyclic(weights)


@pytest.mark.parametrize("seed", range(3))
def test_exact_equals_brute_force_for_seven(seed: int) -> None:
    weights = net_weights(random_wins(7, seed))
    least = min(removed_weight(weights, order) for order in permutations(range(7)))
    assert removed_weight(weights, exact_order(weights)) == least


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 8), seed=st.integers(0, 10_000))
def test_net_weights_descendants_and_bound_of_the_heuristic(size: int, seed: int) -> None:
    wins = random_wins(size, seed)
    weights = net_weights(wins)
    for i in range(size):
        for j in range(size):
            assert weights[i, j] == max(wins[i, j] - wins[j, i], 0)
    order = greedy_order(weights)
    place = {node: k for k, node in enumerate(order)}
    # naive reachability over the arcs that point forwards
    reach = [[place[i] < place[j] and weights[i, j] > 0 for j in range(size)] for i in range(size)]
    for k in range(size):
        for i in range(size):
            for j in range(size):
                reach[i][j] = reach[i][j] or (reach[i][k] and reach[k][j])
    counts = [sum(row) for row in reach]
    ranks = descendant_ranks(weights, order)
    for i in range(size):
        for j in range(size):
            assert (ranks[i] < ranks[j]) == (counts[i] > counts[j])
    assert min(ranks) == 1
    # Eades, Lin, Smyth: on unit weights fewer than half of the arcs point backwards.
    unit = (weights > 0).astype(float)
    assert removed_weight(unit, greedy_order(unit)) <= unit.sum() / 2


def test_a_graph_per_evaluator_added_up_is_the_net_of_all_votes() -> None:
    votes = draw_votes(draw_strengths(1, 6), Crowd(num_votes=400, annotators=7))
    names = model_names(6)
    whole = net_weights(win_counts(votes, names)["q0000"])
    ensemble = np.zeros((6, 6))
    for annotator in {vote.annotator for vote in votes}:
        ensemble += net_weights(win_counts([v for v in votes if v.annotator == annotator], names)["q0000"])
    assert np.allclose(net_weights(ensemble), whole)


# --- Bradley-Terry ---


@pytest.mark.parametrize("seed", range(3))
def test_strengths_maximise_the_written_out_objective(seed: int) -> None:
    wins = np.stack([random_wins(5, seed), random_wins(5, seed + 10), np.zeros((5, 5))])
    centre, variance = np.random.default_rng(seed).normal(size=5), 0.7
    mean, covariance = solve(wins, centre, variance)
    for q in range(3):

        def loss(s: Floats, q: int = q) -> float:
            total = ((s - centre) ** 2).sum() / (2 * variance)
            for i in range(5):
                for j in range(5):
                    total += wins[q, i, j] * math.log1p(math.exp(-(s[i] - s[j])))
            return float(total)

        best = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-9})
        assert mean[q] == pytest.approx(best.x, abs=1e-4)
        step = 1e-4
        hessian = [[(loss(mean[q] + step * (a + b)) - loss(mean[q] + step * a) - loss(mean[q] + step * b)
                     + loss(mean[q])) / step**2 for a in np.eye(5)] for b in np.eye(5)]  # fmt: skip
        assert np.linalg.inv(covariance[q]) == pytest.approx(np.array(hessian), abs=1e-2)
    assert mean[2] == pytest.approx(centre), "no votes: the prior"


def test_names_and_order_of_votes_do_not_matter() -> None:
    votes = draw_votes(draw_strengths(6, 7), Crowd(num_votes=500))
    shuffled = list(votes)
    random.Random(0).shuffle(shuffled)
    shuffled = [Vote(v.question, v.model_b, v.model_a, 1 - v.share, v.annotator) for v in shuffled]
    renaming = dict(zip(model_names(7), [f"x{i}" for i in (3, 1, 6, 0, 2, 5, 4)], strict=True))
    renamed = [Vote(v.question, renaming[v.model_a], renaming[v.model_b], v.share) for v in votes]
    for method in ("bt_map", "pged_exact", "none"):
        first, second, third = (rank_votes(v, method=method) for v in (votes, shuffled, renamed))
        assert first.ranks == second.ranks
        if method == "pged_exact":
            continue  # several orders may remove the same weight
        back = [[ranks[third.models.index(renaming[m])] for m in first.models] for ranks in third.ranks]
        assert [list(ranks) for ranks in first.ranks] == back


def test_the_variance_of_the_questions_is_found() -> None:
    """Many votes: the estimate nears the truth of the simulation, 0.8 squared and 0.3 squared."""
    for own in (0.8, 0.3):
        strengths = draw_strengths(80, 10, own=own, seed=1)
        votes = draw_votes(strengths, Crowd(num_votes=60_000, ties=0.0), seed=1)
        found = rank_votes(votes).strengths
        assert found.variance == pytest.approx(own**2, rel=0.25)
        assert np.corrcoef(found.overall, strengths.mean(axis=0))[0, 1] > 0.97


# --- a known truth ---


def quality(ranks: Any, strengths: Floats) -> float:
    return float(np.mean([kendalltau(-np.array(r), s).statistic for r, s in zip(ranks, strengths, strict=True)]))


@pytest.mark.parametrize("method", METHODS)
def test_many_votes_find_the_truth(method: str) -> None:
    strengths = draw_strengths(10, 8, overall=1.5, own=1.5)
    found = rank_votes(draw_votes(strengths, Crowd(num_votes=40_000, ties=0.0)), method=method)
    assert quality(found.ranks, strengths) > 0.85
    assert found.contradicted < 0.35


@pytest.mark.parametrize("flip", [None, 0.27])
def test_with_few_votes_the_other_questions_help(flip: float | None) -> None:
    """The scale of MR2Bench-Video, 189 votes a question, on fewer questions; mean of three seeds."""
    found: dict[str, list[float]] = {"bt_map": [], "none": [], "pged_greedy": []}
    for seed in range(3):
        strengths = draw_strengths(40, 19, seed=seed)
        votes = draw_votes(strengths, Crowd(num_votes=40 * 189, flip=flip), seed=seed)
        for method, values in found.items():
            values.append(quality(rank_votes(votes, method=method).ranks, strengths))
    assert np.mean(found["bt_map"]) > np.mean(found["none"]) + 0.01
    assert np.mean(found["none"]) > np.mean(found["pged_greedy"])


def test_crowd() -> None:
    strengths = draw_strengths(5, 6, seed=3)
    votes = draw_votes(strengths, Crowd(num_votes=5000, ties=0.1), seed=3)
    assert votes == draw_votes(strengths, Crowd(num_votes=5000, ties=0.1), seed=3)
    assert np.mean([vote.share == 0.5 for vote in votes]) == pytest.approx(0.1, abs=0.02)
    assert {sum(vote.question == f"q{q:04d}" for vote in votes) for q in range(5)} == {1000}
    biased = draw_votes(strengths, Crowd(num_votes=5000, ties=0.0, first_bias=1.0))
    assert np.mean([vote.share for vote in biased]) == pytest.approx(0.9, abs=0.02)
    with pytest.raises(ConfigurationError, match="blind is 2, expected a share"):
        Crowd(blind=2)


# --- full rankings ---


def test_consensus_and_agreement_beside_naive_loops() -> None:
    rankings = draw_rankings(draw_strengths(12, 8), annotators=4, noise=1.0)
    names = model_names(8)
    found = agreement(rankings)
    taus, concordances = [], []
    for q in range(12):
        own = [r for r in rankings if r.question == f"q{q:04d}"]
        mid = [[np.mean([p for p, m in enumerate(sorted(names, key=r.ranks.__getitem__), 1)
                         if r.ranks[m] == r.ranks[name]]) for name in names] for r in own]  # fmt: skip
        means = np.mean(mid, axis=0)
        ranks = consensus_ranks(own, names)
        for i in range(8):
            for j in range(8):
                if abs(means[i] - means[j]) > 1e-9:
                    assert (ranks[i] < ranks[j]) == (means[i] < means[j])
                else:
                    assert ranks[i] == ranks[j]
        taus += [kendalltau(mid[a], mid[b]).statistic for a in range(4) for b in range(a)]
        correction = sum(c**3 - c for row in mid for c in map(float, np.unique(row, return_counts=True)[1]))
        s = ((np.sum(mid, axis=0) - np.sum(mid) / 8) ** 2).sum()
        concordances.append(12 * s / (16 * (512 - 8) - 4 * correction))
    assert found == {"tau_b": pytest.approx(np.mean(taus)), "kendall_w": pytest.approx(np.mean(concordances))}
    same = [FullRanking("q", {"a": 1, "b": 2, "c": 2}, who) for who in "xyz"]
    assert agreement(same) == {"tau_b": pytest.approx(1.0), "kendall_w": pytest.approx(1.0)}
    assert all(math.isnan(value) for value in agreement(same[:1]).values())
    with pytest.raises(GroupError, match="leaves out 'd', expected all 4 models"):
        consensus_ranks(same, ["a", "b", "c", "d"])


# --- variants ---


@pytest.mark.parametrize("min_gap", [0.0, 0.5, 1.0])
def test_variants(min_gap: float) -> None:
    ranking = rank_votes(draw_votes(draw_strengths(60, 19), Crowd(num_votes=60 * 189)))
    variants, dropped = sample_variants(ranking, min_gap=min_gap, seed=1)
    assert len(variants) + len(dropped) == 60
    assert variants == sample_variants(ranking, min_gap=min_gap, seed=1)[0]
    assert variants != sample_variants(ranking, min_gap=min_gap, seed=2)[0]
    places = []
    for variant in variants:
        ranks = [ranking.ranks[variant.question][i] for i in variant.positions]
        strengths = sorted((ranking.strengths.mean[variant.question][i] for i in variant.positions), reverse=True)
        assert len(set(variant.positions)) == 4 and ranks.count(min(ranks)) == 1
        assert variant.gap == pytest.approx(strengths[0] - strengths[1]) and variant.gap >= min_gap
        positions = sorted(sorted(ranking.ranks[variant.question]).index(rank) for rank in ranks)
        assert all(i * 19 // 4 <= place < (i + 1) * 19 // 4 for i, place in enumerate(positions)), (
            "one of each quarter"
        )
        places.append(ranks.index(min(ranks)))
    assert set(places) == {0, 1, 2, 3}, "the best stands anywhere"


def test_the_item_of_a_question_alone_is_its_item_among_all() -> None:
    """And a gap that is just reached is reached."""
    ranking = rank_votes(draw_votes(draw_strengths(12, 8), Crowd(num_votes=12 * 100)))
    variants, _ = sample_variants(ranking, seed=3)
    assert len(variants) > 6
    for one in variants:
        chosen = slice(one.question, one.question + 1)
        strengths = replace(
            ranking.strengths, mean=ranking.strengths.mean[chosen], covariance=ranking.strengths.covariance[chosen]
        )
        alone = replace(
            ranking,
            questions=ranking.questions[chosen],
            wins=ranking.wins[chosen],
            ranks=ranking.ranks[chosen],
            strengths=strengths,
        )
        for min_gap in (0.0, one.gap):
            assert sample_variants(alone, seed=3, min_gap=min_gap) == ([replace(one, question=0)], [])


def test_votes_against_the_ranking_are_counted_where_it_has_an_order() -> None:
    wins = np.array([[0.0, 3.0, 5.0], [1.0, 0.0, 2.5], [3.0, 0.5, 0.0]])
    ranking = rank_votes([Vote("q", "a", "b", 1.0), Vote("q", "b", "c", 1.0)])
    found = replace(ranking, wins=[wins, wins.T], ranks=[(1, 1, 2), (1, 2, 3)])
    assert found.contradicted == pytest.approx((3.0 + 0.5 + 3.0 + 5.0 + 2.5) / (5 + 2.5 + 3 + 0.5 + 15))
    assert replace(ranking, wins=[wins], ranks=[(1, 1, 1)]).contradicted == 0.0


def test_the_filter_keeps_right_labels() -> None:
    """The share of right labels rises with the gap."""
    strengths = draw_strengths(300, 19)
    ranking = rank_votes(draw_votes(strengths, Crowd(num_votes=300 * 189)))
    shares = []
    for min_gap in (0.0, 0.5, 1.0):
        variants, _ = sample_variants(ranking, min_gap=min_gap)
        right = [
            max(v.positions, key=lambda i, q=v.question: strengths[q][i])
            == min(v.positions, key=lambda i, q=v.question: ranking.ranks[q][i])
            for v in variants
        ]
        shares.append(np.mean(right))
    assert shares[0] < shares[1] < shares[2]


def test_wrong_options() -> None:
    votes = [Vote("q", "a", "b", 1.0), Vote("q", "b", "c", 1.0)]
    with pytest.raises(ConfigurationError, match="method is 'elo', expected one of bt_map"):
        rank_votes(votes, method="elo")
    with pytest.raises(GroupError, match="got no votes"):
        rank_votes([])
    with pytest.raises(ConfigurationError, match="num_responses is 4, expected 2 to 3"):
        sample_variants(rank_votes(votes))
    with pytest.raises(ConfigurationError, match="min_gap is -1"):
        sample_variants(rank_votes(votes), num_responses=2, min_gap=-1)
    questions = {"q": Question(id="q", prompt="?", responses={"a": "A", "b": "B"})}
    with pytest.raises(GroupError, match="no response of 'c'"):
        build_benchmark(questions, votes=votes, num_responses=2)
    with pytest.raises(GroupError, match="'q' has judgments but no text"):
        build_benchmark({}, votes=votes, num_responses=2)


# --- files and command ---


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_votes, {"question_id": "q", "model_a": "a", "model_b": "b", "winner": "a"}, "a winner out of model_a"),
        (read_votes, {"question_id": "q", "model_a": "a", "winner": "tie"}, "expected question_id, model_a"),
        (read_votes, {"question_id": "q", "model_a": "a", "model_b": "a", "winner": "tie"}, "'a' against itself"),
        (read_votes, ["q"], "expected question_id"),
        (read_rankings, {"question_id": "q", "ranking": {"a": 0, "b": 1}}, "whole numbers from 1 on"),
        (read_rankings, {"question_id": "q", "ranking": ["a", "b"]}, "expected question_id and a ranking"),
        (read_questions, {"id": "q", "prompt": "?", "responses": ["a"]}, "expected id, prompt and responses"),
    ],
)
def test_bad_lines_are_named(read: Any, row: Any, message: str, tmp_path: Path) -> None:
    good = {
        read_votes: {"question_id": "q", "model_a": "a", "model_b": "b", "winner": "tie"},
        read_rankings: {"question_id": "q", "ranking": {"a": 1, "b": 1}},
        read_questions: {"id": "x", "prompt": "?", "responses": {"a": "A"}},
    }
    write_jsonl(tmp_path / "a.jsonl", [good[read], row])
    with pytest.raises(GroupError, match=r"a\.jsonl, line 2: .*" + message):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("judgments", ["votes", "rankings"])
def test_build_command(judgments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the images of the questions are in the working folder
    models = 8
    strengths = draw_strengths(15, models)
    names = model_names(models)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    questions = [
        {"id": f"q{q:04d}", "prompt": f"Question {q}?", "images": ["a.png"],
         "responses": {name: f"answer {strengths[q][i]:.3f}" for i, name in enumerate(names)}}
        for q in range(15)
    ]  # fmt: skip
    write_jsonl(tmp_path / "questions.jsonl", questions)
    if judgments == "votes":
        words = {1.0: "model_a", 0.0: "model_b", 0.5: "tie"}
        rows = [
            {"question_id": v.question, "model_a": v.model_a, "model_b": v.model_b, "winner": words[v.share],
             "annotator": v.annotator}
            for v in draw_votes(strengths, Crowd(num_votes=3000))
        ]  # fmt: skip
    else:
        rows = [
            {"question_id": r.question, "ranking": dict(r.ranks), "annotator": r.annotator}
            for r in draw_rankings(strengths)
        ]
    write_jsonl(tmp_path / "judgments.jsonl", rows)
    command = ["mr2bench", "build", f"--{judgments}", str(tmp_path / "judgments.jsonl"), "--questions",
               str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out")]  # fmt: skip
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    items, full = (load_preferences(tmp_path / "out" / f"{name}.jsonl") for name in ("benchmark", "full_rankings"))
    assert len(full) == 15 and 5 <= len(items) <= 15
    assert all(group.num_responses == models for group in full)
    right = 0
    for group in items:
        assert group.num_responses == 4 and list(group.rankings or ()).count(1) == 1 and len(group.images) == 1
        values = [float(response.split()[1]) for response in group.responses]
        right += (group.rankings or ())[values.index(max(values))] == 1
    assert right / len(items) > 0.7
    text = (tmp_path / "out" / "benchmark.jsonl").read_text()
    assert not any(name in text for name in names), "no line says who wrote what"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "estimated share of right labels" in card and "| questions | 15 |" in card and "model-03" in card
    if judgments == "rankings":
        assert "Kendall's W" in card
    out = tmp_path / "results"
    evaluated = [
        "evaluate",
        "groups",
        "longest",
        "--source",
        str(tmp_path / "out" / "benchmark.jsonl"),
        "--out",
        str(out),
    ]
    assert CliRunner().invoke(app, evaluated).exit_code == 0
    assert json.loads((out / "results.json").read_text())["items"] == len(items)


def test_build_wants_one_kind_of_judgment(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["mr2bench", "build", "--questions", "q.jsonl", "--out", str(tmp_path)])
    assert isinstance(result.exception, ConfigurationError)
    assert "give either --votes or --rankings" in str(result.exception)


def test_votes_of_rankings_and_two_votes_for_one_question() -> None:
    votes = votes_of([FullRanking("q", {"a": 1, "b": 2, "c": 3})])
    assert rank_votes(votes).ranks == [(1, 2, 3)]
    tied = votes_of([FullRanking("q", {"b": 2, "a": 1, "c": 2, "d": 3}, "x")])
    assert tied == [
        Vote("q", *pair, share, "x")
        for pair, share in (("ba", 0.0), ("bc", 0.5), ("bd", 1.0), ("ac", 1.0), ("ad", 1.0), ("cd", 1.0))
    ]
    found = bradley_terry_map([np.array([[0.0, 3.0], [1.0, 0.0]])])
    assert found.best_probability(0, 0, [1]) > 0.5 and found.best_probability(0, 1, [0]) < 0.5
