"""A GRPO recipe knows no world: a data set that a recipe makes itself is registered by its arguments."""

import inspect
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

import mr_reward.runs.recipe as recipe_module
from mr_reward import MultiResponseReward
from mr_reward.errors import ConfigurationError
from mr_reward.runs.recipe import (
    PolicyArguments,
    PromptSource,
    first_prompts,
    load_prompts,
    make_reward,
    other_rewards,
    unread_data,
)
from mr_reward.worlds.world_policy import WorldPolicyArguments


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


def test_weights_that_the_recipe_gives_stay(args: GRPOConfig) -> None:
    args.reward_weights = [1.0, 0.5]
    assert other_rewards(CountingArguments(dataset="counting", reward_model="rm"), args) == [is_even]
    assert args.reward_weights == [1.0, 0.5]


def test_every_field_reaches_the_reward(args: GRPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(recipe_module, "MultiResponseReward", lambda *given, **options: made.append((given, options)))
    given = {
        "reward_model": "rm",
        "reward": "rank",
        "reward_dtype": "bfloat16",
        "reward_max_tokens": 77,
        "reward_over_length": "error",
        "reward_num_orders": 3,
        "reward_attn_implementation": "eager",
        "reward_placement": "offload",
        "reward_server": "http://host:1",
        "reward_server_hash": "1f",
        "log_groups_steps": 5,
    }
    own = {entry.name for entry in fields(PolicyArguments) if entry.name.startswith(("reward", "log_"))}
    assert set(given) == own, "a new field belongs here"
    args.num_generations_eval, args.ddp_timeout = 2, 99
    make_reward(PolicyArguments(**given), args)  # type: ignore[arg-type]
    ((model,), options) = made[0]
    log = options.pop("group_log")
    assert (log.folder, log.every) == (Path(args.output_dir) / "groups", 5)
    assert model == "rm" and options == {
        "num_generations": 8,
        "num_generations_eval": 2,
        "reward": "rank",
        "server": "http://host:1",
        "server_hash": "1f",
        "dtype": torch.bfloat16,
        "max_tokens_per_batch": 77,
        "over_length": "error",
        "num_orders": 3,
        "attn_implementation": "eager",
        "placement": "offload",
        "timeout": 99,
    }
    assert options.keys() <= inspect.signature(MultiResponseReward).parameters.keys()
    make_reward(PolicyArguments(reward_model="rm"), args)
    assert made[1][1]["group_log"] is None


def test_the_library_knows_no_world() -> None:
    own = {entry.name for entry in fields(WorldPolicyArguments)} - {entry.name for entry in fields(PolicyArguments)}
    assert own == {"num_prompts", "num_eval_prompts", "num_digits", "questions"}
    assert not PolicyArguments.sources
    with pytest.raises(ConfigurationError, match="dataset is missing"):
        load_prompts(PolicyArguments(reward_model="rm"))


def test_handwriting_prompts() -> None:
    arguments = WorldPolicyArguments(num_prompts=3, num_eval_prompts=2, num_digits=1, eval_dataset="handwriting")
    assert len(load_prompts(arguments)) == 3 and len(load_prompts(arguments, evaluation=True)) == 2
    assert load_prompts(arguments, limit=1)["solution"][0] == load_prompts(arguments)["solution"][0]
    assert [len(load_prompts(arguments, limit=limit)) for limit in (1, 3, 64)] == [1, 3, 3]
    arguments = WorldPolicyArguments(
        num_prompts=30, num_digits=2, questions=["sum", "even"], eval_dataset="handwriting"
    )
    first, again, other = (load_prompts(arguments, seed=seed) for seed in (0, 0, 1))
    assert first["digits"] == again["digits"] != other["digits"]
    assert {len(digits) for digits in first["digits"]} == {2} and set(first["question"]) == {"sum", "even"}
    splits = [load_prompts(arguments, evaluation=evaluation)["image"] for evaluation in (False, True)]
    seen = [{image.tobytes() for image in images} for images in splits]
    assert not seen[0] & seen[1], "the held-out prompts are of another split"
    with pytest.raises(ConfigurationError, match="num_prompts is 0"):
        WorldPolicyArguments(num_prompts=0)
