"""One adapter per backbone family, chosen by the configuration's `model_type`."""

from types import MappingProxyType

from transformers import PreTrainedConfig

from mr_reward.backbones.base import BackboneAdapter
from mr_reward.backbones.molmo2 import Molmo2Adapter
from mr_reward.backbones.qwen_vl import QwenVLAdapter
from mr_reward.errors import ConfigurationError

__all__ = ["ADAPTERS", "BackboneAdapter", "get_adapter"]

ADAPTERS: MappingProxyType[str, type[BackboneAdapter]] = MappingProxyType(
    {"qwen2_5_vl": QwenVLAdapter, "qwen3_vl": QwenVLAdapter, "molmo2": Molmo2Adapter}
)


def get_adapter(config: PreTrainedConfig) -> BackboneAdapter:
    """The adapter of a backbone.

    Args:
        config: the backbone's configuration.

    Returns:
        The family's adapter; `BackboneAdapter` itself for any text-only decoder.

    Raises:
        ConfigurationError: a multimodal family without an adapter; treating it as text would ignore its media.

    Example:
        >>> get_adapter(PreTrainedConfig()).media_keys
        ()
    """
    if config.model_type in ADAPTERS:
        return ADAPTERS[config.model_type]()
    if getattr(config, "vision_config", None) is not None:
        raise ConfigurationError(
            f"backbone family {config.model_type!r} is multimodal and has no adapter, expected one of "
            f"{', '.join(ADAPTERS)} or a text-only decoder; add one in mr_reward/backbones"
        )
    return BackboneAdapter()
