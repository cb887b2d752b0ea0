"""`RemoteScorer`: as `GroupScorer`, with the model behind HTTP."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from mr_reward.errors import CheckpointError, ConfigurationError, NonFiniteScoreError, ScoringServerError
from mr_reward.groups import GroupScores, ResponseGroup
from mr_reward.scorers.transport import Outgoing, Transport, TransportSettings
from mr_reward.scorers.wire import Health, ScoreAnswer, dump, to_wire

__all__ = ["TOKEN_VARIABLE", "RemoteScorer"]

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "MR_REWARD_TOKEN"
_ENVELOPE_BYTES = 200  # of a request, around its groups


class RemoteScorer:
    """Scores groups with the reward model of a server that `mr-reward serve` runs; scores equal those in-process.

    A call is cut into requests, several of which are on their way at a time. What another attempt may mend (no
    connection, no answer, half an answer, status 429 or 5xx, an answer that makes no sense) is asked for again with
    growing pauses and the same id, so that the server answers from memory what it has scored already. Anything else
    ends the call at once, and the deadline ends it in any case.

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
        numbers: dict[str, Any] = {
            "deadline": deadline,
            "attempt_timeout": attempt_timeout,
            "max_in_flight": max_in_flight,
            "groups_per_request": groups_per_request,
            "max_wrong_answers": max_wrong_answers,
        }
        for name, number in numbers.items():
            if not number > 0:
                raise ConfigurationError(f"{name} is {number!r}, expected a positive number")
        self.url = _checked_url(url)
        self._options = numbers
        self._expected_hash = expected_hash
        self._health: Health | None = None
        token = token or os.environ.get(TOKEN_VARIABLE)
        self._transport = Transport(
            TransportSettings(
                url=self.url,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                attempt_timeout=attempt_timeout,
                max_in_flight=max_in_flight,
                max_wrong_answers=max_wrong_answers,
            )
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return functools.partial(type(self), expected_hash=self._expected_hash, **self._options), (self.url,)

    @property
    def model_hash(self) -> str:
        """`weights_digest` of the model that scores; asks the server the first time."""
        return self.connect().model_hash

    def connect(self, deadline: float | None = None) -> Health:
        """Ask the server what it is, once; the first call does it by itself.

        Args:
            deadline: seconds to wait for a server that does not run yet; None for that of a call.

        Returns:
            What the server says about itself.

        Raises:
            CheckpointError: it has another model than the expected one.
            ScoringServerError: it cannot be reached in time, or refuses the token.
        """
        if self._health is None:
            seconds = self._options["deadline"] if deadline is None else deadline
            (health,) = self._transport.send([Outgoing(path="/health", body=None, read=_read_health)], seconds)
            self._check_hash(health.model_hash)
            self._expected_hash = health.model_hash
            self._health = health
            logger.info("scoring server %s: model %s, options %s", self.url, health.model_hash, health.options)
        return self._health

    def score(self, groups: Sequence[ResponseGroup]) -> list[list[float] | None]:
        """Score groups.

        Args:
            groups: any number of groups of any size.

        Returns:
            For each group its N scores in input order, or None if the server dropped it.

        Raises:
            MRRewardError: as `score_detailed`.
        """
        return [None if result.scores is None else list(result.scores) for result in self.score_detailed(groups)]

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """Score groups and tell what happened to them.

        Args:
            groups: any number of groups of any size.

        Returns:
            One result per group, in input order.

        Raises:
            CheckpointError: the server has another model than the expected one.
            MediaError: an image is missing, unreadable or too large for the server.
            NonFiniteScoreError: the model gave NaN or infinity.
            OverLengthError: a group does not fit the server's budget and its policy is `error`.
            ScoringServerError: no right answer within the deadline, or the server refuses the request.
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
        requests = [self._request({str(i): groups[i] for i in cut}, [encoded[i] for i in cut]) for cut in cuts]
        seconds = self._options["deadline"] - (time.monotonic() - started)
        results: dict[str, GroupScores] = {}
        for found in self._transport.send(requests, seconds):
            results.update(found)
        return [results[str(i)] for i in range(len(groups))]

    def close(self) -> None:
        """Close the connections. Not needed at the end of a process; a later call opens new ones."""
        self._transport.close()

    def _request(self, groups: dict[str, ResponseGroup], encoded: list[bytes]) -> Outgoing[dict[str, GroupScores]]:
        request_id = uuid.uuid4().hex
        body = b'{"request_id":"%b","groups":[%b]}' % (request_id.encode(), b",".join(encoded))
        read = functools.partial(self._read_scores, groups, request_id)
        return Outgoing(path="/v1/score", body=body, read=read)

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
            if len(result.truncated) != group.num_responses or (
                result.scores is not None and len(result.scores) != group.num_responses
            ):
                count = "no" if result.scores is None else len(result.scores)
                raise ValueError(
                    f"{count} scores and {len(result.truncated)} flags for {group.num_responses} responses"
                )
            if result.scores is None and result.drop_reason is None:
                raise ValueError("a group without scores and without a reason")
            numbers = [*(result.scores or ()), result.order_spread, result.order_flip_rate or 0.0]
            if not all(map(math.isfinite, numbers)):
                raise NonFiniteScoreError(
                    f"{group.name}: scores {result.scores} from {self.url} are not finite; check the server's "
                    "checkpoint, or run it with a wider --dtype (float32)"
                )
            results[result.id] = GroupScores(
                scores=None if result.scores is None else tuple(result.scores),
                truncated=tuple(result.truncated),
                order_spread=result.order_spread,
                order_flip_rate=result.order_flip_rate,
                drop_reason=result.drop_reason,
            )
        return results

    def _check_hash(self, found: str) -> None:
        if self._expected_hash is not None and found != self._expected_hash:
            raise CheckpointError(
                f"{self.url} scores with model {found:.100}, expected {self._expected_hash}; start all its workers "
                "with the same checkpoint and --dtype, or set the expected hash to the new one"
            )


def batches(sizes: Sequence[int], max_items: int, max_bytes: int) -> list[list[int]]:
    """Cut a list into runs of neighbours that fit into a request.

    Args:
        sizes: bytes of each item.
        max_items: of a batch.
        max_bytes: of a batch; an item that is larger is alone.

    Returns:
        Positions of the items of each batch.

    Example:
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


def _read_health(content: bytes) -> Health:
    return Health.model_validate(json.loads(content))


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ConfigurationError(
            f"the URL of the scoring server holds a password; give the token as token or in {TOKEN_VARIABLE}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigurationError(f"the scoring server is {url!r}, expected http://host:port or https://host:port")
    return url.rstrip("/")
