"""A recipe of a reward model: the fields of its YAML file beside those of the trainer, and the groups that they name.

`grpo_recipes/pretrain_rm.py` trains with it, `mr-reward doctor` looks at it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from mr_reward.data.decontamination import decontaminate
from mr_reward.data.groups_file import load_preferences
from mr_reward.errors import ConfigurationError
from mr_reward.groups import ResponseGroup
from mr_reward.training.trainer import RewardTrainingArguments

logger = logging.getLogger(__name__)

# Gets the recipe's arguments and, by name, `evaluation` (whether these are the groups to evaluate on), `seed` and
# `limit` (at most so many, or None).
GroupSource = Callable[..., list[ResponseGroup]]


@dataclass
class RewardModelArguments:
    """What is trained, on what.

    A recipe with groups of its own is a subclass that adds the fields and names them in `sources`; see
    `mr_reward.worlds.world_pretraining.WorldRewardArguments`.
    """

    sources: ClassVar[Mapping[str, GroupSource]] = {}

    layout: str = field(default="set", metadata={"help": "causal, isolated or set"})
    thoughts: str = field(default="included", metadata={"help": "included, stripped or refused"})
    # What `load_preferences` reads: files or folders of ranked groups, in any format of docs/data-formats.md, or hub
    # ids; or a name in `sources`. Several are mixed, with `mixture_weights` if given.
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Files or folders of ranked groups, hub ids, or a name in sources"}
    )
    eval_file: list[str] | None = field(default=None, metadata={"help": "The same for evaluation"})
    decontaminate: bool = field(
        default=False,
        metadata={"help": "Leave out training groups that share prompt, media or text with eval_file"},
    )

    def __post_init__(self) -> None:
        if self.decontaminate and not self.eval_file:
            raise ConfigurationError("decontaminate is on without eval_file; name what must not be trained on")


def named_sets(arguments: RewardModelArguments, *, evaluation: bool = False) -> dict[str, str]:
    """The sets of groups that the recipe names, by the names that the trainer knows them by; none is read."""
    given = arguments.eval_file if evaluation else arguments.train_file
    if not given and not evaluation:
        names = "".join(f", or {name}" for name in arguments.sources)
        raise ConfigurationError(f"train_file is missing; give files of ranked groups or hub ids{names}")
    sets: dict[str, str] = {}
    for place in [given] if isinstance(given, str) else given or []:
        name = place if place in arguments.sources else Path(place).stem
        # Two files train.jsonl, in two folders, are two sets.
        sets[place if name in sets else name] = place
    return sets


def load_set(
    arguments: RewardModelArguments, place: str, *, evaluation: bool = False, seed: int = 0, limit: int | None = None
) -> list[ResponseGroup]:
    """One of `named_sets`. The limit is for sets that are made; a file is read whole."""
    if place in arguments.sources:
        return arguments.sources[place](arguments, evaluation=evaluation, seed=seed, limit=limit)
    return load_preferences(place)


def load_sets(
    arguments: RewardModelArguments, *, evaluation: bool = False, **options: Any
) -> dict[str, list[ResponseGroup]]:
    """The groups to train on, or to evaluate on, by name; a wrong row shows before the backbone is loaded."""
    return {
        name: load_set(arguments, place, evaluation=evaluation, **options)
        for name, place in named_sets(arguments, evaluation=evaluation).items()
    }


def without_evaluation(
    sets: Mapping[str, list[ResponseGroup]], evaluation: Mapping[str, list[ResponseGroup]]
) -> dict[str, list[ResponseGroup]]:
    """The training sets without the groups that meet an evaluation set, by `decontaminate`; how many is logged."""
    clean = {}
    for name, groups in sets.items():
        found = decontaminate(groups, evaluation)
        reasons = ", ".join(f"{count} by {reason} of {other}" for (_, other, reason), count in found.counts.items())
        told = f"{name}: decontaminate leaves out {len(found.removed)} of {len(groups)} groups ({reasons or 'none'})"
        if not found.kept:
            raise ConfigurationError(f"{told}, all share something with eval_file; train on other prompts")
        logger.log(logging.WARNING if found.removed else logging.INFO, told)
        clean[name] = found.kept
    return clean


def training_data(
    arguments: RewardModelArguments,
    args: RewardTrainingArguments,
    sets: Mapping[str, Sequence[ResponseGroup]],
    shares: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """For the model card a row for each set of `load_sets`: what it is, and how and with what was trained on it.

    `shares` are those of the `RewardTrainer`.
    """
    shown = ("loss", "binary_labels", "seed", "learning_rate", "num_train_epochs", "max_steps")
    how = {name: getattr(args, name) for name in shown}
    how["made with"] = ", ".join(f"{name} {version(name)}" for name in ("mr-reward", "torch", "transformers", "peft"))
    rows = []
    for name, place in named_sets(arguments).items():
        digest = None  # of what is no file
        if Path(place).is_file():
            with open(place, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        share = {} if shares is None else {"share": f"{shares[name]:.1%}"}
        rows.append({"name": name, "groups": len(sets[name]), **share, "SHA-256": digest, **how})
    return rows
