"""Evaluation during training: metrics against scoring by hand, flips, the best checkpoint, the loggers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import arguments, easy_groups, reward_model
from transformers import TrainerCallback

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.evaluation.evaluator import evaluate_groups
from mr_reward.training.batches import EvaluationGroups, evaluation_metrics
from mr_reward.training.trainer import RewardTrainer


def mixed_groups(count: int, seed: int = 5) -> list[ResponseGroup]:
    """2 to 5 responses of all lengths, so that batches are padded and lengths matter."""
    rng = random.Random(seed)
    groups = []
    for i in range(count):
        n = rng.randint(2, 5)
        texts = [f"{j} " + "ab" * rng.randint(0, 9) for j in range(n)]
        groups.append(ResponseGroup(prompt=f"p{i}", responses=texts, rankings=rng.sample(range(1, n + 1), n)))
    return groups


@pytest.mark.parametrize("layout", ["set", "causal"])
def test_metrics_equal_those_of_the_scorer(tmp_path: Path, layout: str) -> None:
    groups = mixed_groups(21)
    model = reward_model(layout, "llama")
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    found = RewardTrainer(model, args, easy_groups(8, 0), groups).evaluate()
    expected = evaluate_groups(GroupScorer(model), groups)
    for key in ("best_of_n_accuracy", "pairwise_accuracy", "kendall_tau_b", "score_length_correlation"):
        assert found[f"eval_{key}"] == pytest.approx(expected[key], abs=1e-5), key
    if layout == "set":
        assert found["eval_order_flip_rate"] == 0.0
    else:
        assert found["eval_order_flip_rate"] > 0.0, "an untrained causal model depends on the order"


def test_flips_and_padding_by_hand() -> None:
    groups = [
        ResponseGroup(prompt="a", responses=["x", "yy"], rankings=[1, 2]),
        ResponseGroup(prompt="b", responses=["x", "yy", "zzz"], rankings=[3, 2, 1]),
    ]
    data = EvaluationGroups(groups, num_orders=2, seed=0)
    data.orders[2:] = [[1, 0], [2, 0, 1]]
    predictions = np.array(
        [
            [2.0, 1.0, -100.0],  # right
            [0.0, 1.0, 2.0],  # right
            [3.0, 0.0, -100.0],  # the second response comes first and wins now: a flip
            [5.0, 1.0, 2.0],  # the third response still wins
        ]
    )
    metrics = evaluation_metrics(data, predictions)
    assert metrics["best_of_n_accuracy"] == 1.0
    assert metrics["order_flip_rate"] == 0.5
    assert "order_flip_rate" not in evaluation_metrics(EvaluationGroups(groups, num_orders=1), predictions[:2])


def test_several_sets_are_reported_by_name_and_whole_groups_fit(tmp_path: Path) -> None:
    """Training rows hold two responses; evaluation has whole groups in its own budget."""
    model = reward_model("set", "llama")
    args = arguments(
        tmp_path, max_steps=1, max_responses=2, max_tokens=64, eval_max_tokens=256, eval_strategy="steps", eval_steps=1
    )
    trainer = RewardTrainer(model, args, easy_groups(8, 0), {"easy": easy_groups(4, 1), "mixed": mixed_groups(4)})
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_easy_best_of_n_accuracy", "eval_mixed_kendall_tau_b", "eval_mixed_order_flip_rate"} <= keys


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_checkpoint_by_metric_is_what_is_saved(tmp_path: Path, lora: bool) -> None:
    """The learning rate explodes after the first evaluations: the last model is worse than the best."""

    class Explode(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 40:
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.data.normal_()

    model = reward_model("set", "llama")
    if lora:
        folder = tmp_path / "backbone"
        model.backbone.save_pretrained(folder)
        model.processor.save_pretrained(folder)
        model = MultiResponseRewardModel.from_backbone(folder, layout="set")
    validation = easy_groups(48, 1)
    args = arguments(
        tmp_path / "run",
        max_steps=60,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="steps",
        save_steps=20,
        load_best_model_at_end=True,
        metric_for_best_model="best_of_n_accuracy",
        greater_is_better=True,
    )
    trainer = RewardTrainer(
        model,
        args,
        easy_groups(320, 0),
        validation,
        peft_config=LoraConfig(r=8, lora_alpha=16) if lora else None,
        callbacks=[Explode()],
    )
    trainer.train()
    history = [e["eval_best_of_n_accuracy"] for e in trainer.state.log_history if "eval_best_of_n_accuracy" in e]
    assert history[-1] < max(history) - 0.1, history
    trainer.save_reward_model(tmp_path / "rm")
    found = evaluate_groups(GroupScorer.from_pretrained(tmp_path / "rm"), validation)["best_of_n_accuracy"]
    assert found == pytest.approx(max(history))


def test_tensorboard_gets_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    args = arguments(tmp_path, max_steps=2, report_to="tensorboard", eval_strategy="steps", eval_steps=1)
    RewardTrainer(reward_model("set", "llama"), args, easy_groups(8, 0), easy_groups(4, 1)).train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert {"train/loss", "eval/best_of_n_accuracy", "eval/order_flip_rate"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("eval/best_of_n_accuracy")) == 2
