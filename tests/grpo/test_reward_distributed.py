"""The reward on 2 and 3 real gloo processes gives what a single process gives, and fails on all of them at once."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reward_worker

import mr_reward.grpo.reward as reward_module
from mr_reward.grpo.reward import MultiResponseReward
from mr_reward.grpo.telemetry import COLUMN_KEYS, METRIC_KEYS
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.worlds.tiny import build_qwen3_vl, build_qwen3_vl_processor

pytestmark = pytest.mark.distributed

WORKER = Path(reward_worker.__file__)
Launch = Callable[..., list[dict[str, Any] | None]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Start the worker on `world_size` processes; their records, None for a process that wrote none."""

    def run(scenario: str, world_size: int, model: str | None = None) -> list[dict[str, Any] | None]:
        arguments = [sys.executable, str(WORKER), scenario, str(tmp_path / "rendezvous"), str(tmp_path)]
        processes = [
            subprocess.Popen(
                arguments + ([model] if model else []),
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                },
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [process.communicate(timeout=240)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        records = []
        for rank, process in enumerate(processes):
            if scenario not in ("die", "kill"):
                assert process.returncode == 0, outputs[rank]
            path = tmp_path / f"rank{rank}.json"
            records.append(json.loads(path.read_text()) if path.exists() else None)
        return records

    return run


@pytest.mark.parametrize("world_size", [2, 3])
def test_rewards_equal_the_single_process_ones(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(reward_module, "open_scorer", lambda model, **options: reward_worker.WholeGroupScorer())
    _check_against_a_single_process(launch("equal", world_size), world_size, "fake")


@pytest.mark.parametrize(
    ("world_size", "rows", "size"),
    [
        pytest.param(4, 4, 16, id="one group on four ranks, three own none"),
        pytest.param(8, 4, 16, id="two groups on eight ranks", marks=pytest.mark.slow),
        pytest.param(3, 2, 3, id="groups of three straddle ranks of two"),
    ],
)
def test_groups_wider_than_a_rank(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, world_size: int, rows: int, size: int
) -> None:
    monkeypatch.setattr(reward_module, "open_scorer", lambda model, **options: reward_worker.WholeGroupScorer())
    results = [record[f"{rows}x{size}"] for record in launch(f"only {rows}x{size}", world_size) if record]
    prompts, completions = reward_worker.make_rows(rows * world_size, size)
    expected = reward_worker.call(MultiResponseReward("fake", size, device="cpu"), prompts, completions)
    assert [len(result["rewards"]) for result in results] == [rows] * world_size
    assert sum((result["rewards"] for result in results), []) == pytest.approx(expected["rewards"], abs=1e-6)


@pytest.mark.parametrize("layout", ["causal", "set"])
def test_a_real_model_gives_the_single_process_rewards(launch: Launch, tmp_path: Path, layout: str) -> None:
    folder = str(tmp_path / "reward-model")
    MultiResponseRewardModel.from_backbone(
        build_qwen3_vl(), layout=layout, processor=build_qwen3_vl_processor()
    ).save_pretrained(folder)
    _check_against_a_single_process(launch("equal", 3, folder), 3, folder)


def _check_against_a_single_process(records: list[dict[str, Any] | None], world_size: int, model: str) -> None:
    straddling = 0
    for rows in reward_worker.ROWS_PER_RANK:
        for size in reward_worker.GROUP_SIZES:
            results = [record[f"{rows}x{size}"] for record in records]
            if rows * world_size % size:
                for result in results:
                    assert result["error"] == "GroupAssemblyError"
                    assert f"got {rows * world_size} rows" in result["message"]
                continue
            prompts, completions = reward_worker.make_rows(rows * world_size, size)
            column = reward_worker.references(rows * world_size, size)
            expected = reward_worker.call(
                MultiResponseReward(model, size, device="cpu"),
                prompts,
                completions,
                reference_response=column,
                truth=reward_worker.third,
            )
            assert sum((result["truth"] for result in results), []) == expected["truth"]
            assert len(set(expected["rewards"])) >= size - 1  # not all equal; two rows of a group are duplicates
            assert sum((result["rewards"] for result in results), []) == pytest.approx(expected["rewards"], abs=1e-6)
            for column in COLUMN_KEYS:
                gathered = sum((result["extra"][column] for result in results), [])
                assert gathered == pytest.approx(expected["extra"][column], abs=1e-6)
            _check_metrics([result["metrics"] for result in results], expected["metrics"])
            straddling += results[0]["metrics"]["mr_reward/straddling_groups"] > 0
    assert straddling >= 2


def _check_metrics(per_rank: list[dict[str, float]], single: dict[str, float]) -> None:
    keys = (*METRIC_KEYS, "mr_reward/win_rate", "mr_reward/right_above_wrong")
    assert all(tuple(metrics) == keys for metrics in per_rank) and 0 <= per_rank[0]["mr_reward/win_rate"] <= 1
    for key in keys:
        values = [metrics[key] for metrics in per_rank]
        assert all(value == values[0] or math.isnan(value) for value in values), key
        if key not in ("mr_reward/straddling_groups", "mr_reward/ms_per_group"):
            assert values[0] == pytest.approx(single[key], abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_failing_rank_stops_all_and_names_rank_and_group(launch: Launch, world_size: int) -> None:
    records = launch("fail", world_size)
    for rank, record in enumerate(records):
        broken = record["4x4"]
        assert broken["error"] == ("ZeroDivisionError" if rank == 1 else "PeerRankError")
        assert "rank 1 at step 13 group 1: ZeroDivisionError: the scorer broke" in broken["message"]
        assert broken["metrics"] == {} and broken["extra"] == {}

        last = world_size - 1
        unreadable = record["unreadable"]
        assert unreadable["error"] == ("GroupError" if rank == last else "PeerRankError")
        assert f"rank {last}: GroupError: rollout 0" in unreadable["message"]

        assert max(broken["seconds"], unreadable["seconds"]) < 30
        assert len(record["recovered"]["rewards"]) == 4


def test_different_weights_stop_all_ranks_in_the_first_call(launch: Launch) -> None:
    for record in launch("weights", 2):
        assert record["first"]["error"] == "CheckpointError"
        assert "rank 0: " in record["first"]["message"] and "rank 1: " in record["first"]["message"]


@pytest.mark.parametrize("how", ["die", "kill"])
def test_a_dying_process_is_noticed(launch: Launch, how: str) -> None:
    """One that leaves without a word, and one that gets SIGKILL, as the system does when memory runs out."""
    records = launch(how, 2)
    assert records[1] is None
    assert records[0]["4x4"]["error"] == "PeerRankError"
    assert "lost one" in records[0]["4x4"]["message"]
    assert records[0]["4x4"]["seconds"] < 30


def test_a_rank_out_of_memory_stops_all_and_names_it(launch: Launch) -> None:
    records = launch("memory", 3)
    for rank, record in enumerate(records):
        assert record["4x4"]["error"] == ("OutOfMemoryError" if rank == 1 else "PeerRankError")
        assert "rank 1 at step 13 group 1: OutOfMemoryError: CUDA out of memory" in record["4x4"]["message"]
        assert "out of memory; lower it" in record["4x4"]["message"]
        assert len(record["recovered"]["rewards"]) == 4, "the next call works"


@pytest.mark.parametrize(("scenario", "culprit"), [("stall", 1), ("stall the first", 0)])
def test_a_stalled_rank_is_named_and_all_stop(launch: Launch, scenario: str, culprit: int) -> None:
    """Within the deadline, long before it would have come back; the stalled one stops when it does."""
    records = launch(scenario, 3)
    messages = [record["4x4"]["message"] for record in records]
    assert [record["4x4"]["error"] for record in records] == ["PeerRankError"] * 3
    for rank, record in enumerate(records):
        if rank != culprit:
            assert record["4x4"]["seconds"] < reward_worker.STALL_SECONDS - 3
            assert f"did not come within 0:00:0{reward_worker.DEADLINE_SECONDS:.0f}" in messages[rank]
    # Rank 0 hears all the others; the others hear rank 0.
    witness = messages[2 if culprit == 0 else 0]
    assert re.search(rf"[Rr]anks? \[?{culprit}\b", witness.split("The exchange said:")[1]), witness
