"""A GRPO run that is killed and started again with the same command sees, does and learns what it would have.

Compared are the tables of completions that TRL writes at each step: prompts, completions, rewards, advantages.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl import GRPOConfig

from mr_reward import MultiResponseRewardModel
from mr_reward.runs.launch import checkpoint_to_resume, updates_per_generation
from mr_reward.training.saving import last_complete_checkpoint
from mr_reward.worlds import tiny

RECIPE = Path(__file__).parents[2] / "grpo_recipes" / "train_policy.py"
STEPS = 20
NUM_PROMPTS = 12  # six updates an epoch: the run is in its fourth when it ends


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model and prompts."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("policy", 0), ("backbone", 1)):
        tiny.build_llama(seed).save_pretrained(folder / name)
        tiny.build_tokenizer().save_pretrained(folder / name)
    MultiResponseRewardModel.from_backbone(folder / "backbone").save_pretrained(folder / "rm")
    rows = [{"prompt": [{"role": "user", "content": f"Say {word}"}]} for word in range(NUM_PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


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
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, str(RECIPE), "--config", str(path)]


def run_to_the_end(arguments: list[str], output: Path) -> None:
    with output.with_suffix(".log").open("a") as log:
        result = subprocess.run(arguments, timeout=300, stdout=log, stderr=log, env=environment())
    assert result.returncode == 0, output.with_suffix(".log").read_text()[-4000:]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


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
    run_to_the_end(command(world, output, save_total_limit=None), output)
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
    rng = random.Random(seed)
    kills = 0
    for _ in range(2):
        last = last_complete_checkpoint(output) if output.exists() else None
        before = int(last.split("-")[-1]) if last else 0
        with output.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment())
        wait_for_step(output, before + rng.choice([2, 4, 6]), process)
        time.sleep(rng.uniform(0.0, 0.6))  # between two saves, or in the middle of one
        if process.poll() is None:
            process.send_signal(how)
            kills += 1
        process.wait()
    assert kills, "no run lived long enough to be killed: the machine is too fast for this test"
    run_to_the_end(arguments, output)
    assert "resuming from" in output.with_suffix(".log").read_text()
    assert_same_run(output, uninterrupted)


@pytest.mark.slow
def test_a_full_disk_while_saving_and_resume(uninterrupted: Path, world: Path) -> None:
    """From step 6 on no checkpoint has room; what was saved before it is whole, and the run resumes from it."""
    output = world / "full"
    arguments = command(world, output)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    with output.with_suffix(".log").open("a") as log:  # another process writes the log, which has room
        logger = subprocess.Popen(["cat"], stdin=process.stdout, stdout=log)
    assert process.stdout is not None
    process.stdout.close()
    wait_for_step(output, 6, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert process.wait(240) != 0 and logger.wait(60) == 0
    log_text = output.with_suffix(".log").read_text()
    # Of safetensors and Python, or ours about torch's: it depends on which file was the first without room.
    assert "File too large" in log_text or "is the disk full?" in log_text, log_text[-3000:]
    last = last_complete_checkpoint(output)
    assert last is not None and int(last.split("-")[-1]) >= 4
    run_to_the_end(arguments, output)
    assert_same_run(output, uninterrupted)


def wait_for_step(output: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if any(int(path.name.split("-")[-1]) >= step for path in output.glob("checkpoint-*")):
            return
        time.sleep(0.02)
    assert process.poll() in (None, 0), output.with_suffix(".log").read_text()[-3000:]


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
    run_to_the_end(command(world, output, save_total_limit=None), output)
    log = output.with_suffix(".log").read_text()
    assert "checkpoint-16 is not whole" in log and "resuming from" in log
    assert_same_run(output, uninterrupted)


@pytest.mark.slow
def test_between_two_generations_the_completions_are_drawn_anew(uninterrupted: Path, world: Path) -> None:
    """Steps 3 and 4 share a generation, of which a checkpoint at 3 knows nothing; no prompt is left out for it."""
    output = world / "off-cycle"
    options = {"eval_dataset": None, "eval_strategy": "no"}
    run_to_the_end(command(world, output, save_steps=3, max_steps=3, **options), output)
    assert "save_steps is 3, expected a multiple of 2" in output.with_suffix(".log").read_text()
    run_to_the_end(command(world, output, **options), output)
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


@pytest.mark.parametrize("given", [None, False, "false", True, "true", "here"])
def test_checkpoint_to_resume(tmp_path: Path, given: Any) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    torch.save({}, folder / "rng_state.pth")
    (tmp_path / "checkpoint-8").mkdir()
    expected = {"true": str(folder), "here": "here"}.get(str(given).lower())
    assert checkpoint_to_resume(arguments(tmp_path, resume_from_checkpoint=given)) == expected
