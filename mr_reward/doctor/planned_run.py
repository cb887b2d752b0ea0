"""A GRPO run before it starts, and the checks of its trainer's side: groups, rewards, policy, vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig
from trl import GRPOConfig, ModelConfig

from mr_reward.checkpoint.verify import has_file, weight_shapes
from mr_reward.doctor.findings import Finding
from mr_reward.errors import CheckpointError, ConfigurationError
from mr_reward.grpo.groups import PlannedGroup, RolloutRow, plan_groups
from mr_reward.runs.launch import Launch
from mr_reward.runs.recipe import PolicyArguments, PolicyTrainingArguments, first_prompts, other_rewards, unread_data
from mr_reward.runs.vllm import check_vllm_server

__all__ = ["PlannedRun", "check_trainer", "group_map", "needed_packages", "planned_arguments"]

_REPORT_MODULES = ("wandb", "trackio", "tensorboard", "mlflow", "swanlab")
_WHOLE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_WEIGHT_FILES = (*_WHOLE_WEIGHTS, "adapter_model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SHOWN_RANKS, _SHOWN_GROUPS = 8, 6


@dataclass
class PlannedRun:
    """A run as its recipe describes it; ConfigurationError if prompts or rewards cannot be read."""

    recipe: PolicyArguments
    args: GRPOConfig
    model_config: ModelConfig  # of the policy
    launch: Launch
    use_cpu: bool  # what the recipe says

    def __post_init__(self) -> None:
        if not self.model_config.model_name_or_path:
            raise ConfigurationError("model_name_or_path is missing; give the policy's folder or hub id")
        self.policy: str = self.model_config.model_name_or_path
        self.prompts = first_prompts(self.recipe)  # some, with any one response
        self.num_reward_funcs = 1 + len(other_rewards(self.recipe, self.args))

    @property
    def is_here(self) -> bool:
        """Whether the run can be meant for this machine; elsewhere, what is missing says little."""
        return self.use_cpu or torch.cuda.is_available()


def planned_arguments(num_processes: int) -> type[PolicyTrainingArguments]:
    """TRL's configuration that checks itself as if it ran on so many processes, with a GPU or without."""

    class PlannedArguments(PolicyTrainingArguments):
        __doc__ = PolicyTrainingArguments.__doc__
        use_cpu: bool
        world_size = property(lambda self: num_processes)

        def __post_init__(self) -> None:
            self.asks_for_cpu, self.use_cpu = bool(self.use_cpu), True  # without a GPU, bf16 would be refused
            super().__post_init__()

    return PlannedArguments


def check_trainer(run: PlannedRun) -> Iterator[Finding]:
    """The trainer's side of a run, in the order in which the run would meet it."""
    yield from _check_groups(run)
    yield from _check_rewards(run)
    yield from _check_policy(run)
    if run.args.use_vllm:
        yield _check_vllm(run)


def needed_packages(run: PlannedRun) -> dict[str, str]:
    """Modules that the recipe cannot do without -> the field that asks for them."""
    args = run.args
    reports = args.report_to if isinstance(args.report_to, list) else [args.report_to or "none"]
    needed = {name: f"report_to: {name}" for name in reports if name in _REPORT_MODULES}
    if args.use_vllm and args.vllm_mode == "colocate":
        needed["vllm"] = "use_vllm: true"
    if run.launch.zero_stage:
        needed["deepspeed"] = f"ZeRO stage {run.launch.zero_stage}"
    if run.recipe.reward_server is not None:
        needed["httpx2"] = "reward_server"
    if args.eval_strategy != "no":
        needed["matplotlib"] = "eval_strategy"
    return needed


def group_map(num_ranks: int, rows_per_rank: int, num_generations: int) -> tuple[list[PlannedGroup], list[str]]:
    """The groups of one call of the reward, as a run plans them, and a line for each rank: what it holds and scores.

    With many ranks or groups the middle is left out, and the line says so.

    Example:
        >>> group_map(2, 2, 4)[1]
        ['rank 0: group 0 (1-2), scores 0', 'rank 1: group 0 (3-4), scores none']
    """
    size = num_generations
    rows = [[rank * rows_per_rank + i for i in range(rows_per_rank)] for rank in range(num_ranks)]
    groups = plan_groups([[RolloutRow(str(row // size), "") for row in own] for own in rows], size)
    lines = []
    for rank, own in enumerate(rows):
        held = []
        for index in range(own[0] // size, own[-1] // size + 1):
            first, last = max(1, own[0] + 1 - index * size), min(size, own[-1] + 1 - index * size)
            held.append(f"{index} (all)" if last - first + 1 == size else f"{index} ({first}-{last})")
        scored = [str(group.index) for group in groups if group.owner == rank]
        word = "group" if len(held) == 1 else "groups"
        lines.append(f"rank {rank}: {word} {_listed(held)}, scores {_listed(scored) or 'none'}")
    if len(lines) > _SHOWN_RANKS:
        half = _SHOWN_RANKS // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} more ranks ...", *lines[-half:]]
    return groups, lines


def _listed(parts: list[str]) -> str:
    if len(parts) <= _SHOWN_GROUPS:
        return " ".join(parts)
    return f"{' '.join(parts[: _SHOWN_GROUPS - 1])} ... {parts[-1]}"


def _check_groups(run: PlannedRun) -> Iterator[Finding]:
    """What does not divide has been refused by `GRPOConfig`, which `planned_arguments` gives the number of ranks."""
    args, processes = run.args, run.launch.num_processes
    size = args.num_generations
    rows = args.per_device_train_batch_size * args.steps_per_generation  # of a rank, in one call of the rewards
    groups, lines = group_map(processes, rows, size)
    shown = (
        f"{processes} process{'es' if processes > 1 else ''} x batch {args.per_device_train_batch_size} x "
        f"{args.steps_per_generation} steps per generation = {rows * processes} rollouts"
    )
    spread = "some on two ranks or more" if any(group.straddles for group in groups) else "each on one rank"
    yield Finding("green", "groups", f"{shown}: {len(groups)} groups of {size}, {spread}")
    yield Finding("green", "who holds what", "\n".join(lines))
    if args.eval_strategy == "no":
        return
    if run.recipe.eval_dataset is None:
        text = f"eval_dataset is missing beside eval_strategy: {args.eval_strategy.value}; name the held-out prompts"
        yield Finding("red", "evaluation", text)
    else:
        rows = args.per_device_eval_batch_size * processes
        yield Finding("green", "evaluation", f"batches of {rows} rows, groups of {args.num_generations_eval or size}")


def _check_rewards(run: PlannedRun) -> Iterator[Finding]:
    weights, functions = run.args.reward_weights, run.num_reward_funcs
    if weights is not None and len(weights) != functions:
        text = f"{len(weights)} weights for {functions} reward functions; give one for each"
        yield Finding("red", "reward_weights", text)
    else:
        shown = "all 1" if weights is None else ", ".join(map(str, weights))
        yield Finding("green", "rewards", f"{functions} in all, weights {shown}, KL weight {run.args.beta:g}")
    read, unread = f"read {len(run.prompts)} of them", unread_data(run.recipe)
    if unread:
        yield Finding("yellow", "prompts", f"{read}; not looked at, as on the hub: {', '.join(unread)}")
    else:
        yield Finding("green", "prompts", read)


def _check_policy(run: PlannedRun) -> Iterator[Finding]:
    name, folder = run.policy, Path(run.policy)
    if getattr(run.args, "trust_remote_code", False):
        text = f"trust_remote_code is on: Python code of {name} is run with your rights; read it first"
        yield Finding("yellow", "foreign code", text)
    try:
        if has_file(name, "config.json"):
            if folder.is_dir():
                _check_weight_files(folder)
            AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            yield Finding("green", "policy", f"{name}: its files are there")
            return
    except (CheckpointError, OSError, ValueError) as error:
        yield Finding("red", "policy", f"{name}: {error}")
        return
    if (folder / "adapter_config.json").is_file():
        yield Finding("yellow", "policy", f"{name}: an adapter; merge it to have it checked")
        return
    text = f"{name} is no folder with a config.json, and no hub within reach has it; give the policy's folder"
    # On another machine than that of the run, a name of the hub may well be right.
    unknown = not run.is_here and _HUB_ID.fullmatch(name)
    yield Finding("yellow" if unknown else "red", "policy", f"{text} as model_name_or_path")


def _check_weight_files(folder: Path) -> None:
    if not any((folder / file).is_file() for file in _WEIGHT_FILES):
        raise CheckpointError(f"no weights ({', '.join(_WEIGHT_FILES[:3])}); copy them too")
    if any((folder / file).is_file() for file in _WHOLE_WEIGHTS):
        weight_shapes(folder)


def _check_vllm(run: PlannedRun) -> Finding:
    args = run.args
    if args.vllm_mode == "server":
        try:
            check_vllm_server(args, run.policy)
        except ConfigurationError as error:
            return Finding("yellow", "vLLM server", f"{error} (it need not run yet for a dry run)")
        return Finding("green", "vLLM server", "answers, and can be trained with")
    limit, completion = args.vllm_max_model_length, args.max_completion_length or 0
    if limit is not None and limit <= completion:
        text = f"vllm_max_model_length={limit} leaves no room for a prompt beside max_completion_length={completion}"
        return Finding("red", "vLLM", f"{text}; raise it")
    sleep = "with" if args.vllm_enable_sleep_mode else "without"
    return Finding("green", "vLLM", f"colocated, {args.vllm_gpu_memory_utilization:.0%} of each GPU, {sleep} sleep")
