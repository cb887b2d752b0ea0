"""The parts of `mr-reward doctor`, each against what it looks at."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, LAYOUTS, reward_model
from transformers.utils import is_flash_attn_2_available

import mr_reward.doctor.examine as examine
import mr_reward.doctor.reward_model as reward_model_module
from mr_reward import MultiResponseRewardConfig, MultiResponseRewardModel, ResponseGroup
from mr_reward.doctor.examine import group_map
from mr_reward.doctor.findings import Finding
from mr_reward.doctor.machine import (
    check_devices,
    check_needed,
    check_output_folder,
    check_versions,
    device_memory,
)
from mr_reward.doctor.reward_model import check_weights, score_tiny, score_whole
from mr_reward.model.configuration import RewardMemory
from mr_reward.model.scorer import GroupScorer
from mr_reward.runs.launch import Launch, read_environment


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None)
def test_the_map_holds_every_rollout_once_and_every_group_has_one_scorer(ranks: int, size: int, groups: int) -> None:
    rows = groups * size
    if rows % ranks or rows // ranks > 6 * size:
        return
    held: dict[int, list[int]] = {}
    scorers: dict[int, int] = {}
    for rank, line in enumerate(group_map(ranks, rows // ranks, size)[1]):
        found = re.fullmatch(rf"rank {rank}: groups? (.*), scores (.*)", line)
        assert found is not None, line
        mine = set()
        for index, slots in re.findall(r"(\d+) \((all|\d+-\d+)\)", found[1]):
            first, last = (1, size) if slots == "all" else map(int, slots.split("-"))
            held.setdefault(int(index), []).extend(range(first, last + 1))
            mine.add(int(index))
        for index in re.findall(r"\d+", found[2]):
            assert int(index) in mine and scorers.setdefault(int(index), rank) == rank
    assert held == {index: list(range(1, size + 1)) for index in range(groups)}
    assert sorted(scorers) == list(range(groups))


def test_a_long_map_is_cut_and_says_so() -> None:
    lines = group_map(64, 128, 8)[1]
    assert len(lines) == 9 and lines[4] == "... 56 more ranks ..."
    assert lines[0] == "rank 0: groups 0 (all) 1 (all) 2 (all) 3 (all) 4 (all) ... 15 (all), scores 0 1 2 3 4 ... 15"


def found(findings: object) -> list[tuple[str, str]]:
    return [(finding.level, finding.what) for finding in findings]  # type: ignore[attr-defined]


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(check_versions()) == [("green", "versions"), ("green", "extras")]
    wanted = ["torch>=99", "no-such-package>=1", 'numpy>=99; extra == "x"', 'matplotlib<1; extra == "eval"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    versions, extras = check_versions()
    assert versions.level == "red" and extras.level == "yellow"
    assert f"torch {torch.__version__.split('+')[0]}" in versions.text and "expected >=99" in versions.text
    assert "no-such-package is missing, expected >=1" in versions.text and "numpy" not in versions.text
    assert "expected <1" in extras.text


def test_needed_packages() -> None:
    needed = {"json": "a", "no_such_module": "report_to: it"}
    (here,) = check_needed(needed, here=True)
    (elsewhere,) = check_needed(needed, here=False)
    assert (here.level, elsewhere.level) == ("red", "yellow")
    assert "report_to: it needs no_such_module, which is not installed; pip install 'no_such_module'" in here.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_devices() -> None:
    assert [check_devices(use_cpu=use_cpu, bf16=True).level for use_cpu in (True, None, False)] == [
        "green",
        "green",
        "yellow",
    ]


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of 80 and 40 GB, which no machine of the tests has: what torch says of them is made up."""
    sizes = [80_000_000_000, 40_000_000_000]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=f"GPU {i}", total_memory=sizes[i])
    )
    levels = [check_devices(use_cpu=False, bf16=False, num_local_processes=number).level for number in (1, 2, 3)]
    assert levels == ["green", "green", "yellow"]
    assert check_devices(use_cpu=False, bf16=True).level == "red"
    assert [device_memory(use_cpu=False, num_local_processes=number) for number in (1, 2, 3)] == [
        sum(sizes),
        sizes[1],
        None,
    ]


def test_memory_of_the_host_is_shared_by_its_processes() -> None:
    whole = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    shares = [device_memory(use_cpu=True, num_local_processes=number) or 0 for number in (1, 4)]
    assert shares[0] == pytest.approx(whole, rel=0.02) and shares[1] == shares[0] // 4


def test_output_folder(tmp_path: Path) -> None:
    assert found(check_output_folder(tmp_path / "new" / "run", resume=True))[0] == ("green", "output folder")
    (tmp_path / "file").write_text("")
    assert found(check_output_folder(tmp_path / "file" / "run", resume=False)) == [("red", "output folder")]
    run = tmp_path / "run"
    for step in (5, 10):
        (run / f"checkpoint-{step}").mkdir(parents=True)
    state = run / "checkpoint-5" / "trainer_state.json"
    state.write_text(json.dumps({"global_step": 5}))
    (run / "checkpoint-5" / "rng_state.pth").write_bytes(b"")
    levels = {resume: next(iter(check_output_folder(run, resume=resume))) for resume in (True, False)}
    assert levels[False].level == "yellow" and "checkpoint-10 of an earlier run" in levels[False].text
    assert levels[True].level == "yellow" and "checkpoint-10, which is not whole" in levels[True].text
    torch.save({}, run / "checkpoint-5" / "rng_state.pth")
    whole = next(iter(check_output_folder(run, resume=True)))
    assert (whole.level, whole.text) == ("green", f"{run}: resumes from checkpoint-5")
    (alone, *_) = check_output_folder(run, resume=True, num_processes=2)
    assert alone.level == "yellow" and "from the beginning" in alone.text, "each process has a state"
    for rank in range(2):
        torch.save({}, run / "checkpoint-5" / f"rng_state_{rank}.pth")
    (both, *_) = check_output_folder(run, resume=True, num_processes=2)
    assert (both.level, both.text) == ("green", f"{run}: resumes from checkpoint-5")
    for step, level in ((5, "green"), (10, "red"), (15, "red")):
        (named,) = check_output_folder(tmp_path / "other", resume=str(run / f"checkpoint-{step}"))
        assert named.level == level and f"checkpoint-{step}" in named.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    reward_model("qwen3_vl", "set").save_pretrained(folder)
    return folder


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 1000)


def _without_head(path: Path) -> None:
    save_file({name: value for name, value in load_file(path).items() if not name.startswith("head.")}, path)


def _with_more(path: Path) -> None:
    save_file({**load_file(path), "lm_head.weight": torch.zeros(2)}, path)


def _other_shape(path: Path) -> None:
    save_file({**load_file(path), "readouts.summary": torch.zeros(3)}, path)


def _of_another_model(path: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)


def on_meta(folder: Path) -> MultiResponseRewardModel:
    return MultiResponseRewardModel.without_weights(MultiResponseRewardConfig.from_pretrained(folder))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, None),
        (_cut, "model.safetensors is cut off or no safetensors file"),
        (_garbage, "model.safetensors is cut off or no safetensors file"),
        (Path.unlink, "model.safetensors is missing"),
        (_without_head, r"missing weights \['head.dense.bias', 'head.dense.weight', 'head.out.weight'\]"),
        (_with_more, r"unexpected weights \['lm_head.weight'\]"),
        (_other_shape, r"weights of another shape \['readouts.summary'\]"),
        (_of_another_model, "model.safetensors is missing or not the file that was saved"),
    ],
)
def test_weights(spoil: Callable[[Path], None] | None, message: str | None, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "rm"
    shutil.copytree(folder, copy)
    if spoil is not None:
        spoil(copy / "model.safetensors")
    finding = check_weights(copy, on_meta(copy))
    assert finding.level == ("green" if message is None else "red")
    assert message is None or re.search(message, finding.text), finding.text


def test_weights_in_shards(folder: Path, tmp_path: Path) -> None:
    model = reward_model("qwen3_vl", "set")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    model = on_meta(tmp_path)
    assert check_weights(tmp_path, model).level == "green"
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert f"{shards[1]} is missing" in check_weights(tmp_path, model).text
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    (tmp_path.parent / "elsewhere.safetensors").write_bytes(b"")
    assert "looks for weights in '../elsewhere.safetensors'" in check_weights(tmp_path, model).text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_scores(name: str, layout: str, tmp_path: Path) -> None:
    """Green for what works; the global random state stays."""
    model = reward_model(name, layout)
    model.save_pretrained(tmp_path)
    config = MultiResponseRewardConfig.from_pretrained(tmp_path)
    state = torch.get_rng_state()
    finding = score_tiny(str(tmp_path), config, None, ())
    assert finding.level == "green", finding.text
    assert torch.equal(state, torch.get_rng_state())
    assert config.to_dict() == MultiResponseRewardConfig.from_pretrained(tmp_path).to_dict(), "made tiny as a copy"
    if layout == "causal" and not is_flash_attn_2_available():
        missing = score_tiny(str(tmp_path), config, "flash_attention_2", ())
        assert missing.level != "green" and "attention flash_attention_2 cannot run here" in missing.text


def planned(**args: object) -> Any:
    """As much of a planned run as a single check asks for."""
    options = {
        "num_generations": 4,
        "num_generations_eval": None,
        "max_completion_length": 100,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": False,
        "vllm_gpu_memory_utilization": 0.25,
        "vllm_max_model_length": None,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 6,
        "steps_per_generation": 1,
        "eval_strategy": SimpleNamespace(value="steps"),
        **args,
    }
    return SimpleNamespace(
        args=SimpleNamespace(**options),
        recipe=SimpleNamespace(reward_placement="resident", reward_over_length="drop_group", eval_dataset="x"),
        launch=Launch(num_processes=2),
        use_cpu=False,
        prompts=[],
        policy="policy",
    )


@pytest.mark.parametrize(
    ("weights", "activations", "args", "level", "words"),
    [
        # 100 of a device are 75 beside a vLLM that has a quarter; nine tenths of them may be taken.
        (75, 0, {}, "yellow", "too tight"),
        (76, 0, {}, "red", "does not fit"),
        (40, 27, {}, "green", "of 0.0 GB beside vLLM; the policy comes on top"),
        (40, 28, {}, "yellow", "too tight"),
        (40, 99, {}, "yellow", "too tight"),  # what a forward pass takes can be made smaller, the weights cannot
        (40, 50, {"vllm_enable_sleep_mode": True}, "green", "of 0.0 GB; the policy"),
        (40, 51, {"vllm_enable_sleep_mode": True}, "yellow", "too tight"),
        (40, 50, {"use_vllm": False}, "green", "of 0.0 GB; the policy"),
        (40, 50, {"vllm_mode": "server"}, "green", "of 0.0 GB; the policy"),
        (101, 0, {"use_vllm": False}, "red", "does not fit"),
    ],
)
def test_memory_at_its_limits(
    weights: int, activations: int, args: dict[str, Any], level: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_model_module, "device_memory", lambda **options: 100)
    found = reward_model_module._check_memory(planned(**args), RewardMemory(weights=weights, activations=activations))
    assert (found.level, words in found.text) == (level, True), found


@pytest.mark.parametrize(("limit", "level"), [(99, "red"), (100, "red"), (101, "green"), (None, "green")])
def test_a_prompt_needs_room_beside_the_completion(limit: int | None, level: str) -> None:
    (found,) = examine._check_vllm(planned(vllm_max_model_length=limit))
    assert found.level == level


@pytest.mark.parametrize(("train", "evaluation", "longest"), [(4, None, 4), (4, 2, 4), (4, 7, 7)])
def test_the_row_is_that_of_the_larger_group(train: int, evaluation: int | None, longest: int, folder: Path) -> None:
    scorer = GroupScorer(reward_model("qwen3_vl", "set"))
    run = planned(num_generations=train, num_generations_eval=evaluation)
    found = reward_model_module._check_row(run, scorer, "cpu", torch.float32)
    assert found.level == "green" and f"an unknown prompt + {longest} completions of 100 = " in found.text


def test_an_evaluation_batch_is_that_of_all_processes() -> None:
    texts = {found.what: found.text for found in examine._check_groups(planned(num_generations_eval=3))}
    assert texts["evaluation"] == "batches of 12 rows, groups of 3"
    assert texts["groups"].startswith("2 processes x batch 8 x 1 steps per generation = 16 rollouts: 4 groups of 4")


@pytest.mark.parametrize(("ranks", "count"), [(8, 8), (9, 9), (10, 9)])
def test_the_map_is_cut_when_something_is_left_out(ranks: int, count: int) -> None:
    lines = group_map(ranks, 4, 4)[1]
    assert len(lines) == count and any("... 2 more ranks" in line for line in lines) is (count < ranks)
    whole, more = (group_map(1, 4 * number, 4)[1][0] for number in (6, 7))
    assert "..." not in whole and whole.startswith("rank 0: groups 0 (all) 1 (all) 2 (all) 3 (all) 4 (all) 5 (all), ")
    assert "4 (all) ... 6 (all), scores 0 1 2 3 4 ... 6" in more


def test_a_recipe_is_asked_as_it_would_be_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number of processes and ZeRO stage of the accelerate file, unless given; the scorer's options with --score."""
    asked: list[Any] = []
    monkeypatch.setattr(examine, "_check_run", lambda run: asked.append(run.launch) or [])
    monkeypatch.setattr(examine, "score_whole", lambda *given, **options: asked.append((given, options)))
    launch = tmp_path / "accelerate.yaml"
    launch.write_text("num_processes: 8\nnum_machines: 2\ndeepspeed_config: {zero_stage: 3}\n")
    options = {"reward_model": "rm", "reward_max_tokens": 77, "reward_over_length": "error", "reward_num_orders": 3}
    options |= {"reward_dtype": "bfloat16", "reward_attn_implementation": "eager", "model_name_or_path": "policy"}
    options |= {"output_dir": str(tmp_path), "num_generations": 4, "per_device_train_batch_size": 4, "use_cpu": True}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    examine.examine_recipe(arguments, accelerate_config=launch)
    examine.examine_recipe(arguments, accelerate_config=launch, num_processes=4)
    examine.examine_recipe(arguments, num_processes=4, score=True)
    given = {"max_tokens_per_batch": 77, "over_length": "error", "num_orders": 3}
    assert asked == [
        Launch(num_processes=8, num_machines=2, zero_stage=3),
        Launch(num_processes=4, num_machines=2, zero_stage=3),
        Launch(num_processes=4),
        (("rm", []), {**given, "dtype": torch.bfloat16, "attn_implementation": "eager"}),
    ]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}, Launch(num_processes=6, num_machines=3)),
        ({"WORLD_SIZE": "4"}, Launch(num_processes=4)),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, Launch(zero_stage=2)),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, Launch(zero_stage=3)),
        ({"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, Launch()),
    ],
)
def test_the_launch_of_this_process(
    environment: dict[str, str], expected: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = read_environment()
    assert found == expected and found.num_local_processes == expected.num_processes // expected.num_machines


def test_scores_with_the_weights(folder: Path) -> None:
    scorer = GroupScorer.from_pretrained(folder)
    finding = score_whole(scorer.model, ())
    expected = scorer.score([ResponseGroup(prompt="Is it?", responses=["Yes.", "No.", "Yes."])])[0] or []
    assert finding.level == "green" and ", ".join(f"{score:+.3f}" for score in expected) in finding.text
    with torch.no_grad():
        scorer.model.head.out.weight.fill_(float("nan"))
    broken: Finding = score_whole(scorer.model, ())
    assert broken.level == "red" and "are not finite" in broken.text
