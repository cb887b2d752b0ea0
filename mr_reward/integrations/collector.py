"""Rollouts that a trainer hands over one by one -> whole groups, scored once, and the rewards back to each."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mr_reward.errors import ConfigurationError, GroupAssemblyError, OverLengthError
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.reward import REWARD_TRANSFORMS
from mr_reward.serving.batcher import Batcher

__all__ = ["GroupCollector", "Rollout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response and the prompt that it answers.

    Args:
        key: equal for the rollouts of a group, and different for groups that are on their way at the same time.
        prompt: text or chat messages.
        response: the text to judge.
        images: of the prompt: paths, encoded bytes or PIL images.
    """

    key: str
    prompt: Any
    response: str
    images: Sequence[Any] = ()


@dataclass(slots=True)
class _Waiting:
    """A group that is not whole yet."""

    rollouts: list[tuple[Rollout, asyncio.Future[float]]] = field(default_factory=list)


class GroupCollector:
    """Waits until N rollouts with one key are there and scores them together. All methods belong to one event loop.

    Two groups with the same key at the same time cannot be told apart: the first N rollouts that come are one group.
    As they answer the same prompt each is compared with N - 1 others all the same. A caller that gives up (is
    cancelled) takes its rollout out of a group that is not whole yet, so one that asks again does not count twice.

    Args:
        batcher: scores the groups.
        num_generations: N.
        reward: a name of `mr_reward.grpo.reward.REWARD_TRANSFORMS`.
        deadline: seconds that a rollout waits for the others of its group.

    Raises:
        ConfigurationError: an argument has a value that does not exist.
    """

    def __init__(
        self, batcher: Batcher, *, num_generations: int, reward: str = "centred", deadline: float = 170.0
    ) -> None:
        if num_generations < 1:
            raise ConfigurationError(
                f"num_generations is {num_generations}, expected the trainer's samples per prompt"
            )
        if reward not in REWARD_TRANSFORMS:
            raise ConfigurationError(f"reward is {reward!r}, expected one of {', '.join(REWARD_TRANSFORMS)}")
        if not deadline > 0:
            raise ConfigurationError(f"deadline is {deadline} s, expected more than 0")
        self._batcher = batcher
        self._size = num_generations
        self._transform = REWARD_TRANSFORMS[reward]
        self._deadline = deadline
        self._waiting: dict[str, _Waiting] = {}

    @property
    def num_waiting(self) -> int:
        """Rollouts whose groups are not whole yet."""
        return sum(len(group.rollouts) for group in self._waiting.values())

    async def reward(self, rollout: Rollout) -> float:
        """The reward of a rollout, once its group is whole.

        Args:
            rollout: the rollout.

        Returns:
            Its reward.

        Raises:
            GroupAssemblyError: the others of its group did not come in time.
            MRRewardError: the group cannot be scored.
        """
        group = self._waiting.setdefault(rollout.key, _Waiting())
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        entry = (rollout, future)
        group.rollouts.append(entry)
        if len(group.rollouts) == self._size:
            del self._waiting[rollout.key]
            await self._score(group)
        try:
            async with asyncio.timeout(self._deadline):
                # Shielded: what has become whole is scored, also if this caller gives up.
                return await asyncio.shield(future)
        except TimeoutError as error:
            raise GroupAssemblyError(
                f"group {rollout.key[:80]!r}: {len(group.rollouts)} of {self._size} rollouts came within "
                f"{self._deadline:.0f} s; give the trainer's number of samples per prompt as num_generations, send "
                "all of a group to one server, or raise the deadline (below the trainer's own)"
            ) from error
        finally:
            if self._waiting.get(rollout.key) is group:
                group.rollouts.remove(entry)
                if not group.rollouts:
                    del self._waiting[rollout.key]

    async def _score(self, group: _Waiting) -> None:
        rollouts, futures = zip(*group.rollouts, strict=True)
        try:
            first = rollouts[0]
            whole = ResponseGroup(
                prompt=first.prompt,
                images=first.images,
                responses=[rollout.response for rollout in rollouts],
                id=first.key[:80],
            )
            job = self._batcher.add(uuid.uuid4().hex, b"", [whole])
            await asyncio.wait([job.result])
            (result,) = job.result.result()
            if result.scores is None:
                raise OverLengthError(f"{whole.name} got no reward: {result.drop_reason}")
        except ValueError as error:  # all errors about a group are
            _fail(futures, error)
        except RuntimeError as error:
            _fail(futures, error)
        else:
            for future, value in zip(futures, self._transform(result.scores), strict=True):
                future.set_result(value)


def _fail(futures: Sequence[asyncio.Future[float]], error: Exception) -> None:
    for future in futures:
        future.set_exception(error)
        future.exception()  # read here, as a caller that gave up will not
