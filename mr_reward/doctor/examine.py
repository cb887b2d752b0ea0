"""What `mr-reward doctor` and a run that is about to start call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import yaml
from rich.console import Console
from trl import GRPOConfig, ModelConfig, TrlParser

from mr_reward.doctor.findings import Finding, may_start, show_findings
from mr_reward.doctor.machine import check_devices, check_needed, check_output_folder, check_versions
from mr_reward.doctor.planned_run import PlannedRun, check_trainer, needed_packages, planned_arguments
from mr_reward.doctor.reward_model import check_reward_folder, check_reward_of_run, score_whole
from mr_reward.errors import ConfigurationError, MRRewardError
from mr_reward.groups import ResponseGroup
from mr_reward.runs.launch import Launch, read_environment, read_launch
from mr_reward.runs.recipe import PolicyArguments, scorer_options
from mr_reward.scorers.opening import open_scorer, require_local

__all__ = ["check_before_start", "examine_machine", "examine_recipe"]

logger = logging.getLogger(__name__)


def examine_recipe(
    arguments: Sequence[str],
    *,
    accelerate_config: str | None = None,
    num_processes: int | None = None,
    score: bool = False,
    recipe_type: type[PolicyArguments] = PolicyArguments,
) -> list[Finding]:
    """Check a recipe as if it ran on so many processes, on any machine.

    Args:
        arguments: as for `train_policy.py`: `--config FILE` and any field as `--name value`.
        accelerate_config: file that `accelerate launch` will get.
        num_processes: of the run; None for that of the file, or one.
        score: score a prompt with the reward model itself too, for which its weights are loaded.
        recipe_type: with the fields of the recipe's own data sets.

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
        parser = TrlParser((recipe_type, planned_arguments(launch.num_processes), ModelConfig))
        parser.error = _refuse  # argparse would end the process
        recipe, args, model_config = parser.parse_args_and_config(args=list(arguments))
        run = PlannedRun(recipe, args, model_config, launch, args.asks_for_cpu)
    except (MRRewardError, OSError, ValueError, yaml.YAMLError) as error:
        return [Finding("red", "configuration", str(error))]
    findings = _check_run(run)
    if score and may_start(findings) and recipe.reward_model is not None:
        findings.append(_score(recipe.reward_model, run.prompts, scorer_options(recipe)))
    return findings


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
            findings.append(_score(model, (), {}))
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
    given = str(args.resume_from_checkpoint or "false")  # on the command line everything is text
    resume = given.lower() == "true" if given.lower() in ("true", "false") else given
    findings = [
        *check_versions(),
        *check_needed(needed_packages(run), here=run.is_here),
        check_devices(use_cpu=run.use_cpu, bf16=bool(args.bf16), num_local_processes=launch.num_local_processes),
        *check_output_folder(str(args.output_dir), resume=resume, num_processes=launch.num_processes),
        *check_trainer(run),
    ]
    return [*findings, *check_reward_of_run(run, try_it=may_start(findings))]


def _score(model: str, prompts: Sequence[ResponseGroup], options: dict[str, Any]) -> Finding:
    try:
        return score_whole(require_local(open_scorer(model, **options), "--score"), prompts)
    except MRRewardError as error:
        return Finding("red", "score", str(error))


def _refuse(message: str) -> NoReturn:
    raise ConfigurationError(message)
