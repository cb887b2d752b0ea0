"""Scorers: a reward model on this device, in CPU memory between calls, or behind HTTP; `open_scorer` opens each."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.scorers.opening import OffloadedScorer, open_scorer
    from mr_reward.scorers.remote import RemoteScorer

__all__ = ["OffloadedScorer", "RemoteScorer", "open_scorer"]

__getattr__, __dir__ = lazy_exports(
    __name__, {"opening": ["OffloadedScorer", "open_scorer"], "remote": ["RemoteScorer"]}
)
