"""Checks of the trainer's side of a run: its objective, the policy's folder, vLLM, and whether all fits the memory."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from mr_reward.checkpoint.verify import has_file
from mr_reward.doctor.findings import Finding, Level
from mr_reward.doctor.machine import device_memory
from mr_reward.doctor.reward_model import read_headers
from mr_reward.errors import CheckpointError, ConfigurationError
from mr_reward.model.configuration import MultiResponseRewardConfig
from mr_reward.model.memory import estimate_policy_memory, estimate_reward_memory
from mr_reward.runs.plan import RunPlan
from mr_reward.runs.vllm_server import check_vllm_server

__all__ = ["check_memory", "check_objective", "check_vllm"]

_CHOICES = ("loss_type", "scale_rewards", "importance_sampling_level", "multi_objective_aggregation")
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_GB = 1e9
_ADAM = ("adamw_torch", "adamw_torch_fused")  # of which the memory is known
_WASTE = 0.9  # allocators lose some of a device


def check_objective(plan: RunPlan) -> Iterator[Finding]:
    """Values that the trainer would only refuse in its first step, after everything has been loaded.

    Args:
        plan: the run.

    Yields:
        A red line for each, or a green one.
    """
    if getattr(plan.args, "trust_remote_code", False):
        yield Finding(
            "yellow",
            "foreign code",
            f"trust_remote_code is on: Python code of {plan.policy} is run with your rights; read it first",
        )
    known = _values_that_trl_compares()
    values = {name: getattr(plan.args, name, None) for name in _CHOICES}
    wrong = [
        name for name, value in values.items() if isinstance(value, str) and value not in known.get(name, [value])
    ]
    for name in wrong:
        text = (
            f"{name} is {values[name]!r}, which this version of trl does not know; it knows {', '.join(known[name])}"
        )
        yield Finding("red", "objective", text)
    if not wrong:
        shown = ", ".join(f"{name} {values[name]}" for name in _CHOICES[:2])
        yield Finding("green", "objective", f"{shown}, KL weight {plan.args.beta:g}")


def check_vllm(plan: RunPlan) -> Iterator[Finding]:
    """Whether vLLM can generate for this run, if it is to.

    Args:
        plan: the run.

    Yields:
        One line, or none without vLLM.
    """
    args = plan.args
    if not args.use_vllm:
        return
    if args.vllm_mode == "server":
        try:
            check_vllm_server(args, plan.policy)
        except ConfigurationError as error:
            yield Finding("yellow", "vLLM server", f"{error} (it need not run yet for a dry run)")
        else:
            yield Finding("green", "vLLM server", "answers, and can be trained with")
        return
    limit, completion = args.vllm_max_model_length, args.max_completion_length or 0
    if limit is not None and limit <= completion:
        yield Finding(
            "red",
            "vLLM",
            f"vllm_max_model_length={limit} leaves no room for a prompt beside max_completion_length={completion}; "
            "raise it",
        )
    else:
        sleep = "with" if args.vllm_enable_sleep_mode else "without"
        yield Finding("green", "vLLM", f"colocated, {args.vllm_gpu_memory_utilization:.0%} of each GPU, {sleep} sleep")


def check_memory(plan: RunPlan, reward_config: MultiResponseRewardConfig | None) -> Iterator[Finding]:
    """The policy's folder, and how much memory it and the reward model take of what is there.

    Args:
        plan: the run.
        reward_config: of the reward model; None if it is elsewhere or could not be read.

    Yields:
        A line for each model, and one that compares their sum with the device, where the device is known.
    """
    kept = passing = 0
    try:
        config = _policy_config(plan.policy)
    except (CheckpointError, OSError, ValueError) as error:
        yield Finding("red", "policy", f"{plan.policy}: {error}")
        return
    if config is None:
        yield _unknown_policy(plan)
    else:
        need = estimate_policy_memory(
            config,
            dtype=plan.policy_dtype,
            num_processes=plan.launch.num_processes,
            zero_stage=plan.launch.zero_stage,
            offload=plan.launch.offload,
            lora_rank=plan.lora_rank,
            lora_targets=plan.lora_targets,
        )
        weights = need.weights * (plan.policy_bits or 0) // (8 * plan.policy_dtype.itemsize) or need.weights
        optimizer = need.optimizer if plan.args.optim in _ADAM else 0
        parts = {"weights": weights, "gradients": need.gradients, "optimizer": optimizer}
        yield Finding("green", "memory, policy", f"{_sum(parts)} on each process, activations not counted")
        kept += sum(parts.values())
    if reward_config is not None:
        reward = estimate_reward_memory(
            reward_config,
            dtype=plan.reward_dtype or torch.float32,
            max_tokens=plan.reward_max_tokens,
            dense_mask=reward_config.layout != "causal",
        )
        parts = {"weights": reward.weights, "a forward pass": reward.activations}
        offload = plan.reward_placement == "offload"
        when = "while it scores" if offload else "of it the weights always"
        yield Finding("green", "memory, reward model", f"{_sum(parts)} on each process, {when}")
        kept += 0 if offload else reward.weights
        passing = reward.activations + (reward.weights if offload else 0)
    device = device_memory(use_cpu=plan.use_cpu, num_local_processes=plan.launch.num_local_processes)
    args = plan.args
    if device is not None and not (plan.launch.fsdp or args.fsdp):  # its shards are not part of the estimate
        colocated = args.use_vllm and args.vllm_mode == "colocate" and not args.vllm_enable_sleep_mode
        vllm = args.vllm_gpu_memory_utilization if colocated and not plan.use_cpu else 0.0
        yield _compare(kept, passing, device, vllm)


def _unknown_policy(plan: RunPlan) -> Finding:
    if (Path(plan.policy) / "adapter_config.json").is_file():
        return Finding("yellow", "policy", f"{plan.policy}: an adapter; merge it to have it checked and measured")
    here = plan.use_cpu or torch.cuda.is_available()
    # On another machine than that of the run, a name of the hub may well be right.
    level: Level = "yellow" if not here and _HUB_ID.fullmatch(plan.policy) else "red"
    text = f"{plan.policy} is no folder with a config.json, and no hub within reach has it; give the policy's folder"
    return Finding(level, "policy", f"{text} as model_name_or_path")


def _compare(kept: int, passing: int, device: int, vllm: float) -> Finding:
    """Bytes that stay and that come on top at times, against those of a process's device less vLLM's share of it."""
    free = device * (1 - vllm)
    shown = (
        f"{kept / _GB:.2f} GB always, {(kept + passing) / _GB:.2f} GB at most, of {free / _GB:.1f} GB for a process"
    )
    if vllm:
        shown += f" (vLLM has {vllm:.0%} of {device / _GB:.1f})"
    cure = "take more processes with ZeRO-3, LoRA, bfloat16, reward_placement: offload, or less for vLLM"
    if kept > free:
        return Finding("red", "memory", f"{shown}: it does not fit; {cure}")
    if kept + passing > _WASTE * free:
        return Finding("yellow", "memory", f"{shown}: too tight; lower reward_max_tokens, or {cure}")
    return Finding("green", "memory", shown)


def _values_that_trl_compares() -> dict[str, list[str]]:
    """Field -> the texts that the trainer's source compares it with; it lists them nowhere else."""
    from trl import GRPOTrainer  # takes seconds

    known: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer)))):
        if not isinstance(node, ast.Compare) or not isinstance(node.left, ast.Attribute):
            continue
        if ast.unparse(node.left.value) != "self" or node.left.attr not in _CHOICES:
            continue
        texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
        found = known.setdefault(node.left.attr, [])
        found += [text for text in texts if isinstance(text, str) and text not in found]
    return known


def _policy_config(name: str) -> PreTrainedConfig | None:
    """The configuration, if it is on this machine, where its weights have to be whole too."""
    if not has_file(name, "config.json"):
        return None
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in _WEIGHT_FILES):
            raise CheckpointError(f"no weights ({', '.join(_WEIGHT_FILES[:3])}); copy them too")
        if any((folder / file).is_file() for file in _WEIGHT_FILES[:2]):
            read_headers(folder)
    found: PreTrainedConfig = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    return found


def _sum(parts: dict[str, int]) -> str:
    shown = " + ".join(f"{name} {size / _GB:.2f}" for name, size in parts.items())
    return f"{shown} = {sum(parts.values()) / _GB:.2f} GB"
