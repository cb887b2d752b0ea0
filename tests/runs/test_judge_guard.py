"""The guard over the judge: by its definition on random histories, and in real GRPO runs that go wrong as planned."""

from __future__ import annotations

import json
import logging
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_runs import SHORT_RUN
from trl import GRPOConfig, GRPOTrainer

from mr_reward import MultiResponseReward, MultiResponseRewardModel
from mr_reward.errors import ConfigurationError
from mr_reward.runs.callbacks import WarningSigns
from mr_reward.runs.judge_guard import JudgeGuard, replay_guard, truth_metrics
from mr_reward.worlds import tiny

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "judge_guard.py"
PROMPTS = [{"prompt": [{"role": "user", "content": f"Say {word}"}]} for word in range(4)]
# What the held-out truth and the judge say at steps 0, 1, ... : right until step 2, fooled at 3 and 4, then not.
TRUTH = [0.5, 0.6, 0.8, 0.7, 0.6, 0.5, 0.4]
JUDGED = "eval_rewards/judge/mean"
JUDGE = [0.0, 1.0, 2.0, 3.0, 4.0, 1.5, 5.0]


def alarms_by_definition(truths: list[float], scores: list[float], fall: float, patience: int) -> list[int]:
    """Evaluations that end a first stretch of `patience` fooled ones, each looked at by itself."""

    def fooled(i: int) -> bool:
        best = truths[:i].index(max(truths[:i])) if i else 0
        return i > 0 and truths[i] < truths[best] - fall and scores[i] > scores[best]

    found = []
    for i in range(len(truths)):
        stretch = [fooled(j) for j in range(i - patience + 1, i + 1) if j >= 0]
        before = i - patience >= 0 and fooled(i - patience)
        if len(stretch) == patience and all(stretch) and not before:
            found.append(i)
    return found


@pytest.mark.parametrize("seed", range(30))
def test_alarms_are_those_of_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    count, fall, patience = rng.randint(1, 40), rng.choice([0.0, 0.05, 0.2]), rng.randint(1, 3)
    truths = [round(rng.uniform(0.3, 0.9), 1) for _ in range(count)]
    scores = [round(rng.gauss(i / 10, 1.0), 1) for i in range(count)]
    logs: list[dict[str, Any]] = [{"step": 10 * i, "t": truths[i], "j": scores[i]} for i in range(count)]
    logs += [{"step": 5, "loss": 1.0}, {"step": 10, "t": None, "j": 1.0}, {"step": 0, "t": float("nan"), "j": 1.0}]
    report = replay_guard(logs, truth="t", judge="j", fall=fall, patience=patience)
    assert list(report.alarms) == [10 * i for i in alarms_by_definition(truths, scores, fall, patience)]
    assert report.best == truths.index(max(truths)) and list(report.truths) == truths
    assert report.steps == tuple(range(0, 10 * count, 10))


def test_of_a_step_that_was_evaluated_twice_the_last_counts() -> None:
    logs = [{"step": step, "t": value, "j": 0.0} for step, value in [(0, 0.5), (2, 0.9), (2, 0.6)]]
    assert replay_guard(logs, truth="t", judge="j").truths == (0.5, 0.6)
    with pytest.raises(ConfigurationError, match="no log has x and j"):
        replay_guard(logs, truth="x", judge="j")


def test_evaluations_without_a_number_end_no_run(policy: Path, tmp_path: Path) -> None:
    """Where all groups were dropped the log has None."""
    nothing = [float("nan")] * 3
    trainer = run(policy, tmp_path, guard(), judge=nothing, max_steps=2, eval_on_start=False)
    assert trainer.state.global_step == 2
    assert replay_guard(trainer.state.log_history, truth="eval_rewards/truth/mean", judge=JUDGED).steps == ()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny.build_llama(0).save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


def noise(completions: list[Any], **_: Any) -> list[float]:
    """What the policy learns from."""
    return [float(len(completion[0]["content"])) for completion in completions]


def planned(name: str, values: list[float]) -> Any:
    """A reward function whose value depends on the step alone."""

    def reward(completions: list[Any], trainer_state: Any = None, **_: Any) -> list[float]:
        return [values[trainer_state.global_step]] * len(completions)

    reward.__name__ = name
    return reward


def run(
    policy: Path,
    out: Path,
    guard: JudgeGuard,
    resume: bool | None = None,
    truth: list[float] = TRUTH,
    judge: list[float] = JUDGE,
    **changes: Any,
) -> GRPOTrainer:
    options = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "max_steps": len(TRUTH) - 1,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": not resume,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "metric_for_best_model": "rewards/truth/mean",
        "load_best_model_at_end": True,
        "reward_weights": [1.0, 0.0, 0.0],
        **SHORT_RUN,
        **changes,
    }
    trainer = GRPOTrainer(
        model=str(policy),
        reward_funcs=[noise, planned("truth", truth), planned("judge", judge)],
        args=GRPOConfig(str(out), **options),
        train_dataset=Dataset.from_list(PROMPTS),
        eval_dataset=Dataset.from_list(PROMPTS),
        callbacks=[guard],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def guard(**options: Any) -> JudgeGuard:
    return JudgeGuard(judge=JUDGED, **options)


def test_a_run_that_fools_its_judge_is_told_and_ends_with_its_best_checkpoint(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mr_reward"):
        trainer = run(policy, tmp_path, guard())
    own = [record for record in caplog.records if record.name == JudgeGuard.__module__]
    (warning,) = [record.getMessage() for record in own if record.levelno == logging.WARNING]
    assert warning == (
        "step 4: the judge is fooled: eval_rewards/judge/mean has risen since step 2 while eval_rewards/truth/mean "
        "has fallen from 0.800 to 0.600"
    )
    assert trainer.state.global_step == 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert "best 0.800 at step 2, last 0.400 at step 6; best checkpoint: " in caplog.text
    kept, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 6))
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert not all(torch.equal(kept[name], last[name]) for name in kept)


def test_it_stops_and_stays_stopped(policy: Path, tmp_path: Path) -> None:
    stopped = run(policy, tmp_path, guard(stop=True))
    assert stopped.state.global_step == 4
    patient = run(policy, tmp_path / "patient", guard(stop=True, patience=3))
    assert patient.state.global_step == 6, "fooled at steps 3 and 4 only, and at 6 once"
    # Nothing of the guard is in a checkpoint; a run that is started again behind the alarm knows it by its history.
    again = run(policy, tmp_path, guard(stop=True), resume=True, judge=[*JUDGE[:5], 4.5, 5.0])
    assert again.state.global_step == 5


TURN = 4  # the step from which on the policy is made worse


def letters(completions: list[Any], **_: Any) -> list[float]:
    """The truth: the share of characters before n."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter < "n" for letter in text) / max(1, len(text)) for text in texts]


def turning(completions: list[Any], trainer_state: Any, **_: Any) -> list[float]:
    """A judge that is right until the turn, then pays for the opposite, and more."""
    return [right if trainer_state.global_step < TURN else 2 - right for right in letters(completions)]


def reversible(reward: MultiResponseReward) -> Any:
    """A reward model whose worst responses are rewarded from the turn on."""

    def reversed_reward(prompts: Any, completions: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
        scores = reward(prompts, completions, trainer_state=trainer_state, **kwargs)
        return [score if trainer_state.global_step < TURN else -score for score in scores]

    return reversed_reward


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("watched", ["rewards/letters/mean", "mr_reward/win_rate"])
def test_of_a_policy_that_is_made_worse_the_best_checkpoint_stays(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, watched: str, seed: int
) -> None:
    """By a held-out truth, or by the share above a reference; what is kept is rolled out again, alone."""
    by_truth = watched == "rewards/letters/mean"
    rows = [{"prompt": [{"role": "user", "content": f"Say {word}"}], "reference_response": "ab"} for word in range(8)]
    model = MultiResponseRewardModel.from_backbone(policy)
    reward = MultiResponseReward(model, num_generations=8)

    def trainer_of(start: Path, out: Path, seed: int) -> GRPOTrainer:
        options = {
            **SHORT_RUN,
            "num_generations": 8,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 64,
            "max_steps": 2 * TURN,
            "learning_rate": 4e-2,
            "lr_scheduler_type": "constant",
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "best" if by_truth else "steps",
            "save_steps": 1,
            "save_total_limit": 1,
            "metric_for_best_model": watched,
            "load_best_model_at_end": True,
            "reward_weights": [1.0, 0.0] if by_truth else [1.0],
            "seed": seed,
        }
        return GRPOTrainer(
            model=str(start),
            reward_funcs=[turning, letters] if by_truth else [reversible(reward)],
            args=GRPOConfig(str(out), **options),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            callbacks=[JudgeGuard(judge="eval_rewards/turning/mean") if by_truth else JudgeGuard()],
        )

    trainer = trainer_of(policy, tmp_path, seed)
    trainer.train()
    values = {log["step"]: log[f"eval_{watched}"] for log in trainer.state.log_history if "eval_loss" in log}
    best, last = max(values, key=values.__getitem__), values[2 * TURN]
    assert best in range(2, TURN + 2) and last < values[best] - 0.2, "the policy has not gone as planned"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    kept = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(weights[name], kept[name]) for name in kept), "the run ends with it"
    again = trainer_of(tmp_path / f"checkpoint-{best}", tmp_path / "again", seed + 10)
    again.state.global_step = TURN - 1
    found = again.evaluate()[f"eval_{watched}"]
    assert found > last + 0.1 and found == pytest.approx(values[best], abs=0.15)
    assert ("the judge is fooled" in caplog.text) is by_truth, "a reference is judged by the same judge"


def test_a_policy_that_was_best_before_training_is_told(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(policy, tmp_path, guard(), truth=[0.9, 0.5, 0.6, 0.4], max_steps=3)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert "the best evaluation is that of step 0, of which there is no checkpoint; the run ends with" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric_for_best_model": None, "load_best_model_at_end": False}, "metric_for_best_model is None"),
        ({"metric_for_best_model": None}, "metric_for_best_model is 'loss'"),
        ({"metric_for_best_model": "rewards/judge/mean"}, "does not tell whether the judge is right"),
        ({"greater_is_better": False}, "greater_is_better is false"),
        ({"eval_strategy": "no", "load_best_model_at_end": False, "eval_on_start": False}, "eval_strategy is 'no'"),
    ],
)
def test_what_cannot_be_guarded_is_refused_before_the_first_step(
    policy: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        run(policy, tmp_path, guard(), **changes)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_evaluations_without_a_checkpoint_are_told(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(policy, tmp_path, guard(), save_steps=2, max_steps=2)
    assert "eval_steps is 1, expected a multiple of save_steps=2" in caplog.text


@pytest.mark.parametrize("options", [{"fall": -0.1}, {"patience": 0}])
def test_settings_without_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="expected fall >= 0 and patience >= 1"):
        JudgeGuard(**options)


def test_which_metrics_know_the_truth() -> None:
    assert truth_metrics([noise], ["prompt"]) == ["rewards/noise/mean"]
    assert truth_metrics([], ["prompt", "reference_response"]) == ["mr_reward/win_rate"]


def test_recorded_runs_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A collapse that is told, one that is not, a gain, a gain with a false alarm; a reward model is no run."""
    truth, judge, above = (f"eval_{key}" for key in ("rewards/handwriting_accuracy/mean", "mr_reward/score_mean", "w"))
    rising = [0.0, 1.0, 2.0, 3.0]
    # name: truth, score, share above a reference
    runs = {
        "told": ([0.8, 0.9, 0.7, 0.6], rising, [0.5, 0.6, 0.7, 0.8]),
        "missed": ([0.8, 0.9, 0.7, 0.6], [0.0, 1.0, 0.5, 0.2], [0.5, 0.6, 0.7, 0.6]),
        "gain": ([0.6, 0.7, 0.8, 0.9], rising, [0.8, 0.9, 0.6, 0.5]),
        "false": ([0.6, 0.9, 0.8, 0.8], rising, [0.5, 0.6, 0.7, 0.8]),
    }
    signs_of = WarningSigns(window=1, truths=["truth"])
    assert not signs_of.update({"mr_reward/score_mean": 1.0, "truth": 0.9})
    fooled = signs_of.update({"mr_reward/score_mean": 2.0, "truth": 0.8})
    assert len(fooled) == 1
    for number, (name, columns) in enumerate(runs.items()):
        logs: list[dict[str, Any]] = [
            {"step": 10 * i, truth: right, judge: score, above: share}
            for i, (right, score, share) in enumerate(zip(*columns, strict=True))
        ]
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        if number % 2:
            for log in logs:
                told = {10: ["longer"], 20: fooled if name == "missed" else []}
                log["warning_signs"] = told.get(log["step"], [])
            logs[-1][truth.replace("eval_", "eval_ema_")] = logs[-1][truth] + 0.1
            (folder / "validation.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
        else:
            for step, end in ((20, 3), (100, 4)):  # of several checkpoints the last one has it all
                (folder / f"checkpoint-{step}").mkdir()
                state = {"global_step": step, "log_history": [{"step": 1, "loss": 0.0}, *logs[:end]]}
                (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    shapes = truth.replace("handwriting", "shapes")
    cell = [{"step": 25 * i, shapes: right, judge: float(i)} for i, right in enumerate([0.8, 0.7, 0.6])]
    (tmp_path / "runs" / "shapes").mkdir()
    # The greedy answers to the test decide: no collapse.
    record = {"validation": cell, "start": 0.8, "end": 0.76}
    (tmp_path / "runs" / "shapes" / "recipe-seed1-rm0.json").write_text(json.dumps(record))
    (tmp_path / "runs" / "rm" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "runs" / "rm" / "checkpoint-5" / "trainer_state.json").write_text('{"log_history": [{"step": 5}]}')
    command = [BENCHMARK.name, str(tmp_path / "runs"), "--output", str(tmp_path / "guard.json"), "--watched", above]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "guard.json").read_text())
    assert "5 runs; 1 without two evaluations" in shown
    assert json.loads(shown.splitlines()[-1]) == document
    alarms = {run["name"]: {name: one["alarms"] for name, one in run["watchers"].items()} for run in document["runs"]}
    assert alarms == {
        "told": {truth: [30], above: []},
        "missed": {truth: [], above: [], "warning_signs": [20]},
        "gain": {truth: [], above: [30]},
        "false": {truth: [30], above: [], "warning_signs": []},
        "shapes/recipe-seed1-rm0": {shapes: [50]},
    }
    counts = {
        name: [(found[rate]["hits"], found[rate]["of"]) for rate in ("recall", "false_alarms")]
        for name, found in document["summary"].items()
    }
    signs = [(1, 1), (0, 1)]
    assert counts == {
        truth: [(1, 2), (1, 2)],
        above: [(0, 2), (1, 2)],
        "warning_signs": signs,
        shapes: [(0, 0), (1, 1)],
    }
    # of two coins with one head; Wilson's interval by hand: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert document["summary"][truth]["recall"]["interval"] == pytest.approx([0.0945, 0.9055], abs=1e-3)
    kept = document["summary"][truth]["kept"]
    assert kept["mean"] == pytest.approx((0.3 + 0.3 + 0.0 + 0.1) / 4)
    # Student's: mean ± 3.182 s / sqrt(4), s = 0.15
    assert kept["interval"] == pytest.approx([0.175 - 0.2387, 0.175 + 0.2387], abs=1e-3)
    # The share above the reference is best at steps 30, 20, 10 and 30.
    assert document["summary"][above]["kept"]["mean"] == pytest.approx((0.0 + 0.1 - 0.2 + 0.0) / 4)
    assert document["average"]["mean"] == pytest.approx(0.1) and document["average"]["of"] == 2
    assert len(document["grid"]) == 9
    monkeypatch.setattr(sys, "argv", [*command, "--truth", "eval_x"])
    with pytest.raises(SystemExit, match="none of 6 runs has two evaluations with eval_x"):
        runpy.run_path(str(BENCHMARK), run_name="__main__")
