"""A GRPO recipe: the fields of its YAML file beside those of TRL, and what they make.

`grpo_recipes/train_policy.py` trains with it, `mr-reward doctor` looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from trl import GRPOConfig, TrlParser

from mr_reward.data.sources import SUFFIXES, is_saved, read_saved
from mr_reward.errors import ConfigurationError
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.groups import read_rollouts
from mr_reward.grpo.reward import REWARD_TRANSFORMS, MultiResponseReward
from mr_reward.grpo.telemetry import GroupLog
from mr_reward.grpo.truth import Truth
from mr_reward.hub import why_missing
from mr_reward.model.rows import OVER_LENGTH_POLICIES
from mr_reward.scorers.opening import DTYPES, PLACEMENTS
from mr_reward.training.trainer import backend_for_deepspeed


@dataclass(frozen=True)
class PromptSource:
    """A data set that a recipe makes itself."""

    # Gets the recipe's arguments and, by name, `split`, `evaluation` (whether these are the held-out prompts), `seed`
    # and `limit` (at most so many, or None); gives what `GRPOTrainer` takes.
    load: Callable[..., Dataset]
    # Reward functions that know what is right. They are logged with weight 0, unless `reward_weights` says otherwise:
    # the policy does not learn from them.
    truths: Sequence[Callable[..., Any]] = ()


@dataclass
class PolicyArguments:
    """The reward model and the prompts.

    A recipe with a data set of its own is a subclass that adds the fields and names the data set in `sources`; see
    `mr_reward.worlds.world_policy.WorldPolicyArguments`.
    """

    # The data sets that this recipe makes itself, by the name that `dataset` and `eval_dataset` give.
    sources: ClassVar[Mapping[str, PromptSource]] = {}

    reward_model: str | None = field(default=None, metadata={"help": "Folder or hub id of what pretrain_rm.py wrote"})
    reward: str = field(default="centred", metadata={"help": "centred, raw, rank or win_rate"})
    reward_dtype: str | None = field(default=None, metadata={"help": "Of its backbone; None for the checkpoint's"})
    reward_max_tokens: int = field(default=16384, metadata={"help": "Token budget of one forward pass"})
    reward_over_length: str = field(default="drop_group", metadata={"help": "drop_group, truncate_responses or error"})
    reward_num_orders: int = field(default=1, metadata={"help": "Response orders to average over (layout causal)"})
    reward_attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the reward model"})
    reward_placement: str = field(
        default="resident", metadata={"help": "resident; offload: in CPU memory between calls"}
    )
    # The token stands in the environment variable MR_REWARD_TOKEN; the options of the scorer are the server's.
    reward_server: str | None = field(default=None, metadata={"help": "URL of mr-reward serve, for reward_model"})
    reward_server_hash: str | None = field(default=None, metadata={"help": "Checksum of the server's model"})
    # To `groups` in the output folder, for `mr-reward inspect`; 0 for never.
    log_groups_steps: int = field(default=0, metadata={"help": "Write and show the scored groups every so many steps"})
    # As `trl.rewards.accuracy_reward`, or, where a call makes them, `trl.rewards.get_repetition_penalty_reward()`; in
    # this order after the reward model and the truths of a `PromptSource` in `reward_weights`.
    extra_reward_funcs: list[str] = field(default_factory=list, metadata={"help": "Import paths"})
    # Import paths as above, of functions that know what is right: truths for a data set that comes without them.
    verifiers: list[str] = field(default_factory=list, metadata={"help": "Import paths of rewards that are the truth"})
    # Ranked groups of the policy's own rollouts, for prompts that the reward model was not trained on.
    heldout_rollouts: str | None = field(
        default=None, metadata={"help": "File of ranked rollouts that the reward model is tried on at the start"}
    )
    min_right_above_wrong: float = field(
        default=0.0,
        metadata={"help": "Warn where right rollouts score above wrong ones in a smaller share of pairs"},
    )
    # With the columns `prompt` (text or messages) and, if there are any, `image(s)`.
    dataset: str | None = field(default=None, metadata={"help": "File, hub id, or a name in sources"})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set"})
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out prompts for eval_strategy"})
    eval_dataset_split: str = field(default="validation", metadata={"help": "Split of the held-out prompts"})
    # Evaluated and saved beside the last weights (`ema` in the output folder); see `mr_reward.runs.EMACallback`.
    ema_half_life: float = field(
        default=0.0, metadata={"help": "Average the weights, half-life in steps; 0 for never"}
    )
    # With the first truth of the data set or of verifiers; see `mr_reward.runs.RefreshCallback`.
    refresh_steps: int = field(
        default=0,
        metadata={"help": "Refresh the reward model with the policy's rollouts every so many steps; 0: never"},
    )
    refresh_groups: list[str] = field(
        default_factory=list, metadata={"help": "Files of ranked groups that it was trained on before"}
    )
    refresh_learning_rate: float = field(default=1e-5, metadata={"help": "Of a refresh, falling to zero"})
    # A `metric_for_best_model` that knows what is right is watched by `mr_reward.runs.JudgeGuard`.
    stop_when_fooled: bool = field(default=False, metadata={"help": "Stop when the score rises and the truth falls"})
    skip_doctor: bool = field(default=False, metadata={"help": "Start without the checks of `mr-reward doctor`"})

    def __post_init__(self) -> None:
        choices = {
            "reward": REWARD_TRANSFORMS,
            "reward_over_length": OVER_LENGTH_POLICIES,
            "reward_placement": PLACEMENTS,
            "reward_dtype": (None, *DTYPES),
        }
        problems = [
            f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(str, allowed))}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]
        for name in ("reward_max_tokens", "reward_num_orders"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0.0 <= self.min_right_above_wrong <= 1.0:
            problems.append(f"min_right_above_wrong is {self.min_right_above_wrong}, expected a share from 0 to 1")
        source = self.sources.get(self.dataset or "")
        tells = self.heldout_rollouts or self.verifiers or (source is not None and source.truths)
        if self.refresh_steps and not (self.verifiers or (source is not None and source.truths)):
            problems.append("refresh_steps needs verifiers, which know what is right")
        if self.refresh_steps and (self.reward_server is not None or self.reward_placement != "resident"):
            problems.append(
                "refresh_steps needs a reward model that stays in this process, without reward_server and "
                "with reward_placement: resident"
            )
        if self.min_right_above_wrong and not tells:
            problems.append("min_right_above_wrong needs heldout_rollouts, or verifiers, which know what is right")
        if self.log_groups_steps < 0:
            problems.append(f"log_groups_steps is {self.log_groups_steps}, expected 0 for never, or more")
        if self.refresh_steps < 0:
            problems.append(f"refresh_steps is {self.refresh_steps}, expected 0 for never, or more")
        if self.ema_half_life < 0:
            problems.append(f"ema_half_life is {self.ema_half_life}, expected 0 for no average, or a number of steps")
        if self.stop_when_fooled and self.eval_dataset is None:
            problems.append("stop_when_fooled is true and there is no eval_dataset, expected held-out prompts")
        if problems:
            raise ConfigurationError("; ".join(problems))


@dataclass
class PolicyTrainingArguments(GRPOConfig):
    """`GRPOConfig`; under DeepSpeed on a machine without a GPU the processes find each other by themselves."""

    ddp_backend: str | None = field(default=None, metadata={"help": "gloo without a GPU if DeepSpeed runs"})

    def __post_init__(self) -> None:
        self.ddp_backend = backend_for_deepspeed(self.ddp_backend, use_cpu=self.use_cpu)
        super().__post_init__()


def parse_recipe(*types: type) -> tuple[Any, ...]:
    """The arguments of a recipe script from its YAML file and command line; a field that does not exist is refused."""
    try:
        return tuple(TrlParser(types).parse_args_and_config())
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"the recipe cannot be read: {error}") from error


def load_prompts(
    arguments: PolicyArguments, *, evaluation: bool = False, seed: int = 0, limit: int | None = None
) -> Dataset:
    """The prompts to train on, or the held-out ones, as a data set that `GRPOTrainer` takes."""
    name, split = arguments.dataset, arguments.dataset_split
    if evaluation:
        name, split = arguments.eval_dataset, arguments.eval_dataset_split
    if name is None:
        raise ConfigurationError(f"{'eval_' if evaluation else ''}dataset is missing; give the data set with prompts")
    if name in arguments.sources:
        return arguments.sources[name].load(arguments, split=split, evaluation=evaluation, seed=seed, limit=limit)
    is_file = name.endswith(SUFFIXES)
    if not Path(name).exists() and is_file:
        raise ConfigurationError(f"dataset {name} is no file; give the file with the prompts")
    if missing := why_missing(name, kind="dataset"):
        raise ConfigurationError(f"dataset {name} {missing}")
    try:
        if is_file:
            rows = load_dataset("parquet" if name.endswith(".parquet") else "json", data_files=name, split="train")
        elif is_saved(Path(name)):
            rows = read_saved(Path(name), split)
        else:
            rows = load_dataset(name, split=split)
    except (DatasetsError, StopIteration, ValueError) as error:  # an empty file is a StopIteration
        reason = error.__cause__ or str(error) or "nothing in it"
        raise ConfigurationError(f"dataset {name}, split {split}, cannot be read ({reason}); fix it") from error
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def make_reward(arguments: PolicyArguments, args: GRPOConfig) -> MultiResponseReward:
    """The reward function; a broken folder shows here, before the policy is loaded."""
    if arguments.reward_model is None and arguments.reward_server is None:
        raise ConfigurationError("reward_model is missing; give the folder that pretrain_rm.py wrote")
    every = arguments.log_groups_steps
    return MultiResponseReward(
        arguments.reward_model,
        num_generations=args.num_generations,
        num_generations_eval=args.num_generations_eval,
        reward=arguments.reward,
        server=arguments.reward_server,
        server_hash=arguments.reward_server_hash,
        **scorer_options(arguments),
        placement=arguments.reward_placement,
        group_log=GroupLog(Path(str(args.output_dir)) / "groups", every=every) if every else None,
        timeout=args.ddp_timeout,
    )


def truths(arguments: PolicyArguments) -> list[Callable[..., Any]]:
    """The reward functions that know what is right: those that come with the data set, and the recipe's verifiers."""
    source = arguments.sources.get(arguments.dataset or "")
    verifiers = [import_reward(path, option="verifiers") for path in arguments.verifiers]
    return [*(() if source is None else source.truths), *verifiers]


def scorer_options(arguments: PolicyArguments) -> dict[str, Any]:
    """How the recipe wants its reward model loaded and its groups scored."""
    return {
        "dtype": DTYPES.get(arguments.reward_dtype or ""),
        "max_tokens_per_batch": arguments.reward_max_tokens,
        "over_length": arguments.reward_over_length,
        "num_orders": arguments.reward_num_orders,
        "attn_implementation": arguments.reward_attn_implementation,
    }


def other_rewards(
    arguments: PolicyArguments, args: GRPOConfig, reward: MultiResponseReward | None = None
) -> list[Callable[..., Any]]:
    """The reward functions beside the reward model; sets the weights that the recipe leaves open.

    The first truth is held against the scores of `reward`, if that is given.
    """
    extra = [import_reward(path) for path in arguments.extra_reward_funcs]
    known = truths(arguments)
    if known:
        args.reward_weights = args.reward_weights or [1.0, *(0.0 for _ in known), *(1.0 for _ in extra)]
    if known and reward is not None:
        known[0] = Truth(known[0], reward)
    return [*known, *extra]


def import_reward(path: str, *, option: str = "extra_reward_funcs") -> Callable[..., Any]:
    """The reward function that an import path names; with () at its end, what that makes."""
    try:
        found = resolve_name(path.removesuffix("()"))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{option}: {path!r} cannot be imported ({error}); give module.function") from error
    return found() if path.endswith("()") else found


def first_prompts(arguments: PolicyArguments, count: int = 64) -> list[ResponseGroup]:
    """The first prompts of both data sets as groups, if they are on this machine."""
    groups, elsewhere = [], unread_data(arguments)
    for name, evaluation in ((arguments.dataset, False), (arguments.eval_dataset, True)):
        if name is not None and name not in elsewhere:
            groups += _read_groups(name, load_prompts(arguments, evaluation=evaluation, limit=count))
    return groups


def unread_data(arguments: PolicyArguments) -> list[str]:
    """The data sets that are not on this machine, but may be on a hub."""
    named = (name for name in (arguments.dataset, arguments.eval_dataset) if name is not None)
    elsewhere = (name for name in named if name not in arguments.sources and not Path(name).exists())
    return [name for name in elsewhere if not name.endswith((".json", ".jsonl"))]


def _read_groups(name: str, rows: Dataset) -> list[ResponseGroup]:
    if "prompt" not in rows.column_names:
        raise ConfigurationError(f"dataset {name} has the columns {rows.column_names}, expected prompt among them")
    for number, prompt in enumerate(rows["prompt"]):
        if not isinstance(prompt, str | list) or not prompt:
            raise ConfigurationError(
                f"dataset {name}, row {number}: prompt is {prompt!r}, expected text or a list of messages"
            )
    columns = {column: rows[column] for column in ("image", "images") if column in rows.column_names}
    text = next((number for number, prompt in enumerate(rows["prompt"]) if isinstance(prompt, str)), None)
    if text is not None and any(value != [] for values in columns.values() for value in values):
        raise ConfigurationError(
            f"dataset {name}, row {text}: prompt is text beside the column {', '.join(columns)}, where TRL's trainers "
            "expect chat messages; write [{'role': 'user', 'content': ...}]"
        )
    return read_rollouts(rows["prompt"], [""] * len(rows), columns)[0]
