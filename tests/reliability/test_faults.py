"""Faults in the middle of the work: what is left is usable, and the message names the cause.

Kills, full disks and a jumping clock in training are in training/test_resume.py and runs/test_resume.py; ranks that
die, stall or run out of memory in grpo/test_reward_distributed.py; servers and connections in serving/; an interrupted
`score` in cli/test_score.py.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import random_group, reward_model
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from typer.testing import CliRunner

from mr_reward import GroupScorer, MultiResponseReward, MultiResponseRewardModel, ResponseGroup
from mr_reward.cli.app import app
from mr_reward.data.groups_file import save_preferences
from mr_reward.errors import NonFiniteScoreError
from mr_reward.scorers.remote import RemoteScorer
from mr_reward.training.saving import last_complete_checkpoint
from mr_reward.worlds import tiny


def ranked(count: int, seed: int = 0) -> list[ResponseGroup]:
    rng = random.Random(seed)
    drawn = [random_group(rng, rng.randint(2, 5), longest=20, id=f"g{i}") for i in range(count)]
    return [
        ResponseGroup(
            prompt=group.messages, responses=group.responses, rankings=range(1, group.num_responses + 1), id=group.id
        )
        for group in drawn
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good reward model, one with a NaN among its weights, and groups."""
    folder = tmp_path_factory.mktemp("world")
    reward_model("llama").save_pretrained(folder / "rm")
    broken = reward_model("llama", fresh=True)
    with torch.no_grad():
        broken.backbone.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    broken.save_pretrained(folder / "nan")
    save_preferences(ranked(120), folder / "groups.jsonl")
    return folder


# --- NaN weights ---


@pytest.mark.parametrize(
    "command",
    [
        ["score", "{rm}", "{groups}", "--out", "{out}"],
        ["evaluate", "groups", "{rm}", "--source", "{groups}", "--out", "{out}"],
        ["attack", "{rm}", "{groups}", "--out", "{out}"],
    ],
    ids=lambda command: command[0],
)
def test_nan_weights_are_named_and_nothing_is_reported(command: list[str], world: Path, tmp_path: Path) -> None:
    names = {"rm": world / "nan", "groups": world / "groups.jsonl", "out": tmp_path / "out"}
    result = CliRunner().invoke(app, [word.format(**names) for word in command])
    assert isinstance(result.exception, NonFiniteScoreError)
    assert "layers.1.mlp.down_proj.weight are not finite; use an earlier checkpoint" in str(result.exception)
    written = (tmp_path / "out").read_text() if (tmp_path / "out").is_file() else ""
    assert not written and not list(tmp_path.rglob("results.json"))


def test_nan_weights_stop_a_server_client(world: Path) -> None:
    from http_server import running

    from mr_reward.serving.server import build_app

    with running(build_app(GroupScorer.from_pretrained(world / "nan"))) as url:
        remote = RemoteScorer(url, deadline=20.0)
        with pytest.raises(NonFiniteScoreError, match="down_proj.weight are not finite"):
            remote.score(ranked(2))
        remote.close()


# --- a score that is not finite in the middle of GRPO ---


class Poison(TrainerCallback):
    """Makes the reward model's head NaN after a step, as a bit flip in memory would."""

    def __init__(self, model: MultiResponseRewardModel, step: int) -> None:
        self.model, self.step = model, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.model.head.out.weight.data[0, 0] = math.nan


def trainer(output: Path, scoring: MultiResponseRewardModel, *callbacks: TrainerCallback) -> GRPOTrainer:
    options: dict[str, Any] = {
        "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 6,
        "save_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, "logging_steps": 1,
    }  # fmt: skip
    return GRPOTrainer(
        model=tiny.build_llama(3),
        reward_funcs=[MultiResponseReward(scoring, num_generations=4)],
        args=GRPOConfig(str(output), **options),
        train_dataset=Dataset.from_list([{"prompt": f"Say {i}"} for i in range(8)]),
        processing_class=tiny.build_tokenizer(),
        callbacks=list(callbacks),
    )


def test_a_score_that_is_not_finite_stops_grpo_before_it_learns_from_it(tmp_path: Path) -> None:
    scoring = reward_model("llama", fresh=True)
    run = trainer(tmp_path, scoring, Poison(scoring, 3))
    with pytest.raises(NonFiniteScoreError, match="step 4 group 0.*weights head.out.weight are not finite"):
        run.train()
    last = last_complete_checkpoint(tmp_path)
    assert last == str(tmp_path / "checkpoint-3")
    assert all(weight.isfinite().all() for weight in run.model.parameters()), "no update was made with it"
    again = trainer(tmp_path, reward_model("llama"))
    assert again.train(resume_from_checkpoint=last).global_step == 6


# --- out of memory ---


@pytest.mark.parametrize("allocator", ["cuda", "cpu"])
@pytest.mark.parametrize(
    "command",
    [
        ["score", "{rm}", "{groups}", "--chunk", "8", "--out", "{out}/scored.jsonl"],
        ["evaluate", "groups", "{rm}", "--source", "{groups}", "--out", "{out}"],
    ],
    ids=lambda command: command[0],
)
def test_without_memory_it_says_what_to_lower_and_goes_on(
    command: list[str], allocator: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is full in the middle; the same command, when there is room, does the rest."""
    paths = {"rm": world / "rm", "groups": world / "groups.jsonl", "out": tmp_path}
    words = [word.format_map(paths) for word in command]
    forward, calls = MultiResponseRewardModel.forward, 0

    def full(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            if allocator == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            torch.empty(1 << 60)  # the allocator of the CPU refuses in its own words
        return forward(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MultiResponseRewardModel, "forward", full)
        error = CliRunner().invoke(app, words).exception
    assert isinstance(error, RuntimeError) and "memory" in str(error)
    assert error.__notes__ == [
        "mr_reward: out of memory; a pass holds up to max_tokens_per_batch=16384 tokens, lower that"
    ]
    lines = next(tmp_path.glob("*.jsonl"))
    left = lines.read_text().count("\n")
    assert 0 < left < 120
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert lines.read_text().count("\n") == 120 + (command[0] == "evaluate")


# --- evaluation ---


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, "full disk"])
def test_a_killed_evaluation_goes_on(how: Any, world: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        words = ["evaluate", "groups", str(world / "rm"), "--source", str(world / "groups.jsonl"), "--out", str(out)]
        return [sys.executable, "-c", "from mr_reward.cli import main; main()", *words]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stderr=subprocess.PIPE)
    items = tmp_path / "killed" / "items.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not items.exists() or items.stat().st_size < 3000):
        time.sleep(0.002)
    if isinstance(how, signal.Signals):
        process.send_signal(how)
    else:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4000, 4000))
    told = process.communicate(timeout=120)[1]
    assert isinstance(how, signal.Signals) or (process.returncode == 1 and b"File too large" in told), told[-2000:]
    left = items.read_bytes().count(b"\n")
    assert 0 < left < 121, "it was killed too late or too early for this test to show anything"
    for out in (tmp_path / "killed", tmp_path / "whole"):
        subprocess.run(command(out), env=environment, check=True, capture_output=True)
    found, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole"))
    assert found["items"] == expected["items"] == 120
    assert found["metrics"] == expected["metrics"]


# --- the clock ---


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.time` is an hour off, forwards or backwards, at every look."""
    real, jumps = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + jumps.choice([-3600, 3600]))


@pytest.mark.usefixtures("jumping_clock")
def test_deadlines_of_the_client_do_not_follow_the_clock(world: Path) -> None:
    from http_server import running

    from mr_reward.serving.server import build_app

    scorer = GroupScorer.from_pretrained(world / "rm")
    groups = ranked(30)
    with running(build_app(scorer)) as url:
        remote = RemoteScorer(url, deadline=20.0, groups_per_request=3)
        assert remote.score(groups) == [pytest.approx(scores, abs=1e-5) for scores in scorer.score(groups)]
        remote.close()


@pytest.mark.usefixtures("jumping_clock")
def test_durations_of_the_reward_do_not_follow_the_clock() -> None:
    metrics: dict[str, float] = {}
    reward = MultiResponseReward(reward_model("llama"), num_generations=2)
    log: Callable[[str, float], None] = metrics.__setitem__
    reward(prompts=["p"] * 4, completions=["a", "b", "c", "d"], log_metric=log)
    assert 0.0 < metrics["mr_reward/ms_per_group"] < 60_000
