"""The commands put together, and how they report errors."""

import logging
from typing import Annotated

import typer

from mr_reward import __version__
from mr_reward.cli.checkpoints import card, export, merge, verify
from mr_reward.cli.collect import collect, label
from mr_reward.cli.data import data
from mr_reward.cli.doctor import doctor
from mr_reward.cli.errors import one_error_line
from mr_reward.cli.evaluate import attack, compare, evaluate
from mr_reward.cli.inspect import inspect
from mr_reward.cli.mr2bench import mr2bench
from mr_reward.cli.refresh import refresh
from mr_reward.cli.score import score
from mr_reward.cli.serve import serve

app = typer.Typer(
    help="Multi-response reward models: collect and label rollouts, score, look, check a run, evaluate, serve.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")
app.add_typer(mr2bench, name="mr2bench")
for command in (collect, label, score, inspect, evaluate, compare, attack, merge, export, card, verify, serve):
    app.command()(command)
# Any field of a recipe may follow.
for with_fields in (doctor, refresh):
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(with_fields)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mr-reward {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop")
    ] = False,
) -> None:
    """What stands before a command."""


def main() -> None:
    """Entry point of `mr-reward`: an error of this package or of a file is one line and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_error_line():
        app()
