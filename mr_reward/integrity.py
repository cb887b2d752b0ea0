"""What makes a checkpoint folder whole: configuration keys, weights, processor.

A load refuses what it cannot vouch for.
"""

from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.utils import PROCESSOR_NAME, cached_file

from mr_reward.errors import CheckpointError

__all__ = ["check_config_keys", "check_loading_info", "load_processor"]

# Written by transformers and its Trainer beside the configuration's own fields. None of them changes a score: the
# model passes use_cache=False itself.
_BOOKKEEPING_KEYS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version", "use_cache"}


def check_config_keys(name: str, revision: str | None, config_class: type[PreTrainedConfig]) -> None:
    """Refuse a configuration of another model or with keys that this release does not know.

    Args:
        name: folder or hub id.
        revision: of the hub repository.
        config_class: the configuration class with the known keys.

    Raises:
        CheckpointError: no configuration, another `model_type`, unknown keys or a newer schema.
    """
    try:
        found, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except OSError as error:
        raise CheckpointError(f"{name}: no config.json could be read ({error})") from error
    if not found:  # a folder without the file is no error to transformers
        raise CheckpointError(f"{name}: no config.json there; pass a folder written by save_pretrained")
    if found.get("model_type") != config_class.model_type:
        raise CheckpointError(
            f"{name}: holds a {found.get('model_type')!r} model, expected {config_class.model_type!r}; "
            "turn a plain backbone into a reward model with MultiResponseRewardModel.from_backbone"
        )
    default = config_class()
    unknown = set(found) - set(default.to_dict()) - _BOOKKEEPING_KEYS - {"_commit_hash"}
    if unknown:
        raise CheckpointError(
            f"{name}: unknown configuration keys {sorted(unknown)}; they may change how the model scores. "
            "Load it with the release of mr_reward that wrote it, or remove them"
        )
    if found.get("schema_version", 0) > default.schema_version:
        raise CheckpointError(
            f"{name}: schema version {found['schema_version']}, this release reads up to {default.schema_version}; "
            "upgrade mr_reward"
        )


def check_loading_info(name: str, info: dict[str, Any]) -> None:
    """Refuse weights that do not fit the model exactly; a random head scores as confidently as a trained one.

    Args:
        name: folder or hub id, for the message.
        info: transformers' loading info.

    Raises:
        CheckpointError: missing, unexpected or mismatched keys.
    """
    problems = [
        f"{problem} {sorted(str(key) for key in info[kind])}"
        for kind, problem in (
            ("missing_keys", "missing weights"),
            ("unexpected_keys", "unexpected weights"),
            ("mismatched_keys", "weights of another shape"),
            ("error_msgs", "errors"),
        )
        if info.get(kind)
    ]
    if problems:
        raise CheckpointError(
            f"{name}: {'; '.join(problems)}. A reward model must be complete; save it again with save_pretrained "
            "from the trained model"
        )


def load_processor(name: str, revision: str | None = None) -> Any:
    """Load the processor of a vision-language model, or the tokenizer of a text-only one.

    Args:
        name: folder or hub id.
        revision: of the hub repository.

    Returns:
        A `ProcessorMixin` or a tokenizer.

    Raises:
        CheckpointError: neither is there.
    """
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    has_processor = any(
        cached_file(name, file, revision=revision, **options) is not None
        for file in (PROCESSOR_NAME, "preprocessor_config.json")
    )
    loader = AutoProcessor if has_processor else AutoTokenizer
    try:
        return loader.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: no processor or tokenizer could be loaded ({error})") from error
