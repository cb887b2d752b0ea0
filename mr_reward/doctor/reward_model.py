"""Checks of a reward model's folder that load no weight: its files, and a score of its architecture made tiny."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor, PreTrainedConfig

from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.doctor.findings import Finding, Level
from mr_reward.errors import CheckpointError, MRRewardError
from mr_reward.groups import ResponseGroup
from mr_reward.model.configuration import MultiResponseRewardConfig
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.scorer import GroupScorer

__all__ = ["check_weights", "read_headers", "score_tiny", "score_whole", "shrink"]

_WHAT = "weights"
_HEADS, _LAYERS, _VISION_WIDTH = 2, 2, 64
_ROUNDING = 1e-4  # of float32 scores of a tiny model; scores of different texts differ by more


def check_weights(folder: Path, config: MultiResponseRewardConfig) -> Finding:
    """Read the headers of the weight files: nothing cut off, nothing missing, every shape as the model has it.

    Args:
        folder: of a merged reward model.
        config: its configuration.

    Returns:
        A green line with the number of weights, or a red one.
    """
    try:
        found = read_headers(folder)
        with torch.device("meta"), outside_zero3():
            model = MultiResponseRewardModel(config)
    except MRRewardError as error:
        return Finding("red", _WHAT, str(error))
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
        return Finding("red", _WHAT, text)
    count = sum(torch.Size(shape).numel() for shape in found.values())
    return Finding(
        "green", _WHAT, f"{len(found)} tensors, {count / 1e6:,.1f} million numbers, names and shapes as expected"
    )


def score_tiny(
    folder: str, config: MultiResponseRewardConfig, attention: str | None, prompts: Sequence[ResponseGroup]
) -> Finding:
    """Score a prompt with the architecture made tiny, random weights, and the folder's own processor.

    Args:
        folder: of the reward model.
        config: its configuration.
        attention: attention backend; None for the default.
        prompts: prompts of the run; the first is scored, or a made-up one.

    Returns:
        A line: finite scores, equal for equal texts, and of the order what the layout promises; yellow for a family
        that cannot be made tiny.
    """
    small = shrink(config)
    what = "tiny score"
    if small is None:
        name = getattr(config.backbone_config, "model_type", "?")
        return Finding("yellow", what, f"no tiny copy of a {name} can be made; try --score, which loads the weights")
    if attention is not None:
        small._attn_implementation = attention
    started = time.perf_counter()
    with outside_zero3(), _seeded():
        try:
            model = MultiResponseRewardModel(small).eval()
        except ImportError as error:
            level: Level = "red" if torch.cuda.is_available() else "yellow"
            return Finding(level, what, f"attention {attention} cannot run here: {str(error).splitlines()[0]}")
        model.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        scorer = GroupScorer(model, device="cpu", dtype=torch.float32)
        return _check_scores(scorer, prompts, what, "random weights, tiny", started)


def score_whole(scorer: GroupScorer, prompts: Sequence[ResponseGroup]) -> Finding:
    """The same with the model itself.

    Args:
        scorer: of the reward model.
        prompts: as for `score_tiny`.

    Returns:
        A line with the scores.
    """
    return _check_scores(scorer, prompts, "score", "the model itself", time.perf_counter())


def shrink(config: MultiResponseRewardConfig) -> MultiResponseRewardConfig | None:
    """The same architecture with few layers and heads; token ids, vocabulary and patches as they are.

    Args:
        config: of a reward model.

    Returns:
        A configuration of some million weights; None for a family that this was not written for.
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
def _seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def read_headers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read what the safetensors files of a folder hold; opening one compares its header with its size.

    Args:
        folder: of any model, in one file or in shards.

    Returns:
        Name -> shape of all tensors.

    Raises:
        CheckpointError: a file is missing, cut off or none of this format.

    Example:
        >>> read_headers(Path("outputs/rm"))["head.out.bias"]  # doctest: +SKIP
        (1,)
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
