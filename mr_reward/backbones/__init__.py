"""One adapter per backbone family, chosen by the configuration's `model_type`."""

from collections.abc import Iterable, Sequence
from types import MappingProxyType

from torch import Tensor
from transformers import PreTrainedConfig

from mr_reward.backbones.base import BackboneAdapter, TextAdapter
from mr_reward.backbones.molmo2 import Molmo2Adapter
from mr_reward.backbones.qwen_vl import QwenVLAdapter
from mr_reward.errors import ConfigurationError

__all__ = ["ADAPTERS", "BackboneAdapter", "check_media", "get_adapter", "merge_media", "split_media"]

ADAPTERS: MappingProxyType[str, type[BackboneAdapter]] = MappingProxyType(
    {"qwen2_5_vl": QwenVLAdapter, "qwen3_vl": QwenVLAdapter, "molmo2": Molmo2Adapter}
)


def get_adapter(config: PreTrainedConfig) -> BackboneAdapter:
    """The adapter of a backbone.

    Args:
        config: the backbone's configuration.

    Returns:
        The family's adapter; `TextAdapter` for any text-only decoder.

    Raises:
        ConfigurationError: a multimodal family without an adapter; treating it as text would ignore its media.
    """
    if config.model_type in ADAPTERS:
        return ADAPTERS[config.model_type]()
    if getattr(config, "vision_config", None) is not None:
        raise ConfigurationError(
            f"backbone family {config.model_type!r} is multimodal and has no adapter, expected one of "
            f"{', '.join(ADAPTERS)} or a text-only decoder; add one in mr_reward/backbones"
        )
    return TextAdapter()


def check_media(media: dict[str, Tensor], name: str) -> None:
    """Refuse the media of one prompt that the backbone's forward would not take.

    Args:
        media: tensors by name, as the family's processor makes them.
        name: of the group, for the message.

    Raises:
        MediaError: a combination of media that the family does not take.
    """
    _family_of(media).check_media(media, name)


def merge_media(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The media tensors of the rows of a batch -> those of the batch, by the family's rule.

    Args:
        rows: tensors by name, as the family's processor makes them; a row without media is empty.

    Returns:
        Tensors by name, for the model's forward.
    """
    return _family_of({name for row in rows for name in row}).merge_media(rows)


def split_media(media: dict[str, Tensor], num_images: Sequence[int]) -> list[dict[str, Tensor]]:
    """The media tensors of several prompts in one call of a processor -> those of each prompt, as if it were alone.

    Args:
        media: tensors by name.
        num_images: of each prompt; there are no videos.

    Returns:
        For each prompt tensors by name; none for a prompt without images.
    """
    if not media:
        return [{} for _ in num_images]
    return _family_of(media).split_media(media, num_images)


def _family_of(names: Iterable[str]) -> BackboneAdapter:
    """The family whose processor makes tensors of these names. Rows are made before any model is there to ask."""
    return next((adapter() for adapter in ADAPTERS.values() if set(names) <= set(adapter.media_keys)), TextAdapter())
