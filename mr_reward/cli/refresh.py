"""`mr-reward refresh`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mr_reward.cli.collect import judge_at
from mr_reward.cli.options import BAD_ROWS, refuse_unread
from mr_reward.errors import ConfigurationError

if TYPE_CHECKING:
    from mr_reward.data.labels import Labeller
    from mr_reward.runs.recipe import PolicyArguments


def refresh(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Output folder of a GRPO run, with its checkpoints")],
    config: Annotated[Path, typer.Option(help="Recipe of the run, for train_policy.py")],
    verifier: Annotated[
        str | None, typer.Option(help="Who labels: a reward function; else the truth that the recipe knows")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Who labels: URL of a chat endpoint as OpenAI's, up to /v1")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its model; else the only one that it serves")] = None,
    passes: Annotated[int, typer.Option(min=1, help="Judgments of a group, each in an order drawn anew")] = 3,
    budget: Annotated[int | None, typer.Option(min=1, help="Requests to the judge, at most")] = None,
    groups: Annotated[
        list[str] | None, typer.Option(help="Groups that the reward model was trained on; may be given several times")
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts that are answered, drawn anew for each step")] = 256,
    n: Annotated[int | None, typer.Option("--n", min=2, help="Rollouts of a prompt; else the recipe's")] = None,
    holdout: Annotated[float, typer.Option(help="Share of the prompts that is held out")] = 0.25,
    share: Annotated[float, typer.Option(help="Share of the new groups in the training, beside --groups")] = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the reward model")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Groups of a step")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of the first step; it falls to zero")] = 1e-5,
    loss: Annotated[str, typer.Option(help="best_of_n, plackett_luce or bradley_terry")] = "best_of_n",
    seed: Annotated[int, typer.Option(help="Of the prompts and the order of the groups")] = 0,
) -> None:
    """Train a run's reward model further, on labelled rollouts of its newest checkpoint; then the run can go on.

    Rollouts, labels, training and the measure before and after lie in refresh-STEP of the run's folder. The same
    command resumes after an interruption. Where nobody labels (no --verifier, no --judge, no truth in the recipe) it
    stops behind the rollouts and goes on once they are labelled. Any field of the recipe can follow as --name value.

    Example: mr-reward refresh outputs/policy --config policy.yaml --verifier my_package.rewards.accuracy
    """
    from mr_reward.doctor.recipes import read_recipe
    from mr_reward.runs.recipe import PolicyTrainingArguments
    from mr_reward.runs.refresh import LABELLED, RefreshPlan
    from mr_reward.runs.refresh import refresh as do_refresh
    from mr_reward.training.further import FurtherSteps
    from mr_reward.worlds.world_policy import WorldCollectArguments, WorldPolicyArguments

    known = {
        field.name
        for kind in (WorldPolicyArguments, WorldCollectArguments, PolicyTrainingArguments)
        for field in fields(kind)
    }
    if strange := [arg for arg in context.args if arg[:2] == "--" and arg[2:].split("=")[0] not in known]:
        raise ConfigurationError(f"there is no option or field {', '.join(strange)}")
    arguments = ["--config", str(config), *context.args]
    # Each takes the fields that it knows: the sampling of a run has the names of a collection.
    try:
        (recipe,), _ = read_recipe(arguments, WorldPolicyArguments)
        (collecting,), _ = read_recipe(arguments, WorldCollectArguments)
    except ValueError as error:
        raise ConfigurationError(f"{config} cannot be read: {error}") from error
    if verifier is not None and judge is not None:
        raise ConfigurationError("give one of --verifier and --judge: who is to label?")
    labeller = _labeller(recipe, verifier)
    if judge is not None:
        labeller = judge_at(judge, model=judge_model, passes=passes, budget=budget, seed=seed)
    else:
        refuse_unread(context, "--judge", ("judge_model", "passes", "budget"))
    if not groups:
        refuse_unread(context, "--groups", ("share",))
    plan = RefreshPlan(
        labeller=labeller,
        old=tuple(groups or ()),
        prompts=prompts,
        holdout=holdout,
        how=FurtherSteps(
            steps=steps, batch_size=batch, learning_rate=learning_rate, share=share, loss=loss, seed=seed
        ),
    )
    done = do_refresh(run, recipe, collecting if n is None else replace(collecting, num_generations=n), plan)
    console = Console(soft_wrap=True)
    if done is None:
        raise typer.Exit(BAD_ROWS)
    if isinstance(done, Path):
        out = done.with_name(LABELLED)
        console.print(f"nobody labels: mr-reward label {done} --people NAME --out {out}", markup=False)
        console.print("then the same command goes on", markup=False)
        raise typer.Exit(BAD_ROWS)
    table = Table("", "groups", "right above wrong before", "after", title=f"rollouts of step {done.step}")
    before, after = (f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (done.before, done.after))
    table.add_row("held out", str(done.heldout_groups), before, after)
    table.add_row("trained on", str(done.train_groups), "", "")
    console.print(table)
    console.print(
        f"go on: train_policy.py --config {config} --resume_from_checkpoint true --reward_model {done.folder}",
        markup=False,
    )


def _labeller(recipe: PolicyArguments, verifier: str | None) -> Labeller | None:
    """A verifier, named or known to the recipe."""
    from mr_reward.data.labels import Verifier
    from mr_reward.runs.recipe import import_reward, truths

    if verifier is not None:
        return Verifier(import_reward(verifier, option="--verifier"), verifier)
    known = truths(recipe)
    return Verifier(known[0], known[0].__name__) if known else None
