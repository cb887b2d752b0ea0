"""The benchmarks run; their numbers are nobody's promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mr_reward import MultiResponseRewardModel
from mr_reward.data import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident set from /proc")
def test_training_step_keeps_less_than_the_full_language_model() -> None:
    """With a large vocabulary the logits alone are more than everything else."""
    sizes = {"width": 64, "layers": 2, "vocabulary": 40_000, "rows": 2, "prompt_tokens": 256, "repeats": 1, "steps": 1}
    command = [sys.executable, str(BENCHMARKS / "training_step.py"), "--device", "cpu"]
    for name, value in sizes.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500, env=environment)
    assert "peak memory" in run.stdout
    results = json.loads(run.stdout.splitlines()[-1])
    for checkpointing in ("off", "on"):
        assert results[checkpointing]["memory_full_over_ours"] > 1.5
        assert results[checkpointing]["speed_ours_over_full"] > 1.0


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
def test_policy_comparison_runs_resumes_and_sums_up(tmp_path: Path) -> None:
    """Three judges from one start; what is finished is not run again."""
    sizes = {
        "num_digits": 1,
        "sft_steps": 6,
        "start_step": 3,
        "rm_groups": 64,
        "grpo_steps": 2,
        "eval_steps": 1,
        "eval_prompts": 16,
    }
    sizes |= {"test_samples": 16, "num_generations": 4}
    command = [sys.executable, str(BENCHMARKS / "policy_comparison.py"), "--output", str(tmp_path)]
    command += ["--seeds", "3", "--questions", "read", "even"]
    for name, value in sizes.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    documents = []
    for _ in range(2):
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500, env=environment)
        documents.append(json.loads(run.stdout.splitlines()[-1]))
    assert documents[0] == documents[1], "seconds and all come from the first run"
    (record,) = documents[0]["seeds"]
    assert set(record["judges"]) == {"multi-response", "single-response", "truth"}
    for judge in record["judges"].values():
        assert [point["step"] for point in judge["validation"]] == [0, 1, 2]
    # One start for all: before the first step the policies are the same, so are the right answers of their rollouts.
    assert len({judge["validation"][0]["truth"] for judge in record["judges"].values()}) == 1
    assert (tmp_path / "policy_comparison.png").stat().st_size > 10_000
