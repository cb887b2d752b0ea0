"""Validation during real GRPO training: what is written at each evaluation, and what a resumed run keeps."""

import copy
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from tiny_runs import SHORT_RUN, handwriting_rows, save_policy_that_sees
from transformers import TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerControl
from trl import GRPOConfig, GRPOTrainer

from mr_reward import MultiResponseReward, MultiResponseRewardModel, ResponseGroup
from mr_reward.runs.callbacks import PolicyValidation, WarningSigns
from mr_reward.worlds.handwriting import make_tasks
from mr_reward.worlds.world_policy import handwriting_accuracy


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_policy_that_sees(folder / "policy")
    MultiResponseRewardModel.from_backbone(folder / "policy").save_pretrained(folder / "rm")
    return folder


def train(
    models: Path, out: Path, max_steps: int, *, resume: bool = False
) -> tuple[GRPOTrainer, PolicyValidation, str]:
    reward = MultiResponseReward(models / "rm", num_generations=4)
    terminal = io.StringIO()
    validation = PolicyValidation(
        reward,
        out,
        num_samples=2,
        # Any share is too much: a sign at the first log. A random reward model may follow length: no sign.
        signs=WarningSigns(window=1, zero_spread=-1.0, length_correlation=2.0),
        console=Console(file=terminal, width=120),
    )
    trainer = GRPOTrainer(
        model=str(models / "policy"),
        reward_funcs=[reward, handwriting_accuracy],
        args=GRPOConfig(
            str(out),
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            max_steps=max_steps,
            eval_strategy="steps",
            eval_steps=2,
            eval_on_start=not resume,
            save_strategy="steps",
            save_steps=2,
            reward_weights=[1.0, 0.0],
            **SHORT_RUN,
        ),
        train_dataset=handwriting_rows("train", 16),
        eval_dataset=handwriting_rows("validation", 6),
        callbacks=[validation],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer, validation, terminal.getvalue()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_each_evaluation_is_written_with_samples_figure_and_signs(models: Path, tmp_path: Path) -> None:
    trainer, validation, terminal = train(models, tmp_path, 4)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [0, 2, 4]
    logged = {
        entry["step"]: entry
        for entry in trainer.state.log_history
        if "eval_rewards/handwriting_accuracy/mean" in entry
    }
    for record in found:
        for key in ("eval_mr_reward/score_mean", "eval_rewards/handwriting_accuracy/mean"):
            assert record[key] == logged[record["step"]][key]
    assert found[0]["warning_signs"] == []
    assert "of the groups have equal scores" in found[1]["warning_signs"][0]
    assert found[2]["warning_signs"] == []  # told once

    # the samples are rollouts for held-out prompts, with their scores, best first
    sampled = validation.reward.last_scored[:2]
    text = (tmp_path / "samples.md").read_text()
    for found_group in sampled:
        group, scores = found_group.group, found_group.scores or ()
        held_out = [task.image().tobytes() for task in make_tasks("validation", 6, num_digits=2)]
        assert group.images[0].tobytes() in held_out
        shown = [
            f"{score:+9.3f}  {json.dumps(response, ensure_ascii=False)}"
            for score, response in zip(scores, group.responses, strict=True)
        ]
        assert all(line in text for line in shown)
        positions = [text.index(f"{score:+9.3f}  ") for score in sorted(scores, reverse=True)]
        assert positions == sorted(positions) or len(set(scores)) < len(scores)
    assert text.startswith("# Step 4")
    assert "step 0: rollouts for held-out prompts" in terminal
    with Image.open(tmp_path / "validation.png") as figure:
        assert figure.width > 1000


def test_a_resumed_run_continues_its_files(models: Path, tmp_path: Path) -> None:
    train(models, tmp_path, 2)
    first = records(tmp_path)
    assert [record["step"] for record in first] == [0, 2]
    # what an interrupted run wrote after its last checkpoint is of a future that did not happen
    with open(tmp_path / "validation.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "eval_mr_reward/score_mean": 99.0, "warning_signs": []}) + "\n")
    train(models, tmp_path, 4, resume=True)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [0, 2, 4]
    assert found[:2] == first
    train(models, tmp_path, 2)  # a new run in the same folder starts again
    assert [record["step"] for record in records(tmp_path)] == [0, 2]


class Run:
    """A trainer that logs and evaluates as it is told, with real callbacks; `checkpoint` is what it would save."""

    def __init__(self, reward: MultiResponseReward, folder: Path) -> None:
        self.reward, self.folder, self.state = reward, folder, TrainerState(is_world_process_zero=True)
        self.args = TrainingArguments(str(folder), use_cpu=True)

    def start(self, checkpoint: TrainerState | None = None) -> None:
        if checkpoint is not None:
            self.state = copy.deepcopy(checkpoint)
        signs = WarningSigns(window=2)
        console = Console(file=io.StringIO())
        self.validation = PolicyValidation(self.reward, self.folder, signs=signs, console=console)
        self.validation.on_train_begin(self.args, self.state, TrainerControl())

    def log(self, step: int, **logs: float) -> None:
        self.state.global_step = step
        named = {key.replace("__", "/"): value for key, value in logs.items()}
        self.state.log_history.append({**named, "step": step})
        self.validation.on_log(self.args, self.state, TrainerControl(), logs=named)
        if any(key.startswith("eval_") for key in named):
            self.validation.on_evaluate(self.args, self.state, TrainerControl())


def logs_of(step: int) -> list[dict[str, float]]:
    """What each step logs: signs come at steps 2, 5 and 9, and every third step is evaluated."""
    sick = {2: "mr_reward__zero_spread_groups", 5: "mr_reward__repeated_text", 9: "mr_reward__zero_spread_groups"}
    healthy = {"mr_reward__zero_spread_groups": 0.0, "mr_reward__repeated_text": 0.0}
    found = [{**healthy, **({sick[step]: 2.0} if step in sick else {})}]
    return [*found, *([{"eval_mr_reward__score_mean": float(step)}] if step % 3 == 0 else [])]


@pytest.mark.parametrize("stopped", [1, 2, 3, 4, 5, 6, 9, 11])
def test_a_run_that_is_resumed_anywhere_writes_what_it_would_have(
    models: Path, tmp_path: Path, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs that a line tells are not told again, and none gets lost, whatever was written after the checkpoint."""
    monkeypatch.setattr("mr_reward.runs.callbacks.plot_curves", lambda *_, **__: None)  # takes most of the time
    reward = MultiResponseReward(models / "rm", num_generations=4)
    whole, broken = Run(reward, tmp_path / "whole"), Run(reward, tmp_path / "broken")
    for run in (whole, broken):
        run.start()
        checkpoint = None
        for step in range(1, 13):
            for logs in logs_of(step):
                run.log(step, **logs)
            if run is broken and step == stopped:
                checkpoint = copy.deepcopy(run.state)
            if run is broken and step == min(stopped + 2, 12) and checkpoint is not None:
                break
    assert checkpoint is not None
    broken.start(checkpoint)
    for step in range(stopped + 1, 13):
        for logs in logs_of(step):
            broken.log(step, **logs)
    found, expected = records(tmp_path / "broken"), records(tmp_path / "whole")
    assert found == expected and [record["step"] for record in expected] == [3, 6, 9, 12]
    assert [len(record["warning_signs"]) for record in expected] == [1, 1, 1, 0]


def test_a_second_evaluation_of_a_step_takes_the_place_of_the_first(models: Path, tmp_path: Path) -> None:
    run = Run(MultiResponseReward(models / "rm", num_generations=4), tmp_path)
    run.start()
    for value in (1.0, 2.0):
        run.log(3, **{"eval_mr_reward__score_mean": value})
    (record,) = records(tmp_path)
    assert record["eval_mr_reward/score_mean"] == 2.0
    run.log(5, mr_reward__zero_spread_groups=2.0)
    run.log(5, mr_reward__zero_spread_groups=2.0)
    for value in (1.0, 2.0):
        run.log(5, **{"eval_mr_reward__score_mean": value})
    _, record = records(tmp_path)
    assert record["eval_mr_reward/score_mean"] == 2.0 and len(record["warning_signs"]) == 1, "and keeps its signs"
    kept = records(tmp_path)
    run.state.is_world_process_zero = False
    run.log(6, **{"eval_mr_reward__score_mean": 3.0})
    run.state.is_world_process_zero = True
    assert records(tmp_path) == kept, "another rank writes nothing"


def test_samples_survive_what_a_policy_can_write(models: Path, tmp_path: Path) -> None:
    hostile = ["```\n# heading", "[red]not markup[/red]", "\x1b[31mred\x1b[0m", "lone \ud800 surrogate", ""]
    reward = MultiResponseReward(models / "rm", num_generations=5)
    terminal = io.StringIO()
    validation = PolicyValidation(reward, tmp_path, console=Console(file=terminal, width=120))
    reward(["Say ```\n[bold]x"] * 5, hostile)
    state = TrainerState(global_step=3, log_history=[{"step": 3, "eval_mr_reward/score_mean": 0.0}])
    validation.on_evaluate(TrainingArguments(str(tmp_path), use_cpu=True), state, TrainerControl())
    text = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert text.count("\n```") == 2  # the fence is opened and closed once
    assert "[red]not markup[/red]" in terminal.getvalue()
    assert "\x1b[31m" not in terminal.getvalue()
    assert isinstance(reward.last_scored[0].group, ResponseGroup)
