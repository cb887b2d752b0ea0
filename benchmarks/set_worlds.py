"""When does judging together help? Reward models by layout in worlds where the best possible accuracy is known.

    python benchmarks/set_worlds.py --worlds consensus novelty closest control --sizes 4 8 16 --seeds 0 1 2

The worlds are those of `mr_reward.worlds.sets`. For each world, N, layout and seed a tiny Qwen3-VL is trained on
groups of N by `RewardTrainer` with the cross-entropy over the group, and measured on unseen groups of N. `gap` is
where it ends between the best separate judge (0 %) and the best joint one (100 %); in `control` the two are one, and
the accuracy alone is shown. Worlds with readable pictures need a backbone that can read, such as the reader of
`grpo_recipes/quickstart.py` (`--backbone outputs/quickstart/sft`); without one the start is random weights.

Runs that stand in the output file are not repeated. The last line of stdout is one JSON document, the file's.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor, set_seed

from mr_reward import GroupScorer, MultiResponseRewardModel
from mr_reward.evaluation.evaluator import evaluate_groups
from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments
from mr_reward.worlds.sets import SET_WORLDS, bounds, make_set_groups
from mr_reward.worlds.tiny import build_qwen3_vl, build_qwen3_vl_processor

METRICS = {"best_of_n": "best_of_n_accuracy", "pairwise": "pairwise_accuracy"}


def run(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one model; the cell with what was found."""
    world, size, seed = cell["world"], cell["n"], cell["seed"]
    started = time.perf_counter()
    set_seed(seed)
    if options.backbone is None:
        backbone, processor = build_qwen3_vl(seed), build_qwen3_vl_processor()
    else:
        backbone, processor = options.backbone, AutoProcessor.from_pretrained(options.backbone)
    model = MultiResponseRewardModel.from_backbone(backbone, layout=cell["layout"], processor=processor)
    with tempfile.TemporaryDirectory() as folder:
        args = RewardTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=32,
            num_train_epochs=1,
            learning_rate=cell["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=20,
            seed=seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            logging_strategy="no",
        )
        groups = make_set_groups(world, "train", cell["groups"], num_responses=size, seed=seed)
        RewardTrainer(model, args, groups).train()
    # The same unseen groups for every seed and layout.
    test = make_set_groups(world, "test", cell["test_groups"], num_responses=size, seed=0)
    found = evaluate_groups(GroupScorer(model), test)
    measured = {name: round(found[key], 4) for name, key in METRICS.items()}
    return {**cell, **measured, "seconds": round(time.perf_counter() - started, 1)}


def summarise(runs: Sequence[dict[str, Any]], limits: dict[str, Any]) -> Table:
    """One row for each world, N and layout: mean over the seeds, smallest and largest."""
    table = Table("world", "N", "layout", "groups", title="between the best separate and the best joint judge")
    for name in METRICS:
        for column in (name, "separate, joint", "gap"):
            table.add_column(column)
    keys = ("world", "n", "layout", "groups", "learning_rate", "backbone", "test_groups")
    for cell in dict.fromkeys(tuple(run[key] for key in keys) for run in runs):
        some = [run for run in runs if tuple(run[key] for key in keys) == cell]
        row = [str(value) for value in cell[:4]]
        for name in METRICS:
            separate, joint = (limits[f"{cell[0]} {cell[1]}"][who][name] for who in ("separate", "joint"))
            values = [run[name] for run in some]
            row += [spread(values, ".3f"), f"{separate:.3f}, {joint:.3f}"]
            gaps = [(value - separate) / (joint - separate) for value in values] if joint > separate else []
            row.append(spread(gaps, ".0%"))
        table.add_row(*row)
    return table


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and smallest to largest of several."""
    if not values:
        return ""
    several = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{several}"


def main() -> None:
    """Train what is missing, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(SET_WORLDS), choices=list(SET_WORLDS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], help="numbers of responses N")
    parser.add_argument("--layouts", nargs="+", default=["set", "causal", "isolated"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--groups", type=int, default=19200, help="to train on, once each")
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--test_groups", type=int, default=1024, help="unseen groups for each N")
    parser.add_argument("--backbone", help="folder to start from; random weights if not given")
    parser.add_argument("--output", type=Path, default=Path("docs/results/set_worlds.json"))
    options = parser.parse_args()
    runs = json.loads(options.output.read_text())["runs"] if options.output.is_file() else []
    limits: dict[str, Any] = {}
    fixed = {"groups": options.groups, "test_groups": options.test_groups, "learning_rate": options.learning_rate}
    fixed["backbone"] = "random" if options.backbone is None else Path(options.backbone).name
    for world in options.worlds:
        for size in options.sizes:
            for seed in options.seeds:
                for layout in options.layouts:
                    cell = {"world": world, "n": size, "layout": layout, "seed": seed, **fixed}
                    if not any(cell.items() <= known.items() for known in runs):
                        runs.append(run(cell, options))
                        print(json.dumps(runs[-1]), flush=True)
                    limits = {
                        f"{known['world']} {known['n']}": {
                            who: asdict(found) for who, found in bounds(known["world"], known["n"]).items()
                        }
                        for known in runs
                    }
                    options.output.parent.mkdir(parents=True, exist_ok=True)
                    options.output.write_text(json.dumps({"bounds": limits, "runs": runs}, indent=1) + "\n")
    Console(width=160).print(summarise(runs, limits))
    print(json.dumps({"bounds": limits, "runs": runs}))


if __name__ == "__main__":
    main()
