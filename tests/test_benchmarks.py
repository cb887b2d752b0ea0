"""The benchmarks run; their numbers are not checked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mr_reward import MultiResponseRewardModel
from mr_reward.worlds import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OURS = ("isolated", "set", "set, dense mask")


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident set from /proc")


def run_speed(script: str, *arguments: str, output: Path) -> dict[str, Any]:
    """The JSON document of a speed benchmark with few rounds on one thread."""
    command = [sys.executable, str(BENCHMARKS / script), "--device", "cpu", "--output", str(output)]
    command += ["--repeats", "2", "--matmul_size", "256", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=550, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@linux
def test_scoring_speed_compares_scores_times_and_memory(tmp_path: Path) -> None:
    """With a large vocabulary the logits alone are more than everything else."""
    arguments = ("--cell", "vocabulary:64:16:4:1", "--lengths", "ragged")
    document = run_speed("scoring_speed.py", *arguments, output=tmp_path)
    assert document["machine"]["threads"] == 1
    (cell,) = document["cells"]
    assert len(cell["scores_differ_by"]) == 3, "separate passes, shared cache, dense mask"
    assert max(cell["scores_differ_by"].values()) < 1e-4 < cell["scores_std"]
    found = cell["competitors"]
    assert set(found) == {*OURS, "shared cache", "full LM", "TRL classifier", "separate"}
    for each in found.values():
        assert all(ratio["lower"] > 0 for ratio in each["ratios"].values())
        assert each["peak_share"]["median"] > 0
    assert found["full LM"]["bytes"] > found["isolated"]["bytes"] > 0
    assert found["separate"]["computed_over_needed"] > found["isolated"]["computed_over_needed"] == 1


@pytest.mark.slow
@linux
def test_scoring_speed_reports_what_it_leaves_out(tmp_path: Path) -> None:
    arguments = ("--cell", "tiny:64:16:4:2:image", "--cell", "tiny:64:16:4:2", "--no_memory")
    cell, text = run_speed("scoring_speed.py", *arguments, output=tmp_path)["cells"]
    assert (tmp_path / "scoring_speed.png").stat().st_size > 10_000
    assert not text["skipped"] and set(cell["skipped"]) == {"full LM", "TRL classifier"}
    assert max(cell["scores_differ_by"].values()) < 1e-4, "a prompt with an image gives the same scores too"
    arguments = ("--cell", "10M:64:16:4:1", "--no_memory", "--time_limit", "0.001")
    (cell,) = run_speed("scoring_speed.py", *arguments, output=tmp_path)["cells"]
    assert not cell["competitors"] and all("--time_limit" in why for why in cell["skipped"].values())


@pytest.mark.slow
@linux
def test_scoring_speed_measures_memory_cost_padding_and_peak(tmp_path: Path) -> None:
    memory = run_speed("scoring_speed.py", "--what", "memory", "--cell", "vocabulary:64:16:4:1", output=tmp_path)
    assert min(memory["full_over_ours"].values()) > 1
    shapes = ("--cell", "tiny:32:16:2:1", "--cell", "tiny:128:16:2:1", "--largest", "8")
    linear = run_speed("scoring_speed.py", "--what", "linear", *shapes, output=tmp_path)
    assert len(linear["points"]) == 6 and linear["fit"]["r_squared"] <= 1
    lines = [{"prompt": "2 + 2?" * i, "responses": ["4", "It is 5." * i]} for i in range(1, 40)]
    groups = tmp_path / "groups.jsonl"
    groups.write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--groups", str(groups), "--max_tokens", "512")
    ways = run_speed("scoring_speed.py", "--what", "padding", *arguments, output=tmp_path)["ways"]
    assert ways["ours"]["padding"] == 0 < ways["ours, dense mask"]["padding"] <= ways["file order, padded"]["padding"]
    arguments = ("--cell", "tiny:64:16:4:1", "--no_memory")
    peak = run_speed("scoring_speed.py", "--what", "peak", *arguments, output=tmp_path)["competitors"]
    assert set(peak) == {"isolated", "set", "bare backbone"}
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "scoring_memory.png",
        "scoring_linear.png",
        "scoring_padding.png",
        "scoring_peak.png",
    }


@pytest.mark.slow
@linux
@pytest.mark.parametrize("train", ["lora", "full"])
def test_training_speed_compares_scores_gradients_times_and_memory(train: str, tmp_path: Path) -> None:
    arguments = ("--cell", "vocabulary:64:16:4:1", "--train", train, "--lengths", "ragged")
    arguments += ("--gradient_checkpointing", "off", "on") if train == "lora" else ("--no_memory",)
    document = run_speed("training_speed.py", *arguments, output=tmp_path)
    assert len(document["cells"]) == (2 if train == "lora" else 1)
    for cell in document["cells"]:
        assert len(cell["differ_by"]["scores"]) == len(cell["differ_by"]["gradients"]) == 2
        assert max(cell["differ_by"]["scores"].values()) < 1e-4
        found = cell["competitors"]
        assert set(found) == {*OURS, "full LM", "separate"}
        assert all(ratio["lower"] > 0 for each in found.values() for ratio in each["ratios"].values())
        if train == "lora":
            assert min(found["full LM"]["memory_ratios"].values()) > 1
    assert (tmp_path / "training_speed.png").stat().st_size > 5_000


@pytest.mark.slow
def test_reward_share_runs(tmp_path: Path) -> None:
    tiny.build_qwen3_vl(0, hidden_size=64, num_layers=2).save_pretrained(tmp_path / "policy")
    tiny.build_qwen3_vl_processor().save_pretrained(tmp_path / "policy")
    MultiResponseRewardModel.from_backbone(tmp_path / "policy").save_pretrained(tmp_path / "rm")
    command = [sys.executable, str(BENCHMARKS / "reward_share.py"), "--sizes", "4", "8", "--steps", "3"]
    command += ["--policy", str(tmp_path / "policy"), "--reward_model", str(tmp_path / "rm"), "--repeats", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500, env=environment)
    results = json.loads(run.stdout.splitlines()[-1])["runs"]
    assert set(results) == {"4", "8"}
    assert all(0 < found["share"] < 1 for runs in results.values() for found in runs)


@pytest.mark.slow
def test_attacks_sum_up_every_seed_and_go_on(tmp_path: Path) -> None:
    lines = [{"prompt": "2 + 2?", "responses": ["4", f"{i}", "no"], "rankings": [1, 2, 3]} for i in range(5, 13)]
    groups = tmp_path / "groups.jsonl"
    groups.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, str(BENCHMARKS / "attacks.py"), str(tmp_path), str(groups)]
    empty = subprocess.run(command, capture_output=True, text=True)
    assert empty.returncode and "run benchmarks/layouts.py first" in empty.stderr
    for seed, name in ((0, "set"), (1, "set"), (0, "causal")):
        model = MultiResponseRewardModel.from_backbone(
            tiny.build_llama(seed), layout=name, processor=tiny.build_tokenizer()
        )
        model.save_pretrained(tmp_path / f"seed{seed}" / name)
    found = [json.loads(tool_output(command).splitlines()[-1]) for _ in range(2)]
    assert found[0] == found[1] and {name: len(seeds["empty"]) for name, seeds in found[0].items()} == {
        "causal": 1,
        "set": 2,
    }
    seeds = [json.loads((tmp_path / f"seed{seed}/set/attacks.json").read_text())["attacks"] for seed in (0, 1)]
    assert [found[0]["set"]["empty"][i] for i in (0, 1)] == [
        next(result for result in results if result["name"] == "empty") for results in seeds
    ]
    assert (tmp_path / "attacks.png").stat().st_size > 10_000
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(map(json.dumps, lines[:3])))
    again = json.loads(tool_output([*command[:-1], str(fewer)]).splitlines()[-1])
    assert {seed["num_items"] for seed in again["set"]["empty"]} == {3}, "results of other groups are not taken over"


def tool_output(command: list[str]) -> str:
    """What a program prints, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=500, env=environment).stdout


def tiny_comparison(folder: Path, world: str, *rm_seeds: str) -> list[str]:
    """The command of a comparison in a minute."""
    sizes = {"sft_steps": 6, "start_step": 3, "rollout_prompts": 48, "heldout_prompts": 32, "rm_groups": 96}
    sizes |= {"grpo_steps": 2, "eval_steps": 1, "eval_prompts": 16, "test_samples": 16, "num_generations": 4}
    command = [sys.executable, str(BENCHMARKS / "policy_comparison.py"), "--output", str(folder / "out")]
    command += ["--results", str(folder / "results"), "--world", world, "--seeds", "3", "--rm_seeds", *rm_seeds]
    for name, value in sizes.items():
        command += [f"--{name}", str(value)]
    return command


@pytest.mark.slow
def test_policy_comparison_of_shapes(tmp_path: Path) -> None:
    """The other world goes the same way; what it has of its own are questions, answers and their grades."""
    tool_output([*tiny_comparison(tmp_path, "shapes", "0"), "--arms", "recipe"])
    (cell,) = [json.loads(file.read_text()) for file in (tmp_path / "results" / "shapes").glob("*.json")]
    assert cell["reward_model"]["share_of_rollouts"] == 0.333
    assert all("eval_rewards/shapes_accuracy/mean" in point for point in cell["validation"])


@pytest.mark.slow
def test_policy_comparison_runs_goes_on_and_sums_up(tmp_path: Path) -> None:
    """Arms from one start; they share what they can, and what is finished is not run again."""
    world, results, arms = "handwriting", tmp_path / "results", ["recipe", "single", "truth"]
    command = tiny_comparison(tmp_path, world, "0", "1")
    tool_output([*command, "--arms", "recipe"])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seconds.json")}
    shown = tool_output([*command, "--arms", *arms])
    assert all(file.stat().st_mtime_ns == then for file, then in before.items()), "made once"
    made = {file.parent.name for file in tmp_path.rglob("seconds.json")}
    kinds = ("set-best_of_n-mix", "isolated-bradley_terry-made-up")
    models = {f"rm-{kind}-2-{rm}" for kind in kinds for rm in (0, 1)}  # two epochs
    policies = {f"policy-{arm}-{rm}" for arm in arms for rm in (0, 1)} - {"policy-truth-1"}
    assert made == {"rollouts", *models, *policies}
    cells = {file.stem: json.loads(file.read_text()) for file in (results / world).glob("*.json")}
    assert set(cells) == {name.replace("policy-", "").replace("-", "-seed3-rm") for name in policies}
    for name, cell in cells.items():
        assert [point["step"] for point in cell["validation"]] == [0, 1, 2]
        assert cell["reward_model"]["share_of_rollouts"] == (0.0 if "single" in name else 0.333)
        assert set(cell["seconds"]) == {"rollouts", "reward_model", "grpo"} and cell["settings"]["rm_groups"] == 96
    # One start for all: before the first step the policies are the same, so are the right answers of their rollouts.
    truth = f"eval_rewards/{world}_accuracy/mean"
    assert len({(cell["start"], cell["validation"][0][truth]) for cell in cells.values()}) == 1
    head, *rows = [line.split(" | ") for line in shown.splitlines()[-4:]]
    assert [row[0] for row in rows] == [f"`{arm}`" for arm in arms]
    assert [row[1] for row in rows] == ["1 (2)", "1 (2)", "1 (1)"] and head[7] == "minus `recipe`"
    figure = [sys.executable, str(BENCHMARKS / "comparison_table.py"), world, "3", *arms, "--results", str(results)]
    assert tool_output([*figure, "--figure", str(tmp_path / "figure.png")]).count("\n|") == 4
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    # The same groups for both reward models, in another order and with other new parts.
    logs = [
        (tmp_path / "out" / world / "seed3" / f"rm-set-best_of_n-mix-2-{rm}" / "log.txt").read_text() for rm in (0, 1)
    ]
    assert logs[0] != logs[1]


def test_the_table_of_the_comparison_counts_a_seed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers by hand: two seeds with two reward models each, the truth with one run a seed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from comparison_table import comparison, seeds_of

    ends = {"a": {1: (0.6, 0.7), 2: (0.5, 0.9)}, "b": {1: (0.4, 0.5), 2: (0.5, 0.5)}, "truth": {1: (0.8,), 2: (0.7,)}}
    for arm, seeds in ends.items():
        for seed, runs in seeds.items():
            for rm_seed, end in enumerate(runs):
                curve = [{"eval_rewards/w_accuracy/mean": share} for share in (0.1, 0.9, 0.2 + end)]
                cell = {"start": 0.5, "end": end, "end_of_average": None, "validation": curve}
                cell["reward_model"] = {"right_above_wrong": end}
                (tmp_path / "w").mkdir(exist_ok=True)
                (tmp_path / "w" / f"{arm}-seed{seed}-rm{rm_seed}.json").write_text(json.dumps(cell))
    _, a, b, truth = comparison("w", seeds_of("1-3"), ["a", "b", "truth"], tmp_path)
    # Of a: gains .15 and .2, so .175 ± 12.706 * .0354 / sqrt(2); the truth gains .25. b gains -.05 and 0.
    # The share of sampled answers that are right has gone from .1 to .2 more than the last one of the greedy ones.
    assert a == ["`a`", "2 (4)", "0.675", "+0.175 [-0.143, +0.493]", "+.150 +.200", "0 of 4", "0.70", "", "+0.775", ""]
    assert b[2:7] == ["0.475", "-0.025 [-0.343, +0.293]", "-.050 +.000", "1 of 4", "-0.10"]
    assert b[7] == "-0.200 [-0.200, -0.200]" and truth[1:3] == ["2 (2)", ""] and truth[6] == ""


@pytest.mark.slow
def test_set_worlds_trains_each_layout_once(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "set_worlds.py"), "--output", str(tmp_path), "--sizes", "4", "6"]
    command += ["--groups", "128", "--test_groups", "32", "--worlds", "consensus", "control"]
    first = json.loads(tool_output([*command, "--layouts", "set", "causal"]).splitlines()[-1])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    document = json.loads(tool_output([*command, "--layouts", "set", "causal", "isolated"]).splitlines()[-1])
    assert [(run["world"], run["layout"]) for run in document["runs"]] == [
        (world, layout) for world in ("consensus", "control") for layout in ("causal", "isolated", "set")
    ]
    assert all(run in document["runs"] for run in first["runs"]) and len(first["runs"]) == len(before) == 4
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())
    assert sorted(map(json.dumps, document["runs"])) == sorted(
        json.dumps(json.loads(file.read_text())) for file in tmp_path.glob("*.json")
    )
    for run in document["runs"]:
        assert set(run["found"]) == {"4", "6"}
        assert all(0 <= value <= 1 for values in run["found"].values() for value in values.values())
    assert document["bounds"]["control 4"]["joint"] == {"best_of_n": 1.0, "pairwise": 1.0}
    assert (tmp_path / "set_worlds.png").stat().st_size > 10_000
