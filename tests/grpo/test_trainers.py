"""The reward inside TRL's real trainers, images and environments included: GRPO and RLOO, training and evaluation."""

import itertools
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_runs import SHORT_RUN, handwriting_rows, save_policy_that_sees
from transformers import AutoProcessor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from mr_reward import GroupScorer, MultiResponseReward, MultiResponseRewardModel
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


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: One.
        b: The other.
    """
    return a + b


def policy_with_tools(folder: Path) -> tuple[Any, MultiResponseReward]:
    """Save a policy, and a reward model on it, whose chat template shows tools; its processor, and the reward."""
    save_policy_that_sees(folder / "policy")
    processor = AutoProcessor.from_pretrained(folder / "policy")
    processor.chat_template = (resources.files("trl") / "chat_templates" / "qwen3_vl.jinja").read_text()
    processor.save_pretrained(folder / "policy")
    MultiResponseRewardModel.from_backbone(folder / "policy").save_pretrained(folder / "rm")
    return processor, MultiResponseReward(folder / "rm", num_generations=4)


class Scripted(GRPOTrainer):
    """Its policy calls `add` with other numbers in each rollout, and always says the same in the end."""

    calls = 0

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: object, **__: object) -> tuple[list, None]:
        self.calls += 1
        written = [
            f'<tool_call>\n{{"name": "add", "arguments": {{"a": {i}, "b": 2}}}}\n</tool_call>' for i in range(8)
        ]
        texts = written[: len(prompt_ids)] if self.calls % 2 else ["Done."] * len(prompt_ids)
        ids = [self._tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"] for text in texts]
        return ids, None


def test_completions_with_tool_calls_are_judged_as_the_policy_wrote_them(tmp_path: Path) -> None:
    processor, reward = policy_with_tools(tmp_path)
    written: list[list[int]] = []

    def remember(completions: list, completion_ids: list[list[int]], **_: object) -> list[float]:
        written.extend(completion_ids)
        return [0.0] * len(completions)

    trainer = Scripted(
        model=str(tmp_path / "policy"),
        reward_funcs=[reward, remember],
        args=GRPOConfig(
            str(tmp_path / "out"),
            per_device_train_batch_size=8,
            max_steps=1,
            save_strategy="no",
            **{**SHORT_RUN, "max_completion_length": 300},
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "Add."}]}] * 4),
        tools=[add],
    )
    trainer.train()
    assert isinstance(reward._scorer, GroupScorer)
    renderer = reward._scorer.packer.renderer
    judged = [ids for scored in reward.last_scored for ids in renderer.render(scored.group).response_ids]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [[*ids, end] for ids in judged] == written, "token for token what the policy saw and wrote"
    for scored in reward.last_scored:
        assert scored.scores is not None and len(set(scored.scores)) == 4
        assert all(text.endswith("</tool_response>\n\nDone.") for text in scored.group.responses), "for a reader"


class Room:
    """An environment that begins differently in each rollout."""

    numbers = itertools.count()

    def reset(self, **row: object) -> str:
        return f"\n\nYou are in room {next(self.numbers)}."

    def walk(self, steps: int) -> str:
        """Walk.

        Args:
            steps: How far.
        """
        return "a wall"


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_environments_that_begin_differently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TRL appends what `reset` returns to the prompt, so the rollouts of a group have prompts that differ."""
    _, reward = policy_with_tools(tmp_path)
    prompt = [{"role": "user", "content": "Find the exit."}]
    options = {**SHORT_RUN, "max_completion_length": 16}
    trainer = GRPOTrainer(
        model=str(tmp_path / "policy"),
        reward_funcs=[reward],
        args=GRPOConfig(
            str(tmp_path / "out"), per_device_train_batch_size=8, max_steps=1, save_strategy="no", **options
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt}] * 4),
        environment_factory=Room,
    )
    with caplog.at_level(logging.WARNING, "mr_reward"):
        trainer.train()
    assert len(reward.last_scored) == 2
    numbers = []
    for scored in reward.last_scored:
        (message,) = scored.group.messages
        assert "".join(block["text"] for block in message["content"]) == "Find the exit.\n\nYou are in room"
        assert scored.scores is not None and len(set(scored.scores)) == 4
        numbers += [int(response.split(".\n\n")[0]) for response in scored.group.responses]
    assert numbers == list(range(numbers[0], numbers[0] + 8)), "each response stands behind its own room"
    assert caplog.text.count("its environments began differently") == 1
