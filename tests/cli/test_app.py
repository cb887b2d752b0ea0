"""The command line as a whole: every command helps itself, and its examples are true."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import pytest
import typer

import mr_reward
from mr_reward.cli.app import app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The commands below one, with the words that call them."""
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))
    else:
        yield path, command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_an_example_that_parses(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    text = re.sub(r"\s+", " ", command.help or "")
    examples = re.findall(r"Example: (.*?)(?= Example: |$)", text)
    assert examples, f"mr-reward {' '.join(path)} has no example in its help"
    for example in examples:
        (ours,) = [part for part in example.split("|") if "mr-reward " in part]
        words = shlex.split(ours)
        assert words[: len(path) + 1] == ["mr-reward", *path]
        command.make_context(path[-1], words[len(path) + 1 :])  # an unknown or missing option would raise
    assert all(parameter.help for parameter in command.params if parameter.name != "help"), "an option without help"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_is_passed_on(path: tuple[str, ...]) -> None:
    """One that a command takes and does not look at is worse than one that it does not know."""
    function = inspect.unwrap(COMMANDS[path].callback)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    names = [node for statement in tree.body for node in ast.walk(statement) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    options = set(inspect.signature(function).parameters)
    assert options and options <= read, f"mr-reward {' '.join(path)} does not use {sorted(options - read)}"


def test_start_is_quick_and_loads_no_framework() -> None:
    code = (
        "import sys; from mr_reward.cli import main; sys.argv = ['mr-reward', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
        if seconds[-1] < 3.0:
            break
    assert min(seconds) < 3.0


def test_version_and_errors_of_one_line() -> None:
    base = [sys.executable, "-c", "from mr_reward.cli import main; main()"]
    shown = subprocess.run([*base, "--version"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, f"mr-reward {mr_reward.__version__}\n")
    wrong = subprocess.run([*base, "score", "rm", "none.jsonl"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stdout == "" and wrong.stderr.startswith("error: none.jsonl: is not a file")
    assert wrong.stderr.count("\n") == 1
