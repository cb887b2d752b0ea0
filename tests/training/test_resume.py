"""A run that is killed at any moment and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import kill_twice, log_of, recipe_file, run_to_the_end, run_without_room, wait_for_step
from launching import environment
from safetensors.torch import load_file
from test_trainer import easy_groups

from mr_reward.training.saving import incomplete_reason, last_complete_checkpoint, naming_a_full_disk
from mr_reward.worlds import tiny

RECIPE = Path(__file__).parents[2] / "grpo_recipes" / "pretrain_rm.py"
STEPS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone and two training files."""
    folder = tmp_path_factory.mktemp("world")
    tiny.build_llama(0).save_pretrained(folder / "backbone")
    tiny.build_tokenizer().save_pretrained(folder / "backbone")
    for name, count in (("a", 40), ("b", 25)):
        rows = [
            {"prompt": g.prompt, "responses": list(g.responses), "rankings": g.rankings}
            for g in easy_groups(count, len(name))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(world: Path, output: Path, **changes: Any) -> list[str]:
    """Everything that draws at random is on: dropout, mixture, subsets, negatives, LoRA, accumulation, epochs."""
    config = {
        "model_name_or_path": str(world / "backbone"),
        "output_dir": str(output),
        "train_file": [str(world / "a.jsonl"), str(world / "b.jsonl")],
        "mixture_weights": [1, 2],
        "layout": "set",
        "max_tokens": 512,
        "max_responses": 3,
        "degenerate_negatives": 0.3,
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "batch_rebalance",
        "learning_rate": 1.0e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "save_steps": 3,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "resume_from_checkpoint": True,
        **changes,
    }
    warnings = ["-W", "error::UserWarning:mr_reward"]
    return [sys.executable, *warnings, str(RECIPE), "--config", recipe_file(output, config)]


def losses(output: Path) -> dict[int, float]:
    history = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def assert_same_run(output: Path, expected: Path) -> None:
    """Equal to 1e-6, as asked; on one machine with one thread they are in fact equal bit for bit."""
    assert losses(output) == pytest.approx(losses(expected), abs=1e-6)
    assert len(losses(expected)) == STEPS
    found, weights = load_file(output / "model.safetensors"), load_file(expected / "model.safetensors")
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0, msg=key)


@pytest.fixture(scope="module", params=["lora", "full"])
def uninterrupted(request: pytest.FixtureRequest, world: Path) -> tuple[Path, dict[str, Any]]:
    changes: dict[str, Any] = {} if request.param == "lora" else {"use_peft": False, "learning_rate": 1.0e-3}
    output = world / f"uninterrupted-{request.param}"
    run_to_the_end(command(world, output, **changes), log_of(output))
    return output, changes


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "how"), [(0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_kill_at_a_random_moment_and_resume(
    uninterrupted: tuple[Path, dict[str, Any]], world: Path, seed: int, how: signal.Signals
) -> None:
    expected, changes = uninterrupted
    output = world / f"killed-{expected.name}-{seed}"
    arguments = command(world, output, **changes)
    kill_twice(arguments, output, how, seed, steps=[3])
    run_to_the_end(arguments, log_of(output))
    assert_same_run(output, expected)


@pytest.mark.slow
def test_a_full_disk_while_saving_and_resume(uninterrupted: tuple[Path, dict[str, Any]], world: Path) -> None:
    """No room for a checkpoint from step 6 on: the run says so, the checkpoints before stay whole and are used."""
    expected, changes = uninterrupted
    output = world / f"full-{expected.name}"
    arguments = command(world, output, **changes)
    assert run_without_room(arguments, output, 6, 20_000) >= 3
    run_to_the_end(arguments, log_of(output))
    assert_same_run(output, expected)


@pytest.mark.parametrize("sizes", [[100], [30_000], [1000] * 60])
def test_torch_without_room_is_named_and_a_broken_archive_is_not(tmp_path: Path, sizes: list[int]) -> None:
    """No room in the first tensor, in a large one, in one of many."""
    path, content = tmp_path / "optimizer.pt", {str(i): torch.zeros(size) for i, size in enumerate(sizes)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) * 2, hard))
    try:
        with pytest.raises(OSError, match="is the disk full.*make room"), naming_a_full_disk(tmp_path):
            torch.save(content, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    torch.save(content, path)
    truncate(path)
    with pytest.raises((RuntimeError, OSError)) as broken, naming_a_full_disk(tmp_path):
        torch.load(path, weights_only=True)
    assert "disk full" not in str(broken.value)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(uninterrupted: tuple[Path, dict[str, Any]], world: Path) -> None:
    """Every look at the clock is an hour off, forwards or backwards, and the newest checkpoint has the oldest date."""
    expected, changes = uninterrupted
    output = world / f"clock-{expected.name}"
    shim = world / "clock"
    shim.mkdir(exist_ok=True)
    (shim / "sitecustomize.py").write_text(
        "import random, time\nreal, jumps = time.time, random.Random(0)\n"
        "time.time = lambda: real() + jumps.choice([-3600, 0, 3600])\n"
    )
    arguments = command(world, output, **changes)
    with log_of(output).open("a") as log:
        skewed = {**environment(), "PYTHONPATH": str(shim)}
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=skewed)
        wait_for_step(output, 9, process)
        process.kill()
        process.wait()
    for age, path in enumerate(sorted(output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[-1]))):
        for file in (path, *path.rglob("*")):
            os.utime(file, (10**9 - age * 86_400,) * 2)
    run_to_the_end(arguments, log_of(output), PYTHONPATH=str(shim))
    assert_same_run(output, expected)


@pytest.mark.slow
def test_a_broken_checkpoint_is_passed_over(uninterrupted: tuple[Path, dict[str, Any]], world: Path) -> None:
    """What a kill in the middle of saving leaves: the run goes on from the checkpoint before it."""
    expected, changes = uninterrupted
    output = world / f"broken-{expected.name}"
    shutil.copytree(expected, output)
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    (output / "model.safetensors").unlink()
    shutil.copytree(output / f"checkpoint-{STEPS - 3}", output / f"checkpoint-{STEPS - 1}")
    (output / f"checkpoint-{STEPS - 1}" / "trainer_state.json").unlink()
    run_to_the_end(command(world, output, **changes), log_of(output))
    assert f"checkpoint-{STEPS - 1} is not whole" in log_of(output).read_text()
    assert_same_run(output, expected)


def whole_checkpoint(folder: Path) -> Path:
    step = int(folder.name.split("-")[-1])
    (folder / "global_step").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    torch.save({"a": torch.zeros(1000)}, folder / "optimizer.pt")
    torch.save({}, folder / "rng_state.pth")
    torch.save({}, folder / "global_step" / "zero_states.pt")
    tiny.build_llama().save_pretrained(folder)
    return folder


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trainer_state.json", "trainer_state.json cannot be read"),
        ("optimizer.pt", "optimizer.pt is cut off"),
        ("rng_state.pth", "rng_state.pth is cut off"),
        ("global_step/zero_states.pt", "zero_states.pt is cut off"),
        ("model.safetensors", "model.safetensors is cut off"),
    ],
)
def test_half_a_file_makes_a_checkpoint_incomplete(tmp_path: Path, name: str, words: str) -> None:
    folder = whole_checkpoint(tmp_path / "checkpoint-7")
    assert incomplete_reason(folder) is None
    truncate(folder / name)
    assert words in (incomplete_reason(folder) or "")


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_checkpoint_has_the_random_state_of_every_rank(tmp_path: Path, missing: int) -> None:
    folder = whole_checkpoint(tmp_path / "checkpoint-7")
    for rank in range(3):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    assert incomplete_reason(folder, num_ranks=3) is None
    (folder / f"rng_state_{missing}.pth").unlink()
    assert incomplete_reason(folder, num_ranks=3) == f"rng_state_{missing}.pth is missing"


def test_newest_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step in (9, 10, 100):
        whole_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text('{"global_step": 99}')
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-100 is not whole (its state is of step 99)" in caplog.text
    assert last_complete_checkpoint(tmp_path, num_ranks=2) is None, "each rank needs its random state"
    for rank in range(3):
        torch.save({}, tmp_path / "checkpoint-10" / f"rng_state_{rank}.pth")
        found = last_complete_checkpoint(tmp_path, num_ranks=3)
        assert found == (str(tmp_path / "checkpoint-10") if rank == 2 else None)
    (tmp_path / "checkpoint-10").rename(tmp_path / "checkpoint-101")
    assert incomplete_reason(tmp_path / "checkpoint-101") == "its state is of step 10"
