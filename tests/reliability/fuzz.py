"""Fuzz the inputs that come from outside for as long as you like.

    python tests/reliability/fuzz.py --seconds 600             # every input in turn
    python tests/reliability/fuzz.py --only image --seed 7 --seconds 60

What is found is printed with the seed that brings it back: `--seed SEED --runs 1`.
"""

from __future__ import annotations

# ruff: noqa: E402  run as a script, it has to find the shared modules of the tests
import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from fuzz_targets import prepare, targets


def fuzz(name: str, folder: Path, *, seed: int, seconds: float, runs: int) -> tuple[Counter[str], list[str]]:
    """Try inputs until time or runs are up.

    Args:
        name: of the target.
        folder: that `prepare` has filled.
        seed: of the first input; the next ones count up.
        seconds: limit.
        runs: limit.

    Returns:
        How many were taken, refused, and found; and what was found.
    """
    every, counts, found = targets(), Counter[str](), []
    target = every[name]
    deadline = time.monotonic() + seconds
    for number in range(seed, seed + runs):
        if time.monotonic() > deadline:
            break
        try:
            counts[target(random.Random(number), folder)] += 1
        except Exception:
            counts["found"] += 1
            found.append(f"--only {name} --seed {number} --runs 1\n{traceback.format_exc(limit=-6)}")
    every["request"].close()  # type: ignore[attr-defined]  the one with a server
    return counts, found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="fuzz the inputs that come from outside")
    parser.add_argument("--only", choices=["jsonl", "checkpoint", "image", "request"], action="append")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each input")
    parser.add_argument("--runs", type=int, default=sys.maxsize - 2**40, help="for each input")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table, everything = Table("input", "tried", "taken", "refused", "found"), []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "given")
        folder.mkdir()
        prepare(folder)
        for name in options.only or ["jsonl", "checkpoint", "image", "request"]:
            counts, found = fuzz(name, folder, seed=options.seed, seconds=options.seconds, runs=options.runs)
            kinds = (counts[kind] for kind in ("taken", "refused", "found"))
            table.add_row(name, str(sum(counts.values())), *map(str, kinds))
            everything += found
    console = Console()
    for one in everything[:20]:
        console.print(one, markup=False, highlight=False)
    console.print(table)
    return 1 if everything else 0


if __name__ == "__main__":
    sys.exit(main())
