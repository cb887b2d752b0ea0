"""The recipes as a user starts them: quickstart, reward-model training with LoRA, GRPO on one and two processes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mr_reward import GroupScorer, MultiResponseRewardModel
from mr_reward.data.groups_file import load_preferences
from mr_reward.grpo.telemetry import METRIC_KEYS
from mr_reward.worlds import tiny
from mr_reward.worlds.handwriting import make_groups

RECIPES = Path(__file__).parents[2] / "grpo_recipes"


def run(command: list[str], folder: Path, timeout: float = 400) -> str:
    """Run in an empty folder, so that nothing depends on where the repository is; returns stdout."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def recipe(name: str, config: str, *arguments: object) -> list[str]:
    return [sys.executable, str(RECIPES / name), "--config", str(RECIPES / config), *map(str, arguments)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy in a folder, as a hub model would be."""
    folder = tmp_path_factory.mktemp("policy")
    tiny.build_qwen3_vl(0, hidden_size=64, num_layers=2).save_pretrained(folder)
    tiny.build_qwen3_vl_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_folder(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    MultiResponseRewardModel.from_backbone(backbone, layout="set").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("world", ["handwriting", pytest.param("shapes", marks=pytest.mark.slow)])
def test_quickstart(tmp_path: Path, world: str) -> None:
    """Every stage for a few steps; the figures of the full run are reported in the README."""
    arguments = {"world": world, "seed": 3, "sft_steps": 6, "rm_groups": 96, "grpo_steps": 2, "eval_samples": 16}
    arguments["rollout_prompts"] = 48
    flags = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    stdout = run([sys.executable, str(RECIPES / "quickstart.py"), *flags], tmp_path)
    output = tmp_path / "outputs" / "quickstart"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["layout"] == "set" and metrics["seed"] == 3
    assert set(metrics["seconds"]) == {"sft", "collect", "rm", "grpo", "truth", "total"}
    assert set(metrics["rm"]) == {"n", "best_of_n_accuracy", "pairwise_accuracy", "order_flip_rate"}
    assert metrics["rm"]["order_flip_rate"] == 0
    accuracies = {f"accuracy_{name}" for name in ("before", "after", "with_truth", "of_rm_backbone")}
    assert set(metrics["policy"]) == {"eval_samples", *accuracies} and set(metrics["judge"]) == {"right_above_wrong"}
    rollouts = load_preferences(output / "rollouts" / "train-labelled.jsonl")
    assert 0 < len(rollouts) <= 48 and all(2 <= group.num_responses <= 8 for group in rollouts)
    assert set(metrics["reward"]) == {"first", "last"}
    assert "best of 4" in stdout and "after GRPO" in stdout
    report = (output / "report.md").read_text()
    for value in (metrics["rm"]["best_of_n_accuracy"], metrics["policy"]["accuracy_after"]):
        assert f"| {value:.3f} |" in report
    for figure in ("curves.png", "responses.png"):
        assert (output / figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    groups = make_groups("test", 2)
    assert len(GroupScorer.from_pretrained(output / "rm").score(groups)) == 2
    MultiResponseRewardModel.from_pretrained(output / "rm")
    AutoModelForImageTextToText.from_pretrained(output / "policy")
    AutoProcessor.from_pretrained(output / "policy")


def test_the_quickstart_collects_anew_for_another_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the folder of an earlier run, whose rollouts are those of another policy."""
    monkeypatch.syspath_prepend(str(RECIPES))
    import quickstart

    options = quickstart.QuickstartArguments(rollout_prompts=6, eval_samples=8)
    tiny.build_qwen3_vl_processor().save_pretrained(tmp_path / "policy")
    found = []
    for seed in (1, 2):
        tiny.build_qwen3_vl(seed, hidden_size=64, num_layers=2).save_pretrained(tmp_path / "policy")
        files = quickstart.collect_rollouts(options, tmp_path / "policy", tmp_path / "rollouts")
        found.append([[group.responses for group in load_preferences(file)] for file in files])
    assert [[len(groups) for groups in files] for files in found] == [[6, 4]] * 2 and found[0] != found[1]


@pytest.mark.parametrize("lora", [False, True])
def test_pretrain_rm(tmp_path: Path, backbone: Path, lora: bool) -> None:
    arguments = ["--model_name_or_path", backbone, "--output_dir", tmp_path / "rm", "--num_train_groups", 64]
    arguments += ["--num_eval_groups", 16, "--num_responses", 3, "--layout", "causal", "--loss", "plackett_luce"]
    if lora:
        arguments += ["--use_peft", "true", "--lora_r", 4]
    stdout = run(recipe("pretrain_rm.py", "rm_tiny_handwriting_cpu.yaml", *arguments), tmp_path)
    assert "order_flip_rate" in stdout
    metrics = json.loads((tmp_path / "rm" / "eval_metrics.json").read_text())
    assert 0 <= metrics["handwriting"]["best_of_n_accuracy"] <= 1
    card = (tmp_path / "rm" / "README.md").read_text()
    assert "| handwriting | 64 |" in card
    assert f"{metrics['handwriting']['best_of_n_accuracy']:.3f}" in card
    model = MultiResponseRewardModel.from_pretrained(tmp_path / "rm")
    assert model.config.layout == "causal"
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.distributed
@pytest.mark.parametrize(("num_processes", "batch"), [(1, 4), (2, 2)])
def test_train_policy(tmp_path: Path, backbone: Path, reward_folder: Path, num_processes: int, batch: int) -> None:
    """`accelerate launch` with one process, and with two that each hold half of every group."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(num_processes)]
    # accelerate starts several processes on a CPU through its launcher for several GPUs; the recipe's use_cpu does the
    # rest (its own --cpu wants MPI).
    launch += ["--multi_gpu", "--main_process_port", "0"] if num_processes > 1 else ["--cpu"]
    arguments = ["--model_name_or_path", backbone, "--reward_model", reward_folder, "--output_dir", tmp_path / "out"]
    arguments += ["--per_device_train_batch_size", batch, "--num_generations", 4, "--max_steps", 2]
    arguments += ["--num_prompts", 16, "--log_completions", "false"]
    command = recipe("train_policy.py", "policy_tiny_handwriting_cpu.yaml", *arguments)[1:]
    stdout = run([*launch, *command], tmp_path)
    for key in METRIC_KEYS:
        assert key in stdout, key
    straddling = re.findall(r"'mr_reward/straddling_groups': '?([\d.]+)", stdout)
    assert [float(value) for value in straddling] == [float(num_processes > 1)] * 2
    for folder in ("out", "out/ema"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / folder)


def test_two_rewards_with_kl_and_validation(tmp_path: Path, backbone: Path, reward_folder: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", backbone, "--reward_model", reward_folder, "--output_dir", out]
    arguments += ["--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 8, "--num_generations", 4]
    arguments += ["--num_prompts", 16, "--num_eval_prompts", 4, "--max_steps", 2, "--eval_steps", 1]
    arguments += ["--extra_reward_funcs", "trl.rewards.get_repetition_penalty_reward()"]
    arguments += ["--reward_weights", 1.0, 0.5, 0.25]
    stdout = run(recipe("train_policy.py", "policy_tiny_handwriting_mixed_cpu.yaml", *arguments), tmp_path)
    for key in ("multi_response_reward", "handwriting_accuracy", "repetition_penalty_reward"):
        assert f"'rewards/{key}/mean'" in stdout
    assert "'kl':" in stdout
    records = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all("eval_ema_rewards/handwriting_accuracy/mean" in record for record in records)
    # Nothing is right here, so the first evaluation stays the best; the run ends with it.
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    best = load_file(out / "checkpoint-1" / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], best[name]) for name in best)
    assert (out / "validation.png").stat().st_size > 5000 and "|" in (out / "samples.md").read_text()


def test_missing_reward_model_is_told_before_the_policy_is_loaded(tmp_path: Path) -> None:
    command = recipe("train_policy.py", "policy_tiny_handwriting_cpu.yaml", "--reward_model", "nowhere")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode != 0
    assert (
        "not started" in result.stderr and "nowhere is no folder" in result.stderr and "Traceback" not in result.stderr
    )


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("pretrain_rm.py", ["--output_dir", "out"], "error: model_name_or_path is missing"),
        (
            "train_policy.py",
            ["--use_cpu", "true", "--output_dir", "out"],
            "error: the recipe cannot be read: .*layuot",
        ),
        ("quickstart.py", [], "error: the recipe cannot be read: .*layuot"),
    ],
)
def test_a_script_ends_with_one_line(script: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    """As the commands do; a traceback is for bugs."""
    (tmp_path / "typo.yaml").write_text("layuot: set\n")
    config = [] if script == "pretrain_rm.py" else ["--config", "typo.yaml"]
    command = [sys.executable, str(RECIPES / script), *config, *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert re.search(f"^{message}", result.stderr.splitlines()[-1]), result.stderr
