"""Runs of the recipes in processes of their own: to the end, killed at a random moment, or on a disk without room."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from launching import environment

from mr_reward import MultiResponseRewardModel
from mr_reward.training.saving import last_complete_checkpoint
from mr_reward.worlds import tiny


def policy_world(folder: Path, num_prompts: int) -> Path:
    """The folder, with a policy, a reward model and prompts in it."""
    for name, seed in (("policy", 0), ("backbone", 1)):
        tiny.build_llama(seed).save_pretrained(folder / name)
        tiny.build_tokenizer().save_pretrained(folder / name)
    MultiResponseRewardModel.from_backbone(folder / "backbone").save_pretrained(folder / "rm")
    rows = [{"prompt": [{"role": "user", "content": f"Say {word}"}]} for word in range(num_prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe_file(output: Path, config: dict[str, Any]) -> str:
    """The YAML file of a run, beside its output folder."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return str(path)


def log_of(output: Path) -> Path:
    """What a run printed, beside its output folder."""
    return output.with_suffix(".log")


def run_to_the_end(arguments: Sequence[str], log: Path, *, timeout: float = 300, **variables: str) -> str:
    """Run a command that has to succeed; what its log holds."""
    with log.open("a") as stream:
        env = {**environment(), **variables}
        result = subprocess.run(arguments, timeout=timeout, stdout=stream, stderr=stream, env=env)
    assert result.returncode == 0, log.read_text()[-6000:]
    return log.read_text()


def kill_twice(arguments: Sequence[str], output: Path, how: signal.Signals, seed: int, steps: Sequence[int]) -> None:
    """Start a run and kill it some of `steps` later, between two saves or in the middle of one; twice."""
    rng = random.Random(seed)
    kills = 0
    for _ in range(2):
        last = last_complete_checkpoint(output) if output.exists() else None
        before = int(last.split("-")[-1]) if last else 0
        with log_of(output).open("a") as log:
            process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment())
        wait_for_step(output, before + rng.choice(steps), process)
        time.sleep(rng.uniform(0.0, 0.6))
        if process.poll() is None:
            process.send_signal(how)
            kills += 1
        process.wait()
    assert kills, "no run lived long enough to be killed: the machine is too fast for this test"


def run_without_room(arguments: Sequence[str], output: Path, step: int, num_bytes: int) -> int:
    """Start a run that can write only so many bytes a file from a step on, and fails of it; its last whole step."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    with log_of(output).open("a") as log:  # another process writes the log, which has room
        logger = subprocess.Popen(["cat"], stdin=process.stdout, stdout=log)
    assert process.stdout is not None
    process.stdout.close()
    wait_for_step(output, step, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    assert process.wait(240) != 0 and logger.wait(60) == 0
    text = log_of(output).read_text()
    # Of safetensors and Python, or ours about torch's: it depends on which file was the first without room.
    assert "File too large" in text or "is the disk full?" in text, text[-3000:]
    last = last_complete_checkpoint(output)
    assert last is not None
    return int(last.split("-")[-1])


def wait_for_step(output: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Wait for the checkpoint of a step, or a later one; a run that ends before it has to have succeeded."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if any(int(path.name.split("-")[-1]) >= step for path in output.glob("checkpoint-*")):
            return
        time.sleep(0.02)
    assert process.poll() in (None, 0), log_of(output).read_text()[-3000:]
