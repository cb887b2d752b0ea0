"""Rows of all ranks -> groups of `num_generations` rows, and the rank that scores each. Pure: no collectives.

Words: the *owner* of a group is the rank that scores it, a *holder* one that holds at least one row of it; a
*straddling* group has more than one holder. The owner is always a holder, because holders have the prompt's images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mr_reward.errors import GroupAssemblyError
from mr_reward.grpo.rows import RolloutRow

__all__ = ["PlannedGroup", "plan_groups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedGroup:
    """One prompt's rollouts, wherever they are.

    Args:
        index: number of the group in the global batch.
        responses: N = `num_generations` response texts in global row order.
        holders: the ranks that hold rows of it, ascending.
        owner: the holder that scores it.
        owner_row: position, among the owner's own rows, of the first one that belongs to this group.
    """

    index: int
    responses: tuple[str, ...]
    holders: tuple[int, ...]
    owner: int
    owner_row: int

    @property
    def straddles(self) -> bool:
        """Whether more than one rank holds rows of it."""
        return len(self.holders) > 1


def plan_groups(rows_by_rank: Sequence[Sequence[RolloutRow]], num_generations: int) -> list[PlannedGroup]:
    """Cut the global batch into groups and share them out. The same input gives the same plan on every rank.

    Groups are cut by count, never by content: two neighbouring groups with the same prompt stay two groups. The
    fingerprints only prove that the count is right.

    Args:
        rows_by_rank: the rows of each rank, rank 0 first. Ranks may hold different numbers of rows.
        num_generations: N, rows in a group.

    Returns:
        The groups in global order.

    Raises:
        GroupAssemblyError: the number of rows is not a multiple of N, or a group's rows have different prompts.

    Example:
        >>> row = RolloutRow("prompt", "text")
        >>> [group.holders for group in plan_groups([[row] * 2, [row] * 2], 4)]
        [(0, 1)]
    """
    rows = [(rank, i, row) for rank, own in enumerate(rows_by_rank) for i, row in enumerate(own)]
    if len(rows) % num_generations:
        counts = ", ".join(f"rank {rank}: {len(own)}" for rank, own in enumerate(rows_by_rank))
        raise GroupAssemblyError(
            f"got {len(rows)} rows in all ({counts}), expected a multiple of num_generations={num_generations}; give "
            "MultiResponseReward the num_generations of the trainer's config (and the config the same "
            "num_generations_eval), and use it only in trainers that generate whole groups (GRPO, RLOO)"
        )
    groups = []
    for index, start in enumerate(range(0, len(rows), num_generations)):
        chunk = rows[start : start + num_generations]
        _check_same_prompt(chunk, start, num_generations)
        groups.append(
            PlannedGroup(
                index=index,
                responses=tuple(row.response for _, _, row in chunk),
                holders=tuple(sorted({rank for rank, _, _ in chunk})),
                owner=chunk[0][0],
                owner_row=chunk[0][1],
            )
        )
    return _balance(groups, num_ranks=len(rows_by_rank))


def _check_same_prompt(chunk: Sequence[tuple[int, int, RolloutRow]], start: int, num_generations: int) -> None:
    first = chunk[0][2].fingerprint
    for offset, (rank, _, row) in enumerate(chunk):
        if row.fingerprint != first:
            raise GroupAssemblyError(
                f"rows {start} to {start + num_generations - 1} of the global batch (ranks {chunk[0][0]} to "
                f"{chunk[-1][0]}) should be the {num_generations} rollouts of one prompt, but row {start + offset} "
                f"(rank {rank}) has another prompt or image than row {start} (rank {chunk[0][0]}); give "
                "MultiResponseReward the num_generations of the trainer's config (and the config the same "
                "num_generations_eval), and turn off whatever changes prompts or images from rollout to rollout "
                "(random augmentation, environments with different first observations)"
            )


def _balance(groups: Sequence[PlannedGroup], *, num_ranks: int) -> list[PlannedGroup]:
    """Give each straddling group to its least loaded holder; the load is what the others already cost, in characters.

    The lowest rank wins a tie. A rank's rows are consecutive in the global batch, so a group that began on an earlier
    rank goes on at row 0 of a later one.
    """
    load = [0] * num_ranks
    for group in groups:
        if not group.straddles:
            load[group.owner] += _cost(group)
    balanced = []
    for group in groups:
        if group.straddles:
            owner = min(group.holders, key=lambda rank: (load[rank], rank))
            load[owner] += _cost(group)
            group = replace(group, owner=owner, owner_row=group.owner_row if owner == group.owner else 0)
        balanced.append(group)
    return balanced


def _cost(group: PlannedGroup) -> int:
    return 1 + sum(len(response) for response in group.responses)
