"""Checks of a reward model that load no weight: its files, what its scorer would do in a run, a tiny copy's scores.

The model is built without weights (on the meta device) from the checkpoint's configuration, and asked.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from mr_reward.attention.backends import check_backend
from mr_reward.attention.group import GROUP_ATTENTION
from mr_reward.checkpoint.verify import check_config_keys, check_template_hash, has_file, load_processor
from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.doctor.findings import Finding, may_start
from mr_reward.doctor.machine import device_memory
from mr_reward.errors import (
    BackendError,
    CheckpointError,
    ConfigurationError,
    MRRewardError,
    OverLengthError,
    ScoringServerError,
)
from mr_reward.groups import ResponseGroup
from mr_reward.model.configuration import MultiResponseRewardConfig
from mr_reward.model.fast_path import choose_attention
from mr_reward.model.memory import measure_reward_memory
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.scorer import GroupScorer
from mr_reward.runs.recipe import scorer_options
from mr_reward.templates.rendering import template_hash

if TYPE_CHECKING:
    from mr_reward.doctor.planned_run import PlannedRun

__all__ = [
    "check_reward_folder",
    "check_reward_of_run",
    "check_weights",
    "read_headers",
    "score_tiny",
    "score_whole",
    "shrink",
]

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_SERVER_SECONDS = 2.0  # a scoring server that runs answers at once
_HEADS, _LAYERS, _VISION_WIDTH = 2, 2, 64
_ROUNDING = 1e-4  # of float32 scores of a tiny model; scores of different texts differ by more
_GB = 1e9
_WASTE = 0.9  # allocators lose some of a device


def check_reward_folder(name: str) -> list[Finding]:
    """Look at a reward model alone: its files, and a score of its architecture made tiny."""
    model, findings = _read_folder(name)
    if model is not None and may_start(findings):
        findings.append(_try(name, model.config, None, ()))
    return findings


def check_reward_of_run(run: PlannedRun, *, try_it: bool) -> list[Finding]:
    """Look at the reward model of a run, or its scoring server; `try_it`: score with a tiny copy if nothing is red."""
    recipe = run.recipe
    if recipe.reward_server is not None:
        return [_ask_server(recipe.reward_server, recipe.reward_server_hash)]
    if recipe.reward_model is None:
        return [Finding("red", "reward model", "reward_model is missing; give the folder of pretrain_rm.py")]
    model, findings = _read_folder(recipe.reward_model)
    if model is None:
        return findings
    attention = recipe.reward_attn_implementation
    try:
        # First, as transformers only says that a package for it is missing.
        check_backend(model.config.layout, attention or model.attention_backend, model.adapter.media_blocks)
    except BackendError as error:
        return [*findings, Finding("red", "attention", str(error))]
    findings.append(check_attention(model, attention, is_here=run.is_here))
    options = scorer_options(recipe)
    try:
        scorer = GroupScorer(model, dtype=options["dtype"], max_tokens_per_batch=options["max_tokens_per_batch"])
        findings.append(_check_row(run, scorer))
        findings.append(_check_memory(run, scorer))
    except (MRRewardError, OSError, ValueError) as error:
        findings.append(Finding("red", "row of a group", str(error)))
    if try_it and findings[-1].level != "red" and may_start(findings):
        findings.append(_try(recipe.reward_model, model.config, attention, run.prompts))
    return findings


def _read_folder(name: str) -> tuple[MultiResponseRewardModel | None, list[Finding]]:
    """The model without weights, and what is to be said about the files; None if it cannot be built."""
    what = "reward model"
    if not Path(name).is_dir() and not has_file(name, "config.json"):
        text = f"{name} is no folder, and no hub within reach has it; give the folder that pretrain_rm.py wrote"
        return None, [Finding("red", what, text)]
    try:
        if not any(has_file(name, file) for file in _WEIGHT_FILES):
            raise ConfigurationError(f"{name} holds no weights ({', '.join(_WEIGHT_FILES)}); copy them too")
        if has_file(name, "adapter_config.json") or has_file(name, "reward_model_config.json"):
            return None, [Finding("yellow", what, f"{name}: LoRA or the paper's format; merge it to check it")]
        check_config_keys(name, None, MultiResponseRewardConfig)
        config = MultiResponseRewardConfig.from_pretrained(name)
        with torch.device("meta"), outside_zero3():
            model = MultiResponseRewardModel(config)
        model.processor = load_processor(name)
        check_template_hash(name, config.template_hash, template_hash(model.processor, config.template))
    except (MRRewardError, OSError, ValueError) as error:
        return None, [Finding("red", what, str(error))]
    findings = [Finding("green", what, f"{name}: layout {config.layout}, template unchanged")]
    if Path(name).is_dir():
        findings.append(check_weights(Path(name), model))
    return model, findings


def check_weights(folder: Path, model: MultiResponseRewardModel) -> Finding:
    """Compare the headers of the weight files with the model: nothing cut off or missing, every shape the same."""
    what = "weights"
    try:
        found = read_headers(folder)
    except CheckpointError as error:
        return Finding("red", what, str(error))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    problems = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in (("missing", missing), ("unknown", unknown), ("of another shape", other))
        if names
    ]
    if problems:
        text = f"{folder}: {'; '.join(problems)}; save the reward model again with save_pretrained"
        return Finding("red", what, text)
    count = sum(torch.Size(shape).numel() for shape in found.values())
    return Finding(
        "green", what, f"{len(found)} tensors, {count / 1e6:,.1f} million numbers, names and shapes as expected"
    )


def read_headers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of a model in one file or in shards.

    Opening a file compares its header with its size: CheckpointError if one is missing, cut off or of another format.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read ({error}); copy it again") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the whole folder")
        try:
            with safe_open(path, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except SafetensorError as error:
            raise CheckpointError(f"{path} is cut off or no safetensors file ({error}); copy it again") from error
    return shapes


def check_attention(model: MultiResponseRewardModel, requested: str | None, *, is_here: bool) -> Finding:
    """Choose the attention as a load would, and say which one it is."""
    try:
        choose_attention(model.backbone, requested)
    except ImportError as error:
        text = f"attention {requested} cannot run here: {str(error).splitlines()[0]}"
        return Finding("red" if is_here else "yellow", "attention", text)
    return Finding("green", "attention", f"layout {model.config.layout} on {model.attention_backend}")


def _check_row(run: PlannedRun, scorer: GroupScorer) -> Finding:
    """Lay out the longest prompt with N completions of full length, as a run would."""
    what = "row of a group"
    sizes = (run.args.num_generations, run.args.num_generations_eval or 0)
    texts = [str(i) for i in range(max(sizes))]  # different, so that none is a copy
    longest = run.args.max_completion_length or 0
    packer, prompts = scorer.packer, run.prompts or [ResponseGroup(prompt="?", responses=["?"])]
    rendered = max(
        (packer.renderer.render(replace(group, responses=texts, rankings=None)) for group in prompts),
        key=lambda found: len(found.prompt_ids),
    )
    prompt = f"prompt {len(rendered.prompt_ids)}" if run.prompts else "an unknown prompt"
    filled = replace(rendered, response_ids=[[0] * longest for _ in texts], joiner=None)
    name = f"{prompt} with {len(texts)} completions of {longest} tokens"
    in_chunks = packer.layout != "causal" and scorer.model.attention_backend == GROUP_ATTENTION
    try:
        if in_chunks and packer.num_tokens(filled) > packer.max_tokens:
            packer.trim(filled, name)
            text = (
                f"{name} are more than reward_max_tokens={packer.max_tokens}: scored in chunks over the prompt, exact"
            )
            return Finding("yellow", what, f"{text} but slower; raise it if the memory is there")
        row = packer.lay_out(filled, name)
    except OverLengthError as error:
        policy = run.recipe.reward_over_length
        return Finding(
            "yellow" if policy == "truncate_responses" else "red",
            what,
            f"{error}. This run has over_length={policy!r}",
        )
    assert row is not None  # the policy is `error`
    shown = f"{prompt} + {len(texts)} completions of {longest} = {row.num_tokens} tokens at most"
    return Finding("green", what, f"{shown}, budget {packer.max_tokens}, context {packer.context_tokens}")


def _check_memory(run: PlannedRun, scorer: GroupScorer) -> Finding:
    """What the reward model takes of a process's device, of which vLLM may have its share."""
    need = measure_reward_memory(
        scorer.model.backbone,
        dtype=scorer.model.backbone.dtype,
        max_tokens=scorer.max_tokens_per_batch,
        dense_mask=scorer.model.config.layout != "causal",
    )
    whole = need.weights + need.activations
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
            return Finding("red", "memory, reward model", f"{text}: it does not fit; take bfloat16 or a smaller one")
        if whole > _WASTE * free:
            return Finding("yellow", "memory, reward model", f"{text}: too tight; lower reward_max_tokens")
    return Finding("green", "memory, reward model", text)


def _ask_server(url: str, expected_hash: str | None) -> Finding:
    from mr_reward.scorers import RemoteScorer  # its packages are an extra

    what = "reward model"
    try:
        scorer = RemoteScorer(url, expected_hash=expected_hash)
        try:
            health = scorer.connect(_SERVER_SECONDS)
        finally:
            scorer.close()
    except ScoringServerError as error:
        return Finding("yellow", what, f"{error} (it need not run yet for a dry run)")
    except MRRewardError as error:
        return Finding("red", what, str(error))
    return Finding("green", what, f"{url}: layout {health.layout}, model {health.model_hash}")


def _try(
    name: str, config: MultiResponseRewardConfig, attention: str | None, prompts: Sequence[ResponseGroup]
) -> Finding:
    try:
        return score_tiny(name, config, attention, prompts)
    except (MRRewardError, OSError, ValueError) as error:
        return Finding("red", "tiny score", str(error))


def score_tiny(
    name: str, config: MultiResponseRewardConfig, attention: str | None, prompts: Sequence[ResponseGroup]
) -> Finding:
    """Score the first prompt, or a made-up one, with the architecture made tiny and the folder's own processor.

    Green: finite scores, equal for equal texts, and of the order what the layout promises.
    """
    small, what = shrink(config), "tiny score"
    if small is None:
        kind = getattr(config.backbone_config, "model_type", "?")
        return Finding("yellow", what, f"no tiny copy of a {kind} can be made; try --score, which loads the weights")
    if attention is not None:
        small._attn_implementation = attention
    started = time.perf_counter()
    with outside_zero3(), _seeded():
        model = MultiResponseRewardModel(small).eval()
        model.processor = load_processor(name)
        scorer = GroupScorer(model, device="cpu", dtype=torch.float32)
        return _check_scores(scorer, prompts, what, "random weights, tiny", started)


def score_whole(scorer: GroupScorer, prompts: Sequence[ResponseGroup]) -> Finding:
    """The same with the model itself."""
    return _check_scores(scorer, prompts, "score", "the model itself", time.perf_counter())


def _check_scores(
    scorer: GroupScorer, prompts: Sequence[ResponseGroup], what: str, how: str, started: float
) -> Finding:
    responses = ["Yes.", "No.", "Yes."]
    first = prompts[0] if prompts else ResponseGroup(prompt="Is it?", responses=responses)
    group = ResponseGroup(
        prompt=first.messages, responses=responses, images=first.images, videos=first.videos, id="tiny"
    )
    try:
        scores, turned = (scorer.score([one])[0] or [] for one in (group, group.select([1, 0, 2])))
    except MRRewardError as error:
        return Finding("red", what, str(error))
    shown = ", ".join(f"{score:+.3f}" for score in scores)
    if scores[0] != scores[2]:
        return Finding("red", what, f"equal responses have the scores {shown}; this is an error of mr_reward")
    if scorer.packer.layout != "causal" and abs(scores[0] - turned[1]) > _ROUNDING * max(1.0, abs(scores[0])):
        return Finding("red", what, f"a score depends on the order: {scores[0]} and {turned[1]}; take another backend")
    seconds = time.perf_counter() - started
    prompt = "a prompt of the run" if prompts else "a made-up prompt"
    return Finding("green", what, f"{prompt}, 3 responses, {how}: {shown}; {seconds:.1f} s")


def shrink(config: MultiResponseRewardConfig) -> MultiResponseRewardConfig | None:
    """The same architecture with few layers and heads, some million weights; token ids, vocabulary and patches as they
    are. None for a family that this was not written for.
    """
    small = copy.deepcopy(config)
    backbone: Any = small.backbone_config
    text = backbone.get_text_config()
    if getattr(text, "num_experts", None) or not hasattr(text, "num_attention_heads"):
        return None
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    _set(
        text,
        hidden_size=_HEADS * head_dim,
        intermediate_size=2 * _HEADS * head_dim,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        num_hidden_layers=_LAYERS,
    )
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:_LAYERS]
    small.head_hidden_size = None
    vision = getattr(backbone, "vision_config", None)
    if vision is None:
        return small
    if backbone.model_type in ("qwen3_vl", "qwen2_5_vl"):
        _set(vision, hidden_size=_VISION_WIDTH, intermediate_size=_VISION_WIDTH, num_heads=_HEADS, depth=_LAYERS)
        _set(vision, out_hidden_size=text.hidden_size)
        for name, value in (("deepstack_visual_indexes", [0]), ("fullatt_block_indexes", [_LAYERS - 1])):
            if hasattr(vision, name):
                _set(vision, **{name: value})
        return small
    if backbone.model_type == "molmo2":
        heads = {"num_attention_heads": _HEADS, "num_key_value_heads": _HEADS, "head_dim": _VISION_WIDTH // _HEADS}
        sizes = {"hidden_size": _VISION_WIDTH, "intermediate_size": _VISION_WIDTH}
        _set(vision, **heads, **sizes, num_hidden_layers=_LAYERS)
        _set(backbone.adapter_config, **heads, **sizes, text_hidden_size=text.hidden_size)
        _set(backbone.adapter_config, vision_feature_layer=[_LAYERS - 1, 0])
        return small
    return None


def _set(config: PreTrainedConfig, **values: Any) -> None:
    for name, value in values.items():
        setattr(config, name, value)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
