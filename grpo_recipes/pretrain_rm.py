"""Train a multi-response reward model on N-way preferences.

    python grpo_recipes/pretrain_rm.py --config grpo_recipes/rm_tiny_handwriting_cpu.yaml
    accelerate launch grpo_recipes/pretrain_rm.py --config my.yaml --train_file train.jsonl --output_dir rm
    accelerate launch --config_file configs/deepspeed/zero3.yaml grpo_recipes/pretrain_rm.py --config my.yaml

Every field of `RewardTrainingArguments` (all of transformers' `TrainingArguments`) and of TRL's `ModelConfig` (LoRA
included) can stand in the YAML file or on the command line. With `resume_from_checkpoint: true` the same command
starts a run and resumes it after it was killed. `mr-reward doctor --config my.yaml` looks at it first.
"""

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import set_seed
from trl import ModelConfig, get_peft_config

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.checkpoint.card import write_model_card
from mr_reward.checkpoint.verify import check_there
from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.cli.errors import one_error_line
from mr_reward.errors import ConfigurationError
from mr_reward.evaluation.evaluator import evaluate_groups
from mr_reward.runs.pretraining import (
    RewardModelArguments,
    load_sets,
    named_sets,
    training_data,
    without_evaluation,
)
from mr_reward.runs.recipe import parse_recipe
from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments
from mr_reward.worlds.world_pretraining import WorldRewardArguments


def pretrain(
    model: MultiResponseRewardModel,
    train_groups: Sequence[ResponseGroup] | Mapping[str, Sequence[ResponseGroup]],
    eval_groups: Sequence[ResponseGroup] | Mapping[str, Sequence[ResponseGroup]] | None,
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
    named_sets(arguments)  # that there are some
    check_there(model_config.model_name_or_path, model_config.model_revision)
    # Data first: a wrong row must show before the backbone is loaded.
    train_groups = load_sets(arguments, seed=args.seed)
    eval_groups = load_sets(arguments, evaluation=True, seed=args.seed) or None
    if arguments.decontaminate and eval_groups is not None:
        train_groups = without_evaluation(train_groups, eval_groups)
    set_seed(args.seed)  # the new head starts the same on every rank and at every restart
    load_options = {
        "dtype": model_config.dtype,
        "attn_implementation": model_config.attn_implementation,
        "revision": model_config.model_revision,
    }
    model = MultiResponseRewardModel.from_backbone(
        model_config.model_name_or_path,
        layout=arguments.layout,
        thoughts=arguments.thoughts,
        **{key: value for key, value in load_options.items() if value is not None},
    )
    # A single set is reported without its name, so that metric_for_best_model need not know the file's.
    single = eval_groups is not None and len(eval_groups) == 1
    evaluation = next(iter(eval_groups.values())) if eval_groups is not None and single else eval_groups
    trainer = pretrain(model, train_groups, evaluation, args, model_config)
    trainer.accelerator.end_training()  # the ranks part here
    if not trainer.is_world_process_zero():
        return
    trained_on = training_data(arguments, args, train_groups, trainer.shares)
    if eval_groups is None:
        write_model_card(str(args.output_dir), training_data=trained_on)
        return
    with outside_zero3():  # this rank goes on alone, with the whole model
        scorer = GroupScorer.from_pretrained(
            str(args.output_dir),
            max_tokens_per_batch=args.eval_max_tokens or args.max_tokens,
            over_length=args.over_length,
        )
    metrics = {name: evaluate_groups(scorer, groups, seed=args.seed) for name, groups in eval_groups.items()}
    (Path(str(args.output_dir)) / "eval_metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_model_card(str(args.output_dir), training_data=trained_on, metrics=metrics)
    table = Table("metric", *metrics, title=f"{arguments.layout}, whole groups in two orders")
    for key in next(iter(metrics.values())):
        table.add_row(key, *(f"{values[key]:.4f}" for values in metrics.values()))
    Console().print(table)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with one_error_line():
        main(*parse_recipe(WorldRewardArguments, RewardTrainingArguments, ModelConfig))
        # Threads of the process group that the trainer still holds can abort a finished run when the interpreter ends.
        gc.collect()
