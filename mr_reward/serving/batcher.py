"""Requests that come at the same time are scored together, by one thread that owns the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import KW_ONLY, dataclass, field

from mr_reward.groups import GroupScores, ResponseGroup


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    groups: list[ResponseGroup]
    results: asyncio.Future[list[GroupScores]]


@dataclass(slots=True, eq=False)
class Batcher:
    """Joins requests into calls of `score`, of which one runs at a time. All methods belong to one event loop.

    The scorer keeps the token budget of a forward pass itself; here only the number of groups of a call is limited.
    If a call fails, its requests are scored again in halves until the error is with the request that causes it.
    """

    score: Callable[[Sequence[ResponseGroup]], list[GroupScores]]  # called in a thread of its own
    _: KW_ONLY
    max_groups: int = 256  # a call takes further requests up to this number of groups
    max_wait: float = 0.005  # seconds that a call waits for further requests
    max_pending: int = 4096  # groups that may wait or be scored at a time
    pending: int = field(default=0, init=False)  # groups that wait or are being scored
    _queue: asyncio.Queue[_Job] = field(default_factory=asyncio.Queue, init=False)

    def has_room(self, num_groups: int) -> bool:
        """Whether so many more groups may wait; a request of any size may if nothing else does."""
        return not self.pending or self.pending + num_groups <= self.max_pending

    def submit(self, groups: Sequence[ResponseGroup]) -> asyncio.Future[list[GroupScores]]:
        """The results of a request, once they are there, or whatever error the scorer raised for it."""
        job = _Job(list(groups), asyncio.get_running_loop().create_future())
        self.pending += len(job.groups)
        job.results.add_done_callback(lambda _: self._forget(len(job.groups)))
        self._queue.put_nowait(job)
        return job.results

    @asynccontextmanager
    async def running(self, _: object = None) -> AsyncIterator[None]:
        """Score what comes in until the block ends; the lifespan of an application."""
        task = asyncio.create_task(self._run())
        yield
        task.cancel()
        await asyncio.wait([task])

    async def _run(self) -> None:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring") as thread:
            while True:
                jobs = [await self._queue.get()]
                if self.max_wait:
                    await asyncio.sleep(self.max_wait)
                while not self._queue.empty() and sum(len(job.groups) for job in jobs) < self.max_groups:
                    jobs.append(self._queue.get_nowait())
                await self._score_jobs(jobs, thread)

    async def _score_jobs(self, jobs: Sequence[_Job], thread: ThreadPoolExecutor) -> None:
        call = asyncio.get_running_loop().run_in_executor(thread, self._results_of, [job.groups for job in jobs])
        await asyncio.wait([call])  # the future carries the error, of whatever type
        error = call.exception()
        if error is not None and len(jobs) > 1:
            half = len(jobs) // 2
            await self._score_jobs(jobs[:half], thread)
            await self._score_jobs(jobs[half:], thread)
            return
        for i, job in enumerate(jobs):
            if job.results.cancelled():
                continue
            if error is None:
                job.results.set_result(call.result()[i])
            else:
                job.results.set_exception(error)

    def _forget(self, num_groups: int) -> None:
        self.pending -= num_groups

    def _results_of(self, requests: Sequence[list[ResponseGroup]]) -> list[list[GroupScores]]:
        """The results of each request, from one call; in the thread, so that no error of it can stop the loop."""
        groups = [group for request in requests for group in request]
        results = iter([result for _, result in zip(groups, self.score(groups), strict=True)])
        return [[next(results) for _ in request] for request in requests]
