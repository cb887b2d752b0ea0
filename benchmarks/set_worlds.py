"""When does judging together help? Reward models by layout in worlds where the best possible accuracy is known.

    python benchmarks/set_worlds.py --seeds 0 1 2 3 4

The worlds are those of `mr_reward.worlds.sets`, as text. For each world, layout and seed a tiny Llama with random
weights is trained by `RewardTrainer` with the cross-entropy over the group, on groups of every N, and measured on
unseen groups of each N. `gap` is where it ends between the best separate judge (0 %) and the best joint one (100 %);
in `control` the two are one, and only the accuracy is shown.

Each run is a file in the output folder, and a run whose file is there is not repeated: worlds, layouts and seeds can
be run side by side and put together by a last call. Table and figure are drawn from all files there. The last line of
stdout is one JSON document.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bands import plot_bands
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.checkpoint.checksums import written_whole_file
from mr_reward.evaluation.evaluator import evaluate_groups
from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments
from mr_reward.worlds.sets import SET_WORLDS, bounds, make_set_groups
from mr_reward.worlds.tiny import build_llama, build_tokenizer

LAYOUTS = ("set", "causal", "isolated")
# Of the random weights. With the usual 0.05 nothing is learned in `consensus` for hundreds of steps: what a response
# says and what the others say start too small to be compared.
SPREAD = 0.15
METRICS = {"best_of_n": "best_of_n_accuracy", "pairwise": "pairwise_accuracy"}


def run(world: str, layout: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model on groups of all sizes and measure it at each; settings and what was found."""
    started = time.perf_counter()
    set_seed(seed)
    backbone = build_llama(seed, num_layers=3, initializer_range=SPREAD)
    model = MultiResponseRewardModel.from_backbone(backbone, layout=layout, processor=build_tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        args = RewardTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=32,
            num_train_epochs=1,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            train_sampling_strategy="sequential",
            seed=seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            logging_strategy="no",
        )
        RewardTrainer(model, args, training_groups(world, seed, options)).train()
    seconds = time.perf_counter() - started
    found = {}
    for size in options.sizes:
        # The same unseen groups for every layout and seed.
        test = make_set_groups(world, "test", options.test_groups, num_responses=size, seed=0, pictures=False)
        metrics = evaluate_groups(GroupScorer(model), test)
        found[str(size)] = {name: round(metrics[key], 4) for name, key in METRICS.items()}
    settings = ("groups", "learning_rate", "test_groups")
    return {
        "world": world,
        "layout": layout,
        "seed": seed,
        **{name: getattr(options, name) for name in settings},
        "train_seconds": round(seconds, 1),
        "found": found,
    }


def training_groups(world: str, seed: int, options: argparse.Namespace) -> list[ResponseGroup]:
    """In the order of training: largest groups only for a while, then all sizes mixed, more of the larger ones.

    Whether to compare at all is learned from large groups: where sizes are mixed from the start, small ones say so
    little that it takes several times as many steps.
    """
    largest = max(options.sizes)
    first = make_set_groups(world, "train", options.groups * 2 // 5, num_responses=largest, seed=seed, pictures=False)
    mixed = []
    for size in options.sizes:
        count = (options.groups - len(first)) * size // sum(options.sizes)
        # Of another seed, or those of the largest size would be the same again.
        mixed += make_set_groups(world, "train", count, num_responses=size, seed=seed + 1000, pictures=False)
    random.Random(seed).shuffle(mixed)
    return [*first, *mixed]


def gap(value: float, world: str, size: int, metric: str) -> float | None:
    """Where a value is between the best separate judge, 0, and the best joint one, 1; None where they are one."""
    separate, joint = (getattr(bounds(world, size)[who], metric) for who in ("separate", "joint"))
    return (value - separate) / (joint - separate) if joint > separate else None


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and smallest to largest of several."""
    if not values:
        return ""
    several = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{several}"


def cells(runs: Iterable[dict[str, Any]]) -> dict[tuple[str, int, str], list[dict[str, float]]]:
    """What the seeds found, by world, N and layout, in the order of the table."""
    found: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for known in runs:
        for size, values in known["found"].items():
            found.setdefault((known["world"], int(size), known["layout"]), []).append(values)
    worlds = list(SET_WORLDS)
    return {key: found[key] for key in sorted(found, key=lambda key: (worlds.index(key[0]), *key[1:]))}


def summarise(runs: Sequence[dict[str, Any]]) -> Table:
    """One row for each world, N and layout: mean over the seeds, smallest and largest."""
    table = Table("world", "N", "layout", "seeds", title="between the best separate and the best joint judge")
    for name in METRICS:
        for column in (name, "separate, joint", "gap"):
            table.add_column(column)
    for (world, size, layout), some in cells(runs).items():
        row = [world, str(size), layout, str(len(some))]
        for name in METRICS:
            values = [one[name] for one in some]
            gaps = [place for value in values if (place := gap(value, world, size, name)) is not None]
            limits = (f"{getattr(bounds(world, size)[who], name):.3f}" for who in ("separate", "joint"))
            row += [spread(values, ".3f"), ", ".join(limits), spread(gaps, ".0%")]
        table.add_row(*row)
    return table


def curves(found: Sequence[Sequence[dict[str, float]]]) -> list[list[float]]:
    """Best of N of each seed, at each size."""
    return [[one["best_of_n"] for one in seed] for seed in zip(*found, strict=True)]


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Best of N by number of responses, a panel for each world, with the two bounds."""
    panels: dict[str, dict[str, Any]] = {}
    found = cells(runs)
    for world in dict.fromkeys(world for world, _, _ in found):
        sizes = sorted({size for own, size, _ in found if own == world})
        panels[world] = {
            layout: (sizes, curves([found[world, size, layout] for size in sizes]))
            for layout in dict.fromkeys(layout for own, _, layout in found if own == world)
        }
        for who in ("separate", "joint"):
            panels[world][f"best {who} judge"] = (sizes, [[bounds(world, size)[who].best_of_n for size in sizes]])
    plot_bands(panels, path, title="Best of N on unseen groups: mean and range of the seeds", x_label="responses N")


def main() -> None:
    """Train what is missing, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(SET_WORLDS), choices=list(SET_WORLDS))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], help="numbers of responses N")
    parser.add_argument("--groups", type=int, default=25600, help="to train on, once each")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--test_groups", type=int, default=1024, help="unseen groups for each N")
    parser.add_argument("--output", type=Path, default=Path("docs/results/set_worlds"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for world in options.worlds:
            for layout in options.layouts:
                file = options.output / f"{world}-{layout}-seed{seed}.json"
                if not file.is_file():
                    record = run(world, layout, seed, options)
                    with written_whole_file(file) as unfinished:
                        unfinished.write_text(json.dumps(record, indent=1) + "\n")
                    print(json.dumps(record), flush=True)
    runs = [json.loads(file.read_text()) for file in sorted(options.output.glob("*-seed*.json"))]
    plot(runs, options.output / "set_worlds.png")
    Console(width=160).print(summarise(runs))
    limits = {
        f"{world} {size}": {who: asdict(limit) for who, limit in bounds(world, size).items()}
        for world in options.worlds
        for size in options.sizes
    }
    print(json.dumps({"bounds": limits, "runs": runs}))


if __name__ == "__main__":
    main()
