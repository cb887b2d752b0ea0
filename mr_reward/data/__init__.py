"""Files of groups: JSON Lines with media, public data sets and their conversion, decontamination."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.data.preferences import load_preferences, save_preferences
    from mr_reward.data.scored import ScoredGroup, read_scored, write_scored

__all__ = ["ScoredGroup", "load_preferences", "read_scored", "save_preferences", "write_scored"]

__getattr__ = lazy_exports(
    __name__,
    {
        "ScoredGroup": "scored",
        "load_preferences": "preferences",
        "read_scored": "scored",
        "save_preferences": "preferences",
        "write_scored": "scored",
    },
)
