"""Scoring a benchmark: orders, interruption, scorers, report, and the two commands."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from published_schemas import write_jsonl
from tiny_models import random_group, reward_model
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from mr_reward import GroupScorer, ResponseGroup
from mr_reward.cli.app import app
from mr_reward.data.groups_file import save_preferences
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.evaluation.benchmarks import EvaluationItem
from mr_reward.evaluation.evaluator import (
    ALL_ORDERS,
    draw_orders,
    evaluate_benchmark,
    evaluate_groups,
    score_benchmark,
)
from mr_reward.evaluation.judges import (
    BASELINES,
    Alone,
    Baseline,
    RewardModel,
    ScoresFile,
    load_scorer,
)
from mr_reward.evaluation.official import ItemRecord
from mr_reward.evaluation.report import read_records
from mr_reward.groups import GroupScores
from mr_reward.worlds import tiny
from mr_reward.worlds.handwriting import HANDWRITING_BENCHMARKS


def items(count: int = 40, seed: int = 0) -> list[EvaluationItem]:
    rng = random.Random(seed)
    found = []
    for i in range(count):
        group = random_group(rng, rng.randint(2, 5), longest=20, id=f"{i:05d}")
        ranks = [rng.randint(1, 2) for _ in range(group.num_responses)]
        ranks[rng.randrange(len(ranks))] = 1
        group = ResponseGroup(prompt=group.messages, responses=group.responses, rankings=ranks, id=group.id)
        found.append(EvaluationItem(uid=f"{i:05d}", category="ab"[i % 2], group=group, facts={"i": i}))
    return found


def run(model: Any, path: Path, given: Sequence[EvaluationItem], **options: Any) -> list[ItemRecord]:
    return score_benchmark(model, given, path, settings={"benchmark": "groups"}, **options)


def model(layout: str) -> RewardModel:
    return RewardModel(GroupScorer(reward_model("llama", layout), over_length="drop_group"), layout)


class Counting:
    """Any scorer, counting what it is asked."""

    def __init__(self, scorer: Any, stop_after: int | None = None) -> None:
        self.scorer, self.stop_after = scorer, stop_after
        self.name, self.order_free = scorer.name, scorer.order_free
        self.groups: list[ResponseGroup] = []
        self.largest_call = 0

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        if self.stop_after is not None and len(self.groups) + len(groups) > self.stop_after:
            raise KeyboardInterrupt
        self.groups += groups
        self.largest_call = max(self.largest_call, len(groups))
        return self.scorer.score_detailed(groups)


# --- orders ---


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("k", [1, 4, 24])
def test_orders_are_different_permutations_of_their_own_item(n: int, k: int) -> None:
    drawn = draw_orders("item", n, k, 0)
    assert len(drawn) == len(set(drawn)) == min(k, math.factorial(n))
    assert all(sorted(order) == list(range(n)) for order in drawn)
    assert drawn == draw_orders("item", n, k, 0)
    if n > 3:
        assert drawn != draw_orders("item", n, k, 1) and drawn != draw_orders("other", n, k, 0)


def test_all_orders() -> None:
    assert len(set(draw_orders("item", 4, ALL_ORDERS, 0))) == 24
    assert len(set(draw_orders("item", 6, ALL_ORDERS, 0))) == len(set(draw_orders("item", 6, 720, 0))) == 720
    with pytest.raises(ConfigurationError, match="7 responses have 5040 orders, expected at most 720"):
        draw_orders("item", 7, 5040, 0)
    with pytest.raises(ConfigurationError, match="8 responses have 40320 orders"):
        draw_orders("item", 8, ALL_ORDERS, 0)


def test_the_stored_order_is_not_what_is_shown(tmp_path: Path) -> None:
    """The better response is always stored first; the order-dependent scorer gets it in every slot."""

    class First:
        name, order_free = "first", False

        def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
            return [
                GroupScores(scores=tuple(-float(i) for i in range(g.num_responses)), truncated=(False,) * 2)
                for g in groups
            ]

    pairs = [
        EvaluationItem(uid=str(i), category="", group=ResponseGroup(prompt="?", responses=["a", "b"], rankings=[1, 2]))
        for i in range(400)
    ]
    records = run(First(), tmp_path / "items.jsonl", pairs, num_orders=1)
    assert 0.4 < statistics.fmean(record.judged(0).strict_pair for record in records) < 0.6
    both = run(First(), tmp_path / "both.jsonl", pairs, num_orders=ALL_ORDERS)
    assert statistics.fmean(record.judged(k).strict_pair for record in both for k in (0, 1)) == 0.5


@pytest.mark.parametrize("layout", ["causal", "isolated", "set"])
def test_scores_are_put_back_in_order(layout: str, tmp_path: Path) -> None:
    """Against a loop that scores one order of one item at a time."""
    given = items(12)
    scorer = model(layout)
    direct = GroupScorer(reward_model("llama", layout))
    records = run(scorer, tmp_path / "items.jsonl", given, num_orders=3)
    for item, record in zip(given, records, strict=True):
        for order, scores in zip(record.orders, record.scores or (), strict=True):
            (shown,) = direct.score([item.group.select(order)])
            assert [scores[response] for response in order] == pytest.approx(shown, abs=1e-5)
        assert record.facts == {"i": item.facts["i"]} and record.category == item.category
    spread = max(statistics.pstdev(own) for r in records for own in zip(*(r.scores or ()), strict=True))
    assert spread < 1e-5 if layout != "causal" else spread > 1e-3


def test_default_orders(tmp_path: Path) -> None:
    given = items(6)
    for layout, most in (("set", 1), ("isolated", 1), ("causal", 8)):
        records = run(model(layout), tmp_path / f"{layout}.jsonl", given)
        assert {len(r.orders) for r in records} == {min(most, math.factorial(len(r.rankings))) for r in records}
        if most == 1:
            assert all(list(record.orders[0]) == sorted(record.orders[0]) for record in records)


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bool]]:
    """Every kind of scorer that `load_scorer` knows: its description, and whether responses are scored alone."""
    folder = tmp_path_factory.mktemp("scorers")
    for layout in ("set", "causal"):
        reward_model("llama", layout).save_pretrained(folder / layout)
    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    rows = [{"uid": item.uid, "scores": [random.gauss(0, 1) for _ in item.group.responses]} for item in items(8)]
    write_jsonl(folder / "scores.jsonl", rows)
    plain = [*BASELINES, f"classifier:{folder / 'classifier'}", f"scores:{folder / 'scores.jsonl'}"]
    found = {spec.partition(":")[0]: (spec, False) for spec in plain}
    for layout in ("set", "causal"):
        found |= {layout: (str(folder / layout), False), f"{layout} alone": (str(folder / layout), True)}
    found |= {f"{spec.partition(':')[0]} alone": (spec, True) for spec in plain[:-1]}
    return found


@pytest.mark.parametrize("orders", [None, 1, 2, ALL_ORDERS])
@pytest.mark.parametrize(
    "kind",
    [
        name + alone
        for name in (*BASELINES, "classifier", "set", "causal", "scores")
        for alone in ("", " alone")
        if name + alone != "scores alone"
    ],
)
def test_scores_of_every_scorer_stand_at_their_responses(
    kind: str, orders: int | None, scorers: dict[str, tuple[str, bool]], tmp_path: Path
) -> None:
    """Against the scorer itself, asked about one item in the one order that the file says; a file has one order."""
    spec, alone = scorers[kind]
    scorer, given = load_scorer(spec, device="cpu", alone=alone), items(8)
    records = run(scorer, tmp_path / "items.jsonl", given, num_orders=orders)
    for item, record in zip(given, records, strict=True):
        possible = math.factorial(item.group.num_responses)
        count = (8 if kind == "causal" else 1) if orders is None else possible if orders == ALL_ORDERS else orders
        assert len(record.orders) == (1 if kind == "scores" else min(count, possible))
        for order, scores in zip(record.orders, record.scores or (), strict=True):
            own = list(range(item.group.num_responses))
            assert list(order) == own or kind != "scores"
            (asked,) = scorer.score_detailed([item.group.select(order)])
            assert [scores[response] for response in order] == pytest.approx(list(asked.scores or ()), abs=1e-5)
            (stored,) = scorer.score_detailed([item.group])
            if scorer.order_free:
                assert list(scores) == pytest.approx(list(stored.scores or ()), abs=1e-5)


def test_a_file_of_scores_keeps_their_order(
    scorers: dict[str, tuple[str, bool]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """4, 3, 2, 1 stays 4, 3, 2, 1, whatever is asked; that nothing was shuffled is said, and no other file is it."""
    group = ResponseGroup(prompt="?", responses=["a", "b", "c", "d"], rankings=[1, 2, 3, 4], id="x")
    write_jsonl(tmp_path / "scores.jsonl", [{"uid": "x", "scores": [4, 3, 2, 1]}])
    scorer = ScoresFile(tmp_path / "scores.jsonl")
    for seed in range(5):
        (record,) = run(
            scorer, tmp_path / f"{seed}.jsonl", [EvaluationItem(uid="x", category="", group=group)], num_orders=2,
            seed=seed,
        )  # fmt: skip
        assert record.scores == [[4, 3, 2, 1]] and record.orders == [[0, 1, 2, 3]]
        assert evaluate_groups(scorer, [group], seed=seed)["pairwise_accuracy"] == 1
        assert evaluate_groups(scorer, [group], seed=seed)["order_flip_rate"] == 0
    assert "in one order, not 2" in caplog.text
    write_jsonl(tmp_path / "scores.jsonl", [{"uid": "x", "scores": [1, 2, 3, 4]}])
    with pytest.raises(ConfigurationError, match="holds another run"):
        run(ScoresFile(tmp_path / "scores.jsonl"), tmp_path / "0.jsonl", [], num_orders=2)
    with pytest.raises(ConfigurationError, match=r"scores\.jsonl.* alone=True .* leave it out"):
        load_scorer(f"scores:{tmp_path / 'scores.jsonl'}", alone=True)


# --- interruption ---


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    given = items(100)
    path = tmp_path / "items.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(Counting(model("set"), stop_after=70), path, given)
    assert len(read_records(path)[1]) == 64
    with path.open("a") as file:
        file.write('{"uid": "000')  # killed while it wrote
    second = Counting(model("set"))
    records = run(second, path, given)
    assert [group.id for group in second.groups] == [item.uid for item in given[64:]]
    assert second.largest_call <= 32, "memory is bounded by the items of a call"
    whole = run(model("set"), tmp_path / "whole.jsonl", given)
    assert [r.uid for r in records] == [r.uid for r in whole]
    for one, other in zip(records, whole, strict=True):
        assert list(one.scores[0]) == pytest.approx(list(other.scores[0]), abs=1e-6)  # type: ignore[index]
    assert [r.uid for r in read_records(path)[1]] == [item.uid for item in given]


def test_a_file_of_version_0_1_0_is_resumed(tmp_path: Path) -> None:
    lines = [
        '{"scorer": "longest", "num_orders": null, "seed": 0, "benchmark": "groups"}',
        '{"uid": "00000", "category": "a", "rankings": [1, 2], "lengths": [4, 3], "orders": [[0, 1]], '
        '"scores": [[4.0, 3.0]], "drop_reason": null, "truncated": 0, "facts": {"i": 0}}',
    ]
    (tmp_path / "items.jsonl").write_text("\n".join([*lines, ""]))
    scorer = Counting(Baseline("longest"))
    records = run(scorer, tmp_path / "items.jsonl", items(2))
    assert [group.id for group in scorer.groups] == ["00001"] and records[0].scores == [[4.0, 3.0]]
    assert (tmp_path / "items.jsonl").read_text().splitlines()[:2] == lines


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    run(Baseline("longest"), path, items(3))
    for scorer, options in ((Baseline("shortest"), {}), (Baseline("longest"), {"seed": 1})):
        with pytest.raises(ConfigurationError, match="holds another run .*give another folder"):
            run(scorer, path, items(3), **options)


def test_each_item_is_resumed_as_itself(tmp_path: Path) -> None:
    """Wherever a run stops, no item is scored twice and none is left out; its line says what a whole run says."""
    given = items(34)
    whole = run(model("causal"), tmp_path / "whole.jsonl", given)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for done in (0, 1, 31, 32, 33, 34):
        path = tmp_path / f"{done}.jsonl"
        path.write_text("".join(lines[: 1 + done]))
        scorer = Counting(model("causal"))
        found = run(scorer, path, given)
        assert list(dict.fromkeys(group.id for group in scorer.groups)) == [item.uid for item in given[done:]]
        assert [(one.uid, one.orders) for one in found] == [(one.uid, one.orders) for one in whole]
    alone = run(model("causal"), tmp_path / "alone.jsonl", given[7:8])
    assert alone[0].orders == whole[7].orders, "an item has its orders whatever else is evaluated"


def test_uids_are_unique(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="two items are called '00000'"):
        run(Baseline("longest"), tmp_path / "items.jsonl", [*items(1), *items(1)])


# --- scorers ---


def test_a_run_whose_items_are_all_dropped_has_results(ranked: Path, tmp_path: Path) -> None:
    scorer = RewardModel(GroupScorer(reward_model("llama"), max_tokens_per_batch=8, over_length="drop_group"), "tiny")
    report = evaluate_benchmark("groups", scorer, tmp_path / "r", source=ranked, num_resamples=10)
    assert report.metrics["best_of_n"] == (0.0, 0.0, 0.0)
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert len(results["dropped"]) == 30 and results["score_length_correlation"] is None


def test_dropped_items_are_kept_in_the_file(tmp_path: Path) -> None:
    scorer = RewardModel(GroupScorer(reward_model("llama"), max_tokens_per_batch=60, over_length="drop_group"), "tiny")
    long = ResponseGroup(prompt="?", responses=["x" * 200, "y"], rankings=[1, 2], id="long")
    records = run(scorer, tmp_path / "items.jsonl", [EvaluationItem(uid="long", category="", group=long)])
    assert records[0].scores is None and "token budget" in str(records[0].drop_reason)
    assert read_records(tmp_path / "items.jsonl")[1] == records
    (alone,) = Alone(scorer).score_detailed([long])
    assert alone.scores is None and "token budget" in str(alone.drop_reason)


def test_dropped_is_not_bad(tmp_path: Path) -> None:
    (first, *_) = items(1)
    long = ResponseGroup(prompt="?", responses=["a" * 500, "b"], rankings=[1, 2])
    scorer = RewardModel(
        GroupScorer(reward_model("llama", "set"), max_tokens_per_batch=300, over_length="drop_group"), "m"
    )
    given = [first, EvaluationItem(uid="long", category="", group=long)]
    records = run(scorer, tmp_path / "items.jsonl", given, num_orders=1)
    assert [record.bad_row for record in records] == [None, None]
    assert records[1].scores is None and records[1].drop_reason == "over the token budget"


def test_alone_equals_isolated() -> None:
    groups = [item.group for item in items(10)]
    together, alone = (scorer.score_detailed(groups) for scorer in (model("isolated"), Alone(model("isolated"))))
    for one, other in zip(together, alone, strict=True):
        assert list(one.scores or ()) == pytest.approx(list(other.scores or ()), abs=1e-5)
    changed = Alone(model("set")).score_detailed(groups)
    assert max(abs(a - b) for x, y in zip(together, changed, strict=True) for a, b in zip(x.scores or (), y.scores or (), strict=True)) > 1e-3  # noqa: E501  # fmt: skip


def test_scores_from_a_file(tmp_path: Path) -> None:
    given = items(5)
    first = run(model("set"), tmp_path / "items.jsonl", given)
    write_jsonl(tmp_path / "scores.jsonl", [{"uid": r.uid, "scores": list((r.scores or [[]])[0])} for r in first])
    again = run(load_scorer(f"scores:{tmp_path / 'scores.jsonl'}", device="cpu"), tmp_path / "b.jsonl", given)
    assert [r.scores for r in again] == [r.scores for r in first]
    with pytest.raises(GroupError, match="'00005': no scores in the file, expected"):
        run(ScoresFile(tmp_path / "scores.jsonl"), tmp_path / "c.jsonl", items(6))
    for scores in ([1.0], [1.0, 2.0, 3.0], []):  # of two responses
        write_jsonl(tmp_path / "other.jsonl", [{"uid": "x", "scores": scores}])
        group = ResponseGroup(prompt="?", responses=["a", "b"], id="x")
        with pytest.raises(GroupError, match=f"'x': {len(scores)} scores in the file, expected 2"):
            ScoresFile(tmp_path / "other.jsonl").score_detailed([group])
    for row in ({"uid": 1, "scores": [1.0]}, {"uid": "a", "scores": ["1"]}, {"uid": "a", "scores": [float("nan")]}):
        write_jsonl(tmp_path / "bad.jsonl", [row])
        with pytest.raises(GroupError, match=r"bad.jsonl, line 1: .* expected a uid and finite scores"):
            ScoresFile(tmp_path / "bad.jsonl")


# --- the commands ---


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    save_preferences((item.group for item in items(30)), tmp_path / "groups.jsonl")
    return tmp_path / "groups.jsonl"


def test_evaluate_and_compare(ranked: Path, tmp_path: Path) -> None:
    for layout in ("set", "causal"):
        reward_model("llama", layout).save_pretrained(tmp_path / layout)
        shown = command(
            "evaluate", "groups", tmp_path / layout, "--source", ranked, "--out", tmp_path / f"r-{layout}",
            "--orders", 4, "--resamples", 50,
        )  # fmt: skip
        assert "best_of_n" in shown and "spread over 4 orders" in shown and "| " in shown
        results = json.loads((tmp_path / f"r-{layout}" / "results.json").read_text())
        assert results["items"] == 30 and not results["dropped"]
        metric = results["metrics"]["best_of_n"]
        assert metric["low"] <= metric["value"] <= metric["high"] and metric["low"] < metric["high"]
        if layout == "set":
            assert results["order"]["flip_rate"] == 0 and results["order"]["score_spread"] < 1e-6
            assert set(results["spread_over_orders"].values()) == {0.0}
        else:
            assert results["order"]["flip_rate"] > 0 and results["order"]["score_spread"] > 1e-4
        for figure in ("metrics", "length", "group_size", "position"):
            assert (tmp_path / f"r-{layout}" / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
    shown = command("compare", tmp_path / "r-set", tmp_path / "r-causal", "--resamples", 50)
    assert "A - B" in shown and "pairwise_strict" in shown


def test_results_can_be_computed_again_without_a_model(ranked: Path, tmp_path: Path) -> None:
    """From the per-item file alone, by hand."""
    command("evaluate", "groups", "random", "--source", ranked, "--out", tmp_path / "r", "--resamples", 10)
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "r" / "items.jsonl").read_text().splitlines()]
    right = []
    for line in lines[1:]:
        scores = line["scores"][0]
        right.append(line["rankings"][scores.index(max(scores))] == 1)
    assert results["metrics"]["best_of_n"]["value"] == pytest.approx(statistics.fmean(right))
    first = (tmp_path / "r" / "results.json").read_text()
    command("evaluate", "groups", "random", "--source", ranked, "--out", tmp_path / "r", "--resamples", 10)
    assert (tmp_path / "r" / "results.json").read_text() == first


def test_runs_on_other_items_are_not_compared(ranked: Path, tmp_path: Path) -> None:
    command("evaluate", "groups", "random", "--source", ranked, "--out", tmp_path / "a", "--resamples", 5)
    command(
        "evaluate", "groups", "longest", "--source", ranked, "--out", tmp_path / "b", "--limit", 9, "--resamples", 5
    )
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert isinstance(result.exception, ConfigurationError) and "differ in 21" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--orders", "0"], "--orders is '0', expected a number from 1 on, or all"),
        (["--orders", "few"], "--orders is 'few'"),
        (["--dtype", "float33"], "--dtype is 'float33', expected one of float32"),
        (["--orders", "all"], None),
    ],
)
def test_options(options: list[str], message: str | None, ranked: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "groups", "longest", "--source", str(ranked), "--out", str(tmp_path / "r"), *options]
    result = CliRunner().invoke(app, [*arguments, "--resamples", "5"])
    if message is None:
        assert result.exit_code == 0
    else:
        assert isinstance(result.exception, ConfigurationError) and message in str(result.exception)


def test_the_handwriting_world_as_benchmarks(tmp_path: Path) -> None:
    shown = command("data", "handwriting", tmp_path / "world", "--num-items", 12)
    assert "mr-reward evaluate mr2bench_video" in shown
    for layout in ("set", "causal"):
        reward_model("qwen3_vl", layout).save_pretrained(tmp_path / layout)
        for name, benchmark in HANDWRITING_BENCHMARKS.items():
            out = tmp_path / f"{layout}-{name}"
            source = tmp_path / "world" / name
            command("evaluate", benchmark, tmp_path / layout, "--source", source, "--out", out, "--orders", 2,
                    "--resamples", 20)  # fmt: skip
            results = json.loads((out / "results.json").read_text())
            assert results["items"] == 12
            assert (results["order"]["score_spread"] > 1e-4) == (layout == "causal"), (name, results["order"])
    rows = [json.loads(line) for line in (tmp_path / "world" / "pairs" / "test.jsonl").read_text().splitlines()]
    assert {tuple(row["human_ranking"]) for row in rows} == {(0, 1), (1, 0)}
