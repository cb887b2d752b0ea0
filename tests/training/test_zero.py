"""Training on two CPU processes, under DeepSpeed ZeRO and plain DDP, equals training in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from killed_runs import log_of, recipe_file, run_to_the_end
from launching import DEEPSPEED_CONFIGS as CONFIGS
from launching import environment, needs_deepspeed, two_processes
from safetensors.torch import load_file
from test_trainer import arguments, easy_groups
from torch import nn

from mr_reward import GroupScorer
from mr_reward.checkpoint.zero3 import match_partitioned_dtype
from mr_reward.errors import ConfigurationError
from mr_reward.training.saving import last_complete_checkpoint
from mr_reward.worlds import tiny

ROOT = Path(__file__).parents[2]
STEPS = 8
# Sums over two processes are taken in another order. Seen: 2e-6 in the full runs, 6e-8 with LoRA.
LOSS_TOLERANCE = 1e-4
# Seen: 6e-6 in the full runs, 1e-5 with LoRA, between scores of up to 9.
SCORE_TOLERANCE = 1e-3

SLOW = (pytest.mark.slow, pytest.mark.distributed)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone and a training file."""
    folder = tmp_path_factory.mktemp("zero")
    # Wide enough that ZeRO-3 partitions the value head: it leaves weights of less than 100,000 numbers whole.
    tiny.build_llama(0, hidden_size=352, num_layers=1).save_pretrained(folder / "backbone")
    tiny.build_tokenizer().save_pretrained(folder / "backbone")
    rows = [
        {"prompt": group.prompt, "responses": list(group.responses), "rankings": group.rankings}
        for group in easy_groups(64, 0)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(world: Path, output: Path, launcher: list[str], **changes: Any) -> Path:
    """Run the recipe; dropout is off, it would be drawn differently on two ranks."""
    config = {
        "model_name_or_path": str(world / "backbone"),
        "output_dir": str(output),
        "train_file": [str(world / "train.jsonl")],
        "layout": "set",
        "max_tokens": 512,
        "max_steps": STEPS,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "cosine",
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "disable_tqdm": True,
        "resume_from_checkpoint": True,
        **changes,
    }
    script = str(ROOT / "grpo_recipes" / "pretrain_rm.py")
    command = [sys.executable, *launcher, script, "--config", recipe_file(output, config)]
    run_to_the_end(command, log_of(output), timeout=500)
    return output


LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "learning_rate": 3.0e-3}
DDP = ("--multi_gpu", "--num_processes", "2")
FAULTY_RUN = {"per_device_train_batch_size": 4, "use_cpu": True, "save_steps": 2}
ZERO_3 = ("--config_file", str(CONFIGS / "zero3_cpu.yaml"))


@pytest.fixture(scope="module")
def single(world: Path) -> dict[str, Path]:
    """The same training in one process, with twice the batch."""
    options = {"per_device_train_batch_size": 8, "use_cpu": True}
    return {
        "full": train(world, world / "single-full", [], **options),
        "lora": train(world, world / "single-lora", [], **options, **LORA),
    }


def losses(output: Path) -> list[float]:
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def scores(folder: Path) -> list[list[float] | None]:
    return GroupScorer.from_pretrained(folder, device="cpu").score(easy_groups(16, 9))


def assert_same_model(output: Path, expected: Path) -> None:
    found = losses(output)
    assert len(found) == STEPS
    assert found == pytest.approx(losses(expected), abs=LOSS_TOLERANCE)
    assert found[-1] < found[0] - 0.1, "nothing was learned, so equal curves would say little"
    torch.testing.assert_close(
        torch.tensor(scores(output)), torch.tensor(scores(expected)), atol=SCORE_TOLERANCE, rtol=0
    )


@pytest.fixture(scope="module")
def zero3_lora(world: Path) -> Path:
    return train(world, world / "zero3-lora", two_processes(*ZERO_3), per_device_train_batch_size=4, **LORA)


class TestTwoProcesses:
    pytestmark = [*SLOW, needs_deepspeed]

    @pytest.mark.parametrize("stage", [2, 3])
    def test_full(self, world: Path, single: dict[str, Path], stage: int) -> None:
        launcher = two_processes("--config_file", str(CONFIGS / f"zero{stage}_cpu.yaml"))
        output = train(world, world / f"zero{stage}", launcher, per_device_train_batch_size=4)
        assert_same_model(output, single["full"])
        # A checkpoint's weights are whole too, and the folder loads as it is.
        assert scores(output / f"checkpoint-{STEPS}") == scores(output)

    def test_zero3_lora(self, single: dict[str, Path], zero3_lora: Path) -> None:
        assert_same_model(zero3_lora, single["lora"])
        checkpoint = f"checkpoint-{STEPS}"
        found, expected = (
            load_file(folder / checkpoint / "adapter_model.safetensors") for folder in (zero3_lora, single["lora"])
        )
        assert found.keys() == expected.keys()
        assert any("lora_B" in name for name in found) and any("readouts" in name for name in found)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-3, rtol=0, msg=name)
        names = ("config.json", "adapter_config.json")
        assert all((zero3_lora / checkpoint / name).is_file() for name in names)

    def test_zero3_lora_resumes(self, world: Path, zero3_lora: Path) -> None:
        """From the checkpoint in the middle, as if the run had never stopped; evaluation in one rank works too."""
        output = world / "zero3-resumed"
        shutil.copytree(zero3_lora / f"checkpoint-{STEPS // 2}", output / f"checkpoint-{STEPS // 2}")
        options = {**LORA, "per_device_train_batch_size": 4, "eval_file": [str(world / "train.jsonl")]}
        train(world, output, two_processes(*ZERO_3), **options)
        assert "resuming from" in output.with_suffix(".log").read_text()
        assert losses(output) == pytest.approx(losses(zero3_lora), abs=1e-6)
        found, expected = (load_file(folder / "model.safetensors") for folder in (output, zero3_lora))
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0, msg=name)
        assert json.loads((output / "eval_metrics.json").read_text())["train"]["num_groups"] == 64

    def test_ranks_train_one_model_whatever_their_seeds(self, world: Path, tmp_path: Path) -> None:
        """Head and readout vectors are drawn on each rank before ZeRO-3 takes them; see `zero_worker.py`."""
        worker = [str(Path(__file__).with_name("zero_worker.py")), str(world / "backbone"), str(tmp_path / "out")]
        paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "training"), str(ROOT)])
        command = [sys.executable, *two_processes(*ZERO_3), *worker]
        result = subprocess.run(
            command, timeout=500, capture_output=True, text=True, env={**environment(), "PYTHONPATH": paths}
        )
        assert result.returncode == 0, result.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.distributed
def test_ddp(world: Path, single: dict[str, Path]) -> None:
    output = train(world, world / "ddp", two_processes(*DDP), per_device_train_batch_size=4, use_cpu=True)
    assert_same_model(output, single["full"])


@pytest.fixture(scope="module")
def uninterrupted(world: Path) -> Path:
    return train(world, world / "uninterrupted", two_processes(*DDP), **FAULTY_RUN)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("memory", "out of memory; step 5 has up to 4 groups of 512 tokens: lower per_device_train_batch_size"),
        ("kill", "Signal 9 (SIGKILL) received"),
        ("stall", "Timed out waiting"),
    ],
)
def test_a_rank_fails_in_the_middle_of_a_step(fault: str, told: str, world: Path, uninterrupted: Path) -> None:
    """All stop, the log says why, and the run goes on from its last checkpoint as if nothing had happened."""
    output = world / fault
    config = output.with_suffix(".yaml")
    config.write_text(uninterrupted.with_suffix(".yaml").read_text().replace(str(uninterrupted), str(output)))
    failed = faulty_run(config, fault, step=5)
    assert failed.returncode != 0 and told in failed.stderr, failed.stderr[-6000:]
    if fault != "stall":  # then the one that waited is the first to end
        assert "(local_rank: 1)" in failed.stderr, failed.stderr[-6000:]
    left = last_complete_checkpoint(output, 2)
    assert left is not None and Path(left).name == "checkpoint-4"
    resumed = faulty_run(config, fault, step=-1)
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    assert_same_model(output, uninterrupted)


def faulty_run(config: Path, fault: str, step: int) -> subprocess.CompletedProcess[str]:
    """The recipe in two processes, with a fault in that step of rank 1."""
    return subprocess.run(
        [
            sys.executable,
            *two_processes(*DDP),
            str(Path(__file__).with_name("faulty_recipe.py")),
            "--config",
            str(config),
        ],
        env={**environment(), "FAULT": fault, "FAULT_STEP": str(step)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload", "zero1_cpu", "zero2_cpu", "zero3_cpu"])
def test_configurations(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    stage = int(name[4])
    assert config["distributed_type"] == "DEEPSPEED"
    assert config["mixed_precision"] == ("no" if name.endswith("cpu") else "bf16")
    assert config["deepspeed_config"]["zero_stage"] == stage
    assert (config["deepspeed_config"].get("offload_param_device", "none") == "cpu") == name.endswith("offload")
    if stage == 3:
        assert config["deepspeed_config"]["zero3_save_16bit_model"], "checkpoints would hold no whole weights"


def test_use_cpu_under_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigurationError, match="use_cpu=true in a run that was launched with DeepSpeed"):
        arguments(tmp_path, use_cpu=True)


def test_new_weights_take_the_dtype_of_partitioned_ones() -> None:
    """DeepSpeed marks the weights it has partitioned by `ds_id`; nothing changes without any."""
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2, dtype=torch.bfloat16), "head": nn.Linear(2, 1)})
    match_partitioned_dtype(model)
    assert model["head"].weight.dtype == torch.float32
    for weight in model["backbone"].parameters():
        weight.ds_id = 0
    match_partitioned_dtype(model)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
