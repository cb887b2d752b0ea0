"""GRPO with three judges, everything else equal: multi-response, single-response, and the truth.

    python benchmarks/policy_comparison.py --seeds 0 1 2

The paper's experiment in small, on the handwriting world, harder than the quickstart: three digits and several
questions. For each seed the same policy, a checkpoint of supervised training, is trained three times by
`grpo_recipes/train_policy.py`; the judge is:

- `multi-response`: layout `set`, cross-entropy over the scores of each group;
- `single-response`: layout `isolated`, which equals scoring each response alone, with the Bradley-Terry loss on all
  pairs of the same groups. Same backbone, groups, steps and learning rate as above;
- `truth`: 1 for a right answer, 0 for others. The ceiling.

During training the held-out validation scans are rolled out at `--eval_steps`; at the end each policy answers unseen
test scans greedily. A run has *collapsed* if it ends more than five points below where it started. What is finished in
the output folder is not repeated, so seeds can run side by side (`--no-summary`) and be put together by a last call.
The last line of stdout is one JSON document; the figure lies beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bands import plot_bands
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor

from mr_reward import GroupScorer
from mr_reward.evaluation.evaluator import evaluate_groups
from mr_reward.worlds.handwriting_policy import policy_answers
from mr_reward.worlds.named import WORLDS, world_options

RECIPES = Path(__file__).parents[1] / "grpo_recipes"
# Judge -> layout and loss of its reward model, and the weights of (reward model, truth) in the reward.
JUDGES = {
    "multi-response": ("set", "best_of_n", ("1.0", "0.0")),
    "single-response": ("isolated", "bradley_terry", ("1.0", "0.0")),
    "truth": ("set", "best_of_n", ("0.0", "1.0")),
}
COLLAPSE = 0.05


def recipe(script: str, config: str, folder: Path, **options: Any) -> float:
    """Run a recipe of this repository through its command line, unless its folder is finished; returns seconds."""
    done = folder / "seconds.json"
    if not done.is_file():
        command = [sys.executable, str(RECIPES / script), "--config", str(RECIPES / config)]
        command += ["--output_dir", str(folder), "--disable_tqdm", "true"]
        for key, value in options.items():
            values = value if isinstance(value, list | tuple) else [value]
            command += [f"--{key}", *map(str, values)]
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with open(folder / "log.txt", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        done.write_text(json.dumps(time.perf_counter() - started))
    return json.loads(done.read_text())


def train_reader(folder: Path, seed: int, options: argparse.Namespace) -> Path:
    """The reader of the quickstart on the harder questions: its end is the reward models' backbone."""
    if not (folder / "config.json").is_file():
        sys.path.insert(0, str(RECIPES))
        import quickstart

        arguments = quickstart.QuickstartArguments(
            seed=seed,
            world=options.world,
            num_digits=options.num_digits,
            sft_steps=options.sft_steps,
            questions=options.questions,
        )
        quickstart.train_reader(arguments, folder, options.start_step)
    return folder / f"checkpoint-{options.start_step}"


def own_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the world takes, beside a number and a seed."""
    return world_options(options.world, num_digits=options.num_digits, questions=options.questions)


def greedy_accuracy(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Share of right greedy answers on unseen test scans, over all questions and for each."""
    found = folder / "greedy.json"
    if not found.is_file():
        tasks = WORLDS[options.world].make_tasks("test", options.test_samples, seed=0, **own_options(options))
        model = AutoModelForImageTextToText.from_pretrained(folder)
        answers = policy_answers(model, AutoProcessor.from_pretrained(folder), tasks, show_progress=False)
        right = [task.is_correct(answer) for task, answer in zip(tasks, answers, strict=True)]
        result = {"all": statistics.fmean(right)}
        for question in options.questions:
            result[question] = statistics.fmean(
                hit for hit, task in zip(right, tasks, strict=True) if task.question == question
            )
        found.write_text(json.dumps(result))
    return json.loads(found.read_text())


def ranking(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """How well a reward model ranks unseen groups of the data it was trained on, and groups of N = 8."""
    found = folder / "ranking.json"
    if not found.is_file():
        scorer = GroupScorer.from_pretrained(folder)
        result = {}
        for size in (4, options.num_generations):
            groups = WORLDS[options.world].make_groups("test", 512, num_responses=size, seed=0, **own_options(options))
            metrics = evaluate_groups(scorer, groups)
            result[f"best_of_{size}"] = metrics["best_of_n_accuracy"]
            result[f"pairwise_{size}"] = metrics["pairwise_accuracy"]
        found.write_text(json.dumps(result))
    return json.loads(found.read_text())


def run_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one seed."""
    folder = options.output / f"seed{seed}"
    weak = train_reader(folder / "sft", seed, options)
    world = {"num_digits": options.num_digits, "questions": options.questions, "seed": seed}
    record: dict[str, Any] = {
        "seed": seed,
        "start": greedy_accuracy(weak, options),
        "reward_model_backbone": greedy_accuracy(folder / "sft", options),
        "judges": {},
    }
    for judge, (layout, loss, weights) in JUDGES.items():
        reward_model = folder / f"rm-{layout}"
        seconds = recipe(
            "pretrain_rm.py",
            "rm_tiny_handwriting_cpu.yaml",
            reward_model,
            model_name_or_path=folder / "sft",
            layout=layout,
            loss=loss,
            train_file=options.world,
            eval_file=options.world,
            num_train_groups=options.rm_groups,
            eval_strategy="no",
            **world,
        )
        policy = folder / f"policy-{judge}"
        grpo_seconds = recipe(
            "train_policy.py",
            "policy_tiny_handwriting_cpu.yaml",
            policy,
            model_name_or_path=weak,
            reward_model=reward_model,
            reward_weights=weights,
            num_generations=options.num_generations,
            max_steps=options.grpo_steps,
            eval_strategy="steps",
            eval_steps=options.eval_steps,
            eval_on_start="true",
            dataset=options.world,
            eval_dataset=options.world,
            num_eval_prompts=options.eval_prompts,
            per_device_eval_batch_size=128,
            **world,
        )
        validation = [json.loads(line) for line in (policy / "validation.jsonl").read_text().splitlines()]
        record["judges"][judge] = {
            "reward_model": ranking(reward_model, options) if judge != "truth" else None,
            "reward_model_seconds": round(seconds, 1),
            "grpo_seconds": round(grpo_seconds, 1),
            "end": greedy_accuracy(policy, options),
            "validation": [
                {
                    "step": entry["step"],
                    "score": entry["eval_mr_reward/score_mean"],
                    "truth": entry[f"eval_rewards/{options.world}_accuracy/mean"],
                    "signs": entry["warning_signs"],
                }
                for entry in validation
            ],
        }
        print(seed, judge, record["start"]["all"], record["judges"][judge]["end"]["all"], file=sys.stderr, flush=True)
    return record


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def summarise(records: list[dict[str, Any]]) -> Table:
    """One row per judge."""
    table = Table(
        "judge",
        "best of 4",
        "pairwise",
        "policy, start",
        "end",
        "gain",
        "each seed",
        "collapsed",
        title="GRPO by judge",
    )
    starts = [record["start"]["all"] for record in records]
    for judge in JUDGES:
        runs = [record["judges"][judge] for record in records]
        ends = [run["end"]["all"] for run in runs]
        ranks = [run["reward_model"] for run in runs]
        table.add_row(
            judge,
            *(cell([rank[key] for rank in ranks]) if all(ranks) else "" for key in ("best_of_4", "pairwise_4")),
            cell(starts),
            cell(ends),
            cell([end - start for start, end in zip(starts, ends, strict=True)]),
            ", ".join(f"{end:.3f}" for end in ends),
            str(sum(end < start - COLLAPSE for start, end in zip(starts, ends, strict=True))),
        )
    return table


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Mean over the seeds, and the band from smallest to largest."""
    panels: dict[str, dict[str, Any]] = {}
    for title, key in {
        "true accuracy, validation scans": "truth",
        "reward, validation scans (own scale)": "score",
    }.items():
        panels[title] = {}
        for judge in JUDGES:
            if judge == "truth" and key == "score":
                continue  # its reward is the other panel
            curves = [record["judges"][judge]["validation"] for record in records]
            steps = [point["step"] for point in curves[0]]
            panels[title][judge] = (steps, [[point[key] for point in curve] for curve in curves])
    plot_bands(panels, path, title="GRPO with three judges: mean and range of the seeds")


def main() -> None:
    """Run, sum up, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("outputs/policy_comparison"))
    parser.add_argument("--world", default="handwriting", choices=list(WORLDS))
    parser.add_argument("--num_digits", type=int, default=3, help="of handwriting")
    parser.add_argument("--questions", nargs="+", default=["read", "largest", "even"])
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--sft_steps", type=int, default=540, help="of the reader")
    parser.add_argument("--start_step", type=int, default=270, help="its checkpoint that GRPO starts from")
    parser.add_argument("--rm_groups", type=int, default=19200)
    parser.add_argument("--grpo_steps", type=int, default=200)
    parser.add_argument("--eval_steps", type=int, default=20)
    parser.add_argument("--eval_prompts", type=int, default=64, help="held-out prompts, num_generations rollouts each")
    parser.add_argument("--test_samples", type=int, default=1024, help="unseen images for the greedy accuracy")
    parser.add_argument("--no-summary", action="store_true", help="only run; another call puts the seeds together")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    records = [run_seed(seed, options) for seed in options.seeds]
    if options.no_summary:
        return
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "no_summary")}
    document = {"settings": settings, "seeds": records}
    (options.output / "policy_comparison.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(records, options.output / "policy_comparison.png")
    Console(width=140).print(summarise(records))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
