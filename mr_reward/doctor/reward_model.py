"""Checks of a reward model that load no weight: its files, what its scorer would do in a run, a tiny copy's scores.

The model is built without weights from the checkpoint's configuration, and asked.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mr_reward.backbones.base import tiny_config
from mr_reward.checkpoint.verify import (
    check_checksums,
    check_config_keys,
    check_shapes,
    check_template_hash,
    has_file,
    load_processor,
    weight_shapes,
)
from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.doctor.findings import Finding, may_start
from mr_reward.doctor.machine import device_memory
from mr_reward.errors import (
    BackendError,
    CheckpointError,
    MRRewardError,
    OverLengthError,
    ScoringServerError,
)
from mr_reward.evaluation.benchmarks import open_benchmark
from mr_reward.evaluation.evaluator import report_rollouts
from mr_reward.groups import ResponseGroup, Scorer
from mr_reward.hub import why_missing
from mr_reward.model.configuration import MultiResponseRewardConfig, RewardMemory
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.scorer import GroupScorer
from mr_reward.runs.recipe import PolicyArguments, scorer_options
from mr_reward.scorers.opening import open_scorer, require_local
from mr_reward.templates.rendering import template_hash

if TYPE_CHECKING:
    from mr_reward.doctor.examine import PlannedRun

_ROLLOUTS = "held-out rollouts"
_SERVER_SECONDS = 2.0  # a scoring server that runs answers at once
_ROUNDING = 1e-4  # of float32 scores of a tiny model; scores of different texts differ by more
_GB = 1e9
_WASTE = 0.9  # allocators lose some of a device


def check_reward_folder(name: str) -> list[Finding]:
    """Look at a reward model alone: every byte of its files, and a score of its architecture made tiny."""
    model, findings = _read_folder(name, verify=True)
    if model is not None and may_start(findings):
        findings.append(score_tiny(name, model.config, None, ()))
    return findings


def check_reward_of_run(run: PlannedRun, *, try_it: bool) -> list[Finding]:
    """Look at the reward model of a run, or its scoring server; `try_it`: score with a tiny copy if nothing is red."""
    recipe = run.recipe
    if recipe.reward_server is not None:
        return [_ask_server(recipe.reward_server, recipe.reward_server_hash)]
    if recipe.reward_model is None:
        return [Finding("red", "reward model", "reward_model is missing; give the folder of pretrain_rm.py")]
    attention, options = recipe.reward_attn_implementation, scorer_options(recipe)
    model, findings = _read_folder(recipe.reward_model, attention)
    if model is None:
        return findings
    device, dtype = "cpu" if run.use_cpu else "cuda", options["dtype"] or model.config.dtype or torch.float32
    scorer = GroupScorer(model, max_tokens_per_batch=options["max_tokens_per_batch"])
    findings.append(_check_attention(model, device, dtype))
    findings.append(_check_row(run, scorer, device, dtype))
    findings.append(_check_memory(run, scorer.memory(device=device, dtype=dtype)))
    if try_it and may_start(findings):
        findings.append(score_tiny(recipe.reward_model, model.config, attention, run.prompts))
    return findings


def _ask_server(url: str, expected_hash: str | None) -> Finding:
    from mr_reward.scorers import RemoteScorer  # its packages are an extra

    what = "reward model"
    try:
        with closing(RemoteScorer(url, expected_hash=expected_hash)) as scorer:
            health = scorer.connect(_SERVER_SECONDS)
    except ScoringServerError as error:
        return Finding("yellow", what, f"{error} (it need not run yet for a dry run)")
    except MRRewardError as error:
        return Finding("red", what, str(error))
    return Finding("green", what, f"{url}: layout {health.layout}, model {health.model_hash}")


def _read_folder(
    name: str, attention: str | None = None, *, verify: bool = False
) -> tuple[MultiResponseRewardModel | None, list[Finding]]:
    """The model without weights, and what is to be said about the files; None if it cannot be built.

    `verify` reads every byte; not in a run that is about to start, where every rank asks.
    """
    what = "reward model"
    if reason := why_missing(name):
        return None, [Finding("red", what, f"{name} {reason}")]
    try:
        if has_file(name, "adapter_config.json") or has_file(name, "reward_model_config.json"):
            return None, [Finding("yellow", what, f"{name}: LoRA or the paper's format; merge it to check it")]
        check_config_keys(name, None, MultiResponseRewardConfig)
        config = MultiResponseRewardConfig.from_pretrained(name)
        processor = load_processor(name)
        check_template_hash(name, config.template_hash, template_hash(processor, config.template, config.thoughts))
        model = MultiResponseRewardModel.without_weights(config, attention)
    except (MRRewardError, OSError, ValueError) as error:
        return None, [Finding("red", "attention" if isinstance(error, BackendError) else what, str(error))]
    model.processor = processor
    findings = [Finding("green", what, f"{name}: layout {config.layout}, template unchanged")]
    if Path(name).is_dir():
        findings.append(check_weights(Path(name), model, verify=verify))
    return model, findings


def check_weights(folder: Path, model: MultiResponseRewardModel, *, verify: bool = False) -> Finding:
    """Whether the files are those that were saved, and their headers have what the model has; no weight is loaded."""
    try:
        found = weight_shapes(folder)
        check_shapes(str(folder), found, model.state_dict())
        check_checksums(str(folder), verify=verify)
    except CheckpointError as error:
        return Finding("red", "weights", str(error))
    count = sum(math.prod(shape) for shape in found.values()) / 1e6
    text = f"{len(found)} tensors, {count:,.1f} million numbers, names and shapes as expected"
    return Finding("green", "weights", text)


def _check_attention(model: MultiResponseRewardModel, device: str, dtype: torch.dtype) -> Finding:
    found, wanted = model.attention_for(device, dtype), model.attention_backend
    text = f"layout {model.config.layout} on {found}"
    if found == wanted:
        return Finding("green", "attention", text)
    text += f": {wanted} has no kernel on {device} in {str(dtype).removeprefix('torch.')}; reward_dtype: bfloat16"
    return Finding("yellow", "attention", f"{text} is faster, and reads large groups in chunks")


def _check_row(run: PlannedRun, scorer: GroupScorer, device: str, dtype: torch.dtype) -> Finding:
    """What becomes of the longest prompt with N completions of full length."""
    what, packer = "row of a group", scorer.packer
    texts = [str(i) for i in range(max(run.args.num_generations, run.args.num_generations_eval or 0))]
    longest = run.args.max_completion_length or 0
    prompts = run.prompts or [ResponseGroup(prompt="?", responses=["?"])]
    groups = [replace(group, responses=texts, rankings=None, id="of the longest prompt") for group in prompts]
    try:
        rendered, group = max(
            zip(packer.renderer.render_all(groups), groups, strict=True), key=lambda pair: len(pair[0].prompt_ids)
        )
        chunks = scorer.would_chunk(group, response_tokens=longest, device=device, dtype=dtype)
    except OverLengthError as error:
        policy = run.recipe.reward_over_length
        level: Literal["yellow", "red"] = "yellow" if policy == "truncate_responses" else "red"
        return Finding(level, what, f"{error}. This run has over_length={policy!r}")
    except (MRRewardError, OSError, ValueError) as error:
        return Finding("red", what, str(error))
    prompt = f"prompt {len(rendered.prompt_ids)}" if run.prompts else "an unknown prompt"
    shown = f"{prompt} + {len(texts)} completions of {longest}"
    if chunks:
        shown += f" are more than reward_max_tokens={packer.max_tokens}: scored in chunks over the prompt, exact"
        return Finding("yellow", what, f"{shown} but slower; raise it if the memory is there")
    tokens = packer.num_tokens(rendered) + sum(longest - len(ids) for ids in rendered.response_ids)
    shown += f" = {tokens} tokens at most, budget {packer.max_tokens}, context {packer.context_tokens}"
    return Finding("green", what, shown)


def _check_memory(run: PlannedRun, need: RewardMemory) -> Finding:
    """What the reward model takes of a process's device, of which vLLM may have its share."""
    what, whole = "memory, reward model", need.weights + need.activations
    when = "while it scores" if run.recipe.reward_placement == "offload" else "of it the weights always"
    text = f"weights {need.weights / _GB:.2f} + a forward pass {need.activations / _GB:.2f} = {whole / _GB:.2f} GB"
    text = f"{text} on each process, {when}"
    device = device_memory(use_cpu=run.use_cpu, num_local_processes=run.launch.num_local_processes)
    if device is not None:
        args = run.args
        vllm = args.use_vllm and args.vllm_mode == "colocate" and not args.vllm_enable_sleep_mode and not run.use_cpu
        free = device * (1 - args.vllm_gpu_memory_utilization) if vllm else device
        text += f", of {free / _GB:.1f} GB{' beside vLLM' if vllm else ''}; the policy comes on top"
        if need.weights > free:
            return Finding("red", what, f"{text}: it does not fit; take bfloat16 or a smaller one")
        if whole > _WASTE * free:
            return Finding("yellow", what, f"{text}: too tight; lower reward_max_tokens")
    return Finding("green", what, text)


def score_tiny(
    name: str, config: MultiResponseRewardConfig, attention: str | None, prompts: Sequence[ResponseGroup]
) -> Finding:
    """Score the first prompt, or a made-up one, with the architecture made tiny and the folder's own processor.

    Green: finite scores, equal for equal texts, and of the order what the layout promises.
    """
    what, small, backbone = "tiny score", copy.deepcopy(config), tiny_config(config.backbone_config)
    if backbone is None:
        kind = getattr(config.backbone_config, "model_type", "?")
        return Finding("yellow", what, f"no tiny copy of a {kind} can be made; try --score, which loads the weights")
    small.backbone_config, small.head_hidden_size = backbone, None
    if attention is not None:
        small._attn_implementation = attention
    try:
        with outside_zero3(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed CUDA too
            model = MultiResponseRewardModel(small).eval()
            model.processor = load_processor(name)
            scorer = GroupScorer(model, device="cpu", dtype=torch.float32)
            return _check_scores(scorer, prompts, what, "random weights, tiny")
    except ImportError as error:
        text = f"attention {attention} cannot run here: {str(error).splitlines()[0]}"
        return Finding("red" if torch.cuda.is_available() else "yellow", what, text)
    except (MRRewardError, OSError, ValueError) as error:
        return Finding("red", what, str(error))


def score_whole(model: str | MultiResponseRewardModel, prompts: Sequence[ResponseGroup], **options: Any) -> Finding:
    """The same with the model itself, opened as a run does."""
    try:
        scorer = require_local(open_scorer(model, **options), "--score")
        return _check_scores(scorer, prompts, "score", "the model itself")
    except MRRewardError as error:
        return Finding("red", "score", str(error))


def check_rollouts(path: str) -> Finding:
    """Whether the held-out rollouts of a run can be read, and say anything; nothing is scored."""
    try:
        groups = [item.group for item in open_benchmark("rollouts", path)]
    except (MRRewardError, OSError, ValueError) as error:
        return Finding("red", _ROLLOUTS, str(error))
    mixed = sum(len(set(group.rankings or ())) > 1 for group in groups)
    text = f"{path}: {len(groups)} groups, {mixed} of them with right and wrong responses"
    if not mixed:
        return Finding("red", _ROLLOUTS, f"{text}; give more rollouts of a prompt, or harder prompts")
    return Finding("green", _ROLLOUTS, text)


def judge_rollouts(recipe: PolicyArguments, scorer: Scorer) -> Finding:
    """How often a right one of the held-out rollouts scores above a wrong one, with the recipe's limit."""
    report = report_rollouts(scorer, str(recipe.heldout_rollouts))
    shown = [
        f"{what} {number.value:.3f} (95 %: {number.low:.3f} to {number.high:.3f})"
        for what, number in zip(
            ("right above wrong", "best of N", "calibration error"), report.metrics.values(), strict=False
        )
    ]
    dropped = len(report.records) - len(report.kept)
    text = f"{', '.join(shown)} on {report.num_mixed} of {len(report.records)} groups, {dropped} dropped"
    if report.metrics["right_above_wrong"].value >= recipe.min_right_above_wrong:
        return Finding("green", _ROLLOUTS, text)
    limit = f"below min_right_above_wrong={recipe.min_right_above_wrong:g}"
    return Finding("yellow", _ROLLOUTS, f"{text}: {limit}; train the reward model on rollouts of this policy")


def _check_scores(scorer: GroupScorer, prompts: Sequence[ResponseGroup], what: str, how: str) -> Finding:
    started = time.perf_counter()
    first, texts = (prompts or [ResponseGroup(prompt="Is it?", responses=["?"])])[0], ["Yes.", "No.", "Yes."]
    group = replace(first, responses=texts, rankings=None, id="tiny")
    scores, turned = (scorer.score([one])[0] or [] for one in (group, group.select([1, 0, 2])))
    shown = ", ".join(f"{score:+.3f}" for score in scores)
    if scores[0] != scores[2]:
        return Finding("red", what, f"equal responses have the scores {shown}; this is an error of mr_reward")
    if scorer.packer.layout != "causal" and abs(scores[0] - turned[1]) > _ROUNDING * max(1.0, abs(scores[0])):
        return Finding("red", what, f"a score depends on the order: {scores[0]} and {turned[1]}; take another backend")
    prompt, seconds = "a prompt of the run" if prompts else "a made-up prompt", time.perf_counter() - started
    return Finding("green", what, f"{prompt}, 3 responses, {how}: {shown}; {seconds:.1f} s")
