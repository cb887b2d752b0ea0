"""`mr-reward doctor` as a user starts it: good recipes, broken ones, this machine."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from large_model import QWEN3_VL_4B, large_reward_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig

from mr_reward import MultiResponseRewardModel
from mr_reward.worlds import tiny

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "grpo_recipes" / "policy_tiny_handwriting_cpu.yaml"
ZERO3 = ROOT / "configs" / "deepspeed" / "zero3.yaml"
COMMAND = [sys.executable, "-c", "from mr_reward.cli import main; main()", "doctor"]
SECONDS = 20.0
MEMORY = 3e9  # bytes; the weights of the large reward model would be 8.9e9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policy and reward model where the recipe expects them, a large reward model, and what can be wrong."""
    folder = tmp_path_factory.mktemp("doctor")
    quickstart = folder / "outputs" / "quickstart"
    backbone = tiny.build_qwen3_vl(0, hidden_size=64, num_layers=2)
    backbone.save_pretrained(quickstart / "sft" / "checkpoint-50")
    tiny.build_qwen3_vl_processor().save_pretrained(quickstart / "sft" / "checkpoint-50")
    MultiResponseRewardModel.from_backbone(quickstart / "sft" / "checkpoint-50").save_pretrained(quickstart / "rm")
    large_reward_model(folder / "large", quickstart / "rm", Qwen3VLConfig(**QWEN3_VL_4B))
    for name in ("cut", "template", "headless"):
        shutil.copytree(quickstart / "rm", folder / name)
    os.truncate(folder / "cut" / "model.safetensors", 5000)
    weights = folder / "headless" / "model.safetensors"
    save_file({name: part for name, part in load_file(weights).items() if not name.startswith("head.")}, weights)
    with (folder / "template" / "chat_template.jinja").open("a") as template:
        template.write("!")
    (folder / "questions.jsonl").write_text('{"question": "?"}\n')
    block = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    (folder / "pictures.jsonl").write_text(json.dumps({"prompt": block, "images": ["gone.png"]}) + "\n")
    (folder / "damaged.png").write_bytes(b"no picture")
    (folder / "damaged.jsonl").write_text(json.dumps({"prompt": block, "images": ["damaged.png"]}) + "\n")
    (folder / "half.jsonl").write_text('{"prompt": "?"}\n{"prom')
    (folder / "file").write_text("")
    return folder


def doctor(folder: Path, *arguments: object) -> tuple[int, str, float]:
    started = time.perf_counter()
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "600"},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, time.perf_counter() - started


def test_a_good_recipe_is_green(folder: Path) -> None:
    code, shown, _ = doctor(folder, "--config", RECIPE, "--json")
    findings = json.loads(shown)
    assert code == 0 and {finding["level"] for finding in findings} == {"green"}, shown
    assert [finding["what"] for finding in findings if finding["what"] in ("who holds what", "tiny score")]


@pytest.mark.slow
def test_this_machine_and_a_reward_model(folder: Path) -> None:
    code, shown, _ = doctor(folder, "--model", "outputs/quickstart/rm", "--score")
    assert code == 0 and "the model itself" in shown and "red" not in shown, shown
    code, shown, _ = doctor(folder, "--model", "cut")
    assert code == 1 and "model.safetensors is cut off" in shown


# Options, what is red, and a part of what it says. All have the large reward model unless they name another.
BROKEN: list[tuple[list[Any], str, str]] = [
    (["--num_generations", 7], "configuration", "divisible by"),
    (["--reward_model", "./nowhere"], "reward model", "is no folder, and no hub within reach has it"),
    (["--reward_model", "cut"], "weights", "cut off or no safetensors file"),
    (["--reward_model", "template"], "reward model", "trained with template hash"),
    (["--reward_attn_implementation", "flash_attention_2"], "attention", "cannot express layout 'set'"),
    (["--max_completion_length", 500_000], "row of a group", "context of"),
    (["--reward_max_tokens", 10], "row of a group", "into a pass of 10 tokens"),
    (["--num_generatoins", 8], "configuration", "num_generatoins"),
    (["--dataset", "none.jsonl"], "configuration", "dataset none.jsonl is no file"),
    (["--dataset", "questions.jsonl"], "configuration", "columns ['question'], expected prompt among them"),
    (["--dataset", "pictures.jsonl"], "configuration", "image 'gone.png' does not exist"),
    (["--reward_model", "headless"], "weights", "missing weights ['head.dense.bias'"),
    (["--dataset", "damaged.jsonl"], "configuration", "image 'damaged.png' cannot be opened"),
    (["--dataset", "half.jsonl"], "configuration", "dataset half.jsonl, split train, cannot be read"),
    (["--model_name_or_path", "./nowhere"], "policy", "./nowhere is no folder"),
    (
        ["--accelerate_config", ZERO3, "--num_processes", 3, "--per_device_train_batch_size", 4],
        "configuration",
        "generation_batch_size (12) must be divisible by num_generations (8)",
    ),
    (["--eval_strategy", "epoch"], "evaluation", "eval_dataset is missing"),
    (["--output_dir", "file/run"], "output folder", "cannot be written"),
    (["--report_to", "swanlab"], "packages", "report_to: swanlab needs swanlab, which is not installed"),
    (["--reward_weights", 1, 1, 1], "reward_weights", "3 weights for 2 reward functions"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "what", "message"), BROKEN, ids=lambda value: str(value)[:30])
def test_a_broken_recipe_is_red_soon_and_loads_nothing(
    options: list[Any], what: str, message: str, folder: Path
) -> None:
    arguments = [] if "--reward_model" in options else ["--reward_model", "large"]
    code, shown, seconds = doctor(folder, "--config", RECIPE, "--json", *arguments, *options)
    red = [finding for finding in json.loads(shown) if finding["level"] == "red"]
    assert code == 1 and [finding["what"] for finding in red] == [what] and message in red[0]["text"], shown
    if seconds >= SECONDS:  # the machine may have been busy: some ten seconds alone
        _, _, seconds = doctor(folder, "--config", RECIPE, "--json", *arguments, *options)
    assert seconds < SECONDS
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < MEMORY, "weights were loaded"


def test_a_run_that_would_fail_does_not_start(folder: Path) -> None:
    """Also with a broken file of recipes; `skip_doctor` lets it come to where it fails by itself."""
    recipe = folder / "broken.yaml"
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(RECIPE.read_text()), "max_completion_length": 500_000}))
    script = [sys.executable, ROOT / "grpo_recipes" / "train_policy.py", "--config", recipe, "--output_dir", "never"]
    done = subprocess.run(script, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "not started" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "row of a group" in done.stderr and not (folder / "never").exists()
    recipe.write_text("a: [")
    code, shown, _ = doctor(folder, "--config", recipe)
    assert code == 1 and "configuration" in shown
