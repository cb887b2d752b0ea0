"""Is a judge fit for a policy: right above wrong, best of N and calibration on rollouts, beside naive counts."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from published_schemas import write_jsonl
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from tiny_models import reward_model
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.data import save_preferences
from mr_reward.errors import GroupError
from mr_reward.evaluation.benchmarks import open_benchmark
from mr_reward.evaluation.evaluator import report_rollouts
from mr_reward.evaluation.official import Judged, intervals, reliability, rollouts
from mr_reward.groups import GroupScores, ResponseGroup, dense_ranks


def drawn(seed: int, count: int = 60) -> list[Judged]:
    """Groups of one to eight responses, of two grades or four, some tied, some dropped; some scores are equal."""
    rng = random.Random(seed)
    items = []
    for i in range(count):
        size, grades = rng.randint(1, 8), rng.choice([1, 2, 2, 4])
        ranks = dense_ranks([rng.randrange(grades) for _ in range(size)])
        scores = None if rng.random() < 0.1 else [rng.choice([0.0, 1.0, rng.gauss(0, 2)]) for _ in range(size)]
        items.append(Judged(str(i), rng.choice("ab"), ranks, scores, {"prompt": f"p{i // 2}"}))
    return items


def naive(items: list[Judged]) -> dict[str, float]:
    shares, best = [], []
    for item in items:
        right = [i for i, rank in enumerate(item.rankings) if rank == 1]
        wrong = [i for i, rank in enumerate(item.rankings) if rank > 1]
        if not wrong:
            continue
        s = item.scores
        if s is None:
            shares.append(0.0)
            best.append(0.0)
            continue
        won = [1.0 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0.0 for i in right for j in wrong]
        shares.append(sum(won) / len(won))
        top = [i for i in range(len(s)) if s[i] == max(s)]
        best.append(sum(i in right for i in top) / len(top))
    return {"right_above_wrong": statistics.fmean(shares), "best_of_n": statistics.fmean(best)}


@pytest.mark.parametrize("seed", range(6))
def test_numbers_are_those_of_a_naive_loop(seed: int) -> None:
    items = drawn(seed)
    found = rollouts(items)
    for name, value in naive(items).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    for category in "ab":
        expected = naive([item for item in items if item.category == category])["right_above_wrong"]
        assert found[f"right_above_wrong/{category}"] == pytest.approx(expected, abs=1e-12)
    assert set(rollouts(items[:1] * 2)) == {"right_above_wrong", "best_of_n", "calibration_error"}


@pytest.mark.parametrize("seed", range(4))
def test_calibration_with_one_right_response_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items, claims, hits = [], [], []
    for i in range(400):
        scores = rng.normal(0, 2, rng.integers(2, 7))
        right = int(rng.integers(len(scores)))
        items.append(Judged(str(i), "", [1 + (k != right) for k in range(len(scores))], scores.tolist()))
        claims.append(softmax(scores).max())
        hits.append(float(scores.argmax() == right))
    share, claimed = calibration_curve(hits, claims, n_bins=10, strategy="uniform")
    counts = [count for count in np.histogram(claims, bins=10, range=(0, 1))[0] if count]
    bins = reliability(items)
    assert [one["groups"] for one in bins] == counts
    assert [one["probability"] for one in bins] == pytest.approx(claimed.tolist())
    assert [one["right"] for one in bins] == pytest.approx(share.tolist())
    expected = float(np.abs(claimed - share) @ counts) / 400
    assert rollouts(items)["calibration_error"] == pytest.approx(expected)


def test_a_model_that_claims_what_holds_is_calibrated_also_where_several_are_right() -> None:
    """The best of a group is drawn by the softmax of its scores; who claims five times the margins is not."""
    rng = np.random.default_rng(0)
    items, loud = [], []
    for i in range(6000):
        scores = rng.normal(0, 1.5, 4)
        right = rng.choice(4, p=softmax(scores))
        ranks = [1 + (k != right) for k in range(4)]
        items.append(Judged(str(i), "", ranks, scores.tolist()))
        loud.append(Judged(str(i), "", ranks, (5 * scores).tolist()))
    assert rollouts(items)["calibration_error"] < 0.03
    assert rollouts(loud)["calibration_error"] > 0.2
    # The target of two right ones is a half for each, which scores that share the probability reach.
    assert rollouts([Judged("", "", [1, 1, 2], [50.0, 50.0, 0.0])])["calibration_error"] == pytest.approx(0.0)
    assert rollouts([Judged("", "", [1, 1, 2], [50.0, 0.0, 0.0])])["calibration_error"] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(3))
def test_weights_count_an_item_as_often_as_it_was_drawn(seed: int) -> None:
    items, rng = drawn(seed), random.Random(seed)
    weights = [rng.choice([0, 1, 2, 3]) for _ in items]
    found = rollouts.weighted(items, np.array([weights], dtype=np.float64))
    again = [item for item, weight in zip(items, weights, strict=True) for _ in range(weight)]
    for name, value in rollouts(again).items():
        assert found[name][0] == pytest.approx(value, abs=1e-12, nan_ok=True), name


def test_groups_of_one_prompt_are_drawn_together(tmp_path: Path) -> None:
    """Three groups of a prompt tell as much as one; the same question about another picture is another prompt."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    row = {"prompt": "Which?", "responses": ["a", "b"], "rankings": [1, 2]}
    images = [["a.png"], ["b.png"], ["a.png"], []]
    write_jsonl(tmp_path / "r.jsonl", [{**row, **({"images": one} if one else {})} for one in images])
    facts = [item.facts["prompt"] for item in open_benchmark("rollouts", tmp_path / "r.jsonl")]
    assert facts[0] == facts[2] and len(set(facts)) == 3
    groups = [ResponseGroup(prompt="?", responses=["a"], images=[Image.open(tmp_path / "a.png")], rankings=[1])] * 2
    save_preferences(groups, tmp_path / "embedded.jsonl")
    assert len({item.facts["prompt"] for item in open_benchmark("rollouts", tmp_path / "embedded.jsonl")}) == 1

    items = drawn(7, 40)
    alone = [Judged(i.uid, i.category, i.rankings, i.scores, {"prompt": i.uid}) for i in items]
    thrice = [Judged(f"{i.uid}{k}", i.category, i.rankings, i.scores, i.facts) for i in alone for k in range(3)]
    one, three = intervals([alone], rollouts), intervals([thrice], rollouts)
    assert one["right_above_wrong"].low < one["right_above_wrong"].high
    for name in one:
        assert three[name] == pytest.approx(one[name], abs=1e-12), name


class Length:
    """Likes what is long; drops what says so."""

    def score_detailed(self, groups: list[ResponseGroup]) -> list[GroupScores]:
        return [
            GroupScores(
                scores=None if "drop" in group.responses else tuple(float(len(text)) for text in group.responses),
                truncated=(False,) * group.num_responses,
            )
            for group in groups
        ]


def test_a_run_scores_each_group_once_in_a_drawn_order(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "1", "responses": ["long", "a", "bb"], "rankings": [1, 2, 2]},
        {"prompt": "2", "responses": ["x", "yy"], "rankings": [1, 2]},
        {"prompt": "3", "responses": ["x", "yy"], "rankings": [1, 1]},
        {"prompt": "4", "responses": ["drop", "y"], "rankings": [1, 2]},
    ]
    write_jsonl(tmp_path / "r.jsonl", rows)
    found = report_rollouts(Length(), tmp_path / "r.jsonl")
    assert found.num_mixed == 3 and len(found.kept) == 3
    assert found.metrics["right_above_wrong"].value == pytest.approx(1 / 3)
    orders = {report_rollouts(Length(), tmp_path / "r.jsonl", seed=seed).records[0].orders[0][0] for seed in range(9)}
    assert orders == {0, 1, 2}, "the file's order may be that of the ranks"
    write_jsonl(tmp_path / "bad.jsonl", [*rows, {"prompt": "?", "responses": ["a"]}])
    with pytest.raises(GroupError, match="line 5.*rankings"):
        report_rollouts(Length(), tmp_path / "bad.jsonl")


def test_from_the_command_line(tmp_path: Path) -> None:
    reward_model("llama", "set").save_pretrained(tmp_path / "rm")
    rng = random.Random(0)
    # Whatever an untrained model likes is right in some groups and wrong in others.
    labels = [[1, 1, 1, 1]] * 3 + [[1, 2, 1, 2]] * 4 + [[2, 1, 2, 1]] * 5
    rows = [
        {"prompt": f"{i // 2}?", "responses": [f"{i} {k}" for k in range(4)], "rankings": ranks}
        for i, ranks in enumerate(labels)
    ]
    rng.shuffle(rows)
    write_jsonl(tmp_path / "heldout.jsonl", rows)

    def evaluate(scorer: object, source: str, out: str) -> Any:
        command = ["evaluate", "rollouts", scorer, tmp_path / source, "--out", tmp_path / out]
        return CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False, env={"COLUMNS": "200"})

    result = evaluate(tmp_path / "rm", "heldout.jsonl", "r")
    assert result.exit_code == 0, result.output
    assert "9 of 12 groups have right and wrong responses" in result.output
    content = json.loads((tmp_path / "r" / "results.json").read_text())
    assert content["items_with_right_and_wrong"] == 9 and sum(one["groups"] for one in content["reliability"]) == 9
    for name in ("right_above_wrong", "best_of_n", "calibration_error"):
        number = content["metrics"][name]
        assert number["low"] <= number["value"] <= number["high"] and name in result.output
    assert 0 < content["metrics"]["right_above_wrong"]["value"] < 1
    items = [json.loads(line) for line in (tmp_path / "r" / "items.jsonl").read_text().splitlines()][1:]
    judged = [Judged("", "all", item["rankings"], item["scores"][0]) for item in items]
    assert content["metrics"]["right_above_wrong"]["value"] == pytest.approx(naive(judged)["right_above_wrong"])
    with Image.open(tmp_path / "r" / "reliability.png") as figure:
        assert figure.width > 300
    # The stock of a policy that always answers right says nothing, and that is told.
    write_jsonl(tmp_path / "right.jsonl", [{**row, "rankings": [1, 1, 1, 1]} for row in rows])
    result = evaluate("longest", "right.jsonl", "none")
    assert result.exit_code == 0 and "0 of 12 groups have right and wrong responses" in result.output
    content = json.loads((tmp_path / "none" / "results.json").read_text())
    assert content["metrics"]["right_above_wrong"]["value"] is None and math.isnan(rollouts([])["best_of_n"])
