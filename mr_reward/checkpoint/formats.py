"""Checkpoints in other forms than our own: LoRA adapters, and the public format of arXiv 2604.10966.

A LoRA checkpoint holds an adapter, the reward model's configuration and the processor. The public format is a merged
backbone, `value_head.pt` and `reward_model_config.json`; its separator is a real token, `<|resp_sep|>`, and the score
of a response is read at the token before it, see the templates `mr2rm-*` of `mr_reward.templates.rendering`.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel

from mr_reward.checkpoint.verify import check_shapes, find_file, has_file, load_backbone
from mr_reward.checkpoint.zero3 import whole_weights
from mr_reward.errors import CheckpointError
from mr_reward.templates.rendering import SEPARATOR

_LORA_CONFIG_FILE = "adapter_config.json"
_LORA_WEIGHTS_FILE = "adapter_model.safetensors"
_PAPER_CONFIG_FILE = "reward_model_config.json"
_HEAD_FILE = "value_head.pt"
_REQUIRED = {"value_head_type", "value_head_hidden_dim", "value_head_activation", "resp_repr_mode"}
_OPTIONAL = {"value_head_input_dim"}
_ACTIVATIONS = ("selu", "gelu", "relu", "tanh", "silu")
# Their names of the weights -> ours.
_MLP = {"0.weight": "dense.weight", "0.bias": "dense.bias", "2.weight": "out.weight", "2.bias": "out.bias"}
_LINEAR = {"weight": "dense.weight", "bias": "dense.bias"}


def is_lora(name: str, revision: str | None = None) -> bool:
    """Whether a checkpoint holds a LoRA adapter instead of whole weights."""
    return has_file(name, _LORA_CONFIG_FILE, revision)


def lora_backbone(name: str, config: Any, **options: Any) -> tuple[PreTrainedModel, str, str | None]:
    """Load the backbone that an adapter was trained on."""
    source, revision = config.backbone_name_or_path, config.backbone_revision
    if source is None:
        raise CheckpointError(
            f"{name}: holds a LoRA adapter, but its configuration does not say which backbone it belongs to; put "
            "the folder or hub id into backbone_name_or_path of its config.json"
        )
    backbone = load_backbone(source, revision=revision, **options)
    if backbone.config.model_type != config.backbone_config.model_type:
        raise CheckpointError(
            f"{source}: holds a {backbone.config.model_type!r} backbone, but {name} was trained on a "
            f"{config.backbone_config.model_type!r} one; correct backbone_name_or_path in its config.json"
        )
    return backbone, source, revision


def merge_lora(model: PreTrainedModel, name: str, revision: str | None = None) -> Any:
    """Put a saved adapter on a reward model and merge it into the weights."""
    # peft is loaded where it is needed: scoring a merged model must not depend on it.
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(name, revision=revision)
    in_full = {key for key, _ in model.named_children()} - {"backbone"}
    if not in_full <= set(getattr(config, "modules_to_save", None) or ()):
        raise CheckpointError(
            f"{name}: the adapter saves {getattr(config, 'modules_to_save', None)} in full, expected "
            f"{sorted(in_full)}; without them scores come from random weights. Train with "
            "RewardTrainer(peft_config=...), or set modules_to_save"
        )
    try:
        weights = load_file(str(find_file(name, _LORA_WEIGHTS_FILE, revision)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{name}: no {_LORA_WEIGHTS_FILE} could be read ({error})") from error
    config.base_model_name_or_path = None  # where it was trained; the caller has found the backbone
    wrapped = get_peft_model(model, config)
    check_shapes(
        name,
        {key: tuple(value.shape) for key, value in weights.items()},
        get_peft_model_state_dict(wrapped),
        advice="the adapter belongs to another backbone, or a part of it is gone; use the one it was trained on",
    )
    set_peft_model_state_dict(wrapped, weights)
    return wrapped.merge_and_unload(safe_merge=True)


def is_paper_format(name: str, revision: str | None = None) -> bool:
    """Whether a checkpoint is in this format."""
    return has_file(name, _PAPER_CONFIG_FILE, revision)


def paper_score_scale(hidden_size: int) -> float:
    """The factor on the head's output, 1 / sqrt(width of the backbone)."""
    return 1.0 / math.sqrt(hidden_size)


def read_head(name: str, hidden_size: int, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check the value head; pickles are opened with `weights_only=True` only.

    A linear head becomes a hidden layer of width 1 without activation, which computes the same.
    """
    settings = _read_settings(name, hidden_size, revision)
    if settings["value_head_type"] == "linear":
        names, width, activation = _LINEAR, 1, "linear"
    else:
        names, width = _MLP, settings["value_head_hidden_dim"] or hidden_size
        activation = settings["value_head_activation"].lower()
    found = _read_tensors(name, revision)
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    wanted = dict(zip(names, [(width, hidden_size), (width,), (1, width), (1,)], strict=False))  # linear: two of them
    if shapes != wanted:
        raise CheckpointError(
            f"{name}: {_HEAD_FILE} holds {shapes}, but a {settings['value_head_type']} head of a backbone of width "
            f"{hidden_size} has {wanted}; save the state dict of the value head that {_PAPER_CONFIG_FILE} describes"
        )
    weights = {ours: found[theirs].float() for theirs, ours in names.items()}
    if activation == "linear":
        weights |= {"out.weight": torch.ones(1, 1), "out.bias": torch.zeros(1)}
    return {"head_hidden_size": width, "head_activation": activation}, weights


def write_head(folder: Path, weights: dict[str, Tensor], activation: str) -> None:
    """Write a value head in this format."""
    if activation not in (*_ACTIVATIONS, "linear"):
        raise CheckpointError(
            f"the head's activation is {activation!r}, but the format knows {', '.join(_ACTIVATIONS)} only; train a "
            "head with one of these to export it"
        )
    weights = {key: value.detach().float().cpu() for key, value in weights.items()}
    width, hidden_size = weights["dense.weight"].shape
    bias = weights.get("out.bias", torch.zeros(1))
    tensors = {theirs: weights.get(ours, bias).clone() for theirs, ours in _MLP.items()}
    settings = {
        "value_head_type": "mlp",
        "value_head_hidden_dim": width,
        "value_head_activation": activation,
        "value_head_input_dim": hidden_size,
        "resp_repr_mode": "last",
    }
    if activation == "linear":
        tensors = {
            "weight": weights["out.weight"] @ weights["dense.weight"],
            "bias": weights["out.weight"] @ weights["dense.bias"] + bias,
        }
        settings |= {"value_head_type": "linear", "value_head_hidden_dim": None, "value_head_activation": "selu"}
    torch.save(tensors, folder / _HEAD_FILE)
    (folder / _PAPER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def with_separator(backbone: PreTrainedModel, processor: Any) -> Any:
    """Make sure that the separator is a token of the processor and has a row of the backbone's embedding.

    A new row is the mean of the rows of all other tokens: a row of zeros would leave the backbone without a mark
    between responses for as long as it is frozen.
    """
    index = _separator_id(processor)
    rows = backbone.get_input_embeddings().num_embeddings
    if index is not None and index < rows:
        return processor
    if index is None:
        processor, index = _add_separator(processor)
    if index >= rows:
        text = backbone.config.get_text_config()
        old_size = text.vocab_size
        backbone.resize_token_embeddings(index + 1, mean_resizing=False)
        if hasattr(text, "additional_vocab_size"):  # Molmo2 counts the rows behind those of its language-model head
            text.vocab_size, text.additional_vocab_size = old_size, index + 1 - old_size
    embedding = backbone.get_input_embeddings()
    with whole_weights(embedding), torch.no_grad():
        embedding.weight[index] = embedding.weight[:index].float().mean(0).to(embedding.weight.dtype)
    return processor


def trained_separator(name: str, backbone: PreTrainedModel, processor: Any) -> Any:
    """The processor with the separator that a checkpoint was trained with.

    The paper's merge script writes the base model's tokenizer last, without the separator, and its README adds the
    token again after loading. That is safe where the embedding ends with the row of this one token.
    """
    rows = backbone.get_input_embeddings().num_embeddings
    index = _separator_id(processor)
    if index is None:
        processor, index = _add_separator(processor)
        if index != rows - 1:
            raise CheckpointError(
                f"{name}: the tokenizer has no token {SEPARATOR}, which this format separates responses with, and the "
                f"{rows} rows of the embedding do not end with one for it; add the tokenizer files that the model was "
                "trained with"
            )
    if index >= rows:
        raise CheckpointError(
            f"{name}: {SEPARATOR} is token {index}, but the embedding has {rows} rows; save the backbone after its "
            "embedding has been resized"
        )
    return processor


def _add_separator(processor: Any) -> tuple[Any, int]:
    """A copy of the processor with the separator as a new token, and its id."""
    processor = copy.deepcopy(processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.add_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return processor, tokenizer.convert_tokens_to_ids(SEPARATOR)


def _separator_id(processor: Any) -> int | None:
    tokens = getattr(processor, "tokenizer", processor).added_tokens_decoder
    return next((index for index, token in tokens.items() if token.content == SEPARATOR), None)


def _read_settings(name: str, hidden_size: int, revision: str | None) -> dict[str, Any]:
    try:
        settings = json.loads(Path(str(find_file(name, _PAPER_CONFIG_FILE, revision))).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: {_PAPER_CONFIG_FILE} cannot be read ({error})") from error
    keys = set(settings) if isinstance(settings, dict) else set()
    if keys - _OPTIONAL != _REQUIRED:
        raise CheckpointError(
            f"{name}: {_PAPER_CONFIG_FILE} lacks {sorted(_REQUIRED - keys)} and has the unknown keys "
            f"{sorted(keys - _REQUIRED - _OPTIONAL)}, expected {sorted(_REQUIRED)}; each of them changes the scores"
        )
    mode, kind = settings["resp_repr_mode"], settings["value_head_type"]
    if mode != "last":
        raise CheckpointError(
            f"{name}: resp_repr_mode is {mode!r}, only 'last' can be loaded (the score is read at one token); train "
            "the model again with 'last'"
        )
    if kind not in ("mlp", "linear"):
        raise CheckpointError(f"{name}: value_head_type is {kind!r}, expected 'mlp' or 'linear'")
    if kind == "mlp" and str(settings["value_head_activation"]).lower() not in _ACTIVATIONS:
        raise CheckpointError(
            f"{name}: value_head_activation is {settings['value_head_activation']!r}, expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    if settings.get("value_head_input_dim", hidden_size) != hidden_size:
        raise CheckpointError(
            f"{name}: value_head_input_dim is {settings['value_head_input_dim']}, but the backbone's width is "
            f"{hidden_size}; the head belongs to another backbone"
        )
    return settings


def _read_tensors(name: str, revision: str | None) -> dict[str, Tensor]:
    try:
        found = torch.load(str(find_file(name, _HEAD_FILE, revision)), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{name}: {_HEAD_FILE} cannot be read as plain tensors ({error}); save the head's state_dict with "
            "torch.save. Pickles that hold anything else are never opened"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{name}: {_HEAD_FILE} holds {type(found).__name__}, expected a dictionary of tensors")
    return found
