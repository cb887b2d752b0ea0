"""What a saved folder is: read, checked, written."""

from mr_reward.exports import lazy_exports

__all__: list[str] = []

__getattr__ = lazy_exports(__name__, {})
