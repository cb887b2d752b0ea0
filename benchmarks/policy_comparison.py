"""The comparison of judges in GRPO, by the product's own commands, one ingredient of the recipe taken away at a time.

    python benchmarks/policy_comparison.py --world handwriting --arms recipe single truth --seeds 5 6 7
    python benchmarks/policy_comparison.py --world shapes --seeds 0

For each seed a tiny Qwen3-VL is trained by supervised training. A checkpoint on the way is the weak policy, the end is
the backbone of the reward models. Then for each arm of `ARMS`, and for each of `--rm_seeds`:

1. `grpo_recipes/collect.py`: N = 8 rollouts of the weak policy for train prompts, and for 512 held-out ones;
2. `mr-reward label --verifier`: the train rollouts graded, the held-out ones right or wrong;
3. `grpo_recipes/pretrain_rm.py`: two epochs of 600 steps, a third of the groups rollouts in the arms with a mix.
   Another RM seed is another draw of the new parts and of the order, on the same groups;
4. `grpo_recipes/train_policy.py`: 200 steps of 16 prompts x 8 rollouts, with held-out prompts every 25 steps;
5. greedy accuracy on 1,024 unseen pictures.

What arms share is made once per seed, and nothing that is finished is repeated; a run that was killed goes on with the
stage that it was in. Different seeds can run side by side. Each cell is a JSON file,
`docs/results/policy_comparison/WORLD/ARM-seedK-rmJ.json`; `benchmarks/comparison_table.py` makes tables and the figure
of them, and `benchmarks/judge_guard.py` replays its guard over them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from comparison_setups import RECIPES, SETUPS, Setup, options_of, train_backbone
from comparison_table import COLLAPSE, RESULTS, comparison
from transformers import AutoModelForImageTextToText, AutoProcessor

from mr_reward import GroupScorer
from mr_reward.checkpoint.checksums import written_whole_file
from mr_reward.evaluation.evaluator import report_rollouts
from mr_reward.worlds.named import WORLDS
from mr_reward.worlds.world_policy import GRADES, TRUTHS, policy_answers


@dataclass(frozen=True)
class Arm:
    """What decides the rewards: the reward model's layout, loss and data, and what differs in GRPO."""

    layout: str = "set"
    loss: str = "best_of_n"
    mix: bool = True  # a third of the groups are rollouts of the weak policy
    epochs: int = 2  # over all groups
    schedule: str = "linear"
    beta: float = 0.1  # of the KL term against the policy before training
    by_truth: bool = False  # the reward is 1 for a right answer, 0 for others; the reward model only looks on


ARMS = {
    "recipe": Arm(),
    "no-kl": Arm(beta=0.0),
    "one-epoch": Arm(epochs=1),
    "one-epoch-no-kl": Arm(epochs=1, beta=0.0),
    "no-mix": Arm(mix=False),
    "all-pairs": Arm(loss="bradley_terry"),
    "constant-rate": Arm(schedule="constant_with_warmup"),
    "single": Arm("isolated", "bradley_terry", mix=False),  # the single-response recipe as people build it
    "single-fair": Arm("isolated"),
    "causal": Arm("causal"),
    "truth": Arm(by_truth=True, beta=0.0),
}


SETTINGS = {"num_generations": 8, "rollout_prompts": 9600, "heldout_prompts": 512, "rm_groups": 19200}
SETTINGS |= {"grpo_steps": 200, "eval_steps": 25, "eval_prompts": 64, "test_samples": 1024}
# Of a validation: what the guard is replayed by, and the same of the average of the weights.
CURVE = re.compile(
    r"step|warning_signs|eval_(ema_)?(rewards/\w+_accuracy/mean|mr_reward/(score_mean|win_rate|right_\w+))"
)
_SHARE = re.compile(r"an epoch has .*labelled ([\d.]+)%")


class Stage:
    """Commands in a folder that are run once; how long they took is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done = folder / "seconds.json"

    def run(self, *commands: list[Any]) -> Path:
        """Run the commands one after the other, unless they are done; returns the folder."""
        if not self._done.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            started, cpu = time.perf_counter(), _cpu_of_children()
            with open(self.folder / "log.txt", "w") as log:
                for command in commands:
                    texts = [sys.executable, *map(str, command)]
                    if subprocess.run(texts, stdout=log, stderr=subprocess.STDOUT).returncode:
                        raise SystemExit(f"{' '.join(texts)}\nfailed, see {self.folder / 'log.txt'}")
            seconds = {"wall": time.perf_counter() - started, "cpu": _cpu_of_children() - cpu}
            self._done.write_text(json.dumps({key: round(value, 1) for key, value in seconds.items()}))
        return self.folder

    @property
    def seconds(self) -> dict[str, float]:
        """On the wall and of the CPU, which other programs do not lengthen."""
        return json.loads(self._done.read_text())


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def recipe(script: str, config: str, **fields: Any) -> list[Any]:
    """The command of a recipe of this repository."""
    command = [RECIPES / script, "--config", RECIPES / config]
    for key, value in fields.items():
        command += [f"--{key}", *(value if isinstance(value, list | tuple) else [value])]
    return command


def mr_reward(*words: Any) -> list[Any]:
    """A command of the product's command line."""
    return ["-c", "from mr_reward.cli.app import main; main()", *words]


class Seed:
    """What all arms of a seed share, and its cells."""

    def __init__(self, seed: int, setup: Setup, options: argparse.Namespace) -> None:
        self.seed, self.setup, self.options = seed, setup, options
        self.world: str = options.world
        self.folder = options.output / options.world / f"seed{seed}"
        self.asked = {"num_digits": setup.num_digits, "questions": setup.questions}

    @cached_property
    def backbone(self) -> Path:
        """The end of supervised training; the weak policy lies in it."""
        return train_backbone(self.world, self.setup, self.folder / "sft", self.seed)

    @property
    def weak(self) -> Path:
        """The checkpoint that GRPO starts from."""
        return self.backbone / f"checkpoint-{self.setup.start_step}"

    def accuracy(self, folder: Path) -> float:
        """Share of right greedy answers on unseen test pictures."""
        found = folder / "greedy.json"
        if not found.is_file():
            own = options_of(self.world, self.setup)
            tasks = WORLDS[self.world].make_tasks("test", self.options.test_samples, seed=0, **own)
            model = AutoModelForImageTextToText.from_pretrained(folder)
            answers = policy_answers(model, AutoProcessor.from_pretrained(folder), tasks, show_progress=False)
            right = statistics.fmean(task.is_correct(answer) for task, answer in zip(tasks, answers, strict=True))
            found.write_text(json.dumps(right))
        return json.loads(found.read_text())

    @cached_property
    def rollouts(self) -> Stage:
        """`labelled.jsonl`, graded, and `heldout.jsonl`, right or wrong."""
        stage = Stage(self.folder / "rollouts")
        truth, graded = (f"{one[self.world].__module__}.{one[self.world].__name__}" for one in (TRUTHS, GRADES))
        commands = []
        for name, split, count, seed, verifier in (
            ("labelled", "train", self.options.rollout_prompts, self.seed, graded),
            ("heldout", "validation", self.options.heldout_prompts, 0, truth),  # the same prompts for every seed
        ):
            raw = stage.folder / f"{name}-raw.jsonl"
            fields = {"dataset": self.world, "dataset_split": split, "num_prompts": count, "seed": seed, "out": raw}
            commands.append(
                recipe(
                    "collect.py",
                    "collect_tiny_handwriting_cpu.yaml",
                    policy=self.weak,
                    num_generations=self.options.num_generations,
                    max_completion_length=WORLDS[self.world].answer_tokens,
                    prompts_per_batch=32,
                    **fields,
                    **self.asked,
                )
            )
            out = stage.folder / f"{name}.jsonl"
            commands.append(mr_reward("label", raw, "--verifier", verifier, "--out", out))
        stage.run(*commands)
        return stage

    def reward_model(self, arm: Arm, rm_seed: int) -> Stage:
        """The reward model of an arm, trained; arms that differ in GRPO alone share it."""
        options = self.options
        name = f"rm-{arm.layout}-{arm.loss}-{'mix' if arm.mix else 'made-up'}-{arm.epochs}-{rm_seed}"
        files: list[Any] = [self.world]
        groups, mixture = options.rm_groups, {}
        if arm.mix:
            files.append(self.rollouts.folder / "labelled.jsonl")
            groups, mixture = 2 * groups // 3, {"mixture_weights": [2, 1]}
        stage = Stage(self.folder / name)
        stage.run(
            recipe(
                "pretrain_rm.py",
                "rm_tiny_handwriting_cpu.yaml",
                model_name_or_path=self.backbone,
                layout=arm.layout,
                loss=arm.loss,
                train_file=files,
                eval_file=self.world,
                num_train_groups=groups,
                num_eval_groups=512,
                max_steps=arm.epochs * options.rm_groups // 32,
                eval_strategy="no",
                seed=self.seed + 1000 * rm_seed,
                groups_seed=self.seed,
                output_dir=stage.folder,
                disable_tqdm="true",
                **mixture,
                **self.asked,
            )
        )
        return stage

    def judged(self, folder: Path) -> dict[str, float]:
        """How a reward model ranks unseen made-up groups, and the weak policy's held-out rollouts."""
        found = folder / "judged.json"
        if not found.is_file():
            made_up = json.loads((folder / "eval_metrics.json").read_text())[self.world]
            rollouts = report_rollouts(
                GroupScorer.from_pretrained(folder), self.rollouts.folder / "heldout.jsonl"
            ).metrics
            share = _SHARE.search((folder / "log.txt").read_text())
            numbers = {
                "made_up_best_of_4": made_up["best_of_n_accuracy"],
                "made_up_pairwise": made_up["pairwise_accuracy"],
                "right_above_wrong": rollouts["right_above_wrong"].value,
                "rollouts_best_of_n": rollouts["best_of_n"].value,
                "share_of_rollouts": float(share[1]) / 100 if share else 0.0,
            }
            known = {key: round(value, 4) for key, value in numbers.items() if math.isfinite(value)}
            found.write_text(json.dumps(known))
        return json.loads(found.read_text())

    def policy(self, name: str, arm: Arm, rm_seed: int, reward_model: Path) -> Stage:
        """A policy after GRPO with an arm's judge."""
        options = self.options
        stage = Stage(self.folder / f"policy-{name}-{rm_seed}")
        stage.run(
            recipe(
                "train_policy.py",
                "policy_tiny_handwriting_cpu.yaml",
                model_name_or_path=self.weak,
                reward_model=reward_model,
                reward_weights=["0.0", "1.0"] if arm.by_truth else ["1.0", "0.0"],
                dataset=self.world,
                eval_dataset=self.world,
                num_eval_prompts=options.eval_prompts,
                num_generations=options.num_generations,
                per_device_train_batch_size=16 * options.num_generations,
                per_device_eval_batch_size=16 * options.num_generations,
                max_completion_length=WORLDS[self.world].answer_tokens,
                max_steps=options.grpo_steps,
                lr_scheduler_type=arm.schedule,
                beta=arm.beta,
                eval_strategy="steps",
                eval_steps=options.eval_steps,
                eval_on_start="true",
                log_groups_steps=0,
                seed=self.seed,
                output_dir=stage.folder,
                disable_tqdm="true",
                **self.asked,
            )
        )
        return stage

    def cell(self, name: str, rm_seed: int) -> None:
        """An arm with one of its reward models, written down."""
        result = self.options.results / self.world / f"{name}-seed{self.seed}-rm{rm_seed}.json"
        arm = ARMS[name]
        if result.is_file() or (arm.by_truth and rm_seed != self.options.rm_seeds[0]):
            return  # the truth has no second reward model
        reward_model = self.reward_model(arm, rm_seed)
        policy = self.policy(name, arm, rm_seed, reward_model.folder)
        average = policy.folder / "ema"
        lines = (policy.folder / "validation.jsonl").read_text().splitlines()
        seconds = {"rollouts": self.rollouts.seconds, "reward_model": reward_model.seconds, "grpo": policy.seconds}
        record = {
            "world": self.world,
            "arm": name,
            "seed": self.seed,
            "rm_seed": rm_seed,
            "start": self.accuracy(self.weak),
            "backbone": self.accuracy(self.backbone),
            "end": self.accuracy(policy.folder),
            "end_of_average": self.accuracy(average) if average.is_dir() else None,
            "reward_model": self.judged(reward_model.folder),
            "validation": [_curve(json.loads(line)) for line in lines],
            "seconds": seconds,
            "settings": {key: value for key, value in vars(self.options).items() if key in SETTINGS},
            "versions": {package: version(package) for package in ("mr-reward", "torch", "transformers", "trl")},
            "date": datetime.now(UTC).date().isoformat(),
        }
        with written_whole_file(result) as unfinished:
            unfinished.write_text(json.dumps(record, indent=1) + "\n")
        gain = record["end"] - record["start"]
        shown = f"{record['start']:.3f} -> {record['end']:.3f} ({gain:+.3f})"
        print(result.stem, shown, "collapsed" if gain < -COLLAPSE else "", file=sys.stderr, flush=True)


def _curve(entry: dict[str, Any]) -> dict[str, Any]:
    """What a cell keeps of a validation."""
    kept = {key: value for key, value in entry.items() if CURVE.fullmatch(key)}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in kept.items()}


def main() -> None:
    """Run the cells that are not there yet, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="handwriting", choices=list(SETUPS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rm_seeds", type=int, nargs="+", default=[0, 1], help="reward models of each arm and seed")
    parser.add_argument("--output", type=Path, default=Path("outputs/policy_comparison"), help="models and rollouts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="one JSON file a cell")
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("sft_steps", "start_step"):
        parser.add_argument(f"--{name}", type=int, help="in place of the world's")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("sft_steps", "start_step") if getattr(options, name)}
    for seed in options.seeds:
        cells = Seed(seed, replace(SETUPS[options.world], **given), options)
        for name in options.arms:
            for rm_seed in options.rm_seeds:
                cells.cell(name, rm_seed)
    for row in comparison(options.world, options.seeds, options.arms, options.results):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
