"""Checks of the recipe of a reward model: its data, its backbone, and what the trainer says of the arguments.

The trainer itself is made, around the backbone's architecture made tiny: what it refuses the run would meet, later.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel
from trl import ModelConfig, get_peft_config

from mr_reward.backbones.base import tiny_config
from mr_reward.checkpoint.verify import load_processor
from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.data.sources import is_hub_id
from mr_reward.doctor.findings import Finding
from mr_reward.doctor.machine import check_devices, check_needed, check_versions
from mr_reward.doctor.recipes import check_folder_of_run, check_model_files, needed_packages, read_recipe
from mr_reward.errors import ConfigurationError, MRRewardError
from mr_reward.groups import ResponseGroup
from mr_reward.hub import why_missing
from mr_reward.layouts import check_layout
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.rows import Packer
from mr_reward.runs.launch import Launch
from mr_reward.runs.pretraining import RewardModelArguments, load_set, named_sets
from mr_reward.templates.thoughts import check_thoughts
from mr_reward.training.batches import check_groups
from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments

_GROUPS = 64  # of each set, that are rendered; a file is read whole
_WRONG = (MRRewardError, OSError, ValueError)


class PlannedRewardArguments(RewardTrainingArguments):
    """The trainer's arguments as if there were no GPU; what they refuse is kept in `problem`."""

    __doc__ = RewardTrainingArguments.__doc__
    use_cpu: bool

    def __post_init__(self) -> None:
        self.asks_for_cpu, self.use_cpu = bool(self.use_cpu), True  # without a GPU, bf16 would be refused
        self.problem: str | None = None
        try:
            super().__post_init__()
        except _WRONG as error:
            self.problem = str(error)


def examine_reward_recipe(
    arguments: Sequence[str], launch: Launch, recipe_type: type[RewardModelArguments]
) -> list[Finding]:
    """Check the recipe of a reward model; one that cannot be read is an error."""
    (recipe, args, model_config), findings = read_recipe(arguments, recipe_type, PlannedRewardArguments, ModelConfig)
    if args.problem is not None:
        findings.append(Finding("red", "configuration", args.problem))
    is_here = args.asks_for_cpu or torch.cuda.is_available()
    devices = {"use_cpu": args.asks_for_cpu, "bf16": bool(args.bf16)}
    findings += check_versions()
    findings += check_needed(needed_packages(args, launch), here=is_here)
    findings.append(check_devices(**devices, num_local_processes=launch.num_local_processes))
    findings += check_folder_of_run(args, launch)
    model, about_model = _tiny_model(recipe, model_config, is_here=is_here)
    findings += about_model
    for evaluation in (False, True):
        findings += _check_data(recipe, args, model, evaluation=evaluation)
    if model is not None and args.problem is None:
        findings.append(_check_trainer(recipe, args, model, model_config))
    return findings


def _tiny_model(
    recipe: RewardModelArguments, model_config: ModelConfig, *, is_here: bool
) -> tuple[MultiResponseRewardModel | None, list[Finding]]:
    """The reward model to be, with the architecture made tiny and its own processor, and what is to be said of it."""
    name, attention = model_config.model_name_or_path, model_config.attn_implementation
    findings = []
    if not name:
        findings.append(_red("backbone", "model_name_or_path is missing; give the backbone's folder or hub id"))
    else:
        findings.append(check_model_files(name, "backbone", is_here=is_here))
    for check, value in ((check_layout, recipe.layout), (check_thoughts, recipe.thoughts)):
        try:
            check(value)
        except ConfigurationError as error:
            findings.append(_red("configuration", error))
    if any(finding.level != "green" for finding in findings):
        return None, findings
    try:
        small = tiny_config(AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False))
        if small is None:
            text = f"no tiny copy of {name} can be made, so neither its attention nor the rows of the data were tried"
            return None, [*findings, Finding("yellow", "reward model", text)]
        with outside_zero3(), torch.random.fork_rng(devices=[]):
            backbone = AutoModel.from_config(small, dtype=torch.float32)
            model = MultiResponseRewardModel.from_backbone(
                backbone,
                layout=recipe.layout,
                thoughts=recipe.thoughts,
                processor=load_processor(str(name)),
            )
        if attention is not None:
            MultiResponseRewardModel.without_weights(model.config, attention)
            if is_here:  # with its packages
                model.backbone.set_attn_implementation(attention)
    except ImportError as error:
        return None, [*findings, _red("reward model", f"attention {attention} cannot run here: {error}")]
    except _WRONG as error:
        return None, [*findings, _red("reward model", error)]
    text = f"layout {recipe.layout} on {attention or model.attention_backend}, thoughts {recipe.thoughts}"
    return model, [*findings, Finding("green", "reward model", text)]


def _check_data(
    recipe: RewardModelArguments,
    args: PlannedRewardArguments,
    model: MultiResponseRewardModel | None,
    *,
    evaluation: bool,
) -> Iterator[Finding]:
    """A line for each set that the recipe names: its rows are read as the training reads them, some are rendered."""
    what = "evaluation data" if evaluation else "training data"
    try:
        sets = named_sets(recipe, evaluation=evaluation)
    except ConfigurationError as error:
        yield _red(what, error)
        return
    max_tokens = args.eval_max_tokens or args.max_tokens if evaluation else args.max_tokens
    training: dict[str, Any] = {
        "max_responses": args.max_responses,
        "degenerate_negatives": args.degenerate_negatives > 0,
    }
    for place in sets.values():
        if place not in recipe.sources and not Path(place).exists() and is_hub_id(place):
            reason = why_missing(place, kind="dataset")
            text = f"{place} {reason or 'is on the hub; not looked at'}"
            yield Finding("red" if reason else "yellow", what, text)
            continue
        try:
            groups = load_set(recipe, place, evaluation=evaluation, seed=args.seed, limit=_GROUPS)
            text = f"{place}: read {len(groups)} groups"
            if model is not None and args.problem is None:
                packer = Packer.of(model, max_tokens=max_tokens, over_length=args.over_length)
                options = {} if evaluation else training
                tried = groups[:_GROUPS]
                kept = check_groups(tried, packer, place, training=not evaluation, show_progress=False, **options)
                longest = max(tokens for _, tokens in kept)
                text += f", {len(kept)} of the first {len(tried)} can be used, up to {longest} of {max_tokens} tokens"
            yield Finding("green", what, text)
        except _WRONG as error:
            yield _red(what, error if place in str(error) else f"{place}: {error}")


def _check_trainer(
    recipe: RewardModelArguments,
    args: PlannedRewardArguments,
    model: MultiResponseRewardModel,
    model_config: ModelConfig,
) -> Finding:
    """What the trainer says of its arguments, with a made-up group in the place of each set."""
    group = ResponseGroup(prompt="Is it?", responses=["Yes.", "No."], rankings=[1, 2])
    sets = {name: [group] for name in (named_sets(recipe) if recipe.train_file else ["training"])}
    evaluation = {name: [group] for name in named_sets(recipe, evaluation=True)} or None
    args.report_to, args.push_to_hub, args.disable_tqdm = [], False, True
    if not recipe.train_file:
        args.mixture_weights = None  # of how many is not known
    try:
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir = folder
            trainer = RewardTrainer(model, args, sets, evaluation, peft_config=get_peft_config(model_config))
    except _WRONG as error:
        return _red("trainer", error)
    trained = sum(part.numel() for part in trainer.model.parameters() if part.requires_grad)
    whole = sum(part.numel() for part in trainer.model.parameters())
    how = f"LoRA of rank {model_config.lora_r}" if trained < whole else "all weights"
    text = f"{args.loss}, {how}, {len(sets)} training sets, {len(evaluation or ())} for evaluation"
    return Finding("green", "trainer", text)


def _red(what: str, problem: Any) -> Finding:
    return Finding("red", what, str(problem))
