"""`mr-reward collect | label`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mr_reward.cli.options import BAD_ROWS, Dtype, refuse_unread
from mr_reward.errors import ConfigurationError

if TYPE_CHECKING:
    from mr_reward.data.labels import Labeller
    from mr_reward.runs.collect import Collected

KEY_VARIABLE = "MR_REWARD_JUDGE_KEY"


def collect(
    context: typer.Context,
    policy: Annotated[str, typer.Argument(help="Policy (folder or hub id); with --logged the folder of a GRPO run")],
    prompts: Annotated[str | None, typer.Argument(help="Prompts as for GRPO: file, folder or hub id")] = None,
    out: Annotated[Path, typer.Option(help="The .jsonl file to write, or to resume")] = Path("rollouts.jsonl"),
    n: Annotated[int, typer.Option("--n", min=1, help="Rollouts of a prompt")] = 8,
    split: Annotated[str | None, typer.Option(help="Split of the prompts")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the sampling")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Of the sampling; 0 for all tokens")] = 0,
    min_p: Annotated[float | None, typer.Option(help="Of the sampling")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Of the sampling")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a rollout")] = 256,
    template: Annotated[str | None, typer.Option(help="For the chat template: '{\"enable_thinking\": false}'")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts that are answered at a time")] = 8,
    dtype: Dtype = None,
    use_vllm: Annotated[bool, typer.Option("--use-vllm", "--use_vllm", help="By vLLM")] = False,
    logged: Annotated[
        bool, typer.Option("--logged", help="Take the groups that a run has logged (log_groups_steps)")
    ] = False,
) -> None:
    """Write N rollouts of a policy for each prompt, as groups that nobody has ranked yet; `mr-reward label` does it.

    Prompts are rendered as TRL's trainers render them. Of equal rollouts one is kept, and counted. The same command
    resumes a run that was interrupted; under `accelerate launch` each process takes a share
    (grpo_recipes/collect.py).

    Example: mr-reward collect outputs/policy prompts.jsonl --n 8 --out rollouts.jsonl

    Example: mr-reward collect outputs/run prompts.jsonl --logged --out rollouts.jsonl
    """
    from mr_reward.runs.collect import CollectArguments, collect_logged, prompt_rows
    from mr_reward.runs.collect import collect as write_rollouts

    if logged:
        asked = ("n", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "template")
        refuse_unread(context, "a policy that writes (no --logged)", (*asked, "batch", "dtype", "use_vllm"))
    arguments = CollectArguments(
        policy=policy,
        dataset=prompts,
        dataset_split=split,
        out=str(out),
        num_generations=n,
        limit=limit,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_completion_length=max_tokens,
        chat_template_kwargs=template,
        prompts_per_batch=batch,
        dtype=dtype,
        use_vllm=use_vllm,
    )
    if logged:
        collected = collect_logged(policy, out, None if prompts is None else prompt_rows(arguments))
    elif prompts is None:
        raise ConfigurationError("PROMPTS is missing; give the prompts, or --logged for the groups of a run")
    else:
        found = write_rollouts(arguments)
        if found is None:  # another process of this launch tells it
            return
        collected = found
    Console().print(collected_table(collected, str(out)))


def collected_table(collected: Collected, out: str) -> Table:
    """What a file of rollouts holds, for the terminal."""
    table = Table("groups", str(collected.groups), title=out, show_header=True)
    table.add_row("responses", str(collected.responses))
    table.add_row("duplicates dropped", str(collected.duplicates))
    table.add_row("cut off before their end", str(collected.cut_off))
    table.add_row("groups with a single response", str(collected.single))
    if collected.repeated_groups:
        table.add_row("groups dropped, logged before", str(collected.repeated_groups))
    return table


def judge_at(url: str, **options: Any) -> Labeller:
    """A judge behind a chat endpoint, with the key of the environment."""
    from mr_reward.data.judge_endpoint import JudgeEndpoint

    return JudgeEndpoint(url, key=os.environ.get(KEY_VARIABLE), **options)


def label(
    context: typer.Context,
    rollouts: Annotated[Path, typer.Argument(help=".jsonl file of groups, as `mr-reward collect` writes it")],
    out: Annotated[Path, typer.Option(help="The .jsonl file of ranked groups to write, or to resume")],
    verifier: Annotated[
        str | None, typer.Option(help="Reward function as TRL's trainers take it, as package.module.function")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="URL of a chat endpoint as OpenAI's, up to /v1")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its model; else the only one that it serves")] = None,
    passes: Annotated[int, typer.Option(min=1, help="Judgments of a group, each in an order drawn anew")] = 3,
    budget: Annotated[int | None, typer.Option(min=1, help="Requests to the judge, at most")] = None,
    criteria: Annotated[str | None, typer.Option(help="What the judge is to look at, as text")] = None,
    people: Annotated[
        str | None, typer.Option(help="Who labels by hand, on a page of this machine, with the keyboard alone")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of that page; 0 for a free one")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds until an answer of the judge counts as lost")] = 120.0,
    seed: Annotated[int, typer.Option(help="Seed of the orders")] = 0,
    media: Annotated[Path | None, typer.Option(help="Folder that images of the rows have to lie in")] = None,
) -> None:
    """Rank the groups of a file by a verifier, a judge or people; each line says by whom (`labelled_by`).

    Equal rewards tie. The result is an ordinary file of ranked groups. The same command resumes after an interruption,
    and tries groups again that got no label; while there are some the exit code is 3. The key of a judge stands in the
    environment variable MR_REWARD_JUDGE_KEY.

    Example: mr-reward label rollouts.jsonl --verifier my_package.rewards.accuracy --out train.jsonl

    Example: mr-reward label rollouts.jsonl --judge http://127.0.0.1:8000/v1 --passes 3 --out train.jsonl

    Example: mr-reward label rollouts.jsonl --people anna --out train.jsonl
    """
    from mr_reward.data.labels import label_groups

    if sum(given is not None for given in (verifier, judge, people)) != 1:
        raise ConfigurationError("give one of --verifier, --judge and --people: who is to label?")
    if judge is None:
        refuse_unread(context, "--judge", ("judge_model", "passes", "budget", "criteria", "timeout"))
    if people is None:
        refuse_unread(context, "--people", ("port",))
    if verifier is not None:
        refuse_unread(context, "--judge or --people", ("seed",))
    labeller: Labeller
    page: AbstractContextManager[Any] = nullcontext()
    if verifier is not None:
        from mr_reward.data.labels import Verifier
        from mr_reward.runs.recipe import import_reward

        labeller = Verifier(import_reward(verifier, option="--verifier"), verifier)
    elif people is not None:
        from mr_reward.data.people import People

        labeller = page = People(people, seed=seed, port=port)
    else:
        options = {"passes": passes, "budget": budget, "seed": seed, "timeout": timeout}
        labeller = judge_at(str(judge), model=judge_model, criteria=criteria, **options)
    with page:
        done = label_groups(rollouts, out, labeller, media_within=media)
    table = Table("groups", str(out))
    table.add_row("labelled now", str(done.labelled))
    table.add_row("labelled before", str(done.before))
    table.add_row("labelled by", labeller.name)
    table.add_row("all responses tied", str(done.all_tied))
    numbers = {"left out: a single response": done.single}
    numbers |= {f"no label: {why}": count for why, count in done.left_out.items()} | {"not reached": done.not_reached}
    for what, number in numbers.items():
        if number:
            table.add_row(what, str(number))
    if done.agreement is not None:
        table.add_row("agreement of the passes", f"{done.agreement:.1%}")
    Console().print(table)
    if done.left_out or done.not_reached:
        raise typer.Exit(BAD_ROWS)
