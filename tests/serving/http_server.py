"""Servers in a thread of the test: of scores, with faults between it and the client, and of files."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn

Message = dict[str, Any]
# What is done to the n-th scoring request (0 is the first): None passes it on untouched.
Plan = Callable[[int], str | None]


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The URL of an application that real uvicorn serves until the block ends."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def serving_files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL under which a folder's files are served, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


class Faulty:
    """Stands before the server's application and spoils its answers.

    Args:
        app: the scoring server.
        plan: says what happens to each scoring request.
        pause: seconds that a `slow` answer takes longer.
    """

    def __init__(self, app: Any, plan: Plan, pause: float = 2.0) -> None:
        self.app = app
        self.plan = plan
        self.pause = pause
        self.num_requests = 0
        self.request_ids: list[str] = []

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/score":
            await self.app(scope, receive, send)
            return
        fault = self.plan(self.num_requests)
        self.num_requests += 1
        body = await _read(receive)
        self.request_ids.append(json.loads(body)["request_id"])
        if fault is not None and fault.startswith("status "):
            await _answer(send, int(fault.split()[1]), b"<html>proxy error</html>", b"text/html")
            return
        if fault == "lost":  # the request never arrives, the connection goes
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
            return
        status, content = await self._pass_on(scope, body)
        if fault == "slow":
            await asyncio.sleep(self.pause)
        if fault == "half":
            length = str(len(content)).encode()
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", length)]})
            await send({"type": "http.response.body", "body": content[: len(content) // 2]})
            return
        if fault == "no json":
            content = content[: len(content) // 2]
        elif fault in SPOILERS and status == 200:
            answer = json.loads(content)
            SPOILERS[fault](answer)
            content = json.dumps(answer).encode()
        await _answer(send, status, content)

    async def _pass_on(self, scope: Message, body: bytes) -> tuple[int, bytes]:
        sent: list[Message] = []
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return waiting.pop() if waiting else await asyncio.Future()

        async def collect(message: Message) -> None:
            sent.append(message)

        await self.app(scope, receive, collect)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def _drop_a_result(answer: Message) -> None:
    answer["results"].pop()


def _repeat_a_result(answer: Message) -> None:
    answer["results"].append(answer["results"][0])


def _drop_a_score(answer: Message) -> None:
    answer["results"][0]["scores"].pop()


def _reverse(answer: Message) -> None:
    answer["results"].reverse()


def _other_id(answer: Message) -> None:
    answer["results"][0]["id"] = "nobody"


def _one_twice(answer: Message) -> None:
    answer["results"][0] = answer["results"][-1]


def _no_spread(answer: Message) -> None:
    answer["results"][0]["order_spread"] = float("inf")


def _no_flip_rate(answer: Message) -> None:
    answer["results"][0]["order_flip_rate"] = float("nan")


def _other_request(answer: Message) -> None:
    answer["request_id"] = "another"


def _other_model(answer: Message) -> None:
    answer["model_hash"] = "0" * 16


def _other_options(answer: Message) -> None:
    answer["options"]["num_orders"] = 7


def _no_number(answer: Message) -> None:
    answer["results"][0]["scores"][0] = float("nan")


def _silent_drop(answer: Message) -> None:
    answer["results"][0]["scores"] = None


SPOILERS: dict[str, Callable[[Message], None]] = {
    "missing result": _drop_a_result,
    "repeated result": _repeat_a_result,
    "missing score": _drop_a_score,
    "reordered": _reverse,
    "other id": _other_id,
    "one twice": _one_twice,
    "other request": _other_request,
    "other model": _other_model,
    "other options": _other_options,
    "nan": _no_number,
    "infinite spread": _no_spread,
    "nan flip rate": _no_flip_rate,
    "silent drop": _silent_drop,
}


async def _read(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _answer(send: Any, status: int, content: bytes, kind: bytes = b"application/json") -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
