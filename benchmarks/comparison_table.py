"""The table and the figure of benchmarks/policy_comparison.py, from its JSON files.

    python benchmarks/comparison_table.py handwriting 5-12 recipe single truth --figure docs/figures/judges.png

A seed counts once: the reward models of a seed start from the same data and policy, so their runs are averaged, and
intervals and paired differences are over the seeds. Collapses are counted over all runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bands import plot_bands
from scipy import stats

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "policy_comparison"
COLLAPSE = 0.05  # a run has collapsed if it ends so far below where it started


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval (Student's t) of independent values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def seeds_of(text: str) -> list[int]:
    """`0-4` or `3`."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def runs_of(results: Path, world: str, seeds: Sequence[int], arm: str) -> dict[int, list[dict[str, Any]]]:
    """The JSON files of an arm, by seed; a seed without any is left out."""
    found = {seed: sorted((results / world).glob(f"{arm}-seed{seed}-rm*.json")) for seed in seeds}
    return {seed: [json.loads(path.read_text()) for path in paths] for seed, paths in found.items() if paths}


def gain(run: dict[str, Any], end: str = "end") -> float:
    """Of the policy, by greedy answers."""
    return run[end] - run["start"]


def sampled(run: dict[str, Any], world: str) -> list[float]:
    """How often the policy's sampled answers to held-out prompts are right, evaluation by evaluation."""
    return [point[f"eval_rewards/{world}_accuracy/mean"] for point in run["validation"]]


def sampled_gain(run: dict[str, Any], world: str) -> float:
    """Of the policy, by sampled answers: what GRPO asks for. A policy that is surer gains by that alone."""
    first, *_, last = sampled(run, world)
    return last - first


def _by_seed(runs: dict[int, list[dict[str, Any]]]) -> dict[int, float]:
    return {seed: statistics.fmean(map(gain, own)) for seed, own in runs.items()}


def comparison(world: str, seeds: Sequence[int], arms: Sequence[str], results: Path = RESULTS) -> list[list[str]]:
    """A row for each arm: what the policy gains, and against the first arm and the truth on the same seeds."""
    head = ["judge", "seeds (runs)", "right above wrong", "gain, mean [95 %]", "each seed", "collapsed"]
    rows = [[*head, "of the truth's gain", f"minus `{arms[0]}`", "sampled", "average's gain"]]
    first, truth = (_by_seed(runs_of(results, world, seeds, arm)) for arm in (arms[0], "truth"))
    for arm in arms:
        found = runs_of(results, world, seeds, arm)
        if not found:
            continue
        runs = [run for own in found.values() for run in own]
        gains = _by_seed(found)
        paired = [gains[seed] - first[seed] for seed in gains if seed in first]
        both = [(gains[seed], truth[seed]) for seed in gains if seed in truth]
        most = sum(by_truth for _, by_truth in both)
        ranks = [
            run["reward_model"]["right_above_wrong"] for run in runs if "right_above_wrong" in run["reward_model"]
        ]
        averages = [gain(run, "end_of_average") for run in runs if run["end_of_average"] is not None]
        rows.append(
            [
                f"`{arm}`",
                f"{len(found)} ({len(runs)})",
                f"{statistics.fmean(ranks):.3f}" if ranks and arm != "truth" else "",
                interval(list(gains.values())),
                " ".join(f"{value:+.3f}".replace("0.", ".") for value in gains.values()),
                f"{sum(gain(run) < -COLLAPSE for run in runs)} of {len(runs)}",
                f"{sum(own for own, _ in both) / most:.2f}" if most > 0 and arm != "truth" else "",
                interval(paired) if paired and arm != arms[0] else "",
                f"{statistics.fmean(sampled_gain(run, world) for run in runs):+.3f}",
                f"{statistics.fmean(averages):+.3f}" if averages else "",
            ]
        )
    return rows


def draw(world: str, seeds: Sequence[int], arms: Sequence[str], path: Path, results: Path = RESULTS) -> None:
    """How often held-out rollouts are right during GRPO, less at its start: mean and range of the runs."""
    curves: dict[str, Any] = {}
    for arm in arms:
        found = [run for own in runs_of(results, world, seeds, arm).values() for run in own]
        if found:
            steps = [point["step"] for point in found[0]["validation"]]
            shares = [sampled(run, world) for run in found]
            curves[arm] = (steps, [[share - own[0] for share in own] for own in shares])
    plot_bands({f"{world}: rollouts that are right, less at the start": curves}, path, title="GRPO by its judge")


def main() -> None:
    """Print the table as Markdown, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world")
    parser.add_argument("seeds", type=seeds_of)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    head, *rows = comparison(options.world, options.seeds, options.arms, options.results)
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    if options.figure is not None:
        draw(options.world, options.seeds, options.arms, options.figure, options.results)


if __name__ == "__main__":
    main()
