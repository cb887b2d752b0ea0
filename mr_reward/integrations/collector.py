"""Rollouts that a trainer hands over -> whole groups of one prompt: of a batch, or collected one by one.

A rollout is a group of one response. A group is known by its id *and* its prompt, media included: trainers number the
rows of each file from 0, so the id alone joins the answers to different prompts.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mr_reward.errors import ConfigurationError, GroupAssemblyError, OverLengthError, whole_number
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.groups import prompt_fingerprint
from mr_reward.grpo.reward import reward_transform
from mr_reward.serving.batcher import Batcher
from mr_reward.templates.images import DecodedImages

_Key = tuple[str | None, str]  # id, fingerprint of the prompt


def join_rollouts(rollouts: Sequence[ResponseGroup]) -> ResponseGroup:
    """The rollouts of one prompt, which is taken from the first, as one group."""
    first = rollouts[0]
    responses = [rollout.responses[0] for rollout in rollouts]
    return replace(first, prompt=first.messages, responses=responses, id=str(first.id)[:80])


def cut_into_groups(rollouts: Sequence[ResponseGroup], num_generations: int) -> list[list[int]]:
    """The rows of each group of a batch, whose rows may come in any order.

    Two groups of one id and one prompt are cut in the order of their rows.
    """
    size = whole_number(num_generations, "num_generations", "the trainer's samples per prompt")
    digest = DecodedImages().digest
    rows_by_key: dict[_Key, list[int]] = defaultdict(list)
    for row, rollout in enumerate(rollouts):
        rows_by_key[rollout.id, prompt_fingerprint(rollout, digest)].append(row)
    for (name, _), rows in rows_by_key.items():
        if len(rows) % size:
            prompts = sum(other == name for other, _ in rows_by_key)
            shown = ", ".join(map(str, rows[:20])) + (", ..." if len(rows) > 20 else "")
            others = f" (the id {name} stands at {prompts} different prompts)" if prompts > 1 else ""
            raise GroupAssemblyError(
                f"prompt {name} has {len(rows)} rollouts in this call, rows {shown}{others}, expected a multiple of "
                f"num_generations={size}: the batch was split before the reward, or the prompt or its images change "
                "from rollout to rollout. Use the batch reward manager, or compute_score_single with "
                "`mr-reward serve --collect`; and give the rollouts of one row one prompt"
            )
    return [rows[i : i + size] for rows in rows_by_key.values() for i in range(0, len(rows), size)]


@dataclass(slots=True)
class _Group:
    rollouts: list[ResponseGroup] = field(default_factory=list)
    is_whole: asyncio.Event = field(default_factory=asyncio.Event)
    has_namesakes: bool = False  # another prompt came with the same id
    rewards: asyncio.Task[list[float]] | None = None  # carries its error to each that waits, of whatever type


class GroupCollector:
    """Waits until N rollouts of one id and prompt are there and scores them together. All belongs to one event loop.

    Two such groups at the same time cannot be told apart: the first N rollouts that come are one group. As they answer
    the same prompt each is compared with N - 1 others all the same. Media are told apart by their paths. A caller that
    gives up (is cancelled) takes its rollout out of a group that is not whole yet, so one that asks again does not
    count twice.
    """

    def __init__(
        self, batcher: Batcher, *, num_generations: int, reward: str = "centred", deadline: float = 170.0
    ) -> None:
        if not deadline > 0:
            raise ConfigurationError(f"deadline is {deadline} s, expected more than 0")
        self._batcher = batcher
        self._size = whole_number(num_generations, "num_generations", "the trainer's samples per prompt")
        self._transform = reward_transform(reward)
        self._deadline = deadline
        self._waiting: dict[_Key, _Group] = {}

    @property
    def num_waiting(self) -> int:
        """Rollouts whose groups are not whole yet."""
        return sum(len(group.rollouts) for group in self._waiting.values())

    async def reward(self, rollout: ResponseGroup) -> float:
        """The reward of a rollout, once its group is whole and scored.

        A group that is not whole or not scored in time is a GroupAssemblyError; an error of the scorer comes as it is.
        """
        key = rollout.id, prompt_fingerprint(rollout, str)
        group = self._waiting.setdefault(key, _Group())
        group.rollouts.append(rollout)
        namesakes = [other for (name, _), other in self._waiting.items() if name == rollout.id]
        for other in namesakes if len(namesakes) > 1 else ():
            other.has_namesakes = True
        if len(group.rollouts) == self._size:
            del self._waiting[key]
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
                elsewhere = " (more of this id came with another prompt or image)" if group.has_namesakes else ""
                text = (
                    f"{len(group.rollouts)} of {self._size} rollouts came within {self._deadline:.0f} s{elsewhere}; "
                    "give the trainer's number of samples per prompt as num_generations, send all of a group to one "
                    "server, or raise the "
                )
            name = join_rollouts(group.rollouts).name
            raise GroupAssemblyError(f"{name}: {text}deadline (below the trainer's own)") from error
        finally:
            if self._waiting.get(key) is group:
                group.rollouts.remove(rollout)
                if not group.rollouts:
                    del self._waiting[key]

    async def _score(self, rollouts: Sequence[ResponseGroup]) -> list[float]:
        whole = join_rollouts(rollouts)
        (result,) = await self._batcher.submit([whole])
        if result.scores is None:
            raise OverLengthError(f"{whole.name} got no reward: {result.drop_reason}")
        return list(self._transform(result.scores))
