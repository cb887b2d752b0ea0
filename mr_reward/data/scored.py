"""Groups with their scores in JSON Lines: what `mr-reward score` and a GRPO run write, and `mr-reward inspect` reads.

A line is a line of ranked groups (`mr_reward.data.preferences`), rankings optional, and what scoring it gave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mr_reward.data.groups_file import read_groups, row_from_group
from mr_reward.data.jsonl import write_json_lines
from mr_reward.errors import GroupError
from mr_reward.groups import GroupScores, ResponseGroup

__all__ = ["ScoredGroup", "read_scored", "write_scored"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredGroup:
    """A group and what scoring it gave.

    Args:
        group: the group.
        result: its scores, or why there are none.
        rewards: N values that a trainer got, None for one that got none; None outside of training.
        step: optimizer steps done when it was scored; None outside of training.

    Raises:
        GroupError: the numbers of scores, flags or rewards differ from the number of responses.

    Example:
        >>> group = ResponseGroup(prompt="2 + 2?", responses=["4", "5"])
        >>> result = GroupScores(scores=(1.7, -0.9), truncated=(False, False))
        >>> ScoredGroup(group=group, result=result).scores
        (1.7, -0.9)
    """

    group: ResponseGroup
    result: GroupScores
    rewards: tuple[float | None, ...] | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        given = {"scores": self.scores, "truncated": self.result.truncated, "rewards": self.rewards}
        for name, values in given.items():
            if values is not None and len(values) != self.group.num_responses:
                raise GroupError(
                    f"{self.group.name}: got {len(values)} {name} for {self.group.num_responses} responses, "
                    "expected one each"
                )

    @property
    def scores(self) -> tuple[float, ...] | None:
        """N scores in the order of the responses; None if the group was dropped."""
        return self.result.scores


def read_scored(path: str | Path, *, media_within: str | Path | None = None) -> list[ScoredGroup]:
    """Read groups with their scores.

    Args:
        path: a `.jsonl` file. Relative paths of media count from its folder.
        media_within: as in `load_preferences`.

    Returns:
        The groups in file order.

    Raises:
        GroupError: a line that is no group, whose media do not exist, or that was never scored; or no line at all.

    Example:
        >>> read_scored("scores.jsonl")[0].scores  # doctest: +SKIP
        (1.7, -0.9)
    """
    expected = "a .jsonl file that `mr-reward score` or a GRPO run has written"
    return read_groups(path, _scored, expected=expected, media_within=media_within)


def write_scored(groups: Iterable[ScoredGroup], path: str | Path) -> int:
    """Write groups with their scores so that `read_scored` reads equal ones. The file appears when it is whole.

    Args:
        groups: any number.
        path: the `.jsonl` file, replaced if it exists; its folder is made. For media see `save_preferences`.

    Returns:
        The number of groups.

    Raises:
        MediaError: a medium that is no image.

    Example:
        >>> write_scored(groups, "out/groups/step_00005.rank0.jsonl")  # doctest: +SKIP
        8
    """
    path = Path(path)
    return write_json_lines(path, ({**row_from_group(one.group, path), **_results(one)} for one in groups))


def _results(scored: ScoredGroup) -> dict[str, Any]:
    training = {"rewards": scored.rewards, "step": scored.step}
    return {**scored.result.to_dict(), **{key: value for key, value in training.items() if value is not None}}


def _scored(group: ResponseGroup, row: Mapping[str, Any]) -> ScoredGroup:
    rewards = row.get("rewards")
    if rewards is not None and not (
        isinstance(rewards, list) and all(isinstance(reward, int | float | None) for reward in rewards)
    ):
        raise GroupError(f"{group.name}: rewards is {rewards!r:.80}, expected a list with a value for each response")
    return ScoredGroup(
        group=group,
        result=GroupScores.from_dict(row, group),
        rewards=None if rewards is None else tuple(rewards),
        step=row.get("step"),
    )
