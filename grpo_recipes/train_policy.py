"""Train a policy with GRPO; a multi-response reward model compares the rollouts of each prompt.

    accelerate launch grpo_recipes/train_policy.py --config grpo_recipes/policy_tiny_handwriting_cpu.yaml

Every field of TRL's `GRPOConfig` and `ModelConfig` can stand in the YAML file or on the command line. With
`resume_from_checkpoint: true` the same command starts a run and resumes it after an interruption. The fields of the
worlds come from `WorldPolicyArguments`; a data set of your own can come in the same way.

Before anything is loaded the run is checked, and does not start if something would fail. The same on any machine:

    mr-reward doctor --config RECIPE --accelerate_config configs/deepspeed/zero3.yaml

or this script with `--dry_run`.
"""

import argparse
import gc
import logging
import sys
from typing import Any

from rich.console import Console
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config

from mr_reward.checkpoint.verify import check_there
from mr_reward.cli.errors import one_error_line
from mr_reward.data.groups_file import load_preferences
from mr_reward.doctor import check_before_start, examine_recipe
from mr_reward.doctor.findings import may_start, show_findings
from mr_reward.doctor.reward_model import judge_rollouts
from mr_reward.errors import ConfigurationError
from mr_reward.runs.average import EMACallback
from mr_reward.runs.callbacks import PolicyValidation, RunFigure, ShownGroups, WarningSigns
from mr_reward.runs.judge_guard import JudgeGuard, truth_metrics
from mr_reward.runs.recipe import (
    PolicyArguments,
    PolicyTrainingArguments,
    load_prompts,
    make_reward,
    other_rewards,
    parse_recipe,
    truths,
)
from mr_reward.runs.refresh_callback import RefreshCallback
from mr_reward.runs.resume import ContinuedEpochs, checkpoint_to_resume
from mr_reward.runs.vllm import check_vllm_server, prepare_vllm_on_cpu, send_single_placeholders
from mr_reward.training.saving import naming_a_full_disk
from mr_reward.worlds.world_policy import WorldPolicyArguments

logger = logging.getLogger(__name__)


def dry_run(argv: list[str]) -> bool:
    """Check a run without starting it, as `mr-reward doctor` does."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--accelerate_config")
    options, rest = parser.parse_known_args(argv)
    findings = examine_recipe(rest, accelerate_config=options.accelerate_config, recipe_type=WorldPolicyArguments)
    show_findings(findings, Console(), title="dry run: nothing was trained")
    return may_start(findings)


def train_policy(arguments: PolicyArguments, args: GRPOConfig, model_config: ModelConfig) -> GRPOTrainer:
    """Train, write the policy to `args.output_dir`, and return the trainer with its history."""
    if not model_config.model_name_or_path:
        raise ConfigurationError("model_name_or_path is missing; give the policy's folder or hub id")
    check_there(model_config.model_name_or_path, model_config.model_revision)
    if args.use_vllm and args.vllm_mode == "server":
        check_vllm_server(args, model_config.model_name_or_path, wait=args.vllm_server_timeout)
    reward = make_reward(arguments, args)
    reward_funcs: list[Any] = [reward, *other_rewards(arguments, args, reward)]
    if arguments.heldout_rollouts is not None and args.process_index == 0:
        judged = judge_rollouts(arguments, reward.scorer)
        logger.log(logging.INFO if judged.level == "green" else logging.WARNING, "%s: %s", judged.what, judged.text)
    load_options = {
        "dtype": model_config.dtype,
        "attn_implementation": model_config.attn_implementation,
        "revision": model_config.model_revision,
    }
    args.model_init_kwargs = {
        **{key: value for key, value in load_options.items() if value is not None},
        **(args.model_init_kwargs or {}),
    }
    train_dataset = load_prompts(arguments, seed=args.seed)
    eval_dataset = None
    callbacks: list[TrainerCallback] = [ContinuedEpochs(), RunFigure(str(args.output_dir))]
    if arguments.log_groups_steps:
        callbacks.append(ShownGroups(reward, every=arguments.log_groups_steps))
    if arguments.eval_dataset is not None:
        eval_dataset = load_prompts(arguments, evaluation=True, seed=0)  # the same prompts for every seed
        signs = WarningSigns(
            truths=[f"rewards/{truth.__name__}/mean" for truth in truths(arguments)],
            right_above_wrong=arguments.min_right_above_wrong,
        )
        callbacks.append(PolicyValidation(reward, str(args.output_dir), signs=signs))
        known = truth_metrics(reward_funcs[1:], eval_dataset.column_names)
        if (args.metric_for_best_model or "").removeprefix("eval_") in known or arguments.stop_when_fooled:
            callbacks.append(JudgeGuard(stop=arguments.stop_when_fooled))
        elif args.metric_for_best_model is not None:
            logger.warning(
                "metric_for_best_model is %s, none of the held-out truths (%s): nothing watches whether the reward "
                "model is still right",
                args.metric_for_best_model,
                ", ".join(known) or "there are none",
            )
    if args.use_vllm and args.vllm_mode == "colocate":
        prepare_vllm_on_cpu()
    trainer = GRPOTrainer(
        model=model_config.model_name_or_path,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        peft_config=get_peft_config(model_config),
        quantization_config=get_quantization_config(model_config),
    )
    if arguments.ema_half_life:
        trainer.add_callback(EMACallback(trainer, half_life=arguments.ema_half_life))
    if arguments.refresh_steps:
        known_groups = [group for file in arguments.refresh_groups for group in load_preferences(file)]
        refresh = RefreshCallback(
            trainer,
            every=arguments.refresh_steps,
            verifier=truths(arguments)[0],
            groups=known_groups,
            learning_rate=arguments.refresh_learning_rate,
        )
        trainer.add_callback(refresh)
    send_single_placeholders(trainer)
    with naming_a_full_disk(args.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    trainer.save_model(str(args.output_dir))
    return trainer


def main() -> int:
    """The command line."""
    logging.basicConfig(level=logging.INFO)
    if "--dry_run" in sys.argv:
        return int(not dry_run(sys.argv[1:]))
    recipe = parse_recipe(WorldPolicyArguments, PolicyTrainingArguments, ModelConfig)
    if not check_before_start(*recipe):
        return 1
    train_policy(*recipe).accelerator.end_training()
    # Threads of the process group that the trainer still holds can abort a finished run when the interpreter ends.
    gc.collect()
    return 0


if __name__ == "__main__":
    with one_error_line():
        sys.exit(main())
