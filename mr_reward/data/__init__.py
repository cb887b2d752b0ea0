"""Files of groups: JSON Lines with media, public data sets and their conversion, decontamination."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.data.conversion import Conversion
    from mr_reward.data.converters import get_converter
    from mr_reward.data.decontamination import decontaminate
    from mr_reward.data.preferences import load_preferences, save_preferences
    from mr_reward.data.scored import ScoredGroup, read_scored, write_scored
    from mr_reward.data.sources import read_rows

__all__ = [
    "Conversion",
    "ScoredGroup",
    "decontaminate",
    "get_converter",
    "load_preferences",
    "read_rows",
    "read_scored",
    "save_preferences",
    "write_scored",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Conversion": "conversion",
        "ScoredGroup": "scored",
        "decontaminate": "decontamination",
        "get_converter": "converters",
        "load_preferences": "preferences",
        "read_rows": "sources",
        "read_scored": "scored",
        "save_preferences": "preferences",
        "write_scored": "scored",
    },
)
