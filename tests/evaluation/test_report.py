"""The numbers of a report, by hand, and that every option of the commands reaches what it is for."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from published_schemas import write_jsonl
from tiny_models import reward_model
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.errors import GroupError
from mr_reward.evaluation.benchmarks import BENCHMARKS
from mr_reward.evaluation.official import ItemRecord
from mr_reward.evaluation.report import Report, compare, make_report, read_records, write_report

ORDERS = [(0, 1, 2), (2, 1, 0), (1, 0, 2)]


def record(uid: str, scores: list[tuple[float, ...]] | None, **options: Any) -> ItemRecord:
    return ItemRecord(
        uid=uid,
        category="all",
        rankings=(1, 2, 3),
        lengths=(5, 3, 1),
        orders=ORDERS[: len(scores or ORDERS)],
        scores=scores,
        **options,
    )


def report(*records: ItemRecord) -> Report:
    header = {"scorer": "rm 1f", "num_orders": 3, "seed": 0, "benchmark": "groups"}
    return make_report(BENCHMARKS["groups"], header, records, num_resamples=20)


def test_numbers_over_the_orders() -> None:
    found = report(
        record("same", [(3.0, 2.0, 1.0)] * 3, truncated=2),
        record("flips in the last", [(3.0, 2.0, 1.0), (3.0, 2.0, 1.0), (1.0, 2.0, 0.0)], truncated=1),
        record("tied in the first", [(2.0, 2.0, 1.0), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0)]),
        record("tied in the last", [(2.0, 1.0, 0.0), (2.0, 1.0, 0.0), (2.0, 2.0, 0.0)]),
        record("dropped", None, drop_reason="too long"),
    )
    assert found.order["orders"] == 3
    assert found.order["flip_rate"] == 1 / 4  # of those that were scored, in any of the orders
    # Of a response over the orders, mean over the responses of an item, then over the items.
    spreads = [
        0.0,
        (statistics.pstdev([3, 3, 1]) + 0.0 + statistics.pstdev([1, 1, 0])) / 3,
        statistics.pstdev([2, 1, 1]) / 3,
        statistics.pstdev([1, 1, 2]) / 3,
    ]
    assert found.order["score_spread"] == pytest.approx(statistics.fmean(spreads))
    assert found.equal_scores == 1, "of the first order"
    best = [(1 + 1 + 0.5 + 1) / 5, 4 / 5, (1 + 0 + 1 + 0.5) / 5]
    assert found.metrics["best_of_n"].value == pytest.approx(statistics.fmean(best))
    assert found.spread["best_of_n"] == pytest.approx(statistics.pstdev(best))
    assert [one.uid for one in found.kept] == ["same", "flips in the last", "tied in the first", "tied in the last"]


def test_what_is_written(tmp_path: Path) -> None:
    found = report(
        record("a", [(3.0, 2.0, 1.0), (0.0, 2.0, 1.0)], truncated=3),
        record("b", [(3.0, 1.0, 2.0), (0.0, 2.0, 1.0)]),
        record("c", None, drop_reason="too long"),
    )
    write_report(found, tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["truncated_items"] == 1 and content["dropped"] == {"c": "too long"}
    # Of the first order, over items that were scored; lengths are 5, 3, 1.
    assert content["score_length_correlation"] == pytest.approx((1.0 + 0.5) / 2)
    assert content["items"] == 3 and content["items_by_category"] == {"all": 3}
    value = found.metrics["best_of_n"].value
    assert content["leaderboard_row"].startswith(f"| rm | {100 * value:.1f} |") and math.isclose(
        value, (2 + 0 + 2) / 3 / 3
    )


def test_a_comparison_resamples_as_often_as_asked() -> None:
    runs = [report(*(record(f"{i}", [(float(i % k), 1.0, 0.5)]) for i in range(20))) for k in (2, 3)]
    found = {number: compare(runs[0], runs[1], num_resamples=number)["best_of_n"] for number in (0, 7, 1000)}
    assert found[0].low == found[0].value == found[0].high
    assert len({one.value for one in found.values()}) == 1 and len({one.low for one in found.values()}) == 3


# --- every option has an effect ---


def invoke(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that depends on the order, and a folder of groups in two splits, some of them long."""
    folder = tmp_path_factory.mktemp("world")
    reward_model("qwen3_vl", "causal").save_pretrained(folder / "rm")
    (folder / "pictures").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "pictures" / "a.png")
    (folder / "groups").mkdir()
    for split, count in (("test", 6), ("dev", 4)):
        rows = [
            {
                "prompt": f"{split} {i}?",
                "responses": ["a" * 5 * i, "bb", "c", "ddd"],
                "rankings": [1 + i % 2, 2 - i % 2, 3, 3],
            }
            for i in range(count)
        ]
        write_jsonl(folder / "groups" / f"{split}.jsonl", rows)
    write_jsonl(folder / "pictures.jsonl", [{**rows[0], "images": ["a.png"]}, rows[1]])
    write_jsonl(folder / "bad.jsonl", [*rows, {**rows[0], "rankings": None}])
    return folder


def evaluated(world: Path, out: Path, *options: object, exit_code: int = 0) -> tuple[dict[str, Any], list[ItemRecord]]:
    where = () if "--source" in options else ("--source", world / "groups" / "test.jsonl")
    invoke("evaluate", "groups", world / "rm", *where, "--out", out, *options, exit_code=exit_code)
    return json.loads((out / "results.json").read_text()), read_records(out / "items.jsonl")[1]


EVALUATE: dict[str, tuple[list[object], Any]] = {
    "split": (["--split", "dev", "--source", "groups"], lambda found, items: len(items) == 4),
    "orders": (["--orders", 3], lambda found, items: {len(one.orders) for one in items} == {3}),
    "all orders": (["--orders", "all"], lambda found, items: {len(one.orders) for one in items} == {24}),
    "limit": (["--limit", 2], lambda found, items: [one.uid[:5] for one in items] == ["00000", "00001"]),
    "alone": (["--alone"], lambda found, items: found["scorer"].endswith(" alone") and found["order"]["orders"] == 1),
    "dtype": (["--dtype", "bfloat16"], lambda found, items: True),
    "max_tokens": (["--max-tokens", 38], lambda found, items: len(found["dropped"]) == 3),
    "over_length": (
        ["--max-tokens", 38, "--over-length", "truncate_responses"],
        lambda found, items: not found["dropped"] and found["truncated_items"] == 3,
    ),
    "resamples": (
        ["--resamples", 0],
        lambda found, items: all(one["low"] in (one["value"], None) for one in found["metrics"].values()),
    ),
    "media": (["--source", "pictures.jsonl", "--media", "pictures"], lambda found, items: len(items) == 2),
}


@pytest.mark.parametrize("name", EVALUATE)
def test_every_option_of_evaluate_has_an_effect(name: str, world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(world)
    options, holds = EVALUATE[name]
    options = [world / "groups" if option == "groups" else option for option in options]
    plain, plain_items = evaluated(world, tmp_path / "plain")
    found, items = evaluated(world, tmp_path / "r", *options)
    assert holds(found, items), found
    # Scores are those of these options: another run is not continued in the folder.
    assert name == "resamples" or [one.scores for one in items] != [one.scores for one in plain_items]
    assert plain["order"]["orders"] == 8 and not plain["dropped"] and plain["truncated_items"] == 0
    if name == "resamples":
        assert any(one["low"] < one["value"] for one in plain["metrics"].values())


def test_the_seed_of_evaluate_decides_the_orders(world: Path, tmp_path: Path) -> None:
    orders = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        header, items = evaluated(world, tmp_path / name, "--orders", 2, "--seed", seed)
        orders[name] = [[list(order) for order in one.orders] for one in items]
        assert header["seed"] == seed
    assert orders["a"] == orders["b"] != orders["c"]


def test_bad_rows_end_evaluate_unless_they_may_be_skipped(world: Path, tmp_path: Path) -> None:
    found, _ = evaluated(world, tmp_path, "--source", world / "bad.jsonl", "--skip-bad", exit_code=3)
    assert len(found["bad_rows"]) == 1 and "line 5" in found["bad_rows"][0]


def test_resamples_of_compare(world: Path, tmp_path: Path) -> None:
    for name, scorer in (("a", "longest"), ("b", "shortest")):
        invoke("evaluate", "groups", scorer, "--source", world / "groups" / "test.jsonl", "--out", tmp_path / name)
    intervals = {}
    for number in (0, 1000):
        shown = invoke("compare", tmp_path / "a", tmp_path / "b", "--resamples", number)
        line = next(line for line in shown.splitlines() if "pairwise" in line)
        *_, difference, low, high = re.findall(r"[+-]\d\.\d+", line)
        intervals[number] = difference == low == high
    assert intervals == {0: True, 1000: False}


def test_every_option_of_attack_has_an_effect(world: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i}?", "responses": [f"good {i}", "b" * i + "ad", "a worse one"], "rankings": [1, 2, 2]}
        for i in range(8)
    ]
    write_jsonl(tmp_path / "test.jsonl", rows)
    names = ("master key alone", "control tokens", "empty")

    def attacked(*options: object) -> dict[str, dict[str, Any]]:
        only = [part for name in names for part in ("--only", name)] if "--only" not in options else []
        out = tmp_path / "out.json"
        invoke("attack", world / "rm", tmp_path / "test.jsonl", "--out", out, *only, *options)
        found = json.loads(out.read_text())
        assert found["seed"] == (options[1] if options[:1] == ("--seed",) else 0)
        return {one["name"]: one for one in found["attacks"]}

    plain = attacked()
    assert list(plain) == list(names) and plain == attacked()
    other = attacked("--seed", 1)
    assert all(other[name]["shift"] != plain[name]["shift"] for name in names), "other responses are chosen"
    assert {one["num_items"] for one in attacked("--limit", 3).values()} == {3}
    assert attacked("--only", "empty") == {"empty": plain["empty"]}
    assert attacked("--dtype", "bfloat16") != plain
    assert attacked("--only", "empty", "--max-tokens", 33)["empty"]["num_dropped"] == 3
    with pytest.raises(GroupError, match="'control tokens': all 8 groups were dropped"):  # they were written
        attacked("--max-tokens", 60)
