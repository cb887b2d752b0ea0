"""What makes training cheaper must not change it: accumulation, batches by tokens, checkpointing, bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_evaluation import mixed_groups
from test_trainer import arguments, reward_model
from transformers import modeling_utils

from mr_reward.errors import NonFiniteScoreError
from mr_reward.training.trainer import RewardTrainer
from mr_reward.worlds.handwriting import make_groups


def weights_after_one_step(folder: Path, family: str = "llama", lora: dict[str, Any] | None = None, **options: Any):
    """All trained weights after one SGD step on the same 12 groups, from the same start."""
    torch.manual_seed(0)
    model = reward_model("set", family)
    groups = mixed_groups(12) if family == "llama" else make_groups("train", 12)
    args = arguments(
        folder, **{"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "seed": 7, **options}
    )
    config = LoraConfig(r=4, lora_alpha=8, **lora) if lora is not None else None
    trainer = RewardTrainer(model, args, groups, peft_config=config)
    trainer.train()
    return {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        # 5 + 5 + 2 groups: the last micro-batch is smaller, each group still weighs the same.
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3},
        # Micro-batches of different sizes, formed by tokens.
        {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 3,
            "train_sampling_strategy": "batch_rebalance",
        },
        {"per_device_train_batch_size": 12, "train_sampling_strategy": "group_by_length"},
    ],
)
def test_a_step_does_not_depend_on_how_its_groups_are_batched(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = weights_after_one_step(tmp_path, per_device_train_batch_size=12)
    start = weights_after_one_step(tmp_path, per_device_train_batch_size=12, learning_rate=0.0)
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-3, "the step must move something"
    assert_same(weights_after_one_step(tmp_path, **options), expected, 1e-6)


def test_batches_by_tokens_waste_less(tmp_path: Path) -> None:
    """Padding of the three micro-batches of a step, by tokens and at random."""

    def padding(strategy: str) -> float:
        args = arguments(
            tmp_path,
            train_sampling_strategy=strategy,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
        )
        trainer = RewardTrainer(reward_model("set", "llama"), args, mixed_groups(64))
        batches = [batch["rows"].segments for batch in trainer.get_train_dataloader()]
        assert sum(map(len, batches)) == 64
        return sum(int((segments < 0).sum()) for segments in batches) / sum(segments.numel() for segments in batches)

    assert padding("batch_rebalance") < 0.6 * padding("random")


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
@pytest.mark.parametrize("lora", [None, {}])
def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, family: str, lora: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights_after_one_step(tmp_path, family, lora)
    calls = []
    checkpoint = modeling_utils.checkpoint
    monkeypatch.setattr(
        modeling_utils, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs)
    )
    found = weights_after_one_step(tmp_path, family, lora, gradient_checkpointing=True)
    assert len(calls) >= 2, "one batch through two decoder layers at least"
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
def test_bf16_autocast_trains_with_a_float32_head(tmp_path: Path, family: str) -> None:
    """bf16 has 8 bits of mantissa: the step goes the same way, within a few percent of its length."""
    start = weights_after_one_step(tmp_path, family, {}, learning_rate=0.0)
    expected = weights_after_one_step(tmp_path, family, {})
    found = weights_after_one_step(tmp_path, family, {}, bf16=True)

    def step(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([(weights[name] - start[name]).flatten() for name in start])

    assert all(weight.dtype == torch.float32 for name, weight in found.items() if "head" in name)
    assert not torch.equal(step(found), step(expected)), "autocast must have been on"
    assert torch.nn.functional.cosine_similarity(step(found), step(expected), dim=0) > 0.98


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_lora_variants_train_what_they_should(tmp_path: Path, options: dict[str, Any]) -> None:
    start = weights_after_one_step(tmp_path, "qwen3_vl", options, learning_rate=0.0)
    found = weights_after_one_step(tmp_path, "qwen3_vl", options)
    moved = {name for name in start if not torch.equal(start[name], found[name])}
    # The A matrices have no gradient in the first step: B starts at zero.
    assert {name for name in start if "lora_A" not in name} == moved
    assert any("lora_magnitude_vector" in name for name in moved) == bool(options.get("use_dora"))
    assert not any("visual" in name for name in start)


def test_scores_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    model = reward_model("set", "llama")
    trainer = RewardTrainer(model, arguments(tmp_path), mixed_groups(8))
    model.head.out.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteScoreError, match="step 0.*weights head.out.weight are not finite"):
        trainer.train()
