"""Rollouts that a trainer hands over one by one -> whole groups, scored once, and the rewards back to each.

A rollout is a group of one response. Its id is equal for the rollouts of a group, and different for groups that are on
their way at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mr_reward.errors import ConfigurationError, GroupAssemblyError, OverLengthError
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.reward import reward_transform
from mr_reward.serving.batcher import Batcher


def join_rollouts(rollouts: Sequence[ResponseGroup]) -> ResponseGroup:
    """The rollouts of one prompt, which is taken from the first, as one group."""
    first = rollouts[0]
    responses = [rollout.responses[0] for rollout in rollouts]
    return replace(first, prompt=first.messages, responses=responses, id=str(first.id)[:80])


@dataclass(slots=True)
class _Group:
    rollouts: list[ResponseGroup] = field(default_factory=list)
    is_whole: asyncio.Event = field(default_factory=asyncio.Event)
    rewards: asyncio.Task[list[float]] | None = None  # carries its error to each that waits, of whatever type


class GroupCollector:
    """Waits until N rollouts with one id are there and scores them together. All methods belong to one event loop.

    Two groups with the same id at the same time cannot be told apart: the first N rollouts that come are one group.
    As they answer the same prompt each is compared with N - 1 others all the same. A caller that gives up (is
    cancelled) takes its rollout out of a group that is not whole yet, so one that asks again does not count twice.
    """

    def __init__(
        self, batcher: Batcher, *, num_generations: int, reward: str = "centred", deadline: float = 170.0
    ) -> None:
        if num_generations < 1:
            raise ConfigurationError(
                f"num_generations is {num_generations}, expected the trainer's samples per prompt"
            )
        if not deadline > 0:
            raise ConfigurationError(f"deadline is {deadline} s, expected more than 0")
        self._batcher = batcher
        self._size = num_generations
        self._transform = reward_transform(reward)
        self._deadline = deadline
        self._waiting: dict[str | None, _Group] = {}

    @property
    def num_waiting(self) -> int:
        """Rollouts whose groups are not whole yet."""
        return sum(len(group.rollouts) for group in self._waiting.values())

    async def reward(self, rollout: ResponseGroup) -> float:
        """The reward of a rollout, once its group is whole and scored.

        A group that is not whole or not scored in time is a GroupAssemblyError; an error of the scorer comes as it is.
        """
        group = self._waiting.setdefault(rollout.id, _Group())
        group.rollouts.append(rollout)
        if len(group.rollouts) == self._size:
            del self._waiting[rollout.id]
            group.rewards = asyncio.create_task(self._score(group.rollouts))
            group.rewards.add_done_callback(lambda task: task.exception())  # read, also if all callers gave up
            group.is_whole.set()
        try:
            async with asyncio.timeout(self._deadline):
                await group.is_whole.wait()
                assert group.rewards is not None
                # Shielded: what has become whole is scored, also if this caller gives up.
                return (await asyncio.shield(group.rewards))[group.rollouts.index(rollout)]
        except TimeoutError as error:
            if group.is_whole.is_set():
                text = f"all {self._size} rollouts came, but were not scored within {self._deadline:.0f} s; raise the "
            else:
                text = (
                    f"{len(group.rollouts)} of {self._size} rollouts came within {self._deadline:.0f} s; give the "
                    "trainer's number of samples per prompt as num_generations, send all of a group to one server, or "
                    "raise the "
                )
            name = join_rollouts(group.rollouts).name
            raise GroupAssemblyError(f"{name}: {text}deadline (below the trainer's own)") from error
        finally:
            if self._waiting.get(rollout.id) is group:
                group.rollouts.remove(rollout)
                if not group.rollouts:
                    del self._waiting[rollout.id]

    async def _score(self, rollouts: Sequence[ResponseGroup]) -> list[float]:
        whole = join_rollouts(rollouts)
        (result,) = await self._batcher.submit([whole])
        if result.scores is None:
            raise OverLengthError(f"{whole.name} got no reward: {result.drop_reason}")
        return list(self._transform(result.scores))
