"""A group's prompt, media and responses as token ids: chat and joined templates, tokens, images."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.templates.images import load_image

__all__ = ["load_image"]

__getattr__, __dir__ = lazy_exports(__name__, {"images": __all__})
