"""`RemoteScorer`: as `GroupScorer`, with the model behind HTTP."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx2

from mr_reward.errors import (
    CheckpointError,
    ConfigurationError,
    GroupError,
    MediaError,
    MRRewardError,
    NonFiniteScoreError,
    OverLengthError,
    ScoringServerError,
)
from mr_reward.groups import GroupScores, ResponseGroup, as_groups
from mr_reward.scorers.wire import ErrorAnswer, Health, ScoreAnswer, dump, explain, to_wire

logger = logging.getLogger(__name__)

T = TypeVar("T")

TOKEN_VARIABLE = "MR_REWARD_TOKEN"
_ENVELOPE_BYTES = 200  # of a request, around its groups
_CONNECT_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds
_KEEP_ALIVE_SECONDS = 30.0  # shorter than the server keeps an idle connection
# Errors of the server that are raised here as what they are; all of them would come back with every retry.
_SAME_HERE: dict[str, type[MRRewardError]] = {
    error.__name__: error
    for error in (ConfigurationError, GroupError, MediaError, NonFiniteScoreError, OverLengthError)
}


class RemoteScorer:
    """Scores groups with the reward model of a server that `mr-reward serve` runs; scores equal those in-process.

    A call is cut into requests, several of which are on their way at a time. Where another attempt may help (no
    connection, no answer, half an answer, status 429 or 5xx, an answer that makes no sense) the request is sent again,
    with growing pauses. Anything else ends the call at once, and the deadline ends it in any case.

    The first answer says which model and options the server scores with; every later one has to come from the same.

    It may be used from several threads and in forked processes. A pickled copy holds the URL and the model's checksum
    but not the token, which it takes from the environment.

    Args:
        url: of the server, `http://host:port`.
        token: of the server; None for the environment variable MR_REWARD_TOKEN, if it is set.
        expected_hash: `weights_digest` of the model that has to score; None for the one found at first.
        deadline: seconds that a call may take in all.
        attempt_timeout: seconds until an answer counts as lost.
        max_in_flight: requests at a time.
        groups_per_request: at most; the server may allow less.
        max_wrong_answers: answers to a request that may be status 5xx or make no sense before the call fails.

    Raises:
        ConfigurationError: the URL is none, holds a password, or a number is not positive.

    Example:
        >>> scorer = RemoteScorer("http://127.0.0.1:8765")
        >>> scorer.score([ResponseGroup(prompt="2 + 2?", responses=["4", "5"])])  # doctest: +SKIP
        [[1.7, -0.9]]
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        expected_hash: str | None = None,
        deadline: float = 600.0,
        attempt_timeout: float = 120.0,
        max_in_flight: int = 8,
        groups_per_request: int = 16,
        max_wrong_answers: int = 4,
    ) -> None:
        self._options: dict[str, Any] = {
            "deadline": deadline,
            "attempt_timeout": attempt_timeout,
            "max_in_flight": max_in_flight,
            "groups_per_request": groups_per_request,
            "max_wrong_answers": max_wrong_answers,
        }
        for name, number in self._options.items():
            if not number > 0:
                raise ConfigurationError(f"{name} is {number!r}, expected a positive number")
        self.url = _checked_url(url)
        self._expected_hash = expected_hash
        self._health: Health | None = None
        token = token or os.environ.get(TOKEN_VARIABLE)
        self._headers = httpx2.Headers({"Authorization": f"Bearer {token}"} if token else {})  # hides it in its repr
        # By process: a forked one opens its own connections, and does not touch those it was forked with.
        self._clients: dict[int, httpx2.Client] = {}
        weakref.finalize(self, _close, self._clients)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return functools.partial(type(self), expected_hash=self._expected_hash, **self._options), (self.url,)

    @property
    def model_hash(self) -> str:
        """`weights_digest` of the model that scores; asks the server the first time."""
        return self.connect().model_hash

    def connect(self, deadline: float | None = None) -> Health:
        """What the server is; asked once, and a server that does not run yet is waited for.

        Raises CheckpointError where it has another model than the expected one, and ScoringServerError where it cannot
        be reached in time or refuses the token.
        """
        if self._health is None:
            seconds = self._options["deadline"] if deadline is None else deadline
            read = functools.partial(Health.model_validate_json, strict=True)
            (health,) = self._send([_Request("/health", None, read)], seconds)
            self._check_hash(health.model_hash)
            self._expected_hash = health.model_hash
            self._health = health
            logger.info("scoring server %s: model %s, options %s", self.url, health.model_hash, health.options)
        return self._health

    def score(
        self, groups: ResponseGroup | Mapping[str, Any] | Sequence[ResponseGroup | Mapping[str, Any]]
    ) -> list[list[float] | None]:
        """For each group its N scores in input order, or None if the server dropped it."""
        return [
            None if result.scores is None else list(result.scores) for result in self.score_detailed(as_groups(groups))
        ]

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As `GroupScorer.score_detailed`, with the same errors about groups.

        Raises CheckpointError where the server has another model than the expected one, and ScoringServerError where
        there is no right answer within the deadline or the server refuses the request.
        """
        if not groups:
            return []
        started = time.monotonic()
        health = self.connect()
        encoded = [dump(to_wire(group, str(i))) for i, group in enumerate(groups)]
        for group, part in zip(groups, encoded, strict=True):
            if len(part) + _ENVELOPE_BYTES > health.max_request_bytes:
                raise ScoringServerError(
                    f"{group.name} takes {len(part)} bytes, {self.url} takes requests of {health.max_request_bytes}; "
                    "use smaller images, or start the server with a larger --max-request-mb"
                )
        max_groups = min(int(self._options["groups_per_request"]), health.max_groups)
        cuts = batches([len(part) + 1 for part in encoded], max_groups, health.max_request_bytes - _ENVELOPE_BYTES)
        requests = []
        for cut in cuts:
            request_id = uuid.uuid4().hex
            body = b'{"request_id":"%b","groups":[%b]}' % (request_id.encode(), b",".join(encoded[i] for i in cut))
            read = functools.partial(self._read_scores, {str(i): groups[i] for i in cut}, request_id)
            requests.append(_Request("/v1/score", body, read))
        results: dict[str, GroupScores] = {}
        for found in self._send(requests, self._options["deadline"] - (time.monotonic() - started)):
            results.update(found)
        return [results[str(i)] for i in range(len(groups))]

    def close(self) -> None:
        """Close the connections. Not needed at the end of a process; a later call opens new ones."""
        _close(self._clients)

    def _client(self) -> httpx2.Client:
        if os.getpid() not in self._clients:
            limits = httpx2.Limits(
                max_connections=self._options["max_in_flight"],
                max_keepalive_connections=self._options["max_in_flight"],
                keepalive_expiry=_KEEP_ALIVE_SECONDS,
            )
            # No environment: no proxy between trainer and server, and no netrc.
            client = httpx2.Client(base_url=self.url, headers=self._headers, limits=limits, trust_env=False)
            return self._clients.setdefault(os.getpid(), client)  # another thread may have been faster
        return self._clients[os.getpid()]

    def _send(self, requests: Sequence[_Request[T]], seconds: float) -> list[T]:
        """Results of all requests; they are on their way in threads, so that the deadline ends the call exactly."""
        call = _Call(end=time.monotonic() + seconds)
        client = self._client()
        threads = ThreadPoolExecutor(self._options["max_in_flight"], thread_name_prefix="mr-reward-client")
        try:
            answers = [threads.submit(self._deliver, client, request, call) for request in requests]
            done, waiting = wait(answers, max(0.0, seconds), FIRST_EXCEPTION)
            errors = [error for answer in answers if answer in done and (error := answer.exception()) is not None]
            for error in errors:
                if not isinstance(error, _AgainError):
                    raise error
            if waiting or errors:
                raise ScoringServerError(
                    f"{self.url}: {len(done) - len(errors)} of {len(requests)} requests were answered within "
                    f"{seconds:.1f} s (last problem: {call.problem}); check that the server runs and keeps up, or "
                    "give a longer deadline"
                ) from (errors[0] if errors else None)
            return [answer.result() for answer in answers]
        finally:
            call.is_over.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def _deliver(self, client: httpx2.Client, request: _Request[T], call: _Call) -> T:
        """One request until it has a result, at once or after retries, or until its call is over."""
        # Not with a library for retries: those draw their pauses from the random numbers that a trainer has seeded.
        jitter = random.Random()
        num_wrong = 0
        for attempt in itertools.count():
            try:
                return self._attempt(client, request, call)
            except _AgainError as again:
                call.problem = str(again)
                num_wrong += again.answered
                if num_wrong >= self._options["max_wrong_answers"]:
                    raise ScoringServerError(
                        f"{self.url}: {num_wrong} useless answers to one request, the last: {again}; look into the "
                        "server's log"
                    ) from again
                longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(attempt, 10))
                pause = again.pause if again.pause is not None else jitter.uniform(longest / 2, longest)
                if call.is_over.wait(min(pause, call.seconds_left())) or not call.seconds_left():
                    raise
                log = logger.info if attempt else logger.warning
                log("%s%s: %s; trying again", self.url, request.path, again)
        raise AssertionError("unreachable")

    def _attempt(self, client: httpx2.Client, request: _Request[T], call: _Call) -> T:
        seconds = min(self._options["attempt_timeout"], call.seconds_left())
        end = time.monotonic() + seconds
        timeout = httpx2.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS), pool=call.seconds_left())
        kind = {} if request.body is None else {"Content-Type": "application/json"}
        method = "GET" if request.body is None else "POST"
        try:
            with client.stream(method, request.path, content=request.body, headers=kind, timeout=timeout) as answer:
                content = bytearray()
                for chunk in answer.iter_bytes():
                    content += chunk
                    if time.monotonic() > end:  # the timeout above is for each chunk
                        raise httpx2.ReadTimeout("the answer comes too slowly")
        except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
            raise _AgainError(f"no answer within {seconds:.1f} s", pause=0.0) from error  # it has waited enough
        except httpx2.RequestError as error:  # refused, cut off, half an answer, no HTTP
            raise _AgainError(f"{type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise _failure(self.url, request.path, answer, bytes(content))
        try:
            return request.read(bytes(content))
        except (MRRewardError, RecursionError):
            raise
        except ValueError as error:
            raise _AgainError(f"an answer that makes no sense ({explain(error)})", answered=True) from error

    def _read_scores(
        self, groups: dict[str, ResponseGroup], request_id: str, content: bytes
    ) -> dict[str, GroupScores]:
        """Results by id; ValueError if they cannot be an answer to this request."""
        answer = ScoreAnswer.model_validate(json.loads(content))
        if answer.request_id != request_id:
            raise ValueError(f"it is for request {answer.request_id!r:.100}")
        self._check_hash(answer.model_hash)
        if self._health is not None and answer.options != self._health.options:
            raise ScoringServerError(
                f"{self.url} scores with {answer.options}, at first with {self._health.options}; the scores would not "
                "be comparable: start all its workers with the same options"
            )
        ids = [result.id for result in answer.results]
        if sorted(ids) != sorted(groups):
            raise ValueError(f"{len(ids)} results for {len(groups)} groups, or ids that were not asked for")
        results = {}
        for result in answer.results:
            group = groups[result.id]
            scored = results[result.id] = result.scored(group)
            numbers = [*(scored.scores or ()), scored.order_spread, scored.order_flip_rate or 0.0]
            if not all(map(math.isfinite, numbers)):
                raise NonFiniteScoreError(
                    f"{group.name}: scores {list(scored.scores or ())} from {self.url} are not finite; check the "
                    "server's checkpoint, or run it with a wider --dtype (float32)"
                )
        return results

    def _check_hash(self, found: str) -> None:
        if self._expected_hash is not None and found != self._expected_hash:
            raise CheckpointError(
                f"{self.url} scores with model {found:.100}, expected {self._expected_hash}; start all its workers "
                "with the same checkpoint and --dtype, or set the expected hash to the new one"
            )


@dataclass(frozen=True, slots=True)
class _Request(Generic[T]):
    path: str
    body: bytes | None  # JSON; None for a GET
    read: Callable[[bytes], T]  # ValueError: the answer makes no sense; any other error ends the call


@dataclass
class _Call:
    """What the requests of a call share."""

    end: float
    problem: str = "no answer yet"
    is_over: threading.Event = field(default_factory=threading.Event)

    def seconds_left(self) -> float:
        return max(0.0, self.end - time.monotonic())


class _AgainError(Exception):
    """A failure that another attempt may fix; `answered` if the server did answer, `pause` where it is known."""

    def __init__(self, problem: str, *, answered: bool = False, pause: float | None = None) -> None:
        super().__init__(problem)
        self.answered = answered
        self.pause = pause


def batches(sizes: Sequence[int], max_items: int, max_bytes: int) -> list[list[int]]:
    """Positions of neighbours that fit into a request together; an item larger than `max_bytes` is alone.

    >>> batches([4, 4, 9, 1], 2, 8)
    [[0, 1], [2], [3]]
    """
    found: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not found or len(found[-1]) == max_items or size > room:
            found.append([])
            room = max_bytes
        found[-1].append(i)
        room -= size
    return found


def _close(clients: dict[int, httpx2.Client]) -> None:
    client = clients.pop(os.getpid(), None)
    if client is not None:
        client.close()


def _failure(url: str, path: str, answer: httpx2.Response, content: bytes) -> Exception:
    """What to raise for a status that is not 200."""
    status = answer.status_code
    try:
        told = ErrorAnswer.model_validate(json.loads(content))
    except ValueError:
        told = ErrorAnswer(error="", message=content[:200].decode(errors="replace"))
    if status == 429 or status >= 500:
        seconds = answer.headers.get("retry-after", "")
        pause = min(float(seconds), _LONGEST_PAUSE) if seconds.isdecimal() else None
        # Busy servers and proxies without a server behind them are waited for, up to the deadline.
        return _AgainError(
            f"status {status}: {told.message}", answered=status not in (429, 502, 503, 504), pause=pause
        )
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


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ConfigurationError(
            f"the URL of the scoring server holds a password; give the token as token or in {TOKEN_VARIABLE}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigurationError(f"the scoring server is {url!r}, expected http://host:port or https://host:port")
    return url.rstrip("/")
