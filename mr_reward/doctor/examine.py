"""What `mr-reward doctor` and a run that is about to start call: the planned run, and the checks of its trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from rich.console import Console
from trl import GRPOConfig, ModelConfig

from mr_reward.doctor.findings import Finding, may_start, show_findings
from mr_reward.doctor.machine import check_devices, check_needed, check_versions
from mr_reward.doctor.recipes import (
    check_folder_of_run,
    check_model_files,
    given_fields,
    is_hub_name,
    needed_packages,
    read_recipe,
)
from mr_reward.doctor.reward_model import (
    check_reward_folder,
    check_reward_of_run,
    check_rollouts,
    judge_rollouts,
    score_whole,
)
from mr_reward.doctor.reward_recipe import examine_reward_recipe
from mr_reward.errors import ConfigurationError, MRRewardError, ScoringServerError
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.groups import PlannedGroup, RolloutRow, plan_groups
from mr_reward.hub import why_missing
from mr_reward.runs.launch import Launch, read_environment, read_launch
from mr_reward.runs.pretraining import RewardModelArguments
from mr_reward.runs.recipe import (
    PolicyArguments,
    PolicyTrainingArguments,
    first_prompts,
    make_reward,
    other_rewards,
    scorer_options,
    unread_data,
)
from mr_reward.runs.vllm import check_vllm_server

logger = logging.getLogger(__name__)

_SHOWN_RANKS, _SHOWN_GROUPS = 4, 6  # of the ranks as many at either end


@dataclass
class PlannedRun:
    """A run as its recipe describes it; what cannot be read of it is in `problems`."""

    recipe: PolicyArguments
    args: GRPOConfig
    model_config: ModelConfig  # of the policy
    launch: Launch
    use_cpu: bool  # what the recipe says

    def __post_init__(self) -> None:
        self.problems: list[Finding] = []
        self.policy: str = self.model_config.model_name_or_path or ""
        if not self.policy:
            self._note("model_name_or_path is missing; give the policy's folder or hub id")
        self.prompts: list[ResponseGroup] = []  # some, with any one response
        try:
            self.prompts = first_prompts(self.recipe)
        except (MRRewardError, OSError, ValueError) as error:
            self._note(str(error))
        self.num_reward_funcs: int | None = None
        try:
            self.num_reward_funcs = 1 + len(other_rewards(self.recipe, self.args))
        except (MRRewardError, OSError, ValueError) as error:
            self._note(str(error))

    def _note(self, problem: str) -> None:
        self.problems.append(Finding("red", "configuration", problem))

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


def examine_recipe(
    arguments: Sequence[str],
    *,
    accelerate_config: str | Path | None = None,
    num_processes: int | None = None,
    score: bool = False,
    recipe_type: type[PolicyArguments] | type[RewardModelArguments] = PolicyArguments,
) -> list[Finding]:
    """Check a recipe as if it ran on so many processes, on any machine.

    Args:
        arguments: as for `train_policy.py` or `pretrain_rm.py`: `--config FILE` and any field as `--name value`.
        accelerate_config: file that `accelerate launch` will get.
        num_processes: of the run; None for that of the file, or one.
        score: score a prompt with the reward model itself too, for which its weights are loaded; where the recipe
            names `heldout_rollouts`, they are loaded and those are scored in any case.
        recipe_type: with the fields of the recipe's own data sets; `RewardModelArguments`, or a kind of it, for the
            recipe of a reward model.

    Returns:
        The findings. A recipe that cannot be read is one red finding.

    Example:
        >>> examine_recipe(["--config", "grpo_recipes/policy_tiny_handwriting_cpu.yaml"])  # doctest: +SKIP
        [Finding(level='green', what='versions', ...), ...]
    """
    try:
        launch = read_launch(accelerate_config) if accelerate_config is not None else Launch()
        if num_processes is not None:
            launch = replace(launch, num_processes=num_processes)
        if issubclass(recipe_type, RewardModelArguments):
            return examine_reward_recipe(arguments, launch, recipe_type)
        planned = recipe_type, planned_arguments(launch.num_processes), ModelConfig
        (recipe, args, model_config), unknown = read_recipe(arguments, *planned)
    except (MRRewardError, OSError, ValueError, yaml.YAMLError) as error:
        # Without TRL's own configuration little of the run can be asked; the machine and the model can.
        return [Finding("red", "configuration", str(error)), *check_versions(), *_check_named(arguments)]
    run = PlannedRun(recipe, args, model_config, launch, args.asks_for_cpu)
    run.problems += unknown
    findings = _check_run(run)
    if score and may_start(findings) and recipe.reward_model is not None:
        findings.append(score_whole(recipe.reward_model, run.prompts, **scorer_options(recipe)))
    if recipe.heldout_rollouts is not None and may_start(findings):
        findings.append(_judge(run))
    return findings


def _judge(run: PlannedRun) -> Finding:
    """The held-out rollouts, scored as the run scores; the only check that loads weights without being asked to."""
    try:
        return judge_rollouts(run.recipe, make_reward(run.recipe, run.args).scorer)
    except ScoringServerError as error:
        return Finding("yellow", "held-out rollouts", f"{error} (it need not run yet for a dry run)")
    except MRRewardError as error:
        return Finding("red", "held-out rollouts", str(error))


def examine_machine(model: str | None = None, *, score: bool = False) -> list[Finding]:
    """Check this machine, and a reward model if one is given.

    Args:
        model: folder or hub id of a reward model.
        score: score with the model itself too.

    Returns:
        The findings.

    Example:
        >>> examine_machine("rm")  # doctest: +SKIP
        [Finding(level='green', what='versions', ...), ...]
    """
    findings = [*check_versions(), check_devices(use_cpu=None, bf16=False)]
    if model is not None:
        findings += check_reward_folder(model)
        if score and may_start(findings):
            findings.append(score_whole(model, ()))
    return findings


def check_before_start(recipe: PolicyArguments, args: GRPOConfig, model_config: ModelConfig) -> bool:
    """The checks inside a run that is about to load its models; every rank calls it, the first one shows it.

    Args:
        recipe: its own fields.
        args: TRL's.
        model_config: of the policy.

    Returns:
        Whether the run may start. The first rank shows everything, another what is red on it; what is yellow is
        logged.

    Example:
        >>> recipe = TrlParser((PolicyArguments, GRPOConfig, ModelConfig)).parse_args_and_config()  # doctest: +SKIP
        >>> check_before_start(*recipe)  # doctest: +SKIP
        True
    """
    if recipe.skip_doctor:
        return True
    try:
        findings = _check_run(PlannedRun(recipe, args, model_config, read_environment(), bool(args.use_cpu)))
    except (MRRewardError, OSError, ValueError) as error:
        findings = [Finding("red", "configuration", str(error))]
    good, first = may_start(findings), args.process_index == 0
    for finding in findings:
        if first and finding.level == "yellow":
            logger.warning("doctor: %s: %s", finding.what, finding.text)
    shown = [finding for finding in findings if first or finding.level == "red"]
    if shown:
        title = "may start" if good else "not started (skip_doctor: true starts all the same)"
        show_findings(shown, Console(stderr=True), title=f"rank {args.process_index}: {title}")
    return good


def _check_run(run: PlannedRun) -> list[Finding]:
    """Everything that can be known before a run, in seconds, without loading a weight."""
    args, launch = run.args, run.launch
    findings = [
        *run.problems,
        *check_versions(),
        *check_needed(_needed_packages(run), here=run.is_here),
        check_devices(use_cpu=run.use_cpu, bf16=bool(args.bf16), num_local_processes=launch.num_local_processes),
        *check_folder_of_run(args, launch),
        *_check_groups(run),
        *_check_rewards(run),
        *_check_policy(run),
        *_check_vllm(run),
        *([] if run.recipe.heldout_rollouts is None else [check_rollouts(run.recipe.heldout_rollouts)]),
    ]
    return [*findings, *check_reward_of_run(run, try_it=may_start(findings))]


def _needed_packages(run: PlannedRun) -> dict[str, str]:
    """Modules that the recipe cannot do without -> the field that asks for them."""
    args = run.args
    needed = needed_packages(args, run.launch)
    if args.use_vllm and args.vllm_mode == "colocate":
        needed["vllm"] = "use_vllm: true"
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
    # The text of a response is the rank that holds it.
    groups = plan_groups(
        [[RolloutRow(str(row // size), str(rank)) for row in own] for rank, own in enumerate(rows)], size
    )
    lines = []
    for rank in range(num_ranks):
        held = []
        for group in (group for group in groups if rank in group.holders):
            slots = [i for i, holder in enumerate(group.responses, start=1) if holder == str(rank)]
            held.append(f"{group.index} ({'all' if len(slots) == size else f'{slots[0]}-{slots[-1]}'})")
        scored = [str(group.index) for group in groups if group.owner == rank]
        word = "group" if len(held) == 1 else "groups"
        lines.append(f"rank {rank}: {word} {_listed(held)}, scores {_listed(scored) or 'none'}")
    if num_ranks > 2 * _SHOWN_RANKS + 1:  # a line less for one rank would tell no more
        lines[_SHOWN_RANKS:-_SHOWN_RANKS] = [f"... {num_ranks - 2 * _SHOWN_RANKS} more ranks ..."]
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
    """Functions, weights and prompts."""
    weights, functions = run.args.reward_weights, run.num_reward_funcs
    if functions is None:
        pass
    elif weights is not None and len(weights) != functions:
        text = f"{len(weights)} weights for {functions} reward functions; give one for each"
        yield Finding("red", "reward_weights", text)
    else:
        shown = "all 1" if weights is None else ", ".join(map(str, weights))
        yield Finding("green", "rewards", f"{functions} in all, weights {shown}, KL weight {run.args.beta:g}")
    read, unread = f"read {len(run.prompts)} of them", unread_data(run.recipe)
    if unread:
        yield Finding("yellow", "prompts", f"{read}; not looked at, as on the hub: {', '.join(unread)}")
    elif run.prompts:
        yield Finding("green", "prompts", read)


def _check_policy(run: PlannedRun) -> Iterator[Finding]:
    if not run.policy:
        return
    if getattr(run.args, "trust_remote_code", False):
        text = f"trust_remote_code is on: Python code of {run.policy} is run with your rights; read it first"
        yield Finding("yellow", "foreign code", text)
    yield check_model_files(run.policy, "policy", is_here=run.is_here)
    if run.recipe.ema_half_life and run.launch.zero_stage == 3:
        text = "ema_half_life needs whole weights on each process, which ZeRO-3 cuts; use ZeRO-2, or set it to 0"
        yield Finding("red", "average of the weights", text)


def _check_vllm(run: PlannedRun) -> Iterator[Finding]:
    """The server if it runs already, else whether prompt and completion fit; nothing without vLLM."""
    args = run.args
    limit, completion = args.vllm_max_model_length, args.max_completion_length or 0
    if not args.use_vllm:
        return
    if args.vllm_mode == "server":
        try:
            check_vllm_server(args, run.policy)
            yield Finding("green", "vLLM server", "answers, and can be trained with")
        except ConfigurationError as error:
            yield Finding("yellow", "vLLM server", f"{error} (it need not run yet for a dry run)")
    elif limit is not None and limit <= completion:
        text = f"vllm_max_model_length={limit} leaves no room for a prompt beside max_completion_length={completion}"
        yield Finding("red", "vLLM", f"{text}; raise it")
    else:
        sleep = "with" if args.vllm_enable_sleep_mode else "without"
        text = f"colocated, {args.vllm_gpu_memory_utilization:.0%} of each GPU, {sleep} sleep"
        yield Finding("green", "vLLM", text)


def _check_named(arguments: Sequence[str]) -> Iterator[Finding]:
    """Whether the models that a recipe names are there, where nothing else of it can be looked at."""
    given = given_fields(arguments)
    for what, field in (("policy", "model_name_or_path"), ("reward model", "reward_model")):
        name = given.get(field)
        if not isinstance(name, str) or (what == "policy" and is_hub_name(name)):  # as in `check_model_files`
            continue
        if reason := why_missing(name):
            yield Finding("red", what, f"{name} {reason}")
