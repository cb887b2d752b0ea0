"""`mr-reward doctor`: what is wrong with a recipe, a reward model or this machine, before anything is loaded."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import yaml
from rich.console import Console
from trl import GRPOConfig, ModelConfig, TrlParser

from mr_reward.doctor.findings import Finding, may_start, show_findings
from mr_reward.doctor.machine import check_devices, check_versions
from mr_reward.doctor.reward_model import score_whole
from mr_reward.doctor.run import check_reward_folder, check_run
from mr_reward.errors import ConfigurationError, MRRewardError
from mr_reward.runs.arguments import PolicyTrainingArguments
from mr_reward.runs.launch import Launch, read_environment, read_launch
from mr_reward.runs.plan import RunPlan, planned_arguments
from mr_reward.runs.recipe import PolicyArguments, first_prompts, plan_run
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
        parser = TrlParser(
            (recipe_type, planned_arguments(PolicyTrainingArguments, launch.num_processes), ModelConfig)
        )
        parser.error = _refuse  # argparse would end the process
        # On a machine without a GPU the trainer's configuration refuses bf16 unless it is told to use the CPU.
        recipe, args, model_config = parser.parse_args_and_config(args=[*arguments, "--use_cpu", "true"])
        plan = plan_run(recipe, args, model_config, launch, first_prompts(recipe), use_cpu=_asks_for_cpu(arguments))
    except (MRRewardError, OSError, ValueError, yaml.YAMLError) as error:
        return [Finding("red", "configuration", str(error))]
    findings = check_run(plan)
    if score and may_start(findings) and plan.reward_model is not None:
        findings.append(_score(plan))
    return findings


def examine_machine(model: str | None = None, *, score: bool = False) -> list[Finding]:
    """Check this machine, and a reward model if one is given.

    Args:
        model: folder or hub id of a reward model.
        score: score with the model itself too.

    Returns:
        The findings.
    """
    findings = [*check_versions(), check_devices(use_cpu=None, bf16=False)]
    if model is not None:
        findings += check_reward_folder(model)
        if score and may_start(findings):
            findings.append(_score_folder(model, (), {}))
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
    """
    if recipe.skip_doctor:
        return True
    try:
        plan = plan_run(
            recipe, args, model_config, read_environment(), first_prompts(recipe), use_cpu=bool(args.use_cpu)
        )
        findings = check_run(plan)
    except (MRRewardError, OSError, ValueError) as error:
        findings = [Finding("red", "configuration", str(error))]
    good = may_start(findings)
    if args.process_index == 0:
        for finding in findings:
            if finding.level == "yellow":
                logger.warning("doctor: %s: %s", finding.what, finding.text)
    shown = findings if args.process_index == 0 else [finding for finding in findings if finding.level == "red"]
    if shown:
        title = "may start" if good else "not started (skip_doctor: true starts all the same)"
        show_findings(shown, Console(stderr=True), title=f"rank {args.process_index}: {title}")
    return good


def _refuse(message: str) -> NoReturn:
    raise ConfigurationError(message)


def _asks_for_cpu(arguments: Sequence[str]) -> bool:
    """What the recipe says, before it is told to use the CPU here."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--use_cpu", nargs="?", const=True)
    given, _ = parser.parse_known_args(arguments)
    value = given.use_cpu
    if value is None and given.config is not None:
        with open(given.config, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        value = content.get("use_cpu") if isinstance(content, dict) else None
    return str(value).lower() in ("true", "1", "yes")


def _score(plan: RunPlan) -> Finding:
    options = {
        "dtype": plan.reward_dtype,
        "attn_implementation": plan.reward_attention,
        "max_tokens_per_batch": plan.reward_max_tokens,
    }
    return _score_folder(str(plan.reward_model), plan.prompts, options)


def _score_folder(model: str, prompts: Sequence[Any], options: dict[str, Any]) -> Finding:
    try:
        return score_whole(require_local(open_scorer(model, **options), "--score"), prompts)
    except MRRewardError as error:
        return Finding("red", "score", str(error))
