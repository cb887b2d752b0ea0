"""LoRA checkpoints of a reward model: a folder with an adapter, the reward model's configuration and the processor."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from mr_reward.checkpoint.verify import check_shapes, find_file, has_file, load_backbone
from mr_reward.errors import CheckpointError

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"


def is_lora(name: str, revision: str | None = None) -> bool:
    """Whether a checkpoint holds a LoRA adapter instead of whole weights."""
    return has_file(name, _CONFIG_FILE, revision)


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
        weights = load_file(str(find_file(name, _WEIGHTS_FILE, revision)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{name}: no {_WEIGHTS_FILE} could be read ({error})") from error
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
