"""Who computes which of the visible pairs: the backends, and ours, which computes no others.

Nothing is exported: a user names a backend, as everywhere in transformers, by `attn_implementation`.
"""

from mr_reward.exports import lazy_exports

__all__: list[str] = []

__getattr__, __dir__ = lazy_exports(__name__, {})
