"""Deliberate bugs, each of which some test has to catch.

    python tests/mutation_check.py            # all of them, some 10 minutes on two cores
    python tests/mutation_check.py span head  # those whose names contain one of the words

Each changes a line of a copy of the package and runs the tests that should notice. A bug that no test notices is a
survivor: exit code 1, and a test is missing. A line that is not found any more is an error: the list in
`mutations.py` goes with the code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutations import MUTATIONS, Mutation
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def caught(mutation: Mutation) -> tuple[bool, float, str]:
    """Whether a test noticed, how many seconds that took, and which it was."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mr_reward", "tests", "grpo_recipes", "configs", "benchmarks", "docs"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "constraints.txt", "requirements-vllm-cpu.txt"):
            shutil.copy(ROOT / name, folder)
        path = Path(folder, "mr_reward", mutation.file)
        source = path.read_text()
        if source.count(mutation.line) != 1:
            raise SystemExit(f"{mutation.name}: {source.count(mutation.line)} places in {mutation.file}, expected one")
        path.write_text(source.replace(mutation.line, mutation.bug))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
        done = subprocess.run(
            [*command, *mutation.tests.split()],
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
    rows = [(one, *caught(one)) for one in tqdm(chosen, unit=" bugs")]
    console, table = Console(), Table("bug", "file", Column("caught by", overflow="fold"), "seconds")
    for one, found, seconds, test in rows:
        table.add_row(one.name, one.file, test if found else f"[red]SURVIVED[/] {test}", f"{seconds:.0f}")
    console.print(table)
    survivors = [one.name for one, found, *_ in rows if not found]
    sys.stdout.write(json.dumps({"bugs": len(rows), "survivors": survivors}) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
