"""A GRPO recipe knows no world: a data set that a recipe makes itself is registered by its arguments."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import pytest
from datasets import Dataset
from trl import GRPOConfig

from mr_reward.errors import ConfigurationError
from mr_reward.runs.recipe import (
    PolicyArguments,
    PromptSource,
    first_prompts,
    load_prompts,
    other_rewards,
    unread_data,
)
from mr_reward.worlds.handwriting_policy import HandwritingArguments


def is_even(completions: list[str], **_: Any) -> list[float]:
    return [float(text.isdigit() and int(text) % 2 == 0) for text in completions]


def count_up(arguments: Any, *, split: str, evaluation: bool, seed: int, limit: int | None) -> Dataset:
    rows = [{"prompt": f"{split} {number + arguments.first} {seed} {evaluation}"} for number in range(100)]
    return Dataset.from_list(rows[:limit])


@dataclass
class CountingArguments(PolicyArguments):
    sources: ClassVar[dict[str, PromptSource]] = {"counting": PromptSource(count_up, [is_even])}
    first: int = field(default=7)


@pytest.fixture
def args(tmp_path: Any) -> GRPOConfig:
    return GRPOConfig(str(tmp_path), num_generations=8, bf16=False, use_cpu=True)


def test_a_data_set_of_the_recipes_own(args: GRPOConfig) -> None:
    arguments = CountingArguments(dataset="counting", eval_dataset="counting", first=3, reward_model="rm")
    assert load_prompts(arguments, seed=5)["prompt"][0] == "train 3 5 False"
    assert load_prompts(arguments, evaluation=True)["prompt"][0] == "validation 3 0 True"
    groups = first_prompts(arguments, count=2)
    assert [group.messages[0]["content"][0]["text"] for group in groups] == [
        "train 3 0 False",
        "train 4 0 False",
        "validation 3 0 True",
        "validation 4 0 True",
    ]
    arguments.extra_reward_funcs = ["trl.rewards.get_repetition_penalty_reward()"]
    assert other_rewards(arguments, args)[0] is is_even
    assert args.reward_weights == [1.0, 0.0, 1.0]  # the truth watches
    assert unread_data(arguments) == []


def test_the_library_knows_no_world() -> None:
    own = {entry.name for entry in fields(HandwritingArguments)} - {entry.name for entry in fields(PolicyArguments)}
    assert own == {"num_prompts", "num_eval_prompts", "num_digits", "questions"}
    assert not PolicyArguments.sources
    with pytest.raises(ConfigurationError, match="dataset is missing"):
        load_prompts(PolicyArguments(reward_model="rm"))


def test_handwriting_prompts() -> None:
    arguments = HandwritingArguments(num_prompts=3, num_eval_prompts=2, num_digits=1, eval_dataset="handwriting")
    assert len(load_prompts(arguments)) == 3 and len(load_prompts(arguments, evaluation=True)) == 2
    assert load_prompts(arguments, limit=1)["solution"][0] == load_prompts(arguments)["solution"][0]
    with pytest.raises(ConfigurationError, match="num_prompts is 0"):
        HandwritingArguments(num_prompts=0)
