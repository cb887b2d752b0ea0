"""Files of groups: JSON Lines with media, public data sets and their conversion, decontamination."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.data.groups_file import ScoredGroup, load_preferences, read_scored, save_preferences, write_scored

__all__ = ["ScoredGroup", "load_preferences", "read_scored", "save_preferences", "write_scored"]

__getattr__, __dir__ = lazy_exports(__name__, {"groups_file": __all__})
