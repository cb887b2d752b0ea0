"""Requests on their way to the scoring server: retries, a deadline, and the thread they run in."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import httpx2
from pydantic import ValidationError

from mr_reward.errors import (
    ConfigurationError,
    GroupError,
    MediaError,
    MRRewardError,
    NonFiniteScoreError,
    OverLengthError,
    ScoringServerError,
)
from mr_reward.scorers.wire import ErrorAnswer

__all__ = ["Outgoing", "Transport", "TransportSettings"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Errors of the server that are raised here as what they are; all of them would come back with every retry.
_SAME_HERE: dict[str, type[MRRewardError]] = {
    error.__name__: error
    for error in (ConfigurationError, GroupError, MediaError, NonFiniteScoreError, OverLengthError)
}
_CONNECT_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds
_KEEP_ALIVE_SECONDS = 30.0  # shorter than the server keeps an idle connection


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """How to talk to a server.

    Args:
        url: of the server, without a slash at the end.
        headers: of every request.
        attempt_timeout: seconds until an answer counts as lost and is asked for again.
        max_in_flight: requests at a time.
        max_wrong_answers: answers to a request that may be errors of the server (5xx) or no sense, before giving up.
    """

    url: str
    headers: dict[str, str] = field(repr=False)  # the token is in there
    attempt_timeout: float
    max_in_flight: int
    max_wrong_answers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing(Generic[T]):
    """A request and how to read its answer.

    Args:
        path: on the server.
        body: JSON; None for a GET.
        read: makes the result of the answer's bytes; a ValueError means that the answer makes no sense and is asked
            for again, any other error ends it all.
    """

    path: str
    body: bytes | None
    read: Callable[[bytes], T]


class _Again(Exception):
    """A failure that another attempt may mend; `answered` if the server did answer."""

    def __init__(self, problem: str, *, answered: bool, pause: float = 0.0) -> None:
        super().__init__(problem)
        self.answered = answered
        self.pause = pause


@dataclass
class _Progress:
    """What the error at the deadline tells."""

    num_answered: int = 0
    problem: str = "no answer yet"


class Transport:
    """Sends requests from any thread, several at a time, over connections that are kept.

    They run in an event loop in a daemon thread, so the deadline ends them exactly, whatever the server does, and it
    works where the caller has an event loop of its own. A forked process opens its own.

    Args:
        settings: how to talk to the server.
    """

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._left_behind: list[_Connection] = []  # of the process this one was forked from: not to be touched

    def send(self, requests: Sequence[Outgoing[T]], seconds: float) -> list[T]:
        """Send requests and wait for all results.

        Args:
            requests: in any number.
            seconds: until the deadline.

        Returns:
            The results, in the order of the requests.

        Raises:
            ScoringServerError: the deadline has passed, the server refuses a request, or goes on making no sense.
            MRRewardError: what the server says about a group, as the type that it has there.
        """
        connection = self._connect()
        work = _send_all(connection.client, self._settings, requests, seconds)
        future = asyncio.run_coroutine_threadsafe(work, connection.loop)
        try:
            return future.result()
        finally:
            future.cancel()  # if the wait was interrupted

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        with self._lock:
            if self._connection is not None and self._connection.pid == os.getpid():
                self._connection.close()
                self._connection = None

    def _connect(self) -> _Connection:
        with self._lock:
            if self._connection is not None and self._connection.pid != os.getpid():
                self._left_behind.append(self._connection)
                self._connection = None
            if self._connection is None:
                self._connection = _Connection(self._settings)
            return self._connection


class _Connection:
    """An event loop in a thread, and the HTTP client that lives in it."""

    def __init__(self, settings: TransportSettings) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.client = httpx2.AsyncClient(
            base_url=settings.url,
            headers=settings.headers,
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),  # the others are asyncio's business
            limits=httpx2.Limits(
                max_connections=settings.max_in_flight,
                max_keepalive_connections=settings.max_in_flight,
                keepalive_expiry=_KEEP_ALIVE_SECONDS,
            ),
            trust_env=False,  # no proxy between trainer and server, and no netrc
        )
        thread = threading.Thread(target=self.loop.run_forever, name="mr-reward-client", daemon=True)
        thread.start()
        # Also when it is garbage, and at the end of the process.
        self.close = weakref.finalize(self, _close, self.pid, self.loop, thread, self.client)


def _close(pid: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: httpx2.AsyncClient) -> None:
    if pid != os.getpid():
        return
    with contextlib.suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(client.aclose(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    if not loop.is_running():
        loop.close()


async def _send_all(
    client: httpx2.AsyncClient, settings: TransportSettings, requests: Sequence[Outgoing[T]], seconds: float
) -> list[T]:
    progress = _Progress()
    slots = asyncio.Semaphore(settings.max_in_flight)
    tasks = [asyncio.create_task(_deliver(client, settings, request, slots, progress)) for request in requests]
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.gather(*tasks)
    except TimeoutError as error:
        raise ScoringServerError(
            f"{settings.url}: {progress.num_answered} of {len(requests)} requests were answered within "
            f"{seconds:.1f} s (last problem: {progress.problem}); check that the server runs and keeps up, or give "
            "a longer deadline"
        ) from error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _deliver(
    client: httpx2.AsyncClient,
    settings: TransportSettings,
    request: Outgoing[T],
    slots: asyncio.Semaphore,
    progress: _Progress,
) -> T:
    """One request until it has a result, at once or after retries."""
    jitter = random.Random()  # its own: the trainer's random numbers stay as they are
    num_wrong = 0
    async with slots:
        for attempt in itertools.count():
            try:
                result = await _attempt(client, settings, request)
            except _Again as again:
                num_wrong += again.answered
                if num_wrong >= settings.max_wrong_answers:
                    raise ScoringServerError(
                        f"{settings.url}: {num_wrong} useless answers to one request, the last: {again}; look into "
                        "the server's log"
                    ) from again
                log = logger.info if attempt else logger.warning
                log("%s%s: %s; trying again", settings.url, request.path, again)
                progress.problem = str(again)
                longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(attempt, 10))
                await asyncio.sleep(max(again.pause, jitter.uniform(longest / 2, longest)))
            else:
                progress.num_answered += 1
                return result
    raise AssertionError("unreachable")


async def _attempt(client: httpx2.AsyncClient, settings: TransportSettings, request: Outgoing[T]) -> T:
    try:
        async with asyncio.timeout(settings.attempt_timeout):
            if request.body is None:
                answer = await client.get(request.path)
            else:
                answer = await client.post(
                    request.path, content=request.body, headers={"Content-Type": "application/json"}
                )
    except TimeoutError as error:
        raise _Again(f"no answer within {settings.attempt_timeout:.1f} s", answered=False) from error
    except httpx2.RequestError as error:  # refused, cut off, half an answer, no HTTP
        raise _Again(f"{type(error).__name__}: {error}", answered=False) from error
    if answer.status_code != 200:
        raise _failure(settings.url, request.path, answer)
    try:
        return request.read(answer.content)
    except (MRRewardError, RecursionError):
        raise
    except ValueError as error:
        raise _Again(f"an answer that makes no sense ({_first_line(error)})", answered=True) from error


def _failure(url: str, path: str, answer: httpx2.Response) -> Exception:
    """What to raise for a status that is not 200."""
    status = answer.status_code
    try:
        told = ErrorAnswer.model_validate(json.loads(answer.content))
    except ValueError:
        told = ErrorAnswer(error="", message=answer.text[:200])
    if status == 429 or status >= 500:
        seconds = answer.headers.get("retry-after", "")
        pause = min(float(seconds), _LONGEST_PAUSE) if seconds.isdecimal() else 0.0
        # Busy servers and proxies without a server behind them are waited for, up to the deadline.
        return _Again(f"status {status}: {told.message}", answered=status not in (429, 502, 503, 504), pause=pause)
    if told.error in _SAME_HERE:
        return _SAME_HERE[told.error](f"{told.message} (from the scoring server {url})")
    if status in (401, 403):
        return ScoringServerError(
            f"{url} refuses the token (status {status}); set MR_REWARD_TOKEN in the environment of this process, or "
            "server_token, to the server's token"
        )
    return ScoringServerError(
        f"{url}{path} answers with status {status}: {told.message or 'no message'}; check that the URL is that of "
        "`mr-reward serve`, of the same version"
    )


def _first_line(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0][:200]
