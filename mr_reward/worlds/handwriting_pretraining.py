"""The recipe of a reward model of the handwriting world: its groups, made by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mr_reward.groups import ResponseGroup
from mr_reward.runs.pretraining import GroupSource, RewardModelArguments
from mr_reward.worlds.handwriting import make_groups


def _load_groups(
    arguments: HandwritingRewardArguments, *, evaluation: bool, seed: int, limit: int | None
) -> list[ResponseGroup]:
    count = arguments.num_eval_groups if evaluation else arguments.num_train_groups
    return make_groups(
        "validation" if evaluation else "train",  # scans that the other does not have
        count if limit is None else min(count, limit),
        num_responses=arguments.num_responses,
        num_digits=arguments.num_digits,
        questions=arguments.questions,
        seed=seed,
    )


@dataclass
class HandwritingRewardArguments(RewardModelArguments):
    """The fields of a recipe, and those of the groups `handwriting`."""

    sources: ClassVar[Mapping[str, GroupSource]] = {"handwriting": _load_groups}

    num_responses: int = field(default=4, metadata={"help": "N of the handwriting groups"})
    num_train_groups: int = field(default=8192, metadata={"help": "Handwriting groups to train on"})
    num_eval_groups: int = field(default=256, metadata={"help": "Handwriting groups to evaluate on"})
    num_digits: int = field(default=3, metadata={"help": "Digits per image of the handwriting world"})
    questions: list[str] = field(default_factory=lambda: ["read"], metadata={"help": "Handwriting questions"})
