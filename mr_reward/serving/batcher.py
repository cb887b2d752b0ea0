"""Requests that come at the same time are scored together, by one thread that owns the model."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mr_reward.groups import GroupScores, ResponseGroup

__all__ = ["Batcher", "Job"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A request on its way.

    Args:
        request_id: chosen by the client.
        content: digest of what the client sent.
        groups: to score; empty again once they are scored.
        result: of `score` for the groups, or its error.
    """

    request_id: str
    content: bytes
    groups: list[ResponseGroup]
    result: asyncio.Future[list[GroupScores]]


class Batcher:
    """Joins requests into calls of a scorer. All methods belong to one event loop.

    The scorer keeps the token budget of a forward pass itself; here only the number of groups of a call is limited.
    If a call fails, its requests are scored again in halves until the error is with the request that causes it.

    Args:
        score: scores groups, in a thread of its own; never called twice at the same time.
        max_groups: a call takes further requests up to this number of groups.
        max_wait: seconds that a call waits for further requests.
        max_pending: groups that may wait or be scored at a time.
        num_remembered: answers kept for clients that ask again.

    Example:
        ```python
        batcher = Batcher(scorer.score_detailed)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(batcher.run())
            job = batcher.add("a", b"", groups)
            results = await job.result
        ```
    """

    def __init__(
        self,
        score: Callable[[Sequence[ResponseGroup]], list[GroupScores]],
        *,
        max_groups: int = 256,
        max_wait: float = 0.005,
        max_pending: int = 4096,
        num_remembered: int = 1024,
    ) -> None:
        self._score = score
        self._max_groups = max_groups
        self._max_wait = max_wait
        self._max_pending = max_pending
        self._num_remembered = num_remembered
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._pending = 0

    @property
    def pending(self) -> int:
        """Groups that wait or are being scored."""
        return self._pending

    def has_room(self, num_groups: int) -> bool:
        """Whether so many more groups may wait; a request of any size may if nothing else does."""
        return not self._pending or self._pending + num_groups <= self._max_pending

    def find(self, request_id: str) -> Job | None:
        """The request with this id, if it is on its way or remembered."""
        return self._jobs.get(request_id)

    def add(self, request_id: str, content: bytes, groups: Sequence[ResponseGroup]) -> Job:
        """Take a request in.

        Args:
            request_id: one that `find` does not know.
            content: digest of the request.
            groups: to score.

        Returns:
            The request; wait for its `result`.
        """
        result: asyncio.Future[list[GroupScores]] = asyncio.get_running_loop().create_future()
        job = Job(request_id=request_id, content=content, groups=list(groups), result=result)
        self._jobs[request_id] = job
        while len(self._jobs) > self._num_remembered:
            self._jobs.popitem(last=False)
        self._pending += len(job.groups)
        self._queue.put_nowait(job)
        return job

    async def run(self) -> None:
        """Score what comes in, until cancelled."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring") as thread:
            while True:
                jobs = [await self._queue.get()]
                if self._max_wait:
                    await asyncio.sleep(self._max_wait)
                while not self._queue.empty() and sum(len(job.groups) for job in jobs) < self._max_groups:
                    jobs.append(self._queue.get_nowait())
                await self._score_jobs(jobs, thread)

    async def _score_jobs(self, jobs: Sequence[Job], thread: ThreadPoolExecutor) -> None:
        groups = [group for job in jobs for group in job.groups]
        call = asyncio.get_running_loop().run_in_executor(thread, self._score, groups)
        await asyncio.wait([call])
        error = call.exception()
        if error is not None and len(jobs) > 1:
            half = len(jobs) // 2
            await self._score_jobs(jobs[:half], thread)
            await self._score_jobs(jobs[half:], thread)
            return
        start = 0
        for job in jobs:
            end = start + len(job.groups)
            self._pending -= len(job.groups)
            job.groups.clear()  # the answer is remembered, the images need not be
            if error is None:
                job.result.set_result(call.result()[start:end])
            else:
                self._jobs.pop(job.request_id, None)  # the next attempt may go well
                job.result.set_exception(error)
            start = end
