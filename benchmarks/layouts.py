"""Reward-model accuracy by layout and number of responses; all trained at N = 4, from the same start, in one budget.

    python benchmarks/layouts.py --seeds 0 1 2

Each run is `grpo_recipes/pretrain_rm.py` with the quickstart's YAML; only layout, loss and seed differ. The start is
the reader of `grpo_recipes/quickstart.py`, trained here for each seed. `single-response` is the Bradley-Terry model
on all ordered pairs of the same groups: `isolated` equals scoring each response alone, so the pass is shared and the
model is not. Runs that are finished in the output folder are not repeated, so seeds and models can be run side by side
and put together by a last call. The last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mr_reward import GroupScorer, ResponseGroup
from mr_reward.evaluation.evaluator import evaluate_groups
from mr_reward.evaluation.judges import BASELINES as RULES
from mr_reward.metrics import best_of_n_accuracy, pairwise_accuracy
from mr_reward.worlds.handwriting import make_groups

RECIPES = Path(__file__).parents[1] / "grpo_recipes"
MODELS = {
    "causal": ("causal", "best_of_n"),
    "isolated": ("isolated", "best_of_n"),
    "set": ("set", "best_of_n"),
    "single-response": ("isolated", "bradley_terry"),
}
BASELINES = ("longest", "shortest", "random")


def train(folder: Path, backbone: Path, layout: str, loss: str, seed: int, extra: list[str]) -> float:
    """Train one reward model through the user's entry point; returns the seconds it took."""
    command = [
        sys.executable,
        str(RECIPES / "pretrain_rm.py"),
        "--config",
        str(RECIPES / "rm_tiny_handwriting_cpu.yaml"),
    ]
    command += ["--model_name_or_path", str(backbone), "--output_dir", str(folder), "--layout", layout]
    command += ["--loss", loss, "--seed", str(seed), "--eval_strategy", "no", "--disable_tqdm", "true", *extra]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def run(
    folder: Path,
    backbone: Path,
    layout: str,
    loss: str,
    seed: int,
    groups: dict[int, list[ResponseGroup]],
    extra: list[str],
) -> dict[str, Any]:
    """Train and evaluate one model, or read what an earlier call found."""
    found = folder / "layouts.json"
    if not found.is_file():
        seconds = train(folder, backbone, layout, loss, seed, extra)
        scorer = GroupScorer.from_pretrained(folder)
        results = {str(n): evaluate_groups(scorer, groups[n], seed=seed) for n in groups}
        record = {"model": folder.name, "seed": seed, "train_seconds": round(seconds, 1), "results": results}
        found.write_text(json.dumps(record))
    return json.loads(found.read_text())


def start_from(folder: Path, seed: int) -> Path:
    """The reader that the quickstart trains for this seed."""
    if not (folder / "config.json").is_file():
        sys.path.insert(0, str(RECIPES))
        from quickstart import QuickstartArguments, train_reader

        train_reader(QuickstartArguments(seed=seed), folder)
    return folder


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16], help="numbers of responses N")
    parser.add_argument("--num_groups", type=int, default=512, help="unseen groups for each N")
    parser.add_argument("--output", type=Path, default=Path("outputs/layouts"))
    parser.add_argument("extra", nargs="*", help="more arguments for pretrain_rm.py, after --")
    options = parser.parse_args()
    groups = {n: make_groups("test", options.num_groups, num_responses=n, num_digits=2, seed=0) for n in options.sizes}
    runs = []
    for seed in options.seeds:
        backbone = start_from(options.output / f"seed{seed}" / "sft", seed)
        for name in options.models:
            layout, loss = MODELS[name]
            runs.append(
                run(options.output / f"seed{seed}" / name, backbone, layout, loss, seed, groups, options.extra)
            )
            best = {n: round(result["best_of_n_accuracy"], 3) for n, result in runs[-1]["results"].items()}
            print(name, seed, best, flush=True)
    baselines = []
    for name in BASELINES:
        scores = {n: [[RULES[name](group, text) for text in group.responses] for group in groups[n]] for n in groups}
        rankings = {n: [list(group.rankings or ()) for group in groups[n]] for n in options.sizes}
        results = {
            str(n): {
                "best_of_n_accuracy": best_of_n_accuracy(scores[n], rankings[n]),
                "pairwise_accuracy": pairwise_accuracy(scores[n], rankings[n]),
            }
            for n in options.sizes
        }
        baselines.append({"model": name, "results": results})
    document = {"sizes": options.sizes, "num_groups": options.num_groups, "runs": runs, "baselines": baselines}
    (options.output / "layouts.json").write_text(json.dumps(document, indent=1) + "\n")
    Console().print(summarise(document))
    print(json.dumps(document))


def summarise(document: dict) -> Table:
    """Mean and spread (largest minus smallest) over the seeds."""
    table = Table(
        "model", *(f"N = {n}" for n in document["sizes"]), "winner flips (N = 4)", title="best-of-N accuracy"
    )
    for name in dict.fromkeys(entry["model"] for entry in (*document["runs"], *document["baselines"])):
        entries = [run["results"] for run in (*document["runs"], *document["baselines"]) if run["model"] == name]
        cells = []
        for n in document["sizes"]:
            values = [entry[str(n)]["best_of_n_accuracy"] for entry in entries]
            cells.append(
                f"{statistics.fmean(values):.3f} ± {max(values) - min(values):.3f}"
                if entries[1:]
                else f"{values[0]:.3f}"
            )
        flips = [entry["4"]["order_flip_rate"] for entry in entries if "order_flip_rate" in entry.get("4", {})]
        table.add_row(name, *cells, f"{statistics.fmean(flips):.3f}" if flips else "")
    return table


if __name__ == "__main__":
    main()
