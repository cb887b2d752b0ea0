"""`mr-reward mr2bench build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mr_reward.errors import ConfigurationError

mr2bench = typer.Typer(help="N-way benchmarks from raw human judgments.", no_args_is_help=True)


@mr2bench.callback()
def _group() -> None:
    """With a single command typer would leave its name out."""


@mr2bench.command()
def build(
    questions: Annotated[Path, typer.Option(help=".jsonl file: id, prompt, responses by model, images or videos")],
    out: Annotated[Path, typer.Option(help="Folder to write to")],
    votes: Annotated[
        Path | None, typer.Option(help=".jsonl file: question_id, model_a, model_b, winner, annotator")
    ] = None,
    rankings: Annotated[
        Path | None, typer.Option(help=".jsonl file: question_id, ranking by model, annotator")
    ] = None,
    method: Annotated[str, typer.Option(help="For votes: bt_map, pged_greedy, pged_exact or none")] = "bt_map",
    num_responses: Annotated[int, typer.Option(help="Responses of an item")] = 4,
    min_gap: Annotated[float, typer.Option(help="Logits that the best response has to be ahead")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the draws")] = 0,
) -> None:
    """Rank every question by its votes or full rankings, and draw an item with a clear best response from it.

    Example: mr-reward mr2bench build --votes votes.jsonl --questions questions.jsonl --out benchmark
    """
    from mr_reward.mr2bench.build import build_benchmark, write_benchmark
    from mr_reward.mr2bench.judgments import read_questions, read_rankings, read_votes

    if (votes is None) == (rankings is None):
        raise ConfigurationError("give either --votes or --rankings, the human judgments")
    built = build_benchmark(
        read_questions(questions),
        votes=read_votes(votes) if votes else (),
        rankings=read_rankings(rankings) if rankings else (),
        method=method,
        num_responses=num_responses,
        min_gap=min_gap,
        seed=seed,
        source=out.name,
        show_progress=True,
    )
    write_benchmark(built, out, questions.parent)
    console = Console()
    console.print(str(out), markup=False, highlight=False, soft_wrap=True)
    table = Table("", "", show_header=False)
    for name, value in built.facts.items():
        table.add_row(name, value)
    console.print(table)
