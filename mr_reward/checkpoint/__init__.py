"""What a saved folder is: read, checked, written."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.checkpoint.card import write_model_card
    from mr_reward.checkpoint.verify import weights_digest
    from mr_reward.checkpoint.zero3 import outside_zero3

__all__ = ["outside_zero3", "weights_digest", "write_model_card"]

__getattr__, __dir__ = lazy_exports(
    __name__, {"card": ["write_model_card"], "verify": ["weights_digest"], "zero3": ["outside_zero3"]}
)
