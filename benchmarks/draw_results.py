"""Tables and figures of the docs from the JSON files of docs/results.

What stands between two marks of a page is written anew.

    python benchmarks/draw_results.py

A mark is a comment in Markdown, `<!-- table: NAME ARGUMENTS -->`, and ends with `<!-- end -->`. The tables:

- `quickstart SEEDS`: `metrics.json` of `make quickstart`, a column for each seed;
- `judges WORLD SEEDS ARM ...`: reward models of benchmarks/judge_lab.py, mean, spread and range over the seeds;
- `policies WORLD SEEDS ARM ...`: policies of benchmarks/judge_lab.py, and the paired difference to the first arm;
- `pairs WORLD SEEDS ARM/ARM ...`: policies of benchmarks/judge_lab.py, one less the other, and the mean of all pairs;
- `limits WORLD SEEDS LIMIT ...`: their gains by right above wrong of their reward model;
- `comparison WORLD SEEDS ARM ...`: policies of benchmarks/policy_comparison.py, see benchmarks/comparison_table.py;
- `guard NAME`: benchmarks/judge_guard.py, of docs/results/judge_guard/NAME.json, at the guard's default settings;
- `sets LAYOUT ...`: benchmarks/set_worlds.py, between the best separate and the best joint judge.

SEEDS is `0-4`. A cell that is not there is left out, and the number of seeds is told.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judge_guard
import set_worlds
from bands import plot_bands
from comparison_table import COLLAPSE, comparison, interval, seeds_of

from mr_reward.worlds.sets import bounds

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
_MARK = re.compile(r"(<!-- table: (?P<words>[^>]*?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and range."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation} ({min(values):.3f} to {max(values):.3f})"


def cells(kind: str, world: str, seeds: Sequence[int], arm: str) -> dict[int, dict[str, Any]]:
    """The JSON files of an arm, by seed."""
    paths = {seed: RESULTS / "judge_lab" / world / f"{kind}-{arm}-seed{seed}.json" for seed in seeds}
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.is_file()}


def judges(world: str, seeds: str, *arms: str) -> list[list[str]]:
    """How well reward models rank, by arm."""
    rows = [["reward model", "seeds", "best of 4, made-up groups", "right above wrong, the policy's rollouts"]]
    for arm in arms:
        found = cells("rm", world, seeds_of(seeds), arm).values()
        if found:
            made_up = spread([cell["made_up"]["best_of_n"] for cell in found])
            rollouts = spread([cell["rollouts"]["right_above_wrong"] for cell in found])
            rows.append([f"`{arm}`", str(len(found)), made_up, rollouts])
    return rows


def policies(world: str, seeds: str, *arms: str) -> list[list[str]]:
    """What a policy gains, by arm; differences are paired by seed."""
    rows = [["judge", "seeds", "gain, mean [95 %]", "each seed", "collapsed", f"minus `{arms[0]}`", "average's gain"]]
    base = cells("policy", world, seeds_of(seeds), arms[0])
    for arm in arms:
        found = cells("policy", world, seeds_of(seeds), arm)
        if not found:
            continue
        gains = [cell["end"] - cell["start"] for cell in found.values()]
        both = [seed for seed in found if seed in base]
        gap = interval([found[seed]["end"] - base[seed]["end"] for seed in both]) if both and arm != arms[0] else ""
        average = statistics.fmean(cell["end_of_average"] - cell["start"] for cell in found.values())
        each = " ".join(f"{gain:+.3f}".replace("0.", ".") for gain in gains)
        collapsed = sum(gain < -COLLAPSE for gain in gains)
        rows.append([f"`{arm}`", str(len(found)), interval(gains), each, str(collapsed), gap, f"{average:+.3f}"])
    return rows


def pairs(world: str, seeds: str, *given: str) -> list[list[str]]:
    """What one arm gains more than another, pair by pair; the mean of all pairs counts a seed once."""
    rows = [["policies", "seeds", "difference, mean [95 %]", "each seed"]]
    every: dict[int, list[float]] = {}
    for pair in given:
        one, other = (cells("policy", world, seeds_of(seeds), arm) for arm in pair.split("/"))
        gaps = {seed: one[seed]["end"] - other[seed]["end"] for seed in one if seed in other}
        for seed, gap in gaps.items():
            every.setdefault(seed, []).append(gap)
        rows.append([f"`{pair.replace('/', '` minus `')}`", *_gaps(gaps)])
    return [*rows, ["all of them", *_gaps({seed: statistics.fmean(own) for seed, own in sorted(every.items())})]]


def _gaps(gaps: dict[int, float]) -> list[str]:
    values = list(gaps.values())
    return [str(len(values)), interval(values), " ".join(f"{gap:+.3f}".replace("0.", ".") for gap in values)]


def limits(world: str, seeds: str, *given: str) -> list[list[str]]:
    """What policies gain, by right above wrong of the reward model; those alone whose only reward it is, as it is."""
    found = []
    for seed in seeds_of(seeds):
        for path in sorted((RESULTS / "judge_lab" / world).glob(f"policy-*-seed{seed}.json")):
            judge = path.with_name(path.name.replace("policy-", "rm-", 1))
            if judge.is_file():
                run, model = json.loads(path.read_text()), json.loads(judge.read_text())
                found.append((model["rollouts"]["right_above_wrong"], run["end"] - run["start"]))
    rows = [["right above wrong", "runs", "gain, mean (smallest to largest)", "ended below the start"]]
    edges = [0.0, *map(float, given), 1.0]
    for low, high in zip(edges, edges[1:], strict=False):
        gains = [gain for right, gain in found if low <= right < high]
        if gains:
            shown = f"{statistics.fmean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
            rows.append([f"{low:g} to {high:g}", str(len(gains)), shown, str(sum(gain < 0 for gain in gains))])
    return rows


def sets(*layouts: str) -> list[list[str]]:
    """Best of N in worlds with known bounds, and which share of the way from the separate to the joint one that is."""
    found = set_worlds.cells(json.loads(path.read_text()) for path in sorted((RESULTS / "set_worlds").glob("*.json")))
    rows = [["world", "N", "best separate judge", "best joint judge", *(f"`{layout}`" for layout in layouts)]]
    for world, size in dict.fromkeys((world, size) for world, size, _ in found):
        row = [world, str(size), *(f"{bounds(world, size)[who].best_of_n:.3f}" for who in ("separate", "joint"))]
        for layout in layouts:
            values = [one["best_of_n"] for one in found.get((world, size, layout), [])]
            way = set_worlds.gap(statistics.fmean(values), world, size, "best_of_n") if values else None
            shown = f", {way:.0%}" if way is not None else ""
            row.append(f"{statistics.fmean(values):.3f}{shown} ({len(values)})" if values else "")
        rows.append(row)
    return rows


QUICKSTART = {
    "reward model, best of 4": ("rm", "best_of_n_accuracy"),
    "reward model, pairwise accuracy": ("rm", "pairwise_accuracy"),
    "reward model, winner changes with the order": ("rm", "order_flip_rate"),
    "reward model, right above wrong among the policy's own answers": ("judge", "right_above_wrong"),
    "policy right, before GRPO (greedy)": ("policy", "accuracy_before"),
    "policy right, after GRPO with the reward model": ("policy", "accuracy_after"),
    "policy right, after GRPO with the truth": ("policy", "accuracy_with_truth"),
    "the reward model's backbone right": ("policy", "accuracy_of_rm_backbone"),
}


def quickstart(seeds: str) -> list[list[str]]:
    """What the quickstart measures, and mean and range over its seeds."""
    paths = {seed: RESULTS / "quickstart" / f"seed{seed}.json" for seed in seeds_of(seeds)}
    found = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.is_file()}
    rows = [["", *(f"seed {seed}" for seed in found), "mean (spread)"]]
    for label, (part, key) in QUICKSTART.items():
        values = [metrics[part][key] for metrics in found.values()]
        mean = f"{statistics.fmean(values):.3f} ({max(values) - min(values):.3f})"
        rows.append([label, *(f"{value:.3f}" for value in values), mean])
    seconds = [metrics["seconds"]["total"] for metrics in found.values()]
    rows.append(["seconds", *(f"{value:.0f}" for value in seconds), ""])
    return rows


def compared(world: str, seeds: str, *arms: str) -> list[list[str]]:
    """Policies that TRL trained, by arm."""
    return comparison(world, seeds_of(seeds), arms)


def guard(name: str) -> list[list[str]]:
    """What tells a collapse, and what the checkpoint is worth that is best by it."""
    document = json.loads((RESULTS / "judge_guard" / f"{name}.json").read_text())
    rows = [["watched", "collapses told", "false alarms", "truth of the kept checkpoint, less the last"]]
    for watched, found in document["summary"].items():
        kept = judge_guard.shown(found["kept"]) if found["kept"]["of"] else ""
        told = (judge_guard.shown(found[key]) for key in ("recall", "false_alarms"))
        rows.append([f"`{watched.removeprefix('eval_')}`", *told, kept])
    return rows


TABLES = {
    "guard": guard,
    "quickstart": quickstart,
    "judges": judges,
    "policies": policies,
    "pairs": pairs,
    "limits": limits,
    "comparison": compared,
    "sets": sets,
}


def drawn(text: str) -> str:
    """A page with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        name, *arguments = match["words"].split()
        head, *rows = TABLES[name](*arguments)
        lines = [head, ["---"] * len(head), *rows]
        return match[1] + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in lines) + "\n" + match[4]

    return _MARK.sub(table, text)


def loss_curves(path: Path, world: str, seeds: str, arms: dict[str, str]) -> None:
    """The losses of reward models over their steps, mean and range of the seeds that all arms have."""
    found = {arm: cells("rm", world, seeds_of(seeds), arm) for arm in arms}
    shared = sorted(set.intersection(*(set(own) for own in found.values())))
    curves = {
        label: (
            [20 * (i + 1) for i in range(len(found[arm][shared[0]]["loss"]))],
            [found[arm][s]["loss"] for s in shared],
        )
        for arm, label in arms.items()
    }
    panel = f"loss of the reward model, {world}, seeds {', '.join(map(str, shared))}"
    plot_bands({panel: curves}, path)


def main() -> None:
    """Write the pages and figures."""
    arms = {"set,mix,noise": "readouts start at random", "set,mix": "readouts start as the end of a turn"}
    loss_curves(DOCS / "figures" / "readout_start.png", "handwriting", "0-12", arms)
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if (new := drawn(text)) != text:
            page.write_text(new)


if __name__ == "__main__":
    main()
