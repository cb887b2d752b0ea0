"""A short soak, through the same script as the long one: memory flat, no handle or thread left, scores replayed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soak

SCRIPT = Path(soak.__file__)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_short_soak(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--calls", "150", "--requests", "800", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = json.loads((tmp_path / "soak.json").read_text())
    assert results["reward calls"]["calls"] == 150 and results["reward calls"]["replayed"] >= 300
    assert results["requests"]["requests"] == 800
    assert (tmp_path / "soak.png").stat().st_size > 10_000
    for result in results.values():
        assert result["largest_difference"] <= soak.SAME
        for name, samples in result["processes"].items():
            found = soak.summary(samples)
            # A leak of one image (a few kB) a call or request would be more.
            assert found["rss"][2] - found["rss"][0] < 15, f"{name}: {found}"
            assert found["handles"][2] <= found["handles"][0] + 2, f"{name}: {found}"
            assert found["threads"][2] <= found["threads"][0] + 2, f"{name}: {found}"
