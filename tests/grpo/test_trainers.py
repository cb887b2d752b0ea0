"""The reward inside TRL's real trainers, images included: GRPO and RLOO, training and evaluation."""

from pathlib import Path

import pytest
from tiny_runs import SHORT_RUN, handwriting_rows, save_policy_that_sees
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from mr_reward import MultiResponseReward, MultiResponseRewardModel
from mr_reward.grpo.telemetry import METRIC_KEYS


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)], ids=["grpo", "rloo"]
)
def test_two_steps(tmp_path: Path, trainer_class: type, config_class: type) -> None:
    save_policy_that_sees(tmp_path / "policy")
    MultiResponseRewardModel.from_backbone(tmp_path / "policy").save_pretrained(tmp_path / "rm")
    rows = handwriting_rows("train", 8)
    trainer = trainer_class(
        model=str(tmp_path / "policy"),
        reward_funcs=[MultiResponseReward(tmp_path / "rm", num_generations=4)],
        args=config_class(
            str(tmp_path / "out"),
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            max_steps=2,
            save_strategy="no",
            **SHORT_RUN,
        ),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
    )
    trainer.train()
    metrics = trainer.evaluate()
    steps = [entry for entry in trainer.state.log_history if "mr_reward/score_spread" in entry]
    assert len(steps) == 2
    for key in METRIC_KEYS:
        assert all(key in entry for entry in steps), key
        assert f"eval_{key}" in metrics, key
    # A random reward model tells different texts apart, and its rewards are centred.
    assert all(entry["mr_reward/score_spread"] > 0 for entry in steps)
    assert all(abs(entry["rewards/multi_response_reward/mean"]) < 1e-5 for entry in steps)
