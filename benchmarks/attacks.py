"""Known attacks against the reward models that `layouts.py` has trained: mean and spread over its seeds.

    mr-reward data handwriting outputs/handwriting
    python benchmarks/layouts.py --seeds 0 1 2
    python benchmarks/attacks.py outputs/layouts outputs/handwriting/best_of_4/test.jsonl

Each model is attacked by `mr-reward attack`; what is finished for these groups is not repeated. Above 0 an attack
works: the shift of a bad answer's margin to a good one, in standard deviations of that margin without an attack. A
table and a figure, both of all seeds; the last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from layouts import MODELS
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Results = dict[str, dict[str, list[dict[str, Any]]]]  # model -> attack -> what it did to the model of each seed
COLOURS = dict(zip(MODELS, ("#d97706", "#16a34a", "#2563eb", "#9333ea"), strict=True))


def attacked(folder: Path, groups: Path) -> dict[str, dict[str, Any]]:
    """Attack one model, or read what an earlier call found; by name of the attack."""
    found = folder / "attacks.json"
    if not found.is_file() or json.loads(found.read_text())["groups"] != str(groups):
        command = [sys.executable, "-c", "from mr_reward.cli import main; main()", "attack", str(folder), str(groups)]
        subprocess.run([*command, "--out", str(found)], check=True, stdout=subprocess.DEVNULL)
    return {result["name"]: result for result in json.loads(found.read_text())["attacks"]}


def collect(layouts: Path, groups: Path) -> Results:
    """The results of every model under the output folder of `layouts.py`, in the order of the seeds."""
    results: Results = {}
    for name in MODELS:
        for config in sorted(layouts.glob(f"seed*/{name}/config.json")):
            for attack, result in attacked(config.parent, groups).items():
                results.setdefault(name, {}).setdefault(attack, []).append(result)
    if not results:
        raise SystemExit(f"{layouts} has no reward models in seed*/; run benchmarks/layouts.py first")
    return results


def summarise(results: Results) -> Table:
    """Mean shift, its spread over the seeds (largest minus smallest), how often the bad answer wins.

    A star: the 95 % interval of every seed is above 0, as far as the table shows.
    """
    table = Table("attack on the bad answer", *results, title="shift of the margin, bad wins")
    attacks = next(iter(results.values()))
    before = (
        f"{statistics.fmean(seed['wins_before'] for seed in next(iter(found.values()))):.1%}"
        for found in results.values()
    )
    table.add_row("none", *before)
    for attack in attacks:
        cells = []
        for found in results.values():
            shifts = [seed["shift"] for seed in found[attack]]
            wins = statistics.fmean(seed["wins_after"] for seed in found[attack])
            star = " *" if min(seed["shift_low"] for seed in found[attack]) >= 0.005 else ""
            cells.append(f"{statistics.fmean(shifts):+.2f} ({max(shifts) - min(shifts):.2f}), {wins:.1%}{star}")
        table.add_row(attack, *cells)
    return table


def plot(results: Results, path: Path) -> None:
    """A line for each attack, a point for each model and seed, a bar at the mean."""
    attacks = list(next(iter(results.values())))
    figure = Figure(figsize=(9, 0.52 * len(attacks) + 1.4))
    axis = figure.subplots()
    for index, (name, found) in enumerate(results.items()):
        for row, attack in enumerate(attacks):
            shifts = [seed["shift"] for seed in found[attack]]
            height = row + 0.18 * (index - (len(results) - 1) / 2)
            label = name if row == 0 else None
            axis.scatter(shifts, [height] * len(shifts), s=16, color=COLOURS[name], alpha=0.7, label=label)
            axis.scatter(statistics.fmean(shifts), height, s=90, marker="|", color=COLOURS[name])
    axis.axvline(0, color="#374151", linewidth=1)
    axis.set_yticks(range(len(attacks)), attacks)
    axis.invert_yaxis()
    axis.set_xlabel("shift of the bad answer's margin, in standard deviations; right of the line the attack works")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    axis.legend(frameon=False, ncols=len(results), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Attack, sum up, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", type=Path, help="output folder of benchmarks/layouts.py")
    parser.add_argument("groups", type=Path, help=".jsonl file of ranked groups")
    options = parser.parse_args()
    results = collect(options.layouts, options.groups)
    plot(results, options.layouts / "attacks.png")
    (options.layouts / "attacks.json").write_text(json.dumps(results, indent=1) + "\n")
    Console(width=180).print(summarise(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
