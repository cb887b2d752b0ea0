"""The scoring server's interface: who gets in, what is refused, what is scored together."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from http_server import running
from PIL import Image

from mr_reward import GroupScorer, ResponseGroup
from mr_reward.checkpoint import weights_digest
from mr_reward.errors import ConfigurationError, MediaError
from mr_reward.groups import GroupScores
from mr_reward.scorers.wire import WireGroup, from_wire
from mr_reward.serving import ServerLimits, build_app, serve
from mr_reward.serving.batcher import Batcher
from mr_reward.serving.server import check_access

Groups = Callable[..., list[ResponseGroup]]


def body(request_id: str = "r1", **changes: Any) -> dict[str, Any]:
    turn = {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}
    group = {"id": "0", "messages": [turn], "responses": ["4", "5"], **changes}
    return {"request_id": request_id, "groups": [group]}


def png(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> str:
    buffer = BytesIO()
    Image.new("RGB", size).save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


def image_body(*images: str) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image"} for _ in images]
    turn = {"role": "user", "content": [*content, {"type": "text", "text": "?"}]}
    return body(messages=[turn], images=list(images))


@pytest.fixture
def server(scorer: GroupScorer) -> Iterator[httpx2.Client]:
    limits = ServerLimits(max_groups=3, max_request_bytes=20_000, max_pixels=100)
    with running(build_app(scorer, limits=limits)) as url, httpx2.Client(base_url=url, timeout=20) as http:
        yield http


def test_health(server: httpx2.Client, scorer: GroupScorer) -> None:
    answer = server.get("/health").json()
    assert answer["status"] == "ok" and answer["layout"] == "set" and answer["pending_groups"] == 0
    assert answer["model_hash"] == weights_digest(scorer.model)
    assert answer["options"] == {"max_tokens_per_batch": 2000, "num_orders": 1, "over_length": "drop_group"}
    assert (answer["max_groups"], answer["max_request_bytes"]) == (3, 20_000)


def test_scores(server: httpx2.Client, scorer: GroupScorer) -> None:
    answer = server.post("/v1/score", json=body()).json()
    expected = scorer.score([ResponseGroup(prompt="2 + 2?", responses=["4", "5"])])[0]
    assert answer["results"][0]["scores"] == pytest.approx(expected, rel=0, abs=1e-6)
    assert answer["request_id"] == "r1" and answer["model_hash"] == weights_digest(scorer.model)


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"", 422, "Expecting value"),
        (b"[]", 422, "dictionary"),
        (b"[" * 10_000, 422, ""),
        (b'{"request_id": "a", "groups": []}', 422, "groups: List should have at least 1 item"),
        (json.dumps({**body(), "code": "1"}).encode(), 422, "code: Extra inputs"),
        (json.dumps(body(responses=[1])).encode(), 422, r"responses\.0\S*: Input should be a valid string"),
        (json.dumps(body(responses=[])).encode(), 422, "response"),
        (json.dumps(body("r" * 101)).encode(), 422, "request_id: String should have at most 100"),
        (json.dumps({"request_id": "a", "groups": body()["groups"] * 2}).encode(), 422, "two groups have the same id"),
        (json.dumps({"request_id": "a", "groups": body()["groups"] * 4}).encode(), 422, "4 groups, .* 3"),
        (b'"' + b"x" * 30_000 + b'"', 413, "20000 bytes"),
        (json.dumps(image_body("/etc/passwd")).encode(), 422, "cannot be opened"),
        (json.dumps(image_body("https://example.org/a.png")).encode(), 422, "cannot be opened"),
        (json.dumps(image_body("AAAA")).encode(), 422, "cannot be opened"),
        (json.dumps(image_body(png((20, 20)))).encode(), 422, "20 x 20 pixels, the server takes 100"),
        (json.dumps(image_body(png(kind="PDF"))).encode(), 422, "cannot be opened"),
    ],
)
def test_refused(server: httpx2.Client, sent: bytes, status: int, message: str) -> None:
    answer = server.post("/v1/score", content=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    told = answer.json()
    assert re.search(message, told["message"]), told
    assert len(answer.content) < 1500, "an error does not send the request back"
    assert server.get("/health").json()["pending_groups"] == 0


def test_a_browser_cannot_send_it(server: httpx2.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.post("/v1/score", content=json.dumps(body()), headers={"Content-Type": kind})
        assert answer.status_code == 415
    assert server.get("/docs").status_code == server.get("/openapi.json").status_code == 404


def test_a_body_that_does_not_say_its_length(server: httpx2.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    answer = server.post("/v1/score", content=parts(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_token(scorer: GroupScorer) -> None:
    with running(build_app(scorer, token="secret")) as url, httpx2.Client(base_url=url) as http:
        for path in ("/health", "/v1/score"):
            for headers in ({}, {"Authorization": "secret"}, {"Authorization": "Bearer Secret"}):
                answer = http.request("GET" if path == "/health" else "POST", path, headers=headers)
                assert answer.status_code == 401 and "secret" not in answer.text
        assert http.get("/health", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("token", ["", "two words", "pässword", "line\nbreak"])
def test_tokens_that_are_none(token: str, scorer: GroupScorer) -> None:
    with pytest.raises(ConfigurationError, match="openssl rand -hex 32"):
        build_app(scorer, token=token)


def test_other_machines_need_a_token(scorer: GroupScorer) -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_access(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.5", "a-name"):
        check_access(host, "secret")
        with pytest.raises(ConfigurationError, match=rf"host {host} can be reached from other machines"):
            serve(scorer, host=host)


def test_limits_have_to_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="max_groups is 0"):
        ServerLimits(max_groups=0)
    with pytest.raises(ConfigurationError, match="max_wait is -1"):
        ServerLimits(max_wait=-1)


class Held:
    """A scorer that waits to be let go."""

    def __init__(self, scorer: GroupScorer) -> None:
        self.scorer = scorer
        self.entered, self.go = threading.Event(), threading.Event()
        self.calls: list[list[ResponseGroup]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)

    def score_detailed(self, groups: list[ResponseGroup]) -> Any:
        self.calls.append(list(groups))
        self.entered.set()
        assert self.go.wait(20)
        if any("break it" in response for group in groups for response in group.responses):
            raise RuntimeError("out of memory")
        return self.scorer.score_detailed(groups)


@pytest.fixture
def held(scorer: GroupScorer) -> Held:
    return Held(scorer)


def app_of(held: Held, **limits: Any) -> FastAPI:
    return build_app(held, limits=ServerLimits(**limits))  # type: ignore[arg-type]


def test_what_waits_is_scored_together_and_too_much_has_to_come_again(held: Held) -> None:
    with running(app_of(held, max_pending=4)) as url, httpx2.Client(base_url=url, timeout=20) as http:
        with ThreadPoolExecutor(8) as threads:
            first = threads.submit(http.post, "/v1/score", json=body("first"))
            assert held.entered.wait(20)
            more = [threads.submit(http.post, "/v1/score", json=body(f"more {i}")) for i in range(3)]
            end = time.monotonic() + 10
            while http.get("/health").json()["pending_groups"] < 4:
                assert time.monotonic() < end or held.go.set(), (
                    "4 groups may wait"
                )  # set: or the threads would wait on
            refused = http.post("/v1/score", json=body("too many"))
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            held.go.set()
            assert [answer.result().status_code for answer in [first, *more]] == [200] * 4
        assert http.get("/health").json()["pending_groups"] == 0
    assert [len(groups) for groups in held.calls] == [1, 3]


def test_a_request_that_comes_again_while_it_is_scored_waits_for_the_same_scores(held: Held) -> None:
    with (
        running(app_of(held)) as url,
        httpx2.Client(base_url=url, timeout=20) as http,
        ThreadPoolExecutor(8) as threads,
    ):
        with pytest.raises(httpx2.ReadTimeout):
            http.post("/v1/score", json=body("a"), timeout=0.3)
        again = threads.submit(http.post, "/v1/score", json=body("a"))
        time.sleep(0.5)
        other = threads.submit(
            http.post, "/v1/score", json=body("a", responses=["6", "7", "8"])
        )  # the id alone is nothing
        while http.get("/health").json()["pending_groups"] < 2:
            pass
        held.go.set()
        assert len(again.result().json()["results"][0]["scores"]) == 2
        assert len(other.result().json()["results"][0]["scores"]) == 3
    assert [len(groups) for groups in held.calls] == [1, 1]


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError])
def test_whatever_the_scoring_thread_raises_is_told_at_once(
    error: type[Exception], scorer: GroupScorer, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(groups: Any) -> Any:
        raise error("a bug")

    scorer.score_detailed = fail  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR), running(build_app(scorer)) as url, httpx2.Client(base_url=url) as http:
        for _ in range(2):  # the server goes on
            answer = http.post("/v1/score", json=body(), timeout=5)
            assert answer.status_code == 500 and answer.json()["message"].startswith(f"{error.__name__} in the server")
        assert http.get("/health").json()["pending_groups"] == 0


def test_a_scorer_that_loses_a_result_is_told_at_once(scorer: GroupScorer) -> None:
    scorer.score_detailed = lambda groups: []  # type: ignore[method-assign]
    with running(build_app(scorer)) as url, httpx2.Client(base_url=url) as http:
        for _ in range(2):
            assert http.post("/v1/score", json=body(), timeout=5).status_code == 500


def test_after_a_failure_the_same_request_is_scored_again(scorer: GroupScorer) -> None:
    """Nothing is left of a failed one: neither its error nor its place among those that wait."""
    calls: list[int] = []
    original = scorer.score_detailed

    def fail_first(groups: Any) -> Any:
        calls.append(len(groups))
        if len(calls) <= 2:
            raise RuntimeError("out of memory")
        return original(groups)

    scorer.score_detailed = fail_first  # type: ignore[method-assign]
    limits = ServerLimits(max_pending=1)
    with running(build_app(scorer, limits=limits)) as url, httpx2.Client(base_url=url, timeout=20) as http:
        found = [http.post("/v1/score", json=body()) for _ in range(4)]
        assert [answer.status_code for answer in found] == [500, 500, 200, 200]
        assert http.get("/health").json()["pending_groups"] == 0
    assert calls == [1] * 4


def test_limits_are_reached_and_not_passed(server: httpx2.Client) -> None:
    """3 groups and 20,000 bytes, whether the body says its length or not."""

    def sent(count: int, size: int) -> bytes:
        groups = [{**body()["groups"][0], "id": str(i)} for i in range(count)]
        content = json.dumps({"request_id": "r", "groups": groups}).encode()
        return content + b" " * (size - len(content))

    for count, size, status in ((3, 1000, 200), (4, 1000, 422), (1, 20_000, 200), (1, 20_001, 413)):
        for content in (sent(count, size), iter([sent(count, size)])):
            answer = server.post("/v1/score", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, (count, size, answer.text)


def test_a_request_larger_than_the_room_is_taken_if_nothing_waits(held: Held) -> None:
    """Or it would have to come again for ever; beside another one there has to be room for all of it."""
    large = {"request_id": "r", "groups": [{**body()["groups"][0], "id": str(i)} for i in range(5)]}
    held.go.set()
    with running(app_of(held, max_pending=4)) as url, httpx2.Client(base_url=url, timeout=20) as http:
        assert http.post("/v1/score", json=large).status_code == 200
        held.go.clear()
        held.entered.clear()
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(http.post, "/v1/score", json=body("first"))
            assert held.entered.wait(20)
            assert http.post("/v1/score", json=large).status_code == 429
            held.go.set()
            assert first.result().status_code == 200


def test_a_call_waits_for_further_requests(held: Held) -> None:
    held.go.set()
    with running(app_of(held, max_wait=2.0)) as url, httpx2.Client(base_url=url, timeout=20) as http:
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(http.post, "/v1/score", json=body("first"))
            while not http.get("/health").json()["pending_groups"]:
                pass
            second = http.post("/v1/score", json=body("second"))
            assert first.result().status_code == second.status_code == 200
    assert [len(groups) for groups in held.calls] == [2]


def test_a_call_is_as_large_as_the_batcher_lets_it() -> None:
    """At most one request goes beyond the limit, and the error of one is the error of no other."""
    calls: list[list[str]] = []

    def score(groups: Any) -> list[GroupScores]:
        calls.append([group.id for group in groups])
        if any(group.id == "bad" for group in groups):
            raise ValueError("bad")
        return [GroupScores(scores=(float(len(group.id)),), truncated=(False,)) for group in groups]

    def group(name: str) -> ResponseGroup:
        return ResponseGroup(prompt="?", responses=["a"], id=name)

    async def scenario(*requests: list[str]) -> list[Any]:
        batcher = Batcher(score, max_groups=4, max_wait=0.0)
        futures = [batcher.submit([group(name) for name in request]) for request in requests]
        assert batcher.pending == sum(map(len, requests))
        async with batcher.running():
            found = await asyncio.gather(*futures, return_exceptions=True)
        assert batcher.pending == 0
        return [one if isinstance(one, Exception) else [result.scores[0] for result in one] for one in found]

    assert asyncio.run(scenario(["a", "bb"], ["ccc", "dddd"], ["e"], ["ff"])) == [[1, 2], [3, 4], [1], [2]]
    assert calls == [["a", "bb", "ccc", "dddd"], ["e", "ff"]]
    calls.clear()
    assert asyncio.run(scenario(["a"], ["b"], ["c"], ["d", "e", "f"], ["g"])) == [[1], [1], [1], [1, 1, 1], [1]]
    assert calls == [["a", "b", "c", "d", "e", "f"], ["g"]]
    calls.clear()
    found = asyncio.run(scenario(["a"], ["bb"], ["bad"], ["dddd"]))
    assert [found[0], found[1], found[3]] == [[1], [2], [4]] and isinstance(found[2], ValueError)


def test_one_bad_request_does_not_spoil_the_others(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.ERROR, "mr_reward"),
        running(app_of(held)) as url,
        httpx2.Client(base_url=url, timeout=20) as http,
        ThreadPoolExecutor(8) as threads,
    ):
        first = threads.submit(http.post, "/v1/score", json=body("first"))
        assert held.entered.wait(20)
        sent = [body("a"), body("bad", responses=["break it"]), body("b"), body("c")]
        answers = [threads.submit(http.post, "/v1/score", json=request) for request in sent]
        while http.get("/health").json()["pending_groups"] < 5:
            pass
        held.go.set()
        statuses = [answer.result().status_code for answer in answers]
        assert first.result().status_code == 200
    assert statuses == [200, 500, 200, 200]
    told = answers[1].result().json()["message"]
    assert told == "RuntimeError in the server; its log has the details"
    assert "out of memory" in caplog.text


def test_the_largest_image_is_taken() -> None:
    def received(width: int, height: int) -> ResponseGroup:
        message = image_body(png((width, height)))["groups"][0]
        return from_wire(WireGroup.model_validate(message), 100)

    for size in ((10, 10), (100, 1), (8, 12)):
        assert received(*size).images[0].size == size
    for size in ((10, 11), (101, 1)):
        with pytest.raises(MediaError, match=f"{size[0]} x {size[1]} pixels, the server takes 100"):
            received(*size)


def test_images_keep_every_pixel(tmp_path: Path) -> None:
    from mr_reward.scorers.wire import from_wire, to_wire

    pixels = Image.effect_noise((13, 9), 90)
    path = tmp_path / "a.webp"
    pixels.convert("RGB").save(path, lossless=True)
    transparent = Image.new("RGBA", (4, 4), (200, 10, 10, 60))
    sources: list[Any] = [pixels, str(path), {"bytes": path.read_bytes(), "path": None}, transparent]
    content = [{"type": "image"} for _ in sources] + [{"type": "video"}]
    group = ResponseGroup(
        prompt=[{"role": "user", "content": content}], responses=["\ud800 é 🙂"], images=sources, videos=[[pixels] * 2]
    )
    from mr_reward.templates.images import load_image

    back = from_wire(to_wire(group, "0"), max_pixels=10_000)
    for found, source in zip(back.images, sources, strict=True):
        assert load_image(found).tobytes() == load_image(source).tobytes()
    assert [load_image(frame).tobytes() for frame in back.videos[0]] == [load_image(pixels).tobytes()] * 2
    assert list(back.responses) == list(group.responses) and back.messages == group.messages
