"""The groups of a run as files, with images and scores, for `mr-reward inspect` and to score them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mr_reward.data.groups_file import ScoredGroup, write_scored
from mr_reward.errors import ConfigurationError

__all__ = ["GroupLog"]


class GroupLog:
    """Writes the groups that a rank has scored to `step_00005.rank0.jsonl`, in an evaluation `eval_step_...`.

    A file holds all groups of a step, whatever the number of reward calls, and appears when it is whole. A run that is
    resumed writes the files of the steps that it repeats again. Images lie beside a file, each once.

    Args:
        folder: where to write; `mr-reward inspect` looks for `groups` in the output folder of a run.
        every: write the steps that are a multiple of it; an evaluation is always written.

    Raises:
        ConfigurationError: `every` is no whole number from 1 on.

    Example:
        >>> reward = MultiResponseReward("rm", 8, group_log=GroupLog("out/groups", every=20))  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, *, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigurationError(f"every is {every!r}, expected a whole number from 1 on: log each so many steps")
        self.folder = Path(folder)
        self.every = every
        self._path: Path | None = None
        self._groups: list[ScoredGroup] = []

    def write(self, groups: Sequence[ScoredGroup], *, step: int, rank: int, evaluating: bool) -> None:
        """Write the groups of a reward call.

        Args:
            groups: what this rank has scored; none is no file.
            step: optimizer steps done.
            rank: of this process.
            evaluating: whether the call belongs to an evaluation.

        Raises:
            OSError: the file cannot be written.
        """
        if not groups or not (evaluating or step % self.every == 0):
            return
        path = self.folder / f"{'eval_' if evaluating else ''}step_{step:05d}.rank{rank}.jsonl"
        if path != self._path:
            self._path, self._groups = path, []
        self._groups.extend(groups)
        write_scored(self._groups, path)
