"""Train a multi-response reward model on N-way preferences.

    python grpo_recipes/pretrain_rm.py --config grpo_recipes/rm_tiny_handwriting_cpu.yaml
    accelerate launch grpo_recipes/pretrain_rm.py --config my.yaml --train_file train.jsonl --output_dir rm

Every field of `RewardTrainingArguments` (all of transformers' `TrainingArguments`) and of TRL's `ModelConfig` (LoRA
included) can stand in the YAML file or on the command line.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trl import ModelConfig, TrlParser, get_peft_config

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.data.handwriting import make_groups
from mr_reward.data.preferences import load_preferences
from mr_reward.errors import ConfigurationError
from mr_reward.evaluation.ranking import evaluate_ranking
from mr_reward.training.arguments import RewardTrainingArguments
from mr_reward.training.trainer import RewardTrainer


@dataclass
class RewardModelArguments:
    """What is trained, on what.

    Args:
        layout: causal, isolated or set.
        train_file: JSON Lines with `prompt, responses, rankings` and optional `image(s)`, `video`; or "handwriting".
        eval_file: the same for evaluation; None for no evaluation. "handwriting" uses its unseen validation scans.
        num_responses: N of the handwriting groups.
        num_train_groups: number of handwriting groups to train on.
        num_eval_groups: number of handwriting groups to evaluate on.
        num_digits: digits per image of the handwriting world.
        questions: questions of the handwriting world.
    """

    layout: str = field(default="set", metadata={"help": "causal, isolated or set"})
    train_file: str = field(default="handwriting", metadata={"help": "A .jsonl file, or handwriting"})
    eval_file: str | None = field(default=None, metadata={"help": "A .jsonl file, or handwriting"})
    num_responses: int = field(default=4, metadata={"help": "N of the handwriting groups"})
    num_train_groups: int = field(default=8192, metadata={"help": "Handwriting groups to train on"})
    num_eval_groups: int = field(default=256, metadata={"help": "Handwriting groups to evaluate on"})
    num_digits: int = field(default=3, metadata={"help": "Digits per image of the handwriting world"})
    questions: list[str] = field(default_factory=lambda: ["read"], metadata={"help": "Handwriting questions"})


def load_groups(
    source: str, arguments: RewardModelArguments, split: str, num_groups: int, seed: int
) -> list[ResponseGroup]:
    """Groups from a file, or from the handwriting world."""
    if source != "handwriting":
        return load_preferences(source)
    return make_groups(
        split,
        num_groups,
        num_responses=arguments.num_responses,
        num_digits=arguments.num_digits,
        questions=arguments.questions,
        seed=seed,
    )


def pretrain(
    model: MultiResponseRewardModel,
    train_groups: Sequence[ResponseGroup],
    eval_groups: Sequence[ResponseGroup] | None,
    args: RewardTrainingArguments,
    model_config: ModelConfig | None = None,
) -> RewardTrainer:
    """Train, write the model to `args.output_dir`, and return the trainer with its history."""
    trainer = RewardTrainer(
        model,
        args,
        train_groups,
        eval_groups,
        peft_config=get_peft_config(model_config) if model_config is not None else None,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_reward_model(str(args.output_dir))
    return trainer


def main(arguments: RewardModelArguments, args: RewardTrainingArguments, model_config: ModelConfig) -> None:
    """Load, train, save, evaluate."""
    if not model_config.model_name_or_path:
        raise ConfigurationError("model_name_or_path is missing; give the backbone's folder or hub id")
    # Data first: a wrong row must show before the backbone is loaded.
    train_groups = load_groups(arguments.train_file, arguments, "train", arguments.num_train_groups, args.seed)
    eval_groups = None
    if arguments.eval_file is not None:
        eval_groups = load_groups(arguments.eval_file, arguments, "validation", arguments.num_eval_groups, args.seed)
    load_options = {
        "dtype": model_config.dtype,
        "attn_implementation": model_config.attn_implementation,
        "revision": model_config.model_revision,
    }
    model = MultiResponseRewardModel.from_backbone(
        model_config.model_name_or_path,
        layout=arguments.layout,
        **{key: value for key, value in load_options.items() if value is not None},
    )
    trainer = pretrain(model, train_groups, eval_groups, args, model_config)
    if eval_groups is None or not trainer.is_world_process_zero():
        return
    scorer = GroupScorer.from_pretrained(str(args.output_dir), max_tokens_per_batch=args.max_tokens)
    metrics = evaluate_ranking(scorer, eval_groups, seed=args.seed)
    (Path(str(args.output_dir)) / "eval_metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    table = Table("metric", "value", title=f"{arguments.layout}, {len(eval_groups)} groups")
    for key, value in metrics.items():
        table.add_row(key, f"{value:.4f}")
    Console().print(table)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(*TrlParser((RewardModelArguments, RewardTrainingArguments, ModelConfig)).parse_args_and_config())
