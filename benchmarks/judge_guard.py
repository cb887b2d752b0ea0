"""How often `JudgeGuard` tells that a run goes wrong, and what its checkpoint is worth, over recorded runs.

    python benchmarks/judge_guard.py docs/results/policy_comparison --output docs/results/judge_guard.json

Input: a folder with any number of GRPO runs below it, at least 40 for a claim. Of a run is read its `validation.jsonl`
(`PolicyValidation` writes it; `train_policy.py` has it wherever there is an `eval_dataset`), else the
`trainer_state.json` of its last checkpoint; the JSON files of `benchmarks/policy_comparison.py` are runs too, as those
of `benchmarks/judge_lab.py` (`--truth truth --judge score_mean --watched win_rate`). It needs evaluations with the
truth (`--truth`, the first of them that a run has) and the judge's score (`--judge`), and `eval_on_start: true`: the
first evaluation has to be that of the policy before training.

A run has *collapsed* if its truth ends more than `--collapse` below its first evaluation; in a JSON file, if the
greedy answers to the test end so (`end`, `start`). Three things may tell it: the guard that watches the truth, the
guard that watches another metric of `--watched`, such as the share above a reference, and the run's own warning that
the score rises while the truth falls, on the rollouts that it trains on (`warning_signs` has others too). *Recall* is
the share of the collapsed runs with an alarm, a *false alarm* is one in another run. Shares have Wilson's 95 %
intervals.

*Kept* is the truth of the checkpoint that is best by the watched metric, less that of the last one, with the 95 %
interval of the mean. Where the truth itself is watched this is flattered: the best of several noisy numbers is too
high. The figure of the other metrics is not. *Average* is the truth of `EMACallback`'s average at the last evaluation,
less that of the last weights. Other settings of the guard (`--falls`, `--patiences`) are in the document too; one that
is picked from them has to be confirmed on other runs. The last line of stdout is the JSON document.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats

from mr_reward.runs.judge_guard import replay_guard

SIGNS = "warning_signs"
FOOLED = "winning against the reward model"  # of the text of that warning, see mr_reward.runs.WarningSigns


def histories(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]], float | None]]:
    """The name and the logs of each run, and what it gained on the test, if that is known."""
    found = {path.parent for path in folder.rglob("validation.jsonl")}
    found |= {path.parent.parent for path in folder.rglob("checkpoint-*/trainer_state.json")}
    for run in sorted(found):
        name = run.relative_to(folder).as_posix()
        if (run / "validation.jsonl").is_file():
            yield name, [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()], None
        else:
            states = run.glob("checkpoint-*/trainer_state.json")
            last = max(states, key=lambda path: int(path.parent.name.split("-")[-1]))
            yield name, json.loads(last.read_text())["log_history"], None
    for cell in sorted(folder.rglob("*-seed*.json")):
        if "validation" in (record := json.loads(cell.read_text())):
            gain = record["end"] - record["start"]
            yield cell.relative_to(folder).with_suffix("").as_posix(), record["validation"], gain


def series(logs: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    """A metric by step, where it is a number."""
    found = {log["step"]: log.get(key) for log in logs if isinstance(log.get(key), int | float)}
    return {step: value for step, value in sorted(found.items()) if math.isfinite(value)}


def truth_of(logs: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """The truth that a run was evaluated with."""
    return next((name for name in options.truth if series(logs, name)), options.truth[0])


def replay(
    name: str, logs: list[dict[str, Any]], gain: float | None, options: argparse.Namespace, **guard: Any
) -> dict[str, Any]:
    """What happened in a run, and what each watcher makes of it."""
    truth = truth_of(logs, options)
    truths, average = series(logs, truth), series(logs, truth.replace("eval_", "eval_ema_", 1))
    first, *_, last = truths
    watchers: dict[str, Any] = {}
    for metric in dict.fromkeys([truth, *options.watched]):
        if series(logs, metric).keys() & truths.keys() & series(logs, options.judge).keys():
            report = replay_guard(
                [log for log in logs if log["step"] in truths], truth=metric, judge=options.judge, **guard
            )
            best = report.steps[report.best]
            watchers[metric] = {"alarms": list(report.alarms), "best_step": best, "kept": truths[best] - truths[last]}
    if any(SIGNS in log for log in logs):
        told = [log["step"] for log in logs if any(FOOLED in sign for sign in log.get(SIGNS, []))]
        watchers[SIGNS] = {"alarms": list(dict.fromkeys(told))}  # the average is evaluated at the same step again
    return {
        "name": name,
        "first": truths[first],
        "best": max(truths.values()),
        "last": truths[last],
        "last_step": last,
        "average": average[last] - truths[last] if last in average else None,
        "collapsed": (truths[last] - truths[first] if gain is None else gain) < -options.collapse,
        "watchers": watchers,
    }


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share with Wilson's 95 % interval; None where there is nothing to count."""
    if not hits:
        return {"hits": 0, "of": 0, "share": None, "interval": None}
    low, high = stats.binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return {"hits": sum(hits), "of": len(hits), "share": sum(hits) / len(hits), "interval": [low, high]}


def mean(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its 95 % interval, by Student's distribution; None where there are too few."""
    if not values:
        return {"of": 0, "mean": None, "interval": None}
    middle = statistics.fmean(values)
    if len(values) == 1:
        return {"of": 1, "mean": middle, "interval": None}
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"of": len(values), "mean": middle, "interval": [middle - half, middle + half]}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall, false alarms and the kept checkpoint, by what was watched."""
    summary = {}
    for watcher in dict.fromkeys(name for run in runs for name in run["watchers"]):
        seen = [(run["collapsed"], run["watchers"][watcher]) for run in runs if watcher in run["watchers"]]
        summary[watcher] = {
            "recall": share([bool(found["alarms"]) for collapsed, found in seen if collapsed]),
            "false_alarms": share([bool(found["alarms"]) for collapsed, found in seen if not collapsed]),
            "kept": mean([found["kept"] for _, found in seen if "kept" in found]),
        }
    return summary


def shown(found: dict[str, Any]) -> str:
    """A share or a mean as text."""
    value = f"{found['hits']} of {found['of']}" if "hits" in found else f"{found['mean'] or 0:+.3f}"
    if not found["of"]:
        return "none to count"
    return value + ("" if found["interval"] is None else " ({:.2f} to {:.2f})".format(*found["interval"]))


def print_tables(document: dict[str, Any], console: Console) -> None:
    """The runs, and what the watchers are worth at each setting."""
    table = Table("run", "first", "best", "last", "collapsed", "alarms", title="JudgeGuard, replayed")
    for run in document["runs"]:
        alarms = "; ".join(
            f"{name.removeprefix('eval_')}: {', '.join(map(str, found['alarms']))}"
            for name, found in run["watchers"].items()
            if found["alarms"]
        )
        values = [f"{run[key]:.3f}" for key in ("first", "best", "last")]
        table.add_row(run["name"], *values, "yes" if run["collapsed"] else "", alarms)
    console.print(table)
    columns = ("watched", "fall", "patience", "collapses told", "false alarms", "kept, less the last")
    table = Table(*columns, title="with 95 % intervals")
    for row in document["grid"]:
        for name, found in row["summary"].items():
            if name != SIGNS:
                cells = [shown(found[key]) for key in ("recall", "false_alarms", "kept")]
                table.add_row(name.removeprefix("eval_"), f"{row['fall']:g}", str(row["patience"]), *cells)
    if SIGNS in document["summary"]:
        found = document["summary"][SIGNS]
        table.add_row(SIGNS, "", "", shown(found["recall"]), shown(found["false_alarms"]), "")
    console.print(table)
    console.print(f"the average of the weights, less the last ones: {shown(document['average'])}")


def main() -> None:
    """Replay, sum up, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="regular expression that the name of a run has to match")
    truths = [f"eval_rewards/{world}_accuracy/mean" for world in ("handwriting", "shapes")]
    parser.add_argument("--truth", nargs="+", default=truths, help="decides what has collapsed")
    parser.add_argument("--watched", nargs="*", default=["eval_mr_reward/win_rate"], help="beside the truth")
    parser.add_argument("--judge", default="eval_mr_reward/score_mean")
    parser.add_argument("--fall", type=float, default=0.05)
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--falls", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--patiences", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--collapse", type=float, default=0.05)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    found = [run for run in histories(options.folder) if re.search(options.only, run[0])]
    # Runs of reward models leave checkpoints too.
    recorded = [
        (name, logs, gain)
        for name, logs, gain in found
        if len(series(logs, truth_of(logs, options)).keys() & series(logs, options.judge).keys()) > 1
    ]
    if not recorded:
        raise SystemExit(
            f"{options.folder}: none of {len(found)} runs has two evaluations with {' or '.join(options.truth)} and "
            f"{options.judge}; give the folder of runs that were evaluated, or --truth and --judge"
        )
    console = Console(width=120)
    console.print(f"{len(recorded)} runs; {len(found) - len(recorded)} without two evaluations with both left out")
    runs = [replay(*run, options, fall=options.fall, patience=options.patience) for run in recorded]
    grid = [
        {"fall": fall, "patience": patience, "summary": summarise(again)}
        for fall in options.falls
        for patience in options.patiences
        for again in [[replay(*run, options, fall=fall, patience=patience) for run in recorded]]
    ]
    document = {
        "settings": {key: value for key, value in vars(options).items() if key not in ("folder", "output")},
        "runs": runs,
        "summary": summarise(runs),
        "average": mean([run["average"] for run in runs if run["average"] is not None]),
        "grid": grid,
    }
    print_tables(document, console)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
