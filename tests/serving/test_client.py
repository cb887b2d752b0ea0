"""`RemoteScorer` against real uvicorn: right scores or a clear error within the deadline, whatever comes back."""

from __future__ import annotations

import inspect
import os
import pickle
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from http_server import Faulty, running

import mr_reward.scorers.remote as remote_module
from mr_reward import GroupScorer, ResponseGroup
from mr_reward.checkpoint import weights_digest
from mr_reward.errors import (
    CheckpointError,
    ConfigurationError,
    MediaError,
    NonFiniteScoreError,
    OverLengthError,
    ScoringServerError,
)
from mr_reward.groups import GroupScores
from mr_reward.scorers import RemoteScorer
from mr_reward.scorers.remote import _AgainError, _failure, batches
from mr_reward.scorers.wire import Health
from mr_reward.serving import ServerLimits, build_app

SAME = 1e-6
DEADLINE = 20.0

Groups = Callable[..., list[ResponseGroup]]


def assert_same(found: list[GroupScores], expected: list[GroupScores]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.scores is None) == (other.scores is None)
        assert one.scores is None or list(one.scores) == pytest.approx(list(other.scores or ()), rel=0, abs=SAME)
        assert (one.truncated, one.drop_reason) == (other.truncated, other.drop_reason)
        assert one.order_spread == pytest.approx(other.order_spread, abs=SAME)


def count_calls(scorer: GroupScorer) -> list[int]:
    """The numbers of groups of every call from here on."""
    calls: list[int] = []
    original = scorer.score_detailed

    def counted(batch: list[ResponseGroup]) -> list[GroupScores]:
        calls.append(len(batch))
        return original(batch)

    scorer.score_detailed = counted  # type: ignore[method-assign,assignment]
    return calls


def once(fault: str, at: tuple[int, ...] = (0,)) -> Callable[[int], str | None]:
    return lambda n: fault if n in at else None


def client(url: str, **options: object) -> RemoteScorer:
    return RemoteScorer(url, **{"deadline": DEADLINE, "attempt_timeout": 5.0, **options})  # type: ignore[arg-type]


# --- the ordinary case ---


def test_same_scores_as_in_process(scorer: GroupScorer, groups: Groups) -> None:
    long = ResponseGroup(prompt="?", responses=["x" * 3000, "y"], id="too long")
    duplicates = ResponseGroup(prompt="?", responses=["same", "other", "same"])
    given = [*groups(20), long, duplicates]
    expected = scorer.score_detailed(given)
    with running(build_app(scorer)) as url:
        remote = client(url)
        found = remote.score_detailed(given)
        assert_same(found, expected)
        assert found[20].scores is None and "token budget" in str(found[20].drop_reason)
        assert found[21].scores is not None and found[21].scores[0] == found[21].scores[2]
        assert remote.score(given)[20] is None and remote.score([]) == []
        assert remote.model_hash == weights_digest(scorer.model)
        remote.close()


def test_two_hundred_concurrent_groups(scorer: GroupScorer, groups: Groups) -> None:
    given = groups(200)
    expected = scorer.score_detailed(given)
    calls = count_calls(scorer)
    with running(build_app(scorer)) as url:
        remote = client(url, deadline=120.0, attempt_timeout=60.0, max_in_flight=32)
        with ThreadPoolExecutor(50) as threads:
            found = list(threads.map(lambda group: remote.score_detailed([group])[0], given))
        remote.close()
    assert_same(found, expected)
    assert sum(calls) == 200
    assert len(calls) < 150, "the server did not batch what waited"


def test_limits_of_the_server_cut_the_requests(scorer: GroupScorer, groups: Groups) -> None:
    given = groups(30)
    watch = Faulty(build_app(scorer, limits=ServerLimits(max_groups=4, max_request_bytes=3000)), lambda n: None)
    with running(watch) as url:
        remote = client(url)
        assert_same(remote.score_detailed(given), scorer.score_detailed(given))
        assert watch.num_requests >= 8 and len(set(watch.request_ids)) == watch.num_requests
        huge = ResponseGroup(prompt="?", responses=["x" * 4000], id="huge")
        with pytest.raises(ScoringServerError, match=r"'huge' takes 4\d+ bytes.*requests of 3000"):
            remote.score_detailed([*given, huge])
        remote.close()


def test_batches() -> None:
    assert batches([], 2, 10) == []
    assert batches([3, 3, 3, 1], 9, 9) == [[0, 1, 2], [3]], "what just fits"
    assert batches([5, 5, 1, 20, 1, 1, 1], 2, 10) == [[0, 1], [2], [3], [4, 5], [6]]


# --- faults after which it asks again ---


@pytest.mark.parametrize(
    "fault",
    [
        "lost",
        "half",
        "no json",
        "missing result",
        "repeated result",
        "missing score",
        "other id",
        "one twice",
        "other request",
        "silent drop",
        "status 500",
        "status 502",
        "status 503",
        "status 429",
    ],
)
def test_after_a_fault_in_the_middle_it_asks_again(fault: str, scorer: GroupScorer, groups: Groups) -> None:
    given = groups(12)
    spoiled = Faulty(build_app(scorer), once(fault, (1, 2, 4)))
    with running(spoiled) as url:
        remote = client(url, groups_per_request=3, max_in_flight=2)
        assert_same(remote.score_detailed(given), scorer.score_detailed(given))
        remote.close()
    assert spoiled.num_requests == 4 + 3
    assert sorted(Counter(spoiled.request_ids).values())[-1] > 1
    assert len(set(spoiled.request_ids)) == 4


def test_reordered_results_find_their_groups(scorer: GroupScorer, groups: Groups) -> None:
    given = groups(12)
    with running(Faulty(build_app(scorer), lambda n: "reordered")) as url:
        remote = client(url)
        assert_same(remote.score_detailed(given), scorer.score_detailed(given))
        remote.close()


def test_a_slow_answer_is_asked_for_again(scorer: GroupScorer, groups: Groups) -> None:
    given = groups(3)
    expected = scorer.score_detailed(given)
    with running(Faulty(build_app(scorer), once("slow"), pause=3.0)) as url:
        remote = client(url, attempt_timeout=1.0)
        started = time.monotonic()
        assert_same(remote.score_detailed(given), expected)
        assert time.monotonic() - started < 3.0
        remote.close()


def test_a_slow_server_scores_once_however_often_it_is_asked(scorer: GroupScorer, groups: Groups) -> None:
    given = groups(3)
    expected = scorer.score_detailed(given)
    calls: list[int] = []

    def slow(batch: list[ResponseGroup]) -> list[GroupScores]:
        calls.append(len(batch))
        time.sleep(2.7)  # between the ends of two attempts
        return expected

    scorer.score_detailed = slow  # type: ignore[method-assign,assignment]
    with running(build_app(scorer)) as url:
        remote = client(url, attempt_timeout=0.5)
        assert_same(remote.score_detailed(given), expected)
        remote.close()
    assert calls == [3]


def test_a_server_that_starts_later_is_waited_for(scorer: GroupScorer, groups: Groups) -> None:
    given = groups(4)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    found: list[list[GroupScores]] = []
    remote = client(f"http://127.0.0.1:{port}")
    asking = threading.Thread(target=lambda: found.append(remote.score_detailed(given)))
    asking.start()
    time.sleep(1.0)
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(build_app(scorer), port=port, log_config=None))
    serving = threading.Thread(target=server.run)
    serving.start()
    asking.join(DEADLINE)
    server.should_exit = True
    serving.join(DEADLINE)
    remote.close()
    assert_same(found[0], scorer.score_detailed(given))


# --- faults that end the call ---


@pytest.mark.parametrize("fault", ["missing score", "no json", "other request", "status 500"])
def test_a_fault_that_stays_ends_the_call(fault: str, scorer: GroupScorer, groups: Groups) -> None:
    spoiled = Faulty(build_app(scorer), lambda n: fault)
    with running(spoiled) as url:
        remote = client(url)
        with pytest.raises(ScoringServerError, match="4 useless answers to one request"):
            remote.score(groups(2))
        remote.close()
    assert spoiled.num_requests == 4


@pytest.mark.parametrize("fault", ["slow", "lost", "half", "status 503", "status 429"])
def test_the_deadline_ends_it(fault: str, scorer: GroupScorer, groups: Groups) -> None:
    with running(Faulty(build_app(scorer), lambda n: fault, pause=30.0)) as url:
        remote = client(url, deadline=2.0, attempt_timeout=0.5)
        remote.connect()
        started = time.monotonic()
        with pytest.raises(ScoringServerError, match=r"0 of 1 requests were answered within 2\.0 s \(last problem: "):
            remote.score(groups(2))
        assert 1.5 < time.monotonic() - started < 4.0
        remote.close()


def test_an_error_ends_the_other_requests_of_its_call(scorer: GroupScorer, groups: Groups) -> None:
    """They stop asking, and a later call is not disturbed."""
    faults = ["other model", *["status 503"] * 1000]
    spoiled = Faulty(build_app(scorer), lambda n: faults[n])
    with running(spoiled) as url:
        remote = client(url, groups_per_request=1)
        remote.connect()
        with pytest.raises(CheckpointError):
            remote.score(groups(4))
        time.sleep(0.3)  # what is on its way arrives
        asked = spoiled.num_requests
        time.sleep(1.5)  # longer than the pauses so far
        assert spoiled.num_requests == asked
        faults[:] = [""] * 2000
        assert_same(remote.score_detailed(groups(4)), scorer.score_detailed(groups(4)))
        remote.close()


@pytest.mark.parametrize(
    ("status", "header", "pause", "answered"),
    [
        (429, "3", 3.0, False),
        (429, "3600", 10.0, False),  # nobody is waited for an hour
        (429, "soon", None, False),
        (502, None, None, False),
        (503, "0", 0.0, False),
        (504, None, None, False),
        (500, None, None, True),
        (501, "2", 2.0, True),
    ],
)
def test_how_long_and_how_often_a_failing_server_is_asked(
    status: int, header: str | None, pause: float | None, answered: bool
) -> None:
    """Who is busy or still starts is waited for; answers that are of no use are counted."""
    answer = httpx2.Response(status, headers={} if header is None else {"retry-after": header})
    found = _failure("http://host", "/v1/score", answer, b"no json")
    assert isinstance(found, _AgainError) and (found.pause, found.answered) == (pause, answered)
    assert str(found) == f"status {status}: no json"


def test_the_deadline_counts_from_the_first_question(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is waited for takes its time out of that of the scores."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(remote_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    asked: list[tuple[str, float]] = []
    health = {"status": "ok", "version": "1", "model_hash": "1f", "layout": "set", "options": {}}
    limits = {"max_groups": 4, "max_request_bytes": 10**6, "pending_groups": 0}

    def send(requests: Any, seconds: float) -> list[Any]:
        asked.append((requests[0].path, seconds))
        clock.now += 3.0
        if requests[0].path == "/health":
            return [Health.model_validate({**health, **limits})]
        raise ScoringServerError("enough")

    remote = RemoteScorer("http://host:1", deadline=10.0)
    monkeypatch.setattr(remote, "_send", send)
    with pytest.raises(ScoringServerError, match="enough"):
        remote.score(groups(1))
    assert asked == [("/health", 10.0), ("/v1/score", 7.0)]


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    remote = client(f"http://127.0.0.1:{port}", deadline=1.0)
    started = time.monotonic()
    with pytest.raises(ScoringServerError, match=r"ConnectError.*check that the server runs"):
        remote.connect()
    assert time.monotonic() - started < 3.0
    remote.close()


def test_someone_else_is_there(groups: Groups) -> None:
    async def other(scope: dict[str, object], receive: object, send: Callable[..., object]) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})  # type: ignore[misc]
            await send({"type": "http.response.body", "body": b"not here"})  # type: ignore[misc]

    with running(other) as url:
        remote = client(url)
        started = time.monotonic()
        with pytest.raises(ScoringServerError, match=r"status 404: not here; check that the URL"):
            remote.score(groups(1))
        assert time.monotonic() - started < 2.0, "a 4xx is not tried again"
        remote.close()


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("other model", CheckpointError, r"scores with model 0{16}, expected [0-9a-f]+; start all its workers"),
        ("other options", ScoringServerError, "the scores would not be comparable"),
        ("nan", NonFiniteScoreError, r"'row 0': scores .*nan.* are not finite"),
        ("infinite spread", NonFiniteScoreError, r"'row 0': scores .* are not finite"),
        ("nan flip rate", NonFiniteScoreError, r"'row 0': scores .* are not finite"),
    ],
)
def test_what_must_not_be_used(
    fault: str, error: type[Exception], message: str, scorer: GroupScorer, groups: Groups
) -> None:
    with running(Faulty(build_app(scorer), once(fault, (1,)))) as url:
        remote = client(url)
        remote.score(groups(2))
        with pytest.raises(error, match=message):
            remote.score(groups(2))
        remote.close()


def test_expected_model(scorer: GroupScorer, groups: Groups) -> None:
    with running(build_app(scorer)) as url:
        right = client(url, expected_hash=weights_digest(scorer.model))
        right.score(groups(1))
        with pytest.raises(CheckpointError, match="expected abc; start all its workers"):
            client(url, expected_hash="abc").score(groups(1))
        right.close()


def test_errors_of_the_scorer_arrive_as_what_they_are(scorer: GroupScorer, tmp_path: Path) -> None:
    strict = GroupScorer(scorer.model, max_tokens_per_batch=200, over_length="error")
    too_long = ResponseGroup(prompt="?", responses=["x" * 300], id="long one")
    with running(build_app(strict)) as url:
        remote = client(url)
        with pytest.raises(OverLengthError, match=r"'long one'.*from the scoring server http"):
            remote.score([too_long])
        missing = ResponseGroup(prompt=[{"role": "user", "content": [{"type": "image"}]}], responses=["a"],
                                images=[tmp_path / "no.png"], id="blind")  # fmt: skip
        with pytest.raises(MediaError, match="'blind'"):
            remote.score([missing])
        remote.close()


# --- access ---


def test_token(scorer: GroupScorer, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(build_app(scorer, token="right-token")) as url:
        for token in (None, "wrong-token"):
            started = time.monotonic()
            with pytest.raises(ScoringServerError, match="refuses the token"):
                client(url, token=token).score(groups(1))
            assert time.monotonic() - started < 2.0
        remote = client(url, token="right-token")
        assert_same(remote.score_detailed(groups(1)), scorer.score_detailed(groups(1)))
        assert b"right-token" not in pickle.dumps(remote)
        monkeypatch.setenv("MR_REWARD_TOKEN", "right-token")
        copy = pickle.loads(pickle.dumps(remote))
        assert_same(copy.score_detailed(groups(1)), scorer.score_detailed(groups(1)))
        remote.close()
        copy.close()


def test_a_copy_keeps_to_the_model(scorer: GroupScorer, groups: Groups) -> None:
    with running(build_app(scorer)) as url:
        remote = client(url, expected_hash=weights_digest(scorer.model))
        spoiled = pickle.dumps(remote).replace(weights_digest(scorer.model).encode(), b"f" * 16)
        assert_same(pickle.loads(pickle.dumps(remote)).score_detailed(groups(1)), scorer.score_detailed(groups(1)))
        with pytest.raises(CheckpointError, match="expected f{16}"):
            pickle.loads(spoiled).score(groups(1))


def test_a_copy_keeps_every_option() -> None:
    options = {
        "expected_hash": "1f",
        "deadline": 3.0,
        "attempt_timeout": 2.0,
        "max_in_flight": 5,
        "groups_per_request": 7,
        "max_wrong_answers": 9,
    }
    assert set(options) == inspect.signature(RemoteScorer).parameters.keys() - {"url", "token"}
    make, given = RemoteScorer("http://host:1", token="secret", **options).__reduce__()  # type: ignore[arg-type]
    assert given == ("http://host:1",) and make.keywords == options  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(RemoteScorer("http://host:1", **options)))  # type: ignore[arg-type]
    assert copy.__reduce__()[0].keywords == options


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_process_opens_its_own_connections(scorer: GroupScorer, groups: Groups) -> None:
    given = groups(2)
    expected = scorer.score_detailed(given)
    with running(build_app(scorer)) as url:
        remote = client(url)
        remote.score(given)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                assert_same(remote.score_detailed(given), expected)
                os.write(writing, b"1")
            finally:
                os._exit(0)
        os.close(writing)
        assert os.read(reading, 1) == b"1"
        os.waitpid(pid, 0)
        os.close(reading)
        assert_same(remote.score_detailed(given), expected)
        remote.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8765", "expected http://host:port"),
        ("ftp://host", "expected http://host:port"),
        ("http://", "expected http://host:port"),
        ("http://host/?a=b", "expected http://host:port"),
        ("http://me:secret@host", "holds a password"),
    ],
)
def test_urls_that_are_none(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        RemoteScorer(url)
    assert "secret" not in str(caught.value)


def test_numbers_have_to_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="deadline is 0, expected a positive number"):
        RemoteScorer("http://host", deadline=0)
