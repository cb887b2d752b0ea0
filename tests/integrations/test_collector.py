"""Rollouts become groups: those of a batch are cut, those that come one by one wait for each other."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from mr_reward.groups import GroupScores, ResponseGroup
from mr_reward.integrations.collector import GroupCollector, cut_into_groups


def test_two_neighbours_of_one_index_and_prompt_are_cut_in_the_order_of_their_rows() -> None:
    rollouts = [ResponseGroup(prompt=prompt, responses=[str(i)], id="0") for i, prompt in enumerate("PQPPQPQQ")]
    assert cut_into_groups(rollouts, 2) == [[0, 2], [3, 5], [1, 4], [6, 7]]
    assert cut_into_groups(rollouts, np.int64(4)) == [[0, 2, 3, 5], [1, 4, 6, 7]]
    assert cut_into_groups([], 4) == []


def test_who_gives_up_takes_nothing_from_the_others() -> None:
    """Before the group is whole its place is free again; afterwards it is scored for the others all the same."""
    started = asyncio.Event()

    class Slow:
        calls: list[list[str]] = []

        async def submit(self, groups: Any) -> list[GroupScores]:
            self.calls.append(list(groups[0].responses))
            started.set()
            await asyncio.sleep(0.3)
            scores = tuple(float(len(text)) for text in groups[0].responses)
            return [GroupScores(scores=scores, truncated=(False,) * len(scores))]

    async def scenario() -> None:
        slow = Slow()
        collector = GroupCollector(slow, num_generations=3, reward="raw")  # type: ignore[arg-type]

        def ask(text: str) -> asyncio.Task[float]:
            return asyncio.create_task(collector.reward(ResponseGroup(prompt="?", responses=[text], id="0")))

        early, others = ask("gives up early"), [ask("a")]
        await asyncio.sleep(0)
        assert collector.num_waiting == 2
        early.cancel()
        await asyncio.gather(early, return_exceptions=True)
        assert collector.num_waiting == 1
        others.append(ask("bb"))
        await asyncio.sleep(0)
        assert not slow.calls
        late = ask("gives up late")
        await started.wait()
        late.cancel()
        assert await asyncio.gather(*others) == [1.0, 2.0] and late.cancelled()
        assert slow.calls == [["a", "bb", "gives up late"]] and collector.num_waiting == 0

    asyncio.run(scenario())


def test_a_group_that_is_done_takes_nothing_from_the_next_of_its_prompt() -> None:
    """An epoch later the same id and prompt come again, while the first group is still being scored."""

    class Slow:
        async def submit(self, groups: Any) -> list[GroupScores]:
            await asyncio.sleep(0.1)
            scores = tuple(float(len(text)) for text in groups[0].responses)
            return [GroupScores(scores=scores, truncated=(False,) * len(scores))]

    async def scenario() -> None:
        collector = GroupCollector(Slow(), num_generations=2, reward="raw")  # type: ignore[arg-type]

        def ask(text: str) -> asyncio.Task[float]:
            return asyncio.create_task(collector.reward(ResponseGroup(prompt="?", responses=[text], id="0")))

        first, early = [ask("a"), ask("bb")], ask("ccc")
        await asyncio.sleep(0)
        assert await asyncio.gather(*first) == [1.0, 2.0]
        assert collector.num_waiting == 1
        assert await asyncio.gather(early, ask("dddd")) == [3.0, 4.0] and collector.num_waiting == 0

    asyncio.run(scenario())
