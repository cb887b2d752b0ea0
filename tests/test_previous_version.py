"""What the version before has written loads, scores as it did, and is resumed; see previous_version/README.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mr_reward import GroupScorer, MultiResponseRewardModel
from mr_reward.checkpoint.checksums import changed_file
from mr_reward.cli.app import app
from mr_reward.data.groups_file import load_preferences, read_scored

RECIPES = Path(__file__).parents[1] / "grpo_recipes"
ROUNDING = 1e-6


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, which is the working folder: every path in them is relative to it."""
    folder = Path(shutil.copytree(Path(__file__).parent / "previous_version", tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def keep_lines(path: str, count: int) -> None:
    """What a kill leaves: whole lines and a torn one."""
    lines = Path(path).read_text().splitlines(keepends=True)
    Path(path).write_text("".join(lines[:count]) + lines[count][:20])


def assert_near(found: Any, expected: Any, tolerance: float = ROUNDING) -> None:
    assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() <= tolerance


def mr_reward(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def recipe(script: str, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES.parent)}
    command = [sys.executable, str(RECIPES / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("verify", [False, True])
def test_a_checkpoint_scores_as_it_did(old: Path, verify: bool) -> None:
    groups = load_preferences("groups.jsonl")
    expected = read("scores.json")
    assert_near(GroupScorer.from_pretrained("rm", verify=verify).score(groups), expected)
    assert changed_file(old / "rm", verify=verify) is None
    MultiResponseRewardModel.from_pretrained("rm").save_pretrained("again")
    assert_near(GroupScorer.from_pretrained("again").score(groups), expected)


def test_a_lora_checkpoint_loads(old: Path) -> None:
    scores = GroupScorer.from_pretrained("training/checkpoint-2").score(load_preferences("groups.jsonl"))
    assert all(row is not None and len(set(row)) > 1 for row in scores)


def test_scored_lines_are_continued(old: Path) -> None:
    expected = read_lines("scored.jsonl")
    assert [list(one.scores or ()) for one in read_scored("scored.jsonl")] == [row["scores"] for row in expected]
    keep_lines("scored.jsonl", 3)
    mr_reward("score", "rm", "groups.jsonl", "--out", "scored.jsonl")
    found = read_lines("scored.jsonl")
    assert found[:3] == expected[:3] and [row["id"] for row in found] == [row["id"] for row in expected]
    assert {row["scored_with"] for row in found} == {expected[0]["scored_with"]}
    assert_near([row["scores"] for row in found], [row["scores"] for row in expected])


def test_an_evaluation_is_continued(old: Path) -> None:
    expected, items = read("evaluation/results.json"), read_lines("evaluation/items.jsonl")
    keep_lines("evaluation/items.jsonl", 4)
    mr_reward("evaluate", "groups", "rm", "--source", "groups.jsonl", "--out", "evaluation", "--orders", "2")
    found = read_lines("evaluation/items.jsonl")
    assert found[:4] == items[:4] and [row.keys() for row in found] == [row.keys() for row in items]
    metrics = read("evaluation/results.json")["metrics"]
    assert metrics.keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert metrics[name]["value"] == pytest.approx(value["value"])
    mr_reward("compare", "evaluation", "evaluation")


def test_a_group_log_is_read(old: Path) -> None:
    for path in sorted(Path("policy/groups").iterdir()):
        scored = read_scored(path)
        assert len(scored) == 2 and all(len(one.rewards) == 4 and one.step is not None for one in scored)
    mr_reward("inspect", "policy", "--model", "rm", "--out", "page.html")
    assert "step 1 group 1" in Path("page.html").read_text()


def test_training_is_resumed(old: Path) -> None:
    recipe("pretrain_rm.py", "--config", "training.yaml", "--resume_from_checkpoint", "true")
    assert_same_history("training/checkpoint-4", "training_state.json", ("loss", "grad_norm", "learning_rate"))
    scores = GroupScorer.from_pretrained("training").score(load_preferences("groups.jsonl"))
    assert_near(scores, read("training_scores.json"), 1e-5)


def test_a_policy_is_resumed(old: Path) -> None:
    recipe("train_policy.py", "--config", "policy.yaml", "--resume_from_checkpoint", "true")
    keys = ("grad_norm", "entropy", "mr_reward/score_mean", "mr_reward/score_spread")
    assert_same_history("policy/checkpoint-2", "policy_state.json", keys)
    found = {name: float(value.sum()) for name, value in load_file("policy/model.safetensors").items()}
    assert found == pytest.approx(read("policy_weights.json"), abs=1e-4)
    assert sorted(path.name for path in Path("policy/groups").iterdir()) == [
        "step_00000.rank0.jsonl",  # that version counted the steps before, as no log does
        "step_00001.rank0.jsonl",
        "step_00002.rank0.jsonl",
    ]


@pytest.mark.filterwarnings("ignore:mr_reward:FutureWarning")  # says where the class is now
@pytest.mark.parametrize("folder", ["training/checkpoint-2", "policy/checkpoint-1"])
def test_arguments_are_read_from_where_their_classes_were(old: Path, folder: str) -> None:
    arguments = torch.load(f"{folder}/training_args.bin", weights_only=False)
    assert type(arguments).__module__.startswith("mr_reward.") and arguments.save_steps == int(folder[-1])


def assert_same_history(folder: str, expected: str, keys: tuple[str, ...]) -> None:
    found, wanted = (read(path)["log_history"] for path in (f"{folder}/trainer_state.json", expected))
    assert len(found) == len(wanted) > 0
    for step, other in zip(found, wanted, strict=True):
        assert {key: step[key] for key in keys} == pytest.approx({key: other[key] for key in keys}, abs=1e-4)
