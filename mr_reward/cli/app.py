"""The commands put together, and how they report errors."""

import logging
import sys

import typer
from rich.console import Console

from mr_reward.cli.checkpoints import card, export, merge
from mr_reward.cli.data import data
from mr_reward.cli.evaluate import compare, evaluate
from mr_reward.cli.mr2bench import mr2bench
from mr_reward.cli.score import score
from mr_reward.cli.serve import serve
from mr_reward.errors import MRRewardError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Multi-response reward models: data, evaluation, checkpoints, a scoring server.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")
app.add_typer(mr2bench, name="mr2bench")
for command in (score, evaluate, compare, merge, export, card, serve):
    app.command()(command)


def main() -> None:
    """Entry point of `mr-reward`: an error of this package or of a file is one line and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        app()
    except (MRRewardError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print("error:", error, style="red", markup=False, highlight=False)
        sys.exit(1)
