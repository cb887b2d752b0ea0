"""A GRPO run that is killed and started again with the same command sees, does and learns what it would have.

Compared are the tables of completions that TRL writes at each step: prompts, completions, rewards, advantages.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from killed_runs import kill_twice, log_of, policy_world, recipe_file, run_to_the_end, run_without_room
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler

from mr_reward.runs.resume import ContinuedEpochs, checkpoint_to_resume, updates_per_generation

RECIPE = Path(__file__).parents[2] / "grpo_recipes" / "train_policy.py"
STEPS = 20
NUM_PROMPTS = 12  # six updates an epoch: the run is in its fourth when it ends


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model and prompts."""
    return policy_world(tmp_path_factory.mktemp("world"), NUM_PROMPTS)


def command(world: Path, output: Path, **changes: Any) -> list[str]:
    """Sampling, several updates per generation, shuffled epochs, evaluation with another group size."""
    config = {
        "model_name_or_path": str(world / "policy"),
        "reward_model": str(world / "rm"),
        "output_dir": str(output),
        "dataset": str(world / "prompts.jsonl"),
        "eval_dataset": str(world / "prompts.jsonl"),
        "num_generations": 4,
        "num_generations_eval": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "steps_per_generation": 2,
        "max_completion_length": 8,
        "max_steps": STEPS,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "learning_rate": 1.0e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "beta": 0.0,
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 1,
        "log_completions": True,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "resume_from_checkpoint": True,
        **changes,
    }
    return [sys.executable, str(RECIPE), "--config", recipe_file(output, config)]


def history(output: Path) -> dict[int, dict[str, float]]:
    """What each step logged, without what depends on the clock."""
    entries = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    steps: dict[int, dict[str, float]] = {}
    for entry in entries:
        values = {k: v for k, v in entry.items() if not k.endswith(("step_time", "ms_per_group", "runtime", "second"))}
        steps.setdefault(entry["step"], {}).update(values)
    return steps


def tables(output: Path) -> dict[int, pd.DataFrame]:
    return {
        step: pd.read_parquet(output / "completions" / f"completions_{step:05d}.parquet")
        for step in range(1, STEPS + 1)
    }


def assert_same_run(output: Path, expected: Path) -> None:
    """On one machine with one thread equal bit for bit: what was seen, sampled, rewarded, logged, and the weights."""
    found = tables(output)
    for step, table in tables(expected).items():
        pd.testing.assert_frame_equal(found[step], table, check_exact=True, obj=f"step {step}")
    assert history(output) == history(expected)
    assert len(history(expected)) == STEPS
    assert (output / "validation.jsonl").read_text().count("\n") == STEPS // 4
    weights, others = load_file(output / "model.safetensors"), load_file(expected / "model.safetensors")
    for name, weight in others.items():
        assert torch.equal(weights[name], weight), name


@pytest.fixture(scope="module")
def uninterrupted(world: Path) -> Path:
    output = world / "uninterrupted"
    run_to_the_end(command(world, output, save_total_limit=None), log_of(output))
    steps = history(output)
    assert len({values["learning_rate"] for values in steps.values()}) > STEPS // 2
    spreads = [values["mr_reward/score_spread"] for values in steps.values() if "mr_reward/score_spread" in values]
    assert len(spreads) == STEPS // 2 and min(spreads) > 0, "one reward call per generation"
    seen = [tuple(sorted({str(prompt) for prompt in table["prompt"]})) for table in tables(output).values()]
    epochs = [seen[start : start + 6 : 2] for start in (0, 6, 12)]
    assert epochs[0] != epochs[1] != epochs[2], "the epochs have the same order, so this test shows little"
    return output


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "how"), [(0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_kill_at_a_random_moment_and_resume(uninterrupted: Path, world: Path, seed: int, how: signal.Signals) -> None:
    output = world / f"killed-{seed}"
    arguments = command(world, output)
    kill_twice(arguments, output, how, seed, steps=[2, 4, 6])
    run_to_the_end(arguments, log_of(output))
    assert "resuming from" in log_of(output).read_text()
    assert_same_run(output, uninterrupted)


@pytest.mark.slow
def test_a_full_disk_while_saving_and_resume(uninterrupted: Path, world: Path) -> None:
    """From step 6 on no checkpoint has room; what was saved before it is whole, and the run resumes from it."""
    output = world / "full"
    arguments = command(world, output)
    assert run_without_room(arguments, output, 6, 50_000) >= 4
    run_to_the_end(arguments, log_of(output))
    assert_same_run(output, uninterrupted)


@pytest.mark.slow
def test_half_a_checkpoint_is_passed_over_in_a_later_epoch(uninterrupted: Path, world: Path) -> None:
    """What a kill in the middle of saving leaves; the one before it is of the third epoch."""
    output = world / "broken"
    shutil.copytree(uninterrupted, output, ignore=shutil.ignore_patterns("checkpoint-18", "checkpoint-20"))
    state = output / "checkpoint-16" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    (output / "model.safetensors").unlink()
    for step in range(15, STEPS + 1):
        (output / "completions" / f"completions_{step:05d}.parquet").unlink()
    run_to_the_end(command(world, output, save_total_limit=None), log_of(output))
    log = log_of(output).read_text()
    assert "checkpoint-16 is not whole" in log and "resuming from" in log
    assert_same_run(output, uninterrupted)


@pytest.mark.slow
def test_between_two_generations_the_completions_are_drawn_anew(uninterrupted: Path, world: Path) -> None:
    """Steps 3 and 4 share a generation, of which a checkpoint at 3 knows nothing; no prompt is left out for it."""
    output = world / "off-cycle"
    options = {"eval_dataset": None, "eval_strategy": "no"}
    run_to_the_end(command(world, output, save_steps=3, max_steps=3, **options), log_of(output))
    assert "save_steps is 3, expected a multiple of 2" in log_of(output).read_text()
    run_to_the_end(command(world, output, **options), log_of(output))
    found, expected = tables(output), tables(uninterrupted)
    for step in range(4, STEPS + 1):
        # From here on a generation serves updates 4 and 5, 6 and 7, ...; before it was 3 and 4, 5 and 6, ...
        generated = expected[step - step % 2 - 1]
        assert found[step]["prompt"].tolist() == generated["prompt"].tolist(), step
    again, first = (list(map(str, table["completion"])) for table in (found[4], found[3]))
    assert found[4]["prompt"].tolist() == found[3]["prompt"].tolist() and again != first


def arguments(tmp_path: Path, **changes: Any) -> GRPOConfig:
    options = {"num_generations": 4, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, **changes}
    return GRPOConfig(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("accumulation", "generation", "iterations", "expected"),
    [
        (1, 1, 1, 1),
        (4, 4, 1, 1),
        (4, 2, 1, 1),
        (1, 4, 1, 4),
        (2, 4, 3, 6),
    ],
)
def test_updates_of_a_generation(
    tmp_path: Path, accumulation: int, generation: int, iterations: int, expected: int
) -> None:
    args = arguments(
        tmp_path,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=generation,
        num_iterations=iterations,
    )
    assert updates_per_generation(args) == expected


@pytest.mark.parametrize(("save_steps", "told"), [(3, True), (4, False), (6, True), (8, False), (9, True)])
def test_checkpoints_between_two_generations_are_told(
    tmp_path: Path, save_steps: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, steps_per_generation=4, save_strategy="steps", save_steps=save_steps)
    checkpoint_to_resume(args)
    assert ("expected a multiple of 4" in caplog.text) is told
    caplog.clear()
    checkpoint_to_resume(arguments(tmp_path, steps_per_generation=4, save_strategy="no", save_steps=save_steps))
    assert not caplog.messages


@pytest.mark.parametrize(("epoch", "finished"), [(None, 0), (0.0, 0), (0.9, 0), (1.0, 1), (1.6, 1), (3.2, 3)])
def test_finished_epochs_are_drawn_and_thrown_away(tmp_path: Path, epoch: float | None, finished: int) -> None:
    def loader() -> DataLoader[int]:
        return DataLoader(range(20), sampler=RepeatSampler(range(20), 1, 4, shuffle=True, seed=0), batch_size=4)  # type: ignore[arg-type]

    expected, found = loader(), loader()
    orders = [torch.cat(list(expected)).tolist() for _ in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    state = TrainerState(epoch=epoch)
    ContinuedEpochs().on_train_begin(arguments(tmp_path), state, TrainerControl(), train_dataloader=found)
    assert torch.cat(list(found)).tolist() == orders[finished]


@pytest.mark.parametrize("given", [None, False, "false", True, "true", "here"])
def test_checkpoint_to_resume(tmp_path: Path, given: Any) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    torch.save({}, folder / "rng_state.pth")
    (tmp_path / "checkpoint-8").mkdir()
    expected = {"true": str(folder), "here": "here"}.get(str(given).lower())
    assert checkpoint_to_resume(arguments(tmp_path, resume_from_checkpoint=given)) == expected
