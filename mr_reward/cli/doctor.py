"""`mr-reward doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mr_reward.errors import ConfigurationError


def doctor(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="Recipe of train_policy.py or pretrain_rm.py; else this machine")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Without a recipe: a reward model to look at too")] = None,
    accelerate_config: Annotated[
        Path | None, typer.Option("--accelerate-config", "--accelerate_config", help="File for accelerate launch")
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option("--num-processes", "--num_processes", min=1, help="Of the run; else the file's")
    ] = None,
    score: Annotated[bool, typer.Option("--score", help="Load the reward model and score a prompt with it")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON document")] = False,
) -> None:
    """Check a run before it costs a GPU: in seconds, without loading a weight. Exit code 1 if anything is red.

    Only where the recipe names heldout_rollouts, its reward model is loaded and scores them.

    Versions, devices, who holds which rollout, lengths, attention, the reward model's folder, memory, and a score of
    its architecture made tiny. Of the recipe of a reward model: its data, read as the training reads them, its
    backbone, and what the trainer says. Any field of the recipe can be given as --name value.

    Example: mr-reward doctor --config recipe.yaml --num-processes 8 --num_generations 16
    """
    from mr_reward.doctor.examine import examine_machine, examine_recipe
    from mr_reward.doctor.findings import may_start, show_findings
    from mr_reward.doctor.recipes import trains_reward_model
    from mr_reward.worlds.world_policy import WorldPolicyArguments
    from mr_reward.worlds.world_pretraining import WorldRewardArguments

    if config is None and context.args and Path(context.args[0]).is_file():
        config = Path(context.args.pop(0))
    if config is not None:
        if model is not None:
            raise ConfigurationError("--model goes without --config; a recipe names its own, or say --reward_model")
        arguments = ["--config", str(config), *context.args]
        findings = examine_recipe(
            arguments,
            accelerate_config=accelerate_config,
            num_processes=num_processes,
            score=score,
            recipe_type=WorldRewardArguments if trains_reward_model(arguments) else WorldPolicyArguments,
        )
    else:
        if context.args:
            raise ConfigurationError(f"got {' '.join(context.args)} without --config; give the recipe they belong to")
        findings = examine_machine(model, score=score)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        show_findings(findings, Console(), title=str(config or model or "this machine"))
    if not may_start(findings):
        raise typer.Exit(1)
