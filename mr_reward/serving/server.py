"""The scoring server: `GET /health`, `POST /v1/score`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from mr_reward.errors import ConfigurationError, MRRewardError
from mr_reward.groups import GroupScores, ResponseGroup
from mr_reward.model.scorer import GroupScorer
from mr_reward.scorers.opening import scored_by
from mr_reward.scorers.wire import ErrorAnswer, Health, ScoreAnswer, ScoreRequest, WireResult, dump, explain, from_wire
from mr_reward.serving.batcher import Batcher

logger = logging.getLogger(__name__)

_READ_SECONDS = 60.0  # for the body of a request
_PARALLEL_READS = 16  # bodies in memory before they are queued
_KEEP_ALIVE_SECONDS = 75  # longer than the client keeps an idle connection
_SHUTDOWN_SECONDS = 60  # for requests on their way when the server is told to stop


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What a server takes.

    Args:
        max_groups: groups of a request.
        max_request_bytes: size of a request.
        max_pixels: of an image or frame.
        max_pending: groups that may wait; beyond, clients are told to come again.
        max_wait: seconds that a call of the model waits for further requests to join it.

    Raises:
        ConfigurationError: a limit is not positive, or the wait negative.

    Example:
        >>> ServerLimits(max_groups=16).max_pending
        4096
    """

    max_groups: int = 256
    max_request_bytes: int = 64 * 1024**2
    max_pixels: int = 50_000_000
    max_pending: int = 4096
    max_wait: float = 0.005

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            least = 0 if name == "max_wait" else 1
            if limit < least:
                raise ConfigurationError(f"{name} is {limit}, expected at least {least}")


def build_app(scorer: GroupScorer, *, token: str | None = None, limits: ServerLimits | None = None) -> FastAPI:
    """The server as an ASGI application.

    Args:
        scorer: scores the groups; nothing else may use it at the same time.
        token: what clients have to show (`Authorization: Bearer ...`); None lets everybody in.
        limits: what is refused; None for the defaults.

    Returns:
        The application.

    Raises:
        ConfigurationError: the token is empty or has characters that no header can carry.

    Example:
        >>> app = build_app(GroupScorer.from_pretrained("rm"))  # doctest: +SKIP
    """
    _check_token(token)
    limits = limits or ServerLimits()
    service = _Service(scorer, limits)

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "a valid token is needed", {"WWW-Authenticate": "Bearer"})

    # No pages that describe the interface: they load scripts from elsewhere, and need no token.
    app = FastAPI(
        dependencies=[Depends(check_token)],
        lifespan=service.batcher.running,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )

    app.get("/health")(service.health)
    app.post("/v1/score")(service.score)
    return app


def serve(
    scorer: GroupScorer,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    limits: ServerLimits | None = None,
    reuse_port: bool = False,
) -> None:
    """Serve until the process is told to stop; requests on their way are still answered.

    Args:
        scorer: scores the groups.
        host: address to listen at.
        port: its port; 0 for a free one, which is logged.
        token: see `build_app`.
        limits: see `build_app`.
        reuse_port: let several servers listen at the same port; the system spreads the connections over them.

    Raises:
        ConfigurationError: the address can be reached from other machines and there is no token.
        OSError: the port is taken.

    Example:
        >>> serve(GroupScorer.from_pretrained("rm"), port=8765)  # doctest: +SKIP
    """
    check_access(host, token)
    run_app(build_app(scorer, token=token, limits=limits), host=host, port=port, reuse_port=reuse_port)


def run_app(app: FastAPI, *, host: str, port: int, reuse_port: bool = False) -> None:
    """Serve an application until the process is told to stop; who may reach it has been checked."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=2048, reuse_port=reuse_port) as listener:
        bound = listener.getsockname()[1]
        logger.info("scoring server at http://%s:%d", f"[{host}]" if ":" in host else host, bound)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
        uvicorn.Server(config).run(sockets=[listener])


def check_access(host: str, token: str | None) -> None:
    """Refuse to let everybody in; known before the model is loaded, which takes a while."""
    _check_token(token)
    if token is None and not _is_loopback(host):
        raise ConfigurationError(
            f"host {host} can be reached from other machines and there is no token; set one (MR_REWARD_TOKEN or "
            "--token-file), or listen at 127.0.0.1"
        )


class _Service:
    """What the endpoints do."""

    def __init__(self, scorer: GroupScorer, limits: ServerLimits) -> None:
        self._limits = limits
        self._layout = scorer.model.config.layout
        model_hash, options = scored_by(scorer)
        self._scored_by: dict[str, Any] = {"model_hash": model_hash, "options": options}
        self._reads = asyncio.Semaphore(_PARALLEL_READS)
        # By content: a client that asks again because an answer took too long waits for the same one, else a slow
        # server would begin again with each attempt.
        self._running: dict[bytes, asyncio.Future[list[GroupScores]]] = {}
        self.batcher = Batcher(scorer.score_detailed, max_wait=limits.max_wait, max_pending=limits.max_pending)
        logger.info("model %s, layout %s, options %s", model_hash, self._layout, options)

    def health(self) -> Response:
        return _answer(
            Health(
                status="ok",
                version=version("mr-reward"),
                layout=self._layout,
                max_groups=self._limits.max_groups,
                max_request_bytes=self._limits.max_request_bytes,
                pending_groups=self.batcher.pending,
                **self._scored_by,
            )
        )

    async def score(self, request: Request) -> Response:
        # A page in a browser can send other types to a loopback address unasked.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refuse(415, "UnsupportedMediaType", "expected the content type application/json")
        async with self._reads:
            try:
                async with asyncio.timeout(_READ_SECONDS):
                    body = await self._read(request)
            except TimeoutError:
                return _refuse(408, "Timeout", f"the request took more than {_READ_SECONDS:.0f} s to arrive")
            if body is None:
                text = f"a request may have {self._limits.max_request_bytes} bytes (--max-request-mb)"
                return _refuse(413, "TooLarge", text)
            content = hashlib.blake2b(body, digest_size=16).digest()
            try:
                message, groups = await run_in_threadpool(self._parse, body)
            except MRRewardError as error:
                return _refuse(422, type(error).__name__, str(error))
            except (ValueError, RecursionError) as error:
                return _refuse(422, "InvalidRequest", explain(error))
        return await self._answer_for(message, content, groups)

    async def _answer_for(self, message: ScoreRequest, content: bytes, groups: list[ResponseGroup]) -> Response:
        scoring = self._running.get(content)
        if scoring is None:
            if not self.batcher.has_room(len(groups)):
                text = f"{self.batcher.pending} groups are waiting already"
                return _refuse(429, "Busy", text, {"Retry-After": "1"})
            scoring = self._running[content] = self.batcher.submit(groups)
            scoring.add_done_callback(lambda _: self._running.pop(content))
        await asyncio.wait([scoring])  # the future carries the error, of whatever type
        error = scoring.exception()
        if error is None:
            pairs = zip(message.groups, scoring.result(), strict=True)
            results = [WireResult.of(group.id, scored) for group, scored in pairs]
            return _answer(ScoreAnswer(request_id=message.request_id, **self._scored_by, results=results))
        if isinstance(error, MRRewardError):
            return _refuse(422, type(error).__name__, str(error))
        logger.error("scoring failed", exc_info=error)
        return _refuse(500, "ScoringFailed", f"{type(error).__name__} in the server; its log has the details")

    async def _read(self, request: Request) -> bytes | None:
        """The body, or None if it is too large; then at most the limit has been read."""
        limit = self._limits.max_request_bytes
        announced = request.headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > limit:
            return None
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                return None
        return bytes(body)

    def _parse(self, body: bytes) -> tuple[ScoreRequest, list[ResponseGroup]]:
        # Not pydantic's own parser, which refuses lone surrogates.
        message = ScoreRequest.model_validate(json.loads(body))
        if len(message.groups) > self._limits.max_groups:
            raise ValueError(
                f"{len(message.groups)} groups, a request may have {self._limits.max_groups} (--max-groups)"
            )
        if len({group.id for group in message.groups}) < len(message.groups):
            raise ValueError("two groups have the same id")
        return message, [from_wire(group, self._limits.max_pixels) for group in message.groups]


def _answer(message: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(message), status, headers, "application/json")


def _refuse(status: int, error: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return _answer(ErrorAnswer(error=error, message=message), status, headers)


def _check_token(token: str | None) -> None:
    if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigurationError(
            "the token is empty, or has spaces or characters outside ASCII; make one with, for instance, "
            "openssl rand -hex 32"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who knows where it leads
        return False
