"""Checks of a GRPO run before it starts: on any machine, in seconds, without loading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoProcessor

from mr_reward.attention.backends import check_backend
from mr_reward.attention.group import GROUP_ATTENTION
from mr_reward.backbones import get_adapter
from mr_reward.checkpoint.verify import check_config_keys, check_template_hash, has_file
from mr_reward.doctor.findings import Finding, Level, may_start
from mr_reward.doctor.group_map import group_map
from mr_reward.doctor.machine import check_devices, check_needed, check_output_folder, check_versions
from mr_reward.doctor.policy import check_memory, check_objective, check_vllm
from mr_reward.doctor.reward_model import check_weights, score_tiny
from mr_reward.errors import ConfigurationError, MRRewardError, OverLengthError, ScoringServerError
from mr_reward.groups import ResponseGroup
from mr_reward.model.configuration import MultiResponseRewardConfig, check_layers, context_tokens
from mr_reward.model.rows import Packer
from mr_reward.runs.plan import RunPlan
from mr_reward.templates.rendering import Renderer, template_hash

__all__ = ["check_reward_folder", "check_run"]

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_REPORT_MODULES = ("wandb", "trackio", "tensorboard", "mlflow", "swanlab")
_SERVER_SECONDS = 2.0  # a scoring server that runs answers at once


def check_run(plan: RunPlan) -> list[Finding]:
    """Look at everything that can be known before a run.

    Args:
        plan: the run.

    Returns:
        Findings in the order in which the run would meet them.
    """
    args = plan.args
    # Elsewhere than on the machine of the run, what is missing says little.
    here = plan.use_cpu or torch.cuda.is_available()
    findings = [*check_versions(), *check_needed(_needed_packages(plan), here=here)]
    local = plan.launch.num_local_processes
    findings.append(check_devices(use_cpu=plan.use_cpu, bf16=bool(args.bf16), num_local_processes=local))
    given = str(args.resume_from_checkpoint or "false")  # on the command line everything is text
    resume = given.lower() == "true" if given.lower() in ("true", "false") else given
    processes = plan.launch.num_processes
    findings += check_output_folder(str(args.output_dir), resume=resume, num_processes=processes)
    findings += [*_describe_geometry(plan), *check_objective(plan), *_check_rewards(plan)]
    config, more = _read_reward_model(plan)
    findings += more
    if config is not None:
        findings += _check_reward_model(plan, config)
    findings += check_vllm(plan)
    findings += check_memory(plan, config)
    if config is not None and may_start(findings):
        findings.append(_try(plan, config))
    return findings


def check_reward_folder(folder: str) -> list[Finding]:
    """Look at a reward model alone.

    Args:
        folder: of a reward model, or a hub id.

    Returns:
        Findings: its files, and a score of its architecture made tiny.
    """
    config, findings = _read_folder(folder)
    if config is not None and may_start(findings):
        findings.append(score_tiny(folder, config, None, ()))
    return findings


def _describe_geometry(plan: RunPlan) -> Iterator[Finding]:
    """What does not divide has been refused by `GRPOConfig`: `planned_arguments` tells it the number of processes."""
    args, processes = plan.args, plan.launch.num_processes
    size = args.num_generations
    rows = args.per_device_train_batch_size * args.steps_per_generation  # of a rank, in one call of the rewards
    shown = (
        f"{processes} process{'es' if processes > 1 else ''} x batch {args.per_device_train_batch_size} x "
        f"{args.steps_per_generation} steps per generation = {rows * processes} rollouts"
    )
    spread = "some on two ranks or more" if rows % size else "each on one rank"
    yield Finding("green", "groups", f"{shown}: {rows * processes // size} groups of {size}, {spread}")
    yield Finding("green", "who holds what", "\n".join(group_map(processes, rows, size)))
    if args.eval_strategy != "no" and plan.eval_dataset is None:
        text = f"eval_dataset is missing beside eval_strategy: {args.eval_strategy.value}; name the held-out prompts"
        yield Finding("red", "evaluation", text)
    elif args.eval_strategy != "no":
        rows = args.per_device_eval_batch_size * processes
        yield Finding("green", "evaluation", f"batches of {rows} rows, groups of {args.num_generations_eval or size}")


def _check_rewards(plan: RunPlan) -> Iterator[Finding]:
    weights = plan.args.reward_weights
    if weights is not None and len(weights) != plan.num_reward_funcs:
        yield Finding(
            "red",
            "reward_weights",
            f"{len(weights)} weights for {plan.num_reward_funcs} reward functions; give one for each",
        )
    else:
        shown = "all 1" if weights is None else ", ".join(map(str, weights))
        yield Finding("green", "rewards", f"{plan.num_reward_funcs} in all, weights {shown}")
    read = f"read {len(plan.prompts)} of them"
    if plan.unread:
        yield Finding("yellow", "prompts", f"{read}; not looked at, as on the hub: {', '.join(plan.unread)}")
    else:
        yield Finding("green", "prompts", read)


def _read_reward_model(plan: RunPlan) -> tuple[MultiResponseRewardConfig | None, list[Finding]]:
    name = plan.reward_model
    if plan.reward_server is not None:
        return None, [_ask_reward_server(plan, plan.reward_server)]
    if name is None:
        return None, [Finding("red", "reward model", "reward_model is missing; give the folder of pretrain_rm.py")]
    return _read_folder(name)


def _read_folder(name: str) -> tuple[MultiResponseRewardConfig | None, list[Finding]]:
    if not Path(name).is_dir() and not has_file(name, "config.json"):
        text = f"{name} is no folder, and no hub within reach has it; give the folder that pretrain_rm.py wrote"
        return None, [Finding("red", "reward model", text)]
    try:
        if not any(has_file(name, file) for file in _WEIGHT_FILES):
            raise ConfigurationError(f"{name} holds no weights ({', '.join(_WEIGHT_FILES)}); copy them too")
        if has_file(name, "adapter_config.json") or has_file(name, "reward_model_config.json"):
            return None, [
                Finding("yellow", "reward model", f"{name}: LoRA or the paper's format; merge it to check it")
            ]
        check_config_keys(name, None, MultiResponseRewardConfig)
        config = MultiResponseRewardConfig.from_pretrained(name)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        check_template_hash(name, config.template_hash, template_hash(processor, config.template))
    except (MRRewardError, OSError, ValueError) as error:
        return None, [Finding("red", "reward model", str(error))]
    findings = [Finding("green", "reward model", f"{name}: layout {config.layout}, template unchanged")]
    if Path(name).is_dir():
        findings.append(check_weights(Path(name), config))
    return config, findings


def _ask_reward_server(plan: RunPlan, url: str) -> Finding:
    from mr_reward.scorers import RemoteScorer  # its packages are an extra

    try:
        scorer = RemoteScorer(url, expected_hash=plan.reward_server_hash)
        try:
            health = scorer.connect(_SERVER_SECONDS)
        finally:
            scorer.close()
    except ScoringServerError as error:
        return Finding("yellow", "reward model", f"{error} (it need not run yet for a dry run)")
    except MRRewardError as error:
        return Finding("red", "reward model", str(error))
    return Finding("green", "reward model", f"{url}: layout {health.layout}, model {health.model_hash}")


def _check_reward_model(plan: RunPlan, config: MultiResponseRewardConfig) -> Iterator[Finding]:
    try:
        backend = plan.reward_attention or GROUP_ATTENTION
        check_backend(config.layout, backend, get_adapter(config.backbone_config).media_blocks)
        check_layers(config)
        yield Finding("green", "attention", f"layout {config.layout} on {backend}")
    except MRRewardError as error:
        yield Finding("red", "attention", str(error))
    try:
        yield _check_row(plan, config)
    except (MRRewardError, OSError, ValueError) as error:
        yield Finding("red", "row of a group", str(error))


def _check_row(plan: RunPlan, config: MultiResponseRewardConfig) -> Finding:
    """Lay out the longest prompt with N completions of full length, as a run would."""
    sizes = (plan.args.num_generations, plan.args.num_generations_eval or 0)
    texts = [str(i) for i in range(max(sizes))]  # different, so that none is a copy
    longest = plan.args.max_completion_length or 0
    renderer = Renderer(AutoProcessor.from_pretrained(plan.reward_model, trust_remote_code=False), config.template)
    packer = Packer(
        renderer,
        layout=config.layout,
        max_tokens=plan.reward_max_tokens,
        context_tokens=context_tokens(config.backbone_config),
        over_length="error",
    )
    prompts = plan.prompts or [ResponseGroup(prompt="?", responses=["?"])]
    rendered = max(
        (renderer.render(replace(group, responses=texts, rankings=None)) for group in prompts),
        key=lambda found: len(found.prompt_ids),
    )
    prompt = f"prompt {len(rendered.prompt_ids)}" if plan.prompts else "an unknown prompt"
    filled = replace(rendered, response_ids=[[0] * longest for _ in texts], joiner=None)
    name = f"{prompt} with {len(texts)} completions of {longest} tokens"
    in_chunks = config.layout != "causal" and plan.reward_attention in (None, GROUP_ATTENTION)
    try:
        if in_chunks and packer.num_tokens(filled) > packer.max_tokens:
            packer.trim(filled, name)
            return Finding(
                "yellow",
                "row of a group",
                f"{name} are more than reward_max_tokens={packer.max_tokens}: scored in chunks over the prompt, exact "
                "but slower; raise it if the memory is there",
            )
        row = packer.lay_out(filled, name)
    except OverLengthError as error:
        level: Level = "yellow" if plan.reward_over_length == "truncate_responses" else "red"
        return Finding(level, "row of a group", f"{error}. This run has over_length={plan.reward_over_length!r}")
    assert row is not None  # the policy is `error`
    shown = f"{prompt} + {len(texts)} completions of {longest} = {row.num_tokens} tokens at most"
    return Finding("green", "row of a group", f"{shown}, budget {packer.max_tokens}, context {packer.context_tokens}")


def _try(plan: RunPlan, config: MultiResponseRewardConfig) -> Finding:
    try:
        return score_tiny(str(plan.reward_model), config, plan.reward_attention, plan.prompts)
    except (MRRewardError, OSError, ValueError) as error:
        return Finding("red", "tiny score", str(error))


def _needed_packages(plan: RunPlan) -> dict[str, str]:
    """Modules that the recipe cannot do without -> the field that asks for them."""
    args = plan.args
    reports = args.report_to if isinstance(args.report_to, list) else [args.report_to or "none"]
    needed = {name: f"report_to: {name}" for name in reports if name in _REPORT_MODULES}
    if args.use_vllm and args.vllm_mode == "colocate":
        needed["vllm"] = "use_vllm: true"
    if plan.launch.zero_stage:
        needed["deepspeed"] = f"ZeRO stage {plan.launch.zero_stage}"
    if plan.reward_server is not None:
        needed["httpx2"] = "reward_server"
    if args.eval_strategy != "no":
        needed["matplotlib"] = "eval_strategy"
    return needed
