"""Each benchmark from a folder in its published schema, its metric beside an independent few lines."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from published_schemas import WRITERS, Row, write_jsonl
from scipy.stats import kendalltau

from mr_reward.errors import ConfigurationError, GroupError, MediaError, MRRewardError
from mr_reward.evaluation import official
from mr_reward.evaluation.benchmarks import BENCHMARKS, EvaluationItem, open_benchmark
from mr_reward.evaluation.official import ItemRecord, Judged, intervals, n_way, paired_interval, rewardbench_2


def make(name: str, folder: Path, seed: int) -> tuple[list[Row], list[EvaluationItem], list[list[float]]]:
    """Rows as published, items as read, and a score for each response; some scores are equal."""
    rng = random.Random(seed)
    rows = WRITERS[name](folder, rng)
    items = list(open_benchmark(name, folder))
    scores = [[rng.choice([0.0, 0.25, 0.5, rng.random()]) for _ in item.group.responses] for item in items]
    return rows, items, scores


def summarise(name: str, items: list[EvaluationItem], scores: list[list[float]]) -> dict[str, float]:
    judged = [
        Judged(item.uid, item.category, item.group.rankings or (), own, item.facts)
        for item, own in zip(items, scores, strict=True)
    ]
    return BENCHMARKS[name].summarise(judged)


def expected_vl(rows: list[Row], scores: list[list[float]]) -> dict[str, float]:
    right: dict[str, list[bool]] = {"general": [], "hallucination": [], "reasoning": []}
    for row, (a, b) in zip(rows, scores, strict=True):
        start = row["id"][:4].lower()
        name = {"rlai": "hallucination", "rlhf": "hallucination", "hall": "hallucination"}.get(start, "general")
        name = "reasoning" if start in ("math", "mmmu") else name
        right[name].append(a > b if row["human_ranking"] == [0, 1] else b > a)
    means = {name: np.mean(values) for name, values in right.items()}
    return {"macro": np.mean(list(means.values())), "overall": np.mean(sum(right.values(), [])), **means}


def expected_multimodal(rows: list[Row], scores: list[list[float]]) -> dict[str, float]:
    right = [(a > b) == (row["Better"] == "Output1") and a != b for row, (a, b) in zip(rows, scores, strict=True)]
    found = {"overall": np.mean(right)}
    for category, start, name in (
        ("reasoning", "math", "reasoning/math"),
        ("reasoning", "emma", "reasoning/coding"),
        ("safety", "pairs", "safety/bias"),
        ("safety", "toxic", "safety/toxicity"),
        ("vqa", "", "vqa"),
        ("knowledge", "", "knowledge"),
        ("preference", "", "preference"),
        ("correctness", "", "correctness"),
    ):
        chosen = [r for row, r in zip(rows, right, strict=True) if row["Category"] == category and row["ID"].startswith(start)]  # noqa: E501  # fmt: skip
        found[name] = np.mean(chosen)
    return found


def expected_mm_rlhf(rows: list[Row], scores: list[list[float]]) -> dict[str, float]:
    def both(chosen: list[int]) -> tuple[float, float]:
        ids = {rows[i]["id"] for i in chosen}
        whole = [all(scores[i][0] > scores[i][1] for i in chosen if rows[i]["id"] == uid) for uid in ids]
        return float(np.mean([scores[i][0] > scores[i][1] for i in chosen])), float(np.mean(whole))

    found = dict(zip(("acc", "acc_plus"), both(list(range(len(rows)))), strict=True))
    for name in ("mcq", "long", "short", "safety", "video"):
        members = [i for i, row in enumerate(rows) if name in (row.get("image") or row.get("video"))]
        found[f"acc/{name}"], found[f"acc_plus/{name}"] = both(members)
    return found


def expected_video(rows: list[Row], scores: list[list[float]]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for row, (a, b) in zip(rows, scores, strict=True):
        right.setdefault(row["dimension"].lower().replace(" ", "-"), []).append(a > b)
    means = {name: float(np.mean(values)) for name, values in right.items()}
    perception = np.mean(right["long-form-perception"] + right["short-form-perception"])
    return {
        "overall": np.mean(sum(right.values(), [])),
        "macro": np.mean(list(means.values())),
        "macro_4": np.mean([perception, means["knowledge"], means["reasoning"], means["safety"]]),
        **means,
    }


def expected_mr2bench(media: str) -> Callable[[list[Row], list[list[float]]], dict[str, float]]:
    def expected(rows: list[Row], scores: list[list[float]]) -> dict[str, float]:
        own = [row for row in rows if media in row]
        best, right, total, strict, taus = [], 0.0, 0, 0, []
        for row, values in zip(own, scores, strict=True):
            ranks = row["ranking"]
            winners = [i for i, value in enumerate(values) if value == max(values)]
            best.append(sum(ranks[i] == 1 for i in winners) / len(winners))
            for i in range(4):
                for j in range(4):
                    if ranks[i] < ranks[j]:
                        total += 1
                        strict += values[i] > values[j]
                        right += 1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0
            taus.append(kendalltau(values, [-rank for rank in ranks]).statistic)
        return {
            "best_of_n": np.mean(best),
            "pairwise": right / total,
            "pairwise_strict": strict / total,
            "tau_b": np.nanmean(taus),
        }

    return expected


def expected_rewardbench_2(rows: list[Row], scores: list[list[float]]) -> dict[str, float]:
    found: dict[str, Any] = {}
    for row, values in zip(rows, scores, strict=True):
        if row["subset"] != "Ties":
            credit = 1 / values.count(max(values)) if values[0] == max(values) else 0
            found.setdefault(row["subset"].lower(), []).append(credit)
    found = {name: np.mean(values) for name, values in found.items()}
    ref, tied = {}, {}
    for row, values in zip(rows, scores, strict=True):
        if row["subset"] == "Ties":
            kind, number = row["id"].split(":")
            right, wrong = values[: row["num_correct"]], values[row["num_correct"] :]
            (tied if kind == "tied" else ref)[number] = (min(right) - max(wrong), max(right) - min(right))
    margins = [(tied[n][0], min(tied[n][0], ref[n][0]), tied[n][1]) for n in tied]
    larger = []
    for _, hard, spread in margins:
        if spread:
            larger.append(math.tanh(hard / spread - 1))
        else:
            larger.append(0.0 if hard == 0 else math.copysign(1.0, hard))
    found["ties"] = (
        0.3 * np.mean([margin > 0 for margin, _ in tied.values()])
        + 0.3 * np.mean([margin > 0 for margin, _ in ref.values()])
        + 0.2 * np.mean([margin > spread for margin, _, spread in margins])
        + 0.2 * np.mean([hard > spread for _, hard, spread in margins])
        + 0.01 * np.mean(larger)
    )
    return {"average": np.mean(list(found.values())), **found}


EXPECTED = {
    "vl_rewardbench": expected_vl,
    "multimodal_rewardbench": expected_multimodal,
    "mm_rlhf_rewardbench": expected_mm_rlhf,
    "video_rewardbench": expected_video,
    "mr2bench_image": expected_mr2bench("image"),
    "mr2bench_video": expected_mr2bench("video"),
    "rewardbench_2": expected_rewardbench_2,
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", EXPECTED)
def test_official_metric(name: str, seed: int, tmp_path: Path) -> None:
    rows, items, scores = make(name, tmp_path, seed)
    found, expected = summarise(name, items, scores), EXPECTED[name](rows, scores)
    assert found.keys() == expected.keys()
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(float(value), abs=1e-12), metric
    assert set(BENCHMARKS[name].headline) <= found.keys()


def test_every_benchmark_is_tested() -> None:
    assert set(EXPECTED) == set(WRITERS) == set(BENCHMARKS) - {"groups", "rollouts"}, "those two are not published"


@pytest.mark.parametrize("name", EXPECTED)
def test_items(name: str, tmp_path: Path) -> None:
    _, items, _ = make(name, tmp_path, 0)
    assert len({item.uid for item in items}) == len(items)
    for item in items:
        assert item.group.id == item.uid and item.group.rankings is not None
        assert not any("<image>" in block.get("text", "") for turn in item.group.messages for block in turn["content"])
        media = len(item.group.images) + len(item.group.videos)
        assert media == (0 if name == "rewardbench_2" else 1)
        json.dumps(dict(item.facts))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_missing_column_names_both_lists(name: str, tmp_path: Path) -> None:
    rows, _, _ = make(name, tmp_path, 0)
    needed = {names for names in BENCHMARKS[name].columns if sum(n in rows[0] for n in names) == 1}
    assert needed
    for names in needed:
        (present,) = (n for n in names if n in rows[0])
        plain = [{k: v for k, v in row.items() if k != present and k != "image"} | (
            {"image": "a.png"} if "image" in row and present != "image" else {}) for row in rows]  # fmt: skip
        path = tmp_path / "other" / f"{present}.jsonl"
        write_jsonl(path, [{"extra": 1, **plain[0]}])
        with pytest.raises(GroupError) as caught:
            list(open_benchmark(name, path))
        told = str(caught.value)
        assert f"{present}.jsonl, line 1" in told and "found extra, " in told
        assert " or ".join(names) in told.split("found")[0] and "expected " in told


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vl_rewardbench", {"human_ranking": [1, 2]}, r"'human_ranking' is \[1, 2\], expected \[0, 1\]"),
        ("vl_rewardbench", {"response": ["a"]}, "expected 2 texts"),
        ("multimodal_rewardbench", {"Better": "A"}, "'Better' is 'A', expected 'Output1' or 'Output2'"),
        ("mm_rlhf_rewardbench", {"image": "other/1.png"}, "holds none of mcq, long, short, safety, video"),
        ("mr2bench_image", {"ranking": [2, 3, 4, 5]}, "counted from 0 or 1"),
        ("mr2bench_image", {"ranking": [1, 2, 3]}, "one whole number for each response"),
        ("rewardbench_2", {"id": "x", "subset": "Ties"}, "expected 'tied:NUMBER' or 'ref:NUMBER'"),
    ],
)
def test_wrong_values(name: str, change: Row, message: str, tmp_path: Path) -> None:
    rows, _, _ = make(name, tmp_path, 0)
    row = {**rows[0], **change}
    if name == "mr2bench_image":
        row = {**rows[1], **change}
    if isinstance(row.get("image"), dict):
        row["image"] = "a.png"
    write_jsonl(tmp_path / "wrong" / "a.jsonl", [row])
    with pytest.raises(MRRewardError, match=message):
        list(open_benchmark(name, tmp_path / "wrong" / "a.jsonl"))


def test_mm_rlhf_rewardbench_of_the_hub_holds_paths_and_copies_hold_images(tmp_path: Path) -> None:
    """The published file names media that lie elsewhere; a copy with images keeps the last part of their paths."""
    rows, items, _ = make("mm_rlhf_rewardbench", tmp_path / "media", 0)
    columns = ("id", "prompt", "chosen", "rejected", "image", "video")
    table = [{name: row.get(name) for name in columns} for row in rows]
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "hub" / "train.parquet")
    with pytest.raises(MediaError, match=r"train.parquet, row 1: .*mcq/000000.png.*--media FOLDER"):
        list(open_benchmark("mm_rlhf_rewardbench", tmp_path / "hub"))
    with pytest.raises(ConfigurationError, match="nowhere is no folder"):
        open_benchmark("mm_rlhf_rewardbench", tmp_path / "hub", media=tmp_path / "nowhere")
    found = list(open_benchmark("mm_rlhf_rewardbench", tmp_path / "hub", media=tmp_path / "media"))
    assert [item.category for item in found] == [item.category for item in items]
    assert [(i.group.images, i.group.videos) for i in found] == [(i.group.images, i.group.videos) for i in items]

    embedded = []
    for row in (row for row in rows if row.get("image")):
        content = (tmp_path / "media" / row["image"]).read_bytes()
        subset, _, name = row["image"].partition("/")
        plain = {key: row[key] for key in ("id", "prompt", "chosen", "rejected")}
        for path, more in ((row["image"], {}), (name, {"subset": subset}), (name, {"path": row["image"]})):
            embedded.append((subset, {**plain, "image": {"bytes": content, "path": path}, **more}))
    for subset, row in embedded:
        item = BENCHMARKS["mm_rlhf_rewardbench"].read(row)
        assert item is not None and item.category == subset
    wrong = {**embedded[0][1], "image": {"bytes": b"a", "path": "1.png"}}
    with pytest.raises(GroupError, match="holds none of mcq.* and no column of path, "):
        BENCHMARKS["mm_rlhf_rewardbench"].read(wrong)


def test_ranks_from_zero(tmp_path: Path) -> None:
    row = {"question": "?", "candidates": ["a", "b", "c"], "rankings": [0, 1, 1], "image": "a.png"}
    from published_schemas import picture

    (tmp_path / "a.png").write_bytes(picture(0))
    write_jsonl(tmp_path / "a.jsonl", [row])
    (item,) = open_benchmark("mr2bench_image", tmp_path / "a.jsonl")
    assert item.group.rankings == (1, 2, 2)


@pytest.mark.parametrize(("start", "category"), [("pairs-1", "bias"), ("Pairs-1", "bias"), ("toxic", "toxicity")])
def test_the_case_of_an_id_does_not_matter(start: str, category: str) -> None:
    row = {"ID": start, "Category": "safety", "Better": "Output2", "Text": "?", "Output1": "a", "Output2": "b"}
    item = BENCHMARKS["multimodal_rewardbench"].read({**row, "Image": "a.png"})  # type: ignore[misc]
    assert item is not None and item.category == f"safety/{category}" and item.group.rankings == (2, 1)


@pytest.mark.parametrize("ranks", [[2, 3, 3], [-1, 0, 1], [1, 2], [0, 1.0, 2], [True, False, True]])
def test_ranks_that_begin_elsewhere_are_refused(ranks: list[Any]) -> None:
    row = {"question": "?", "candidates": ["a", "b", "c"], "rankings": ranks, "image": "a.png"}
    with pytest.raises(GroupError, match="counted from 0 or 1"):
        BENCHMARKS["mr2bench_image"].read(row)  # type: ignore[misc]


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no benchmark 'mmlu', expected one of vl_rewardbench"):
        open_benchmark("mmlu")
    with pytest.raises(ConfigurationError, match="give its file or folder"):
        open_benchmark("groups")
    with pytest.raises(ConfigurationError, match="is no file, no folder and no hub id"):
        open_benchmark("vl_rewardbench", tmp_path / "none" / "here.jsonl")


def test_dropped_items_are_wrong_everywhere(tmp_path: Path) -> None:
    for name in EXPECTED:
        _, items, _ = make(name, tmp_path / name, 1)
        dropped = summarise(name, items, [None] * len(items))  # type: ignore[list-item]
        assert all(value == 0 or math.isnan(value) for value in dropped.values()), dropped
        perfect = [[-float(rank) for rank in item.group.rankings or ()] for item in items]
        assert all(value >= 1 - 1e-12 for value in summarise(name, items, perfect).values())


def test_ties_score_of_a_perfect_and_a_blind_model() -> None:
    def score(tied: list[float], ref: list[float]) -> float:
        return rewardbench_2(
            [
                Judged("a", "ties", (1, 1, 2), tied, {"kind": "tied", "prompt": "0"}),
                Judged("b", "ties", (1, 2), ref, {"kind": "ref", "prompt": "0"}),
            ]
        )["ties"]

    assert score([1.0, 1.0, 0.0], [1.0, 0.0]) == pytest.approx(1.01)
    assert score([0.0, 0.0, 0.0], [0.0, 0.0]) == 0.0
    assert score([1.0, 0.6, 0.5], [1.0, 0.0]) == pytest.approx(0.6 + 0.01 * math.tanh(0.1 / 0.4 - 1))
    # A margin that equals the difference among the right answers is not larger: of `tied`, and of both.
    assert score([1.0, 0.5, 0.0], [1.0, 0.0]) == pytest.approx(0.6)
    assert score([1.0, 0.75, 0.0], [0.25, 0.0]) == pytest.approx(0.8)
    # A margin of nothing is not ahead.
    assert score([1.0, 0.5, 0.5], [1.0, 1.0]) == pytest.approx(0.01 * math.tanh(-1))


@pytest.mark.parametrize("name", EXPECTED)
def test_weights_count_an_item_as_often_as_it_was_drawn(name: str, tmp_path: Path) -> None:
    """Against the metric of a list in which an item stands as often; units get a new name each time."""
    _, items, scores = make(name, tmp_path, 2)
    judged = [
        Judged(item.uid, item.category, item.group.rankings or (), own, item.facts)
        for item, own in zip(items, scores, strict=True)
    ]
    metric = BENCHMARKS[name].summarise
    rng = random.Random(0)
    for _ in range(10):
        times: dict[str, int] = {}
        drawn, weights = [], []
        for item in judged:
            (unit,) = [str(item.facts[key]) for key in ("id", "prompt") if key in item.facts] or [item.uid]
            weights.append(times.setdefault(unit, rng.choice([0, 1, 1, 2, 3])))
            for time in range(weights[-1]):
                again = {key: f"{item.facts[key]} #{time}" for key in item.facts.keys() & {"id", "prompt"}}
                drawn.append(Judged(item.uid, item.category, item.rankings, item.scores, {**item.facts, **again}))
        found = metric.weighted(judged, np.array([weights], dtype=np.float64))
        for key, value in metric(drawn).items():
            assert found[key][0] == pytest.approx(value, abs=1e-12, nan_ok=True), key


def test_intervals_cover_and_pairs_are_drawn_together() -> None:
    """Of 200 experiments on a coin of 0.7, about 95 % of the intervals hold the truth."""
    rng = random.Random(0)
    held = 0
    for experiment in range(200):
        items = [Judged(str(i), "", (1, 2), (1.0, 0.0) if rng.random() < 0.7 else (0.0, 1.0)) for i in range(80)]
        found = intervals([items], n_way, num_resamples=200, seed=experiment)["pairwise"]
        held += found.low <= 0.7 <= found.high
    assert 0.89 <= held / 200 <= 0.99
    same = paired_interval([items], [items], n_way, num_resamples=50)
    assert same["pairwise"] == (0.0, 0.0, 0.0)
    # Duplicates of one id carry the information of one: the interval is as wide as that of half the items.
    duplicates = [Judged(f"{i.uid}{k}", "", i.rankings, i.scores, {"id": i.uid}) for i in items for k in "ab"]
    alone, both = (intervals([x], n_way, num_resamples=400)["pairwise"] for x in (items, duplicates))
    assert both.high - both.low == pytest.approx(alone.high - alone.low, rel=0.25)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_intervals_are_as_wide_as_those_of_a_share(share: float) -> None:
    """Of a share p of n items 95 % lie within 1.96 sqrt(p (1 - p) / n); within 1.64 it would be 90 %."""
    size, width = 400, 2 * 1.96 * math.sqrt(share * (1 - share) / 400)
    first, second = (
        [Judged(str(i), "", (1, 2), (float(i < round(share * size)), 0.5)) for i in order]
        for order in (range(size), range(size - 1, -1, -1))
    )
    found = intervals([first], n_way, num_resamples=4000)["pairwise"]
    assert found.value == pytest.approx(share) and found.high - found.low == pytest.approx(width, rel=0.06)
    assert found.high - found.value == pytest.approx(found.value - found.low, rel=0.15)
    wrong = [replace(item, scores=(0.0, 0.5)) for item in second]  # the difference is the share itself
    assert paired_interval([first], [wrong], n_way, num_resamples=4000)["pairwise"] == pytest.approx(found)


@pytest.mark.parametrize("fact", ["id", "prompt"])
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_items_that_belong_together_are_drawn_together(fact: str, copies: int) -> None:
    """Copies of an item tell nothing new: the intervals, of a run and of a difference, are those without copies."""
    rng = random.Random(copies)

    def run(scores: dict[str, tuple[float, ...]], times: int) -> list[Judged]:
        return [
            Judged(f"{name}{k}", "", (1, 2, 3), scores[name], {fact: name})
            for name in sorted(scores)
            for k in range(times)
        ]

    draws = [{f"{i:02d}": tuple(rng.choice([0.0, 1.0, 2.0]) for _ in range(3)) for i in range(30)} for _ in range(2)]
    found = []
    for times in (1, copies):
        first, second = (run(scores, times) for scores in draws)
        found.append((intervals([first], n_way), paired_interval([first], [second], n_way)))
    for one, other in zip(*found, strict=True):
        assert one["best_of_n"].low < one["best_of_n"].high
        for name in one:
            assert other[name] == pytest.approx(one[name], abs=1e-12), name


@pytest.mark.parametrize(
    ("name", "mean"), [("vl_rewardbench", "macro"), ("video_rewardbench", "macro"), ("rewardbench_2", "average")]
)
def test_a_resample_without_a_category_is_averaged_over_the_others(name: str, mean: str) -> None:
    metric = BENCHMARKS[name].summarise
    rng = random.Random(0)
    items = [Judged(str(i), "abc"[i % 3], (1, 2), (rng.random(), rng.random())) for i in range(30)]
    others = [item for item in items if item.category != "b"]
    weights = np.array([[1.0] * 30, [float(item.category != "b") for item in items]])
    found = metric.weighted(items, weights)
    assert found[mean].tolist() == [metric(items)[mean], metric(others)[mean]]
    assert math.isnan(found["b"][1]) and not math.isnan(found["b"][0])


def test_the_difference_goes_by_the_items_and_not_by_their_places() -> None:
    rng = random.Random(0)
    first, second = (
        [Judged(str(i), "ab"[i % 2], (1, 2), (rng.random(), rng.random())) for i in range(40)] for _ in range(2)
    )
    expected = paired_interval([first], [second], n_way)
    assert expected["pairwise"].low < expected["pairwise"].high
    assert paired_interval([first], [second[::-1]], n_way) == expected
    worse = [Judged(i.uid, i.category, i.rankings, None) if i.uid == "7" else i for i in first]
    # One item of 40 differs: the interval is that of a share of 1/40, far from that of two runs on other items.
    assert paired_interval([first], [worse], n_way)["best_of_n"].high <= 4 / 40


def test_as_many_other_items_are_other_items() -> None:
    first, second = ([Judged(f"{name}{i}", "", (1, 2), (1.0, 0.0)) for i in range(3)] for name in "ab")
    with pytest.raises(ConfigurationError, match=r"have 3 and 3 items and differ in 6 \(a0, "):
        paired_interval([first], [second], n_way)
    with pytest.raises(ConfigurationError, match=r"have 3 and 3 items and differ in 2 \(a2, "):
        paired_interval([first], [[*first[:2], second[2]]], n_way)


def test_memory_is_saved_in_blocks_that_do_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    items = [Judged(str(i), "", (1, 2), (rng.random(), rng.random())) for i in range(50)]
    expected = intervals([items], n_way, num_resamples=100)["pairwise"]
    assert expected.low < expected.value < expected.high
    for block in (1, 150, 50 * 99):
        monkeypatch.setattr(official, "_BLOCK", block)
        assert intervals([items], n_way, num_resamples=100)["pairwise"] == expected


def test_a_value_is_the_mean_over_the_orders_and_few_orders_start_over() -> None:
    right, wrong = (1.0, 0.0), (0.0, 1.0)
    both = ItemRecord(
        uid="a", category="", rankings=(1, 2), lengths=(1, 1), orders=[(0, 1), (1, 0)], scores=[right, wrong]
    )
    assert [both.judged(k).scores for k in range(5)] == [right, wrong, right, wrong, right]
    orders = [[Judged("a", "", (1, 2), scores)] for scores in (right, right, wrong, right)]
    assert intervals(orders, n_way, num_resamples=10)["best_of_n"] == (0.75, 0.75, 0.75)
    none = [[Judged("a", "", (1, 2), wrong)]] * 4
    assert paired_interval(orders, none, n_way, num_resamples=10)["best_of_n"] == (0.75, 0.75, 0.75)


def test_an_id_counts_once_however_many_pairs_it_has() -> None:
    pairs = [("a", True), ("a", True), ("a", True), ("b", False), ("c", True), ("c", False)]
    items = [
        Judged(str(i), "mcq", (1, 2), (1.0, 0.0) if right else (0.0, 1.0), {"id": name})
        for i, (name, right) in enumerate(pairs)
    ]
    found = BENCHMARKS["mm_rlhf_rewardbench"].summarise(items)
    assert found["acc_plus"] == found["acc_plus/mcq"] == pytest.approx(1 / 3) and found["acc"] == pytest.approx(4 / 6)


def test_an_id_that_is_drawn_twice_counts_twice() -> None:
    """Acc+ over ids of which three in ten are wholly right: as a bootstrap of the ids' own zeros and ones."""
    items = [
        Judged(f"{i}{k}", "mcq", (1, 2), (1.0, 0.0) if i < 12 or k == "a" else (0.0, 1.0), {"id": i})
        for i in range(40)
        for k in "ab"
    ]
    found = intervals([items], BENCHMARKS["mm_rlhf_rewardbench"].summarise, num_resamples=2000)["acc_plus"]
    generator = np.random.default_rng(0)
    whole = np.array([i < 12 for i in range(40)])
    plain = [whole[generator.integers(40, size=40)].mean() for _ in range(2000)]
    low, high = np.percentile(plain, [2.5, 97.5])
    assert found.value == 0.3
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
