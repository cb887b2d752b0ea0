"""Where the weights are between reward calls: the same scores, and memory that comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import checkpoint_groups, reward_model

from mr_reward import GroupScorer, MultiResponseReward
from mr_reward.errors import ConfigurationError
from mr_reward.scorers.opening import OffloadedScorer

TESTS = Path(__file__).parents[1]


def test_offload_gives_the_same_scores_bit_for_bit() -> None:
    groups = checkpoint_groups("qwen3_vl")
    expected = GroupScorer(reward_model("qwen3_vl")).score_detailed(groups)
    offloaded = OffloadedScorer(GroupScorer(reward_model("qwen3_vl", fresh=True)), "cpu")
    for _ in range(2):
        assert offloaded.score_detailed(groups) == expected
    assert offloaded.score_detailed([]) == []


def test_weights_are_away_only_during_a_call_also_one_that_fails() -> None:
    model = reward_model("llama", fresh=True)
    offloaded = OffloadedScorer(GroupScorer(model), "cpu")
    weight = model.backbone.get_input_embeddings().weight
    home = weight.data_ptr()
    seen: list[int] = []

    def fail(*_: object) -> None:
        seen.append(weight.data_ptr())
        raise RuntimeError("no memory")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        offloaded.score_detailed(checkpoint_groups("llama"))
    handle.remove()
    assert seen != [home]
    assert weight.data_ptr() == home
    assert offloaded.score_detailed(checkpoint_groups("llama"))[0].scores is not None


def test_tied_weights_stay_tied() -> None:
    model = reward_model("llama", fresh=True)
    first, second = list(model.backbone.parameters())[:2]
    extra = torch.nn.Module()
    extra.register_parameter("tied", first)
    model.add_module("extra", extra)
    offloaded = OffloadedScorer(GroupScorer(model), "cpu")
    same: list[bool] = []
    model.register_forward_hook(lambda *_: same.append(extra.tied.data_ptr() == first.data_ptr() != second.data_ptr()))
    offloaded.score_detailed(checkpoint_groups("llama")[:1])
    assert same == [True]


def test_an_unknown_placement_is_refused_before_loading() -> None:
    with pytest.raises(ConfigurationError, match="placement is 'disk', expected one of resident, offload"):
        MultiResponseReward("/no/such/folder", 4, placement="disk")


def measure(placement: str, calls: int) -> dict:
    # glibc keeps freed blocks below this size for reuse; a weight's copy is larger and goes back at once.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": str(TESTS),
    }
    command = [sys.executable, str(TESTS / "scorers" / "memory_worker.py"), placement, str(calls)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_offload_returns_to_the_memory_before_after_each_of_50_calls() -> None:
    found = measure("offload", 50)
    # The first calls also make the buffers that torch and the allocator keep; what counts is the level after them.
    base = found["after"][9]
    assert found["weights"] > 90
    assert base < found["before"] + 0.25 * found["weights"], found["after"]
    assert max(found["after"]) < base + 0.05 * found["weights"], found["after"]
    assert min(found["inside"][1:]) > base + 0.7 * found["weights"], "a call has the weights twice on a CPU"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_resident_memory_is_flat_over_200_calls() -> None:
    found = measure("resident", 200)
    assert max(found["after"][20:]) < found["after"][19] + 0.05 * found["weights"], found["after"]
    assert max(found["inside"]) < found["before"] + 0.8 * found["weights"]
