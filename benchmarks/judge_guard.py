"""How often `JudgeGuard` would have told that a run went wrong, over recorded runs.

    python benchmarks/judge_guard.py outputs/policy_comparison --output docs/results/judge_guard.json

Reads every run below a folder: its `validation.jsonl`, else the `trainer_state.json` of its last checkpoint. A run has
*collapsed* if its held-out truth ends more than `--collapse` below its first evaluation. Recall is the share of the
collapsed runs in which the guard raised an alarm before or at the end, a false alarm is one in another run. The kept
checkpoint is the one with the best truth; it was chosen by the number that is compared here, so the difference to the
last one is flattered, and the figure to trust is one on other data. All settings of `--falls` and `--patiences` are in
the document too. The last line of stdout is the JSON document.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mr_reward.runs.judge_guard import replay_guard


def histories(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The name and the logs of each run."""
    found = {path.parent for path in folder.rglob("validation.jsonl")}
    found |= {path.parent.parent for path in folder.rglob("checkpoint-*/trainer_state.json")}
    for run in sorted(found):
        name = run.relative_to(folder).as_posix()
        if (run / "validation.jsonl").is_file():
            yield name, [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        else:
            states = sorted(
                run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[-1])
            )
            yield name, json.loads(states[-1].read_text())["log_history"]


def share(hits: int, of: int) -> dict[str, Any]:
    """A share with Wilson's 95 % interval; None where there is nothing to count."""
    if not of:
        return {"hits": 0, "of": 0, "share": None, "interval": None}
    z, p = 1.959964, hits / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    ends = [(middle + sign * half) / (1 + z * z / of) for sign in (-1, 1)]
    return {"hits": hits, "of": of, "share": p, "interval": [max(0.0, ends[0]), min(1.0, ends[1])]}


def replay(name: str, logs: list[dict[str, Any]], options: argparse.Namespace, **guard: Any) -> dict[str, Any]:
    """What the guard makes of one run."""
    report = replay_guard(logs, truth=options.truth, judge=options.judge, **guard)
    first, last, best = report.truths[0], report.truths[-1], report.truths[report.best]
    return {
        "name": name,
        "first": first,
        "last": last,
        "best": best,
        "best_step": report.steps[report.best],
        "last_step": report.steps[-1],
        "collapsed": last < first - options.collapse,
        "alarms": list(report.alarms),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall, false alarms, and what keeping the best checkpoint is worth by the held-out truth."""
    collapsed = [run for run in runs if run["collapsed"]]
    others = [run for run in runs if not run["collapsed"]]
    gains = [run["best"] - run["last"] for run in runs]
    return {
        "runs": len(runs),
        "recall": share(sum(bool(run["alarms"]) for run in collapsed), len(collapsed)),
        "false_alarms": share(sum(bool(run["alarms"]) for run in others), len(others)),
        "kept_minus_last": {"mean": statistics.fmean(gains), "largest": max(gains)},
    }


def shown(found: dict[str, Any]) -> str:
    """A share as text."""
    if found["share"] is None:
        return "none to count"
    low, high = found["interval"]
    return f"{found['hits']} of {found['of']} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Replay, sum up, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="regular expression that the name of a run has to match")
    parser.add_argument("--truth", default="eval_rewards/handwriting_accuracy/mean")
    parser.add_argument("--judge", default="eval_mr_reward/score_mean")
    parser.add_argument("--fall", type=float, default=0.05)
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--falls", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--patiences", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--collapse", type=float, default=0.05)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    found = [(name, logs) for name, logs in histories(options.folder) if re.search(options.only, name)]
    # Runs of reward models leave checkpoints too.
    recorded = [run for run in found if any(options.truth in log and options.judge in log for log in run[1])]
    if not recorded:
        raise SystemExit(
            f"{options.folder}: none of {len(found)} runs has evaluations with {options.truth} and {options.judge}; "
            "give the folder of runs that were evaluated, or --truth and --judge"
        )
    console = Console(width=120)
    console.print(f"{len(recorded)} runs; {len(found) - len(recorded)} without both metrics left out")
    runs = [replay(*run, options, fall=options.fall, patience=options.patience) for run in recorded]
    grid = [
        {"fall": fall, "patience": patience}
        | summarise([replay(*run, options, fall=fall, patience=patience) for run in recorded])
        for fall in options.falls
        for patience in options.patiences
    ]
    settings = {key: value for key, value in vars(options).items() if key not in ("folder", "output")}
    document = {"settings": settings, "runs": runs, "summary": summarise(runs), "grid": grid}
    table = Table("run", "first", "best (step)", "last", "collapsed", "alarms", title="JudgeGuard, replayed")
    for run in runs:
        best = f"{run['best']:.3f} ({run['best_step']})"
        alarms = ", ".join(map(str, run["alarms"]))
        table.add_row(
            run["name"], f"{run['first']:.3f}", best, f"{run['last']:.3f}", "yes" if run["collapsed"] else "", alarms
        )
    settings_table = Table("fall", "patience", "collapses told", "false alarms", title="by setting, 95 % intervals")
    for row in grid:
        settings_table.add_row(f"{row['fall']:g}", str(row["patience"]), *(shown(row[key]) for key in RATES))
    console.print(table)
    console.print(settings_table)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


RATES = ("recall", "false_alarms")

if __name__ == "__main__":
    main()
