"""The recipe of a reward model of one of the worlds: its groups, made by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from mr_reward.groups import ResponseGroup
from mr_reward.runs.pretraining import GroupSource, RewardModelArguments
from mr_reward.worlds.named import WORLDS, world_options


def _load_groups(
    world: str, arguments: WorldRewardArguments, *, evaluation: bool, seed: int, limit: int | None
) -> list[ResponseGroup]:
    count = arguments.num_eval_groups if evaluation else arguments.num_train_groups
    return WORLDS[world].make_groups(
        "validation" if evaluation else "train",  # pictures that the other does not have
        count if limit is None else min(count, limit),
        num_responses=arguments.num_responses,
        seed=seed if arguments.groups_seed is None else arguments.groups_seed,
        **world_options(world, num_digits=arguments.num_digits, questions=arguments.questions),
    )


@dataclass
class WorldRewardArguments(RewardModelArguments):
    """The fields of a recipe, and those of the groups `handwriting` and `shapes`."""

    sources: ClassVar[Mapping[str, GroupSource]] = {world: partial(_load_groups, world) for world in WORLDS}

    num_responses: int = field(default=4, metadata={"help": "N of the world's groups"})
    num_train_groups: int = field(default=8192, metadata={"help": "Groups of the world to train on"})
    num_eval_groups: int = field(default=256, metadata={"help": "Groups of the world to evaluate on"})
    # With one of their own, runs of several seeds learn from the same groups: new parts and the order differ.
    groups_seed: int | None = field(default=None, metadata={"help": "Seed of the world's groups; None for the run's"})
    num_digits: int = field(default=3, metadata={"help": "Digits per image of the handwriting world"})
    questions: list[str] = field(default_factory=lambda: ["read"], metadata={"help": "Questions of the world"})
