"""The whole path in minutes on a CPU: a weak policy, a reward model that compares answers, GRPO, and the truth.

    make quickstart
    python grpo_recipes/quickstart.py --seed 1 --layout causal

A tiny Qwen3-VL learns to read handwritten digits (SFT). What it can do after a third of the steps is the weak policy;
its final state is the backbone of a multi-response reward model. The weak policy's own rollouts are collected and
labelled by the truth; the reward model learns to rank groups, a third of them such rollouts and the others made up.
GRPO then trains the weak policy on the reward model's comparison of its rollouts, at a rate that falls to zero; for
this run the truth only measures. The same run with the truth as its reward shows what could be gained. Everything is
written to the output folder.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pretrain_rm
import train_policy
import transformers
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, ModelConfig, SFTConfig, SFTTrainer, TrlParser

from mr_reward import GroupScorer, MultiResponseRewardModel
from mr_reward.cli.errors import one_error_line
from mr_reward.data.labels import Verifier, label_groups
from mr_reward.errors import ConfigurationError
from mr_reward.evaluation.evaluator import evaluate_groups, report_rollouts
from mr_reward.evaluation.plots import plot_curves, plot_scored_groups
from mr_reward.runs.collect import collect
from mr_reward.runs.recipe import parse_recipe
from mr_reward.training.trainer import RewardTrainingArguments
from mr_reward.worlds.handwriting import make_sft_rows
from mr_reward.worlds.named import WORLDS, world_options
from mr_reward.worlds.tiny import build_qwen3_vl, build_qwen3_vl_processor
from mr_reward.worlds.world_policy import GRADES, TRUTHS, WorldCollectArguments, policy_answers

RECIPES = Path(__file__).parent
STAGES = {
    "sft": "supervised training",
    "collect": "rollouts",
    "rm": "reward model",
    "grpo": "GRPO",
    "truth": "by truth",
}


@dataclass
class QuickstartArguments:
    """Arguments of the quickstart; everything else stands in the three YAML files beside this script.

    Args:
        output: folder for all results.
        seed: of weights, data and rollouts.
        layout: causal, isolated or set.
        world: handwriting or shapes.
        num_digits: digits in each image of handwriting.
        questions: what is asked about the images.
        sft_steps: steps of supervised training, a multiple of 3; None for the YAML's.
        rollout_prompts: prompts whose rollouts by the weak policy the reward model learns from.
        rm_groups: groups to train the reward model on, a third of them rollouts.
        grpo_steps: steps of GRPO, with the reward model and with the truth.
        eval_samples: unseen images to measure the policy on, and unseen groups for the reward model.
    """

    output: str = field(default="outputs/quickstart", metadata={"help": "Folder for all results"})
    seed: int = field(default=0, metadata={"help": "Of weights, data and rollouts"})
    layout: str = field(default="set", metadata={"help": "causal, isolated or set"})
    world: str = field(default="handwriting", metadata={"help": "handwriting or shapes"})
    num_digits: int = field(default=2, metadata={"help": "Digits in each image of handwriting"})
    questions: list[str] = field(default_factory=lambda: ["read"], metadata={"help": "What is asked about the images"})
    sft_steps: int | None = field(default=None, metadata={"help": "Steps of SFT"})
    rollout_prompts: int = field(default=1536, metadata={"help": "Prompts of the rollouts that it learns from"})
    rm_groups: int = field(default=12800, metadata={"help": "Groups to train the reward model on"})
    grpo_steps: int = field(default=100, metadata={"help": "Steps of GRPO"})
    eval_samples: int = field(default=512, metadata={"help": "Unseen images and groups to measure on"})

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise ConfigurationError(f"world is {self.world!r}, expected one of {', '.join(WORLDS)}")
        self.world_options = world_options(self.world, num_digits=self.num_digits, questions=self.questions)


def read_recipe(name: str, types: tuple[type, ...], **overrides: Any) -> Any:
    """Parse a YAML beside this script, with overrides as on the command line; None keeps the YAML's value."""
    arguments = ["--config", str(RECIPES / name)]
    for key, value in overrides.items():
        if value is not None:
            arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return TrlParser(types).parse_args_and_config(args=arguments)


def train_reader(options: QuickstartArguments, folder: Path, weak_step: int | None = None) -> Path:
    """SFT from random weights with TRL; returns the checkpoint after `weak_step` (a third) of the steps."""
    if weak_step is None and options.sft_steps is not None:
        weak_step = options.sft_steps // 3
    (args,) = read_recipe(
        "sft_tiny_handwriting_cpu.yaml",
        (SFTConfig,),
        output_dir=folder,
        seed=options.seed,
        max_steps=options.sft_steps,
        save_steps=weak_step,
    )
    num_tasks = args.max_steps * args.per_device_train_batch_size
    tasks = WORLDS[options.world].make_tasks("train", num_tasks, seed=options.seed, **options.world_options)
    processor = build_qwen3_vl_processor()
    trainer = SFTTrainer(
        build_qwen3_vl(options.seed),
        args=args,
        train_dataset=Dataset.from_list(make_sft_rows(tasks)),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(str(folder))
    processor.save_pretrained(folder)
    return folder / f"checkpoint-{args.save_steps}"


def collect_rollouts(options: QuickstartArguments, policy: Path, folder: Path) -> tuple[Path, Path]:
    """Rollouts of the policy: graded ones to train on, and held-out ones that are right or wrong."""
    shutil.rmtree(folder, ignore_errors=True)  # those of another policy; a file of them would be refused
    files = []
    for split, count, seed, verifier in (
        ("train", options.rollout_prompts, options.seed, GRADES[options.world]),
        ("validation", options.eval_samples // 2, 0, TRUTHS[options.world]),
    ):
        (arguments,) = read_recipe(
            "collect_tiny_handwriting_cpu.yaml",
            (WorldCollectArguments,),
            policy=policy,
            dataset=options.world,
            dataset_split=split,
            num_prompts=count,
            seed=seed,
            num_digits=options.num_digits,
            questions=options.questions,
            max_completion_length=WORLDS[options.world].answer_tokens,
            out=folder / f"{split}.jsonl",
        )
        collect(arguments)
        files.append(folder / f"{split}-labelled.jsonl")
        label_groups(arguments.out, files[-1], Verifier(verifier, f"{verifier.__module__}.{verifier.__name__}"))
    return files[0], files[1]


def train_reward_model(
    options: QuickstartArguments, backbone: Path, rollouts: Path, folder: Path
) -> list[dict[str, float]]:
    """Pretrain the reward model on ranked groups, made-up ones and rollouts; returns the log."""
    arguments, args, model_config = read_recipe(
        "rm_tiny_handwriting_cpu.yaml",
        (pretrain_rm.WorldRewardArguments, RewardTrainingArguments, ModelConfig),
        output_dir=folder,
        model_name_or_path=backbone,
        layout=options.layout,
        train_file=[options.world, rollouts],
        mixture_weights=[2, 1],
        eval_file=options.world,
        num_digits=options.num_digits,
        questions=options.questions,
        seed=options.seed,
        num_train_groups=2 * options.rm_groups // 3,
        max_steps=options.rm_groups // 32,
    )
    transformers.set_seed(options.seed)
    model = MultiResponseRewardModel.from_backbone(str(backbone), layout=options.layout)
    trainer = pretrain_rm.pretrain(
        model,
        pretrain_rm.load_sets(arguments, seed=options.seed),
        pretrain_rm.load_sets(arguments, evaluation=True, seed=options.seed)[options.world],
        args,
        model_config,
    )
    return trainer.state.log_history


def run_grpo(
    options: QuickstartArguments, policy: Path, reward_model: Path, folder: Path, *, by_truth: bool = False
) -> list[dict[str, float]]:
    """GRPO with the reward model, or with the truth while the reward model looks on; returns the log."""
    recipe = read_recipe(
        "policy_tiny_handwriting_cpu.yaml",
        (train_policy.WorldPolicyArguments, GRPOConfig, ModelConfig),
        output_dir=folder,
        model_name_or_path=policy,
        reward_model=reward_model,
        dataset=options.world,
        num_digits=options.num_digits,
        questions=options.questions,
        seed=options.seed,
        max_steps=options.grpo_steps,
        max_completion_length=WORLDS[options.world].answer_tokens,
        reward_weights=["0.0", "1.0"] if by_truth else ["1.0", "0.0"],  # reward model, truth
        ema_half_life=0,
    )
    return train_policy.train_policy(*recipe).state.log_history


def measure_policy(folder: Path, options: QuickstartArguments) -> float:
    """True accuracy of greedy answers on unseen scans."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    # The same images for every seed and policy.
    tasks = WORLDS[options.world].make_tasks("test", options.eval_samples, seed=0, **options.world_options)
    answers = policy_answers(model, AutoProcessor.from_pretrained(folder), tasks)
    return sum(task.is_correct(answer) for task, answer in zip(tasks, answers, strict=True)) / len(tasks)


def curve(log: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric of a trainer's log."""
    entries = [entry for entry in log if entry.get(key) is not None]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def main(options: QuickstartArguments) -> dict[str, Any]:
    """Run everything; returns what `metrics.json` holds."""
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    @contextmanager
    def stage(name: str, text: str) -> Iterator[None]:
        console.rule(text)
        begin = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begin

    with stage(
        "sft", "1/5  supervised training: a third of it is the weak policy, all of it the reward model's backbone"
    ):
        weak_policy = train_reader(options, output / "sft")
        before = measure_policy(weak_policy, options)
        backbone = measure_policy(output / "sft", options)
    with stage("collect", "2/5  the weak policy's own rollouts, labelled by the truth"):
        rollouts, heldout = collect_rollouts(options, weak_policy, output / "rollouts")
    with stage("rm", f"3/5  reward model, layout {options.layout}: which answer is best?"):
        rm_log = train_reward_model(options, output / "sft", rollouts, output / "rm")
        scorer = GroupScorer.from_pretrained(output / "rm")
        made = WORLDS[options.world].make_groups
        groups = made("test", options.eval_samples, num_responses=4, seed=0, **options.world_options)
        ranking = evaluate_groups(scorer, groups)
        judged = report_rollouts(scorer, heldout).metrics["right_above_wrong"].value
    with stage("grpo", "4/5  GRPO: the reward model compares the rollouts of each prompt"):
        grpo_log = run_grpo(options, weak_policy, output / "rm", output / "policy")
        after = measure_policy(output / "policy", options)
    with stage("truth", "5/5  the same with the truth as the reward: what could be gained"):
        truth_log = run_grpo(options, weak_policy, output / "rm", output / "policy-truth", by_truth=True)
        with_truth = measure_policy(output / "policy-truth", options)

    rewards = curve(grpo_log, "mr_reward/score_mean")[1]
    tenth = max(1, len(rewards) // 10)
    metrics = {
        "layout": options.layout,
        "seed": options.seed,
        "seconds": {**seconds, "total": time.perf_counter() - started},
        "rm": {
            "n": 4,
            **{key: ranking[key] for key in ("best_of_n_accuracy", "pairwise_accuracy", "order_flip_rate")},
        },
        "policy": {
            "eval_samples": options.eval_samples,
            "accuracy_before": before,
            "accuracy_after": after,
            "accuracy_with_truth": with_truth,
            "accuracy_of_rm_backbone": backbone,
        },
        # Of pairs of the weak policy's held-out rollouts; None where all rollouts of each prompt are right, or wrong.
        "judge": {"right_above_wrong": judged if math.isfinite(judged) else None},
        "reward": {"first": sum(rewards[:tenth]) / tenth, "last": sum(rewards[-tenth:]) / tenth},
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shown = groups[:9]
    plot_scored_groups(shown, [scores or [] for scores in scorer.score(shown)], output / "responses.png")
    plot_curves(
        {
            "reward model: best of 4 (validation)": {"accuracy": curve(rm_log, "eval_best_of_n_accuracy")},
            "GRPO: mean score of the rollouts": {"score": curve(grpo_log, "mr_reward/score_mean")},
            "GRPO: are the rollouts right?": {
                reward: curve(log, f"rewards/{options.world}_accuracy/mean")
                for reward, log in (("reward model", grpo_log), ("truth", truth_log))
            },
        },
        output / "curves.png",
    )
    write_report(metrics, output, console)
    return metrics


def write_report(metrics: dict[str, Any], output: Path, console: Console) -> None:
    """The final table, on the terminal and as `report.md`."""
    policy, rm, reward, seconds = (metrics[key] for key in ("policy", "rm", "reward", "seconds"))
    judged = metrics["judge"]["right_above_wrong"]
    rows = [
        ("reward model: best of 4, unseen scans", f"{rm['best_of_n_accuracy']:.3f}"),
        ("reward model: pairwise accuracy", f"{rm['pairwise_accuracy']:.3f}"),
        ("reward model: winner changes with the order", f"{rm['order_flip_rate']:.3f}"),
        ("reward model: right above wrong, the policy's rollouts", "none" if judged is None else f"{judged:.3f}"),
        ("policy: right on unseen scans, before GRPO", f"{policy['accuracy_before']:.3f}"),
        ("policy: right on unseen scans, after GRPO", f"{policy['accuracy_after']:.3f}"),
        ("policy: right on unseen scans, after GRPO by the truth", f"{policy['accuracy_with_truth']:.3f}"),
        ("reward model's backbone: right on unseen scans", f"{policy['accuracy_of_rm_backbone']:.3f}"),
        ("mean score of the rollouts, first and last tenth", f"{reward['first']:.2f} -> {reward['last']:.2f}"),
        ("seconds: " + ", ".join(STAGES.values()), ", ".join(f"{seconds[key]:.0f}" for key in STAGES)),
    ]
    table = Table("what", "value", title=f"layout {metrics['layout']}, seed {metrics['seed']}")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"Results, models and figures: {output}")
    lines = [
        f"# Quickstart: layout {metrics['layout']}, seed {metrics['seed']}",
        "",
        "| what | value |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "![curves](curves.png)", "", "![responses and their scores](responses.png)", ""]
    (output / "report.md").write_text("\n".join(lines))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    with one_error_line():
        main(*parse_recipe(QuickstartArguments))
