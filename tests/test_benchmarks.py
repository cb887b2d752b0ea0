"""The benchmarks run; their numbers are nobody's promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
