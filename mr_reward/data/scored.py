"""Groups with their scores in JSON Lines: what `mr-reward score` and a GRPO run write, and `mr-reward inspect` reads.

A line is a line of ranked groups (`mr_reward.data.preferences`), rankings optional, and what scoring it gave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mr_reward.data.group_rows import group_from_row, row_from_group
from mr_reward.data.jsonl import read_json_lines, write_json_lines
from mr_reward.data.media_files import resolve_media
from mr_reward.errors import GroupError, MRRewardError
from mr_reward.groups import ResponseGroup

__all__ = ["ScoredGroup", "read_scored", "write_scored"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredGroup:
    """A group and what scoring it gave.

    Args:
        group: the group.
        scores: N scores in the order of the responses; None if the group was dropped.
        truncated: N flags, True where the end of the response was cut off before it was scored.
        order_spread: mean standard deviation of a response's score over the orders, 0 for one order.
        drop_reason: why the group was dropped, else None.
        rewards: N values that a trainer got, None for one that got none; None outside of training.
        step: optimizer steps done when it was scored; None outside of training.

    Raises:
        GroupError: the numbers of scores, flags or rewards differ from the number of responses.

    Example:
        >>> group = ResponseGroup(prompt="2 + 2?", responses=["4", "5"])
        >>> ScoredGroup(group=group, scores=(1.7, -0.9), truncated=(False, False)).scores
        (1.7, -0.9)
    """

    group: ResponseGroup
    scores: tuple[float, ...] | None
    truncated: tuple[bool, ...]
    order_spread: float = 0.0
    drop_reason: str | None = None
    rewards: tuple[float | None, ...] | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        for name in ("scores", "truncated", "rewards"):
            values = getattr(self, name)
            if values is not None and len(values) != self.group.num_responses:
                raise GroupError(
                    f"{self.group.name}: got {len(values)} {name} for {self.group.num_responses} responses, "
                    "expected one each"
                )


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
    path = Path(path)
    if not path.is_file():
        raise GroupError(f"{path}: is not a file; give a .jsonl file that `mr-reward score` or a GRPO run has written")
    groups = []
    within = None if media_within is None else Path(media_within)
    for number, row in read_json_lines(path):
        try:
            if isinstance(row, GroupError):
                raise row
            groups.append(_scored(row, f"{path.name}:{number}", path.parent, within))
        except MRRewardError as error:
            raise GroupError(f"{path}, line {number}: {error}") from error
    if not groups:
        raise GroupError(f"{path}: holds no group; give a .jsonl file that `mr-reward score` has written")
    return groups


def write_scored(groups: Iterable[ScoredGroup], path: str | Path) -> None:
    """Write groups with their scores so that `read_scored` reads equal ones. The file appears when it is whole.

    Args:
        groups: any number.
        path: the `.jsonl` file, replaced if it exists; its folder is made. For media see `save_preferences`.

    Raises:
        MediaError: a medium that is no image.

    Example:
        >>> write_scored(groups, "out/groups/step_00005.rank0.jsonl")  # doctest: +SKIP
    """
    path = Path(path)
    write_json_lines(path, ({**row_from_group(scored.group, path), **_results(scored)} for scored in groups))


def _results(scored: ScoredGroup) -> dict[str, Any]:
    row: dict[str, Any] = {
        "scores": None if scored.scores is None else list(scored.scores),
        "truncated": list(scored.truncated),
        "order_spread": scored.order_spread,
        "drop_reason": scored.drop_reason,
    }
    if scored.rewards is not None:
        row["rewards"] = list(scored.rewards)
    if scored.step is not None:
        row["step"] = scored.step
    return row


def _scored(row: Any, fallback_id: str, root: Path, within: Path | None) -> ScoredGroup:
    group = resolve_media(group_from_row(row, fallback_id, ranked=False), root, within)
    if not isinstance(row, Mapping) or "scores" not in row:
        raise GroupError(f"{group.name}: has no scores; give a file that `mr-reward score` has written")
    return ScoredGroup(
        group=group,
        scores=_numbers(row, "scores", group),
        truncated=_numbers(row, "truncated", group) or (False,) * group.num_responses,
        order_spread=row.get("order_spread") or 0.0,
        drop_reason=row.get("drop_reason"),
        rewards=_numbers(row, "rewards", group),
        step=row.get("step"),
    )


def _numbers(row: Mapping[str, Any], key: str, group: ResponseGroup) -> tuple[Any, ...] | None:
    """A list of numbers, flags or nulls under a key, or None."""
    values = row.get(key)
    if values is None:
        return None
    kinds: dict[str, tuple[type, ...]] = {
        "scores": (int, float),
        "truncated": (bool,),
        "rewards": (int, float, type(None)),
    }
    if not isinstance(values, list) or not all(isinstance(value, kinds[key]) for value in values):
        raise GroupError(f"{group.name}: {key} is {values!r:.80}, expected a list with a value for each response")
    return tuple(values)
