"""The same reward for other trainers: verl, OpenRLHF, ms-swift; see docs/other-trainers.md."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.integrations.ms_swift import register
    from mr_reward.integrations.verl import compute_score, compute_score_single

__all__ = ["compute_score", "compute_score_single", "register"]

__getattr__, __dir__ = lazy_exports(
    __name__, {"ms_swift": ["register"], "verl": ["compute_score", "compute_score_single"]}
)
