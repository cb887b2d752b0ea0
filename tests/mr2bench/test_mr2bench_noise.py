"""The builder on awkward judgments: noisy ones, missing ones, equal texts; and whether it knows how sure it is."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from crowd import Crowd, draw_rankings, draw_strengths, draw_votes, model_names
from published_schemas import write_jsonl
from scipy.stats import norm

from mr_reward.errors import GroupError
from mr_reward.mr2bench.build import Built, build_benchmark
from mr_reward.mr2bench.judgments import (
    FullRanking,
    Question,
    Vote,
    read_questions,
    read_rankings,
    read_votes,
)
from mr_reward.mr2bench.rankings import (
    Strengths,
    agreement,
    greedy_order,
    net_weights,
    rank_rankings,
    ranking_strengths,
    solve,
)

VOTE = {"question_id": "q", "model_a": "a", "model_b": "b", "winner": "tie"}
QUESTION = {"id": "q", "prompt": "?", "responses": {"a": "A"}}


def texts_for(strengths: Any) -> dict[str, Question]:
    names = model_names(strengths.shape[1])
    return {
        f"q{q:04d}": Question(id=f"q{q:04d}", prompt="?", responses={n: f"{q} {i}" for i, n in enumerate(names)})
        for q in range(len(strengths))
    }


def right_labels(built: Built, strengths: Any) -> float:
    """The share of items whose label is the truly strongest of the four."""
    return float(
        np.mean([
            max(v.positions, key=lambda i, own=strengths[int(built.ranking.questions[v.question][1:])]: own[i])
            == min(v.positions, key=lambda i, own=built.ranking.ranks[v.question]: own[i])
            for v in built.variants
        ])
    )  # fmt: skip


def claimed(built: Built) -> float:
    return float(built.facts["estimated share of right labels"].split("%")[0]) / 100


# --- how sure ---


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_the_card_of_full_rankings_does_not_claim_too_much(noise: float) -> None:
    """8 models, 240 questions, 3 annotators. Bradley-Terry on the pairs claimed 0.925 where 0.676 were right."""
    claims, truths = [], []
    for seed in range(3):
        strengths = draw_strengths(240, 8, seed=seed)
        built = build_benchmark(
            texts_for(strengths), rankings=draw_rankings(strengths, noise=noise, seed=seed), min_gap=0.5, seed=seed
        )
        claims.append(claimed(built))
        truths.append(right_labels(built, strengths))
    assert np.mean(claims) == pytest.approx(np.mean(truths), abs=0.08)


@pytest.mark.parametrize("flip", [None, 0.27])
def test_the_card_of_votes_does_not_claim_too_much(flip: float | None) -> None:
    strengths = draw_strengths(200, 19)
    built = build_benchmark(texts_for(strengths), votes=draw_votes(strengths, Crowd(num_votes=200 * 189, flip=flip)))
    assert claimed(built) == pytest.approx(right_labels(built, strengths), abs=0.08)


def test_one_ranking_a_question_claims_nothing() -> None:
    strengths = draw_strengths(20, 8)
    rankings = draw_rankings(strengths, annotators=1)
    built = build_benchmark(texts_for(strengths), rankings=rankings)
    assert built.facts["estimated share of right labels"] == "unknown, no question has two rankings"
    with pytest.raises(GroupError, match="one ranking for each of 20 questions, expected two"):
        ranking_strengths({r.question: [r] for r in rankings}, model_names(8))


def test_ranking_strengths_beside_loops() -> None:
    """Unequal numbers of annotators; means, variances and shrinkage written out."""
    names = model_names(6)
    drawn = draw_rankings(draw_strengths(9, 6), annotators=4, noise=1.0)
    rankings = {f"q{q:04d}": [r for r in drawn if r.question == f"q{q:04d}"][: 1 + q % 4] for q in range(9)}
    found = ranking_strengths(rankings, names)
    scores: list[list[list[float]]] = []
    for given in rankings.values():
        scores.append([])
        for one in given:
            row = []
            for name in names:
                better = sum(one.ranks[other] < one.ranks[name] for other in names)
                equal = sum(one.ranks[other] == one.ranks[name] for other in names)
                row.append(-float(norm.ppf((better + (equal + 1) / 2 - 0.375) / 6.25)))
            scores[-1].append(row)
    means = [[sum(row[m] for row in own) / len(own) for m in range(6)] for own in scores]
    overall = [sum(row[m] for row in means) / 9 for m in range(6)]
    residual = sum(
        (row[m] - means[q][m]) ** 2 for q, own in enumerate(scores) for row in own for m in range(6)
    )  # fmt: skip
    noise = residual / (5 * sum(len(own) - 1 for own in scores))
    spread = sum((means[q][m] - overall[m]) ** 2 for q in range(9) for m in range(6)) / (8 * 5)
    own_variance = spread - noise * sum(1 / len(own) for own in scores) / 9
    scale = 1.702 / (2 * noise) ** 0.5
    for q, given in enumerate(rankings.values()):
        trust = own_variance / (own_variance + noise / len(given))
        for m in range(6):
            assert found.mean[q, m] == pytest.approx(scale * (overall[m] + trust * (means[q][m] - overall[m])))
            assert found.covariance[q, m, m] == pytest.approx(scale**2 * own_variance * (1 - trust))
    assert found.variance == pytest.approx(scale**2 * own_variance)


def test_best_of_two_is_the_gaussian_tail_and_best_of_more_is_less() -> None:
    wins = np.random.default_rng(0).integers(0, 5, (1, 5, 5)).astype(float)
    wins[:, range(5), range(5)] = 0
    mean, covariance = solve(wins, np.zeros(5), 0.7)
    found = Strengths(mean, covariance, np.zeros(5), 0.7)

    def ahead(i: int, j: int) -> float:
        spread = covariance[0][i, i] + covariance[0][j, j] - 2 * covariance[0][i, j]
        return float(norm.cdf((mean[0][i] - mean[0][j]) / np.sqrt(spread)))

    assert found.best_probability(0, 1, [3]) == pytest.approx(ahead(1, 3), abs=0.03)
    every = [found.best_probability(0, i, [j for j in range(5) if j != i]) for i in range(5)]
    assert sum(every) == pytest.approx(1.0, abs=0.05), "4,000 draws each"
    assert every[1] <= min(ahead(1, j) for j in (0, 2, 3, 4)) + 0.03


def test_rankings_and_models_may_come_in_any_order() -> None:
    rankings = draw_rankings(draw_strengths(10, 6), noise=1.0)
    shuffled = [replace(r, ranks=dict(sorted(r.ranks.items(), reverse=True))) for r in rankings]
    random.Random(0).shuffle(shuffled)
    first, second = rank_rankings(rankings), rank_rankings(shuffled)
    assert first.ranks == second.ranks
    assert first.strengths.mean == pytest.approx(second.strengths.mean)


def test_annotators_who_all_agree() -> None:
    same = [FullRanking("q", {"a": 1, "b": 2, "c": 3, "d": 4}, who) for who in "xyz"]
    found = rank_rankings(same)
    assert found.ranks == [(1, 2, 3, 4)] and np.isfinite(found.strengths.mean).all()
    assert found.strengths.best_probability(0, 0, [1, 2, 3]) > 0.95


# --- graphs and consensus ---


@pytest.mark.parametrize("seed", range(8))
def test_the_heuristic_leaves_no_cycle(seed: int) -> None:
    weights = net_weights(np.random.default_rng(seed).integers(0, 4, (12, 12)).astype(float))
    place = np.argsort(greedy_order(weights))
    left = nx.DiGraph([(i, j) for i, j in zip(*np.nonzero(weights), strict=True) if place[i] < place[j]])
    assert nx.is_directed_acyclic_graph(left)


# --- what was never judged, equal texts ---


def test_only_judged_responses_are_drawn() -> None:
    """Each question has 8 of 19 responses; the others have neither votes nor texts, except for being known models."""
    strengths, names = draw_strengths(20, 19), model_names(19)
    shown = {f"q{q:04d}": [n for i, n in enumerate(names) if (i + q) % 19 < 8] for q in range(20)}
    votes = [
        v for v in draw_votes(strengths, Crowd(num_votes=20 * 900))
        if v.model_a in shown[v.question] and v.model_b in shown[v.question]
    ]  # fmt: skip
    questions = {q: Question(id=q, prompt="?", responses={n: n for n in own}) for q, own in shown.items()}
    built = build_benchmark(questions, votes=votes)
    assert len(built.items) > 10 and all(group.num_responses == 8 for group in built.full)
    for group in (*built.items, *built.full):
        assert set(group.responses) <= set(shown[str(group.id)])
    few = [Vote("few", "a", "b", 1.0), *votes]
    questions["few"] = Question(id="few", prompt="?", responses={"a": "A", "b": "B"})
    assert "few" in build_benchmark(questions, votes=few).dropped


def test_equal_texts_never_meet_in_an_item() -> None:
    """One of two equal responses would be called worse."""
    votes = [Vote("q", a, b, 1.0) for i, a in enumerate("abcdef") for b in "abcdef"[i + 1 :] for _ in range(9)]
    texts = {"a": "Yes", "b": "No", "c": "Yes ", "d": "Maybe", "e": "Never", "f": "Never"}
    for seed in range(20):
        built = build_benchmark({"q": Question(id="q", prompt="?", responses=texts)}, votes=votes, seed=seed)
        (group,) = built.items
        assert len({text.strip() for text in group.responses}) == 4
    same = {name: "Yes" for name in texts}
    assert build_benchmark({"q": Question(id="q", prompt="?", responses=same)}, votes=votes).dropped == ["q"]


def test_questions_without_judgments_are_counted() -> None:
    strengths = draw_strengths(5, 6)
    questions = texts_for(draw_strengths(8, 6))
    built = build_benchmark(questions, votes=draw_votes(strengths, Crowd(num_votes=2000)))
    assert built.facts["questions without judgments, left out"] == "3" and len(built.full) == 5


# --- files ---


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_votes, {**VOTE, "winner": ["model_a"]}, "expected question_id, model_a"),
        (read_votes, {**VOTE, "annotator": ["x"]}, "annotator is .*expected a text"),
        (read_rankings, {"question_id": "q", "ranking": {"a": 1, "b": 2}, "annotator": True}, "annotator is True"),
        (read_questions, {**QUESTION, "images": "a.png"}, "images is 'a.png', expected a list"),
        (read_questions, {**QUESTION, "prompt": None}, "expected id, prompt"),
    ],
)
def test_bad_lines_are_named(read: Any, row: Any, message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(GroupError, match=r"a\.jsonl, line 1: .*" + message):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("given", "name"), [(0, "0"), (7, "7"), ("", ""), ("0", "0"), (None, None)])
def test_the_number_of_an_annotator_is_a_name(given: Any, name: str | None, tmp_path: Path) -> None:
    """Those who number their annotators begin at 0."""
    write_jsonl(tmp_path / "votes.jsonl", [{**VOTE, "annotator": given}])
    ranking = {"question_id": "q", "ranking": {"a": 1, "b": 2}, "annotator": given}
    write_jsonl(tmp_path / "rankings.jsonl", [ranking])
    assert [vote.annotator for vote in read_votes(tmp_path / "votes.jsonl")] == [name]
    assert [one.annotator for one in read_rankings(tmp_path / "rankings.jsonl")] == [name]


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{no\n")
    with pytest.raises(GroupError, match=r"a\.jsonl, line 1: the line is no JSON"):
        read_votes(tmp_path / "a.jsonl")


def test_rankings_of_different_models_have_no_agreement() -> None:
    with pytest.raises(GroupError, match="one ranking is of 2 models, another of 1"):
        agreement([FullRanking("q", {"a": 1, "b": 2}), FullRanking("q", {"a": 1})])
    with pytest.raises(GroupError, match="one ranking is of 2 models, another of 2 or of others"):
        agreement([FullRanking("q", {"a": 1, "b": 2}), FullRanking("q", {"a": 1, "c": 2})])
