"""Which rank holds which rollout, and which scores which group: as text, made by the plan that a run makes."""

from __future__ import annotations

from collections import defaultdict

from mr_reward.grpo.groups import RolloutRow, plan_groups

__all__ = ["group_map"]

_SHOWN_RANKS, _SHOWN_GROUPS = 8, 6


def group_map(num_ranks: int, rows_per_rank: int, num_generations: int) -> list[str]:
    """Describe one call of the reward.

    Args:
        num_ranks: processes.
        rows_per_rank: rollouts that each holds.
        num_generations: N, rollouts of a group.

    Returns:
        A line for each rank: the groups with the numbers of the rollouts that it holds, and the groups that it scores.
        With many ranks or groups the middle is left out, and the line says so.

    Raises:
        GroupAssemblyError: the rollouts cannot be cut into groups.

    Example:
        >>> group_map(2, 2, 4)
        ['rank 0: group 0 (1-2), scores 0', 'rank 1: group 0 (3-4), scores none']
    """
    prompts = [str(row // num_generations) for row in range(num_ranks * rows_per_rank)]
    rows = [RolloutRow(prompt, "") for prompt in prompts]
    by_rank = [rows[rank * rows_per_rank : (rank + 1) * rows_per_rank] for rank in range(num_ranks)]
    scored: dict[int, list[str]] = defaultdict(list)
    for group in plan_groups(by_rank, num_generations):
        scored[group.owner].append(str(group.index))
    lines = []
    for rank in range(num_ranks):
        held: dict[int, list[int]] = defaultdict(list)
        for row in range(rank * rows_per_rank, (rank + 1) * rows_per_rank):
            held[row // num_generations].append(row % num_generations + 1)
        parts = [
            f"{index} (all)" if len(slots) == num_generations else f"{index} ({slots[0]}-{slots[-1]})"
            for index, slots in held.items()
        ]
        word = "group" if len(parts) == 1 else "groups"
        lines.append(f"rank {rank}: {word} {_listed(parts)}, scores {_listed(scored[rank]) or 'none'}")
    if len(lines) > _SHOWN_RANKS:
        half = _SHOWN_RANKS // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} more ranks ...", *lines[-half:]]
    return lines


def _listed(parts: list[str]) -> str:
    if len(parts) <= _SHOWN_GROUPS:
        return " ".join(parts)
    return f"{' '.join(parts[: _SHOWN_GROUPS - 1])} ... {parts[-1]}"
