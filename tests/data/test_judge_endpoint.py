"""A judge behind a chat endpoint: a local stub orders by a rule, and does all wrong that such servers do."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_image
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.data.groups_file import load_preferences
from mr_reward.data.judge_endpoint import JudgeEndpoint
from mr_reward.data.labels import _read, label_groups
from mr_reward.errors import ConfigurationError, ScoringServerError

Answer = Callable[[dict[str, str], int], Any]  # name -> response, number of the request; what the stub answers


def by_length(responses: dict[str, str], number: int) -> str:
    """Longer is better, equal lengths tie."""
    lengths = sorted({len(text) for text in responses.values()}, reverse=True)
    ranking = [[name for name, text in responses.items() if len(text) == length] for length in lengths]
    return json.dumps({"ranking": ranking})


class Stub(ThreadingHTTPServer):
    """Answers with what `answer` gives: a text of the model, (status, headers) or a whole message."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is no error of the test."""


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "stub-1"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            number = len(self.server.bodies)
        found = self.server.answer(shown(body), number)
        if isinstance(found, tuple):
            status, headers = found
            self._send(status, b'{"error": "no"}', headers)
            return
        message = dict(found) if isinstance(found, dict) else {"role": "assistant", "content": found}
        reason = message.pop("finish_reason", "stop")
        self._send(200, json.dumps({"choices": [{"message": message, "finish_reason": reason}]}).encode())

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def shown(body: dict[str, Any]) -> dict[str, str]:
    """Name -> response, in the order that the judge sees."""
    content = body["messages"][0]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    mark = re.findall(r"^(===== [0-9a-f]{8}) prompt$", text, re.MULTILINE)[0]
    parts = re.split(rf"^{mark} (.*)\n?", text, flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {name.removeprefix("response "): body[:-1] for name, body in pairs if name.startswith("response ")}


@contextmanager
def stub(answer: Answer = by_length) -> Iterator[Stub]:
    with Stub(answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def judge(server: Stub, **options: Any) -> JudgeEndpoint:
    return JudgeEndpoint(server.url, **{"first_pause": 0.01, "timeout": 20.0, **options})


def groups_file(folder: Path, count: int = 6, seed: int = 0) -> Path:
    """Groups of 2 to 5 different responses of random lengths."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        texts = ["x" * rng.randint(1, 4) + str(j) for j in range(rng.randint(2, 5))]
        rows.append({"id": f"g{i}", "prompt": f"question {i}", "responses": texts})
    path = folder / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_steady_judge_gives_its_order(tmp_path: Path, seed: int) -> None:
    source, out = groups_file(tmp_path, seed=seed), tmp_path / "out.jsonl"
    with stub() as server:
        done = label_groups(source, out, judge(server, passes=3, seed=seed, key="secret"))
        assert done.labelled == 6 and done.agreement == 1.0
        assert len(server.bodies) == 18 and set(server.keys) == {"Bearer secret"}
        orders = [tuple(shown(body).values()) for body in server.bodies if "question 1\n" in str(shown_text(body))]
        assert len(orders) == 3 and len({tuple(sorted(order)) for order in orders}) == 1
        assert {body["model"] for body in server.bodies} == {"stub-1"}
        every = [tuple(shown(body).values()) for body in server.bodies]
        assert len(set(every)) > 6, "the order is drawn anew for each pass"
    for row, group in zip(lines(out), load_preferences(out), strict=True):
        lengths = [len(text) for text in row["responses"]]
        assert row["rankings"] == [1 + sorted(set(lengths), reverse=True).index(length) for length in lengths]
        assert row["passes"] == 3 and row["labelled_by"].startswith(f"judge stub-1 at {server.url}, 3 passes")
        assert group.num_responses == len(lengths)


def shown_text(body: dict[str, Any]) -> str:
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def test_passes_are_averaged_and_their_agreement_is_told(tmp_path: Path) -> None:
    """A judge that always likes what stands first: over many orders it says nothing, and the agreement shows it."""
    source, out = groups_file(tmp_path, count=1), tmp_path / "out.jsonl"

    def first(responses: dict[str, str], number: int) -> str:
        return json.dumps({"ranking": list(responses)})

    with stub(first) as server:
        done = label_groups(source, out, judge(server, passes=40))
        (row,) = lines(out)
        places = [[list(shown(body).values()).index(text) for text in row["responses"]] for body in server.bodies]
    means = [-(1 + sum(place[i] for place in places) / 40) for i in range(len(row["responses"]))]
    assert row["ratings"] == pytest.approx(means)
    pairs = [(i, j) for i in range(len(means)) for j in range(i)]
    same = [(a[i] < a[j]) == (b[i] < b[j]) for k, a in enumerate(places) for b in places[:k] for i, j in pairs]
    assert done.agreement == pytest.approx(sum(same) / len(same)) and 0.4 < done.agreement < 0.6


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("I like B best.", "wrong JSON"),
    "cut off": ('{"ranking": [["A"', "wrong JSON"),
    "another object": ('{"best": "A"}', "wrong JSON"),
    "half an order": ('{"ranking": ["A"]}', "half an order"),
    "one twice": ('{"ranking": ["A", "A", "B", "C", "D", "E"]}', "half an order"),
    "a stranger": ('{"ranking": ["A", "Z"]}', "half an order"),
    "refusal": ({"role": "assistant", "content": None, "refusal": "I cannot"}, "refused"),
    "filtered": ({"content": '{"ranking": ["A"]}', "finish_reason": "content_filter"}, "refused"),
    "nothing": ({"role": "assistant", "content": ""}, "refused"),
    "no text": ({"role": "assistant", "content": 3}, "wrong JSON"),
    "busy": ((429, {"Retry-After": "0"}), "no answer"),
    "broken": ((503, {}), "no answer"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_is_asked_for_again(tmp_path: Path, kind: str) -> None:
    """Once: the label is as if nothing had been. Always: the group has no label, and the file none of it."""
    wrong, counted = WRONG[kind]
    source, out = groups_file(tmp_path, count=2), tmp_path / "out.jsonl"
    with stub(lambda responses, number: wrong if number == 1 else by_length(responses, number)) as server:
        assert label_groups(source, out, judge(server, passes=2, at_a_time=1)).labelled == 2
        assert len(server.bodies) == 5
        seen = [tuple(shown(body).values()) for body in server.bodies[:2]]
        assert sorted(seen[0]) == sorted(seen[1])
    assert [row.get("judge_failures") for row in lines(out)] == [{counted: 1}, None]
    with stub(lambda responses, number: wrong) as server:
        other = tmp_path / "other.jsonl"
        if counted == "no answer":
            with pytest.raises(ScoringServerError, match="answered none of 2 groups"):
                label_groups(source, other, judge(server, passes=2, max_attempts=2))
        else:
            done = label_groups(source, other, judge(server, passes=2, max_attempts=2))
            assert done.left_out == {counted: 2} and other.read_bytes() == b""
        assert len(server.bodies) == 8


def test_an_answer_that_does_not_come(tmp_path: Path) -> None:
    source, out = groups_file(tmp_path, count=1), tmp_path / "out.jsonl"

    def late(responses: dict[str, str], number: int) -> str:
        time.sleep(2.0 if number == 1 else 0.0)
        return by_length(responses, number)

    with stub(late) as server:
        assert label_groups(source, out, judge(server, passes=1, timeout=0.4)).labelled == 1
    assert lines(out)[0]["judge_failures"] == {"no answer": 1}


def test_half_the_passes_are_enough(tmp_path: Path) -> None:
    source = groups_file(tmp_path, count=1)

    def some(good: int) -> Answer:
        return lambda responses, number: by_length(responses, number) if number <= good else "no"

    for good, labelled in ((2, 1), (1, 0)):
        with stub(some(good)) as server:
            out = tmp_path / f"{good}.jsonl"
            assert label_groups(source, out, judge(server, passes=4, max_attempts=1)).labelled == labelled


def test_thoughts_before_the_order_and_names_beyond_z(tmp_path: Path) -> None:
    texts = [f"{'x' * (i + 1)}" for i in range(30)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "?", "responses": texts}) + "\n")

    def thinking(responses: dict[str, str], number: int) -> str:
        return '<think>{"ranking": ["R1"]} no</think>```json\n' + by_length(responses, number) + "\n```"

    with stub(thinking) as server:
        label_groups(source, out, judge(server, passes=1))
    assert lines(out)[0]["rankings"] == list(range(30, 0, -1)) and lines(out)[0]["agreement"] is None


def test_the_judge_sees_the_images(tmp_path: Path) -> None:
    random_image(random.Random(0)).save(tmp_path / "a.png")
    blocks = [{"type": "text", "text": "before"}, {"type": "image"}, {"type": "text", "text": "after"}]
    row = {"prompt": [{"role": "user", "content": blocks}], "images": ["a.png"], "responses": ["1", "22"]}
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(row) + "\n")
    with stub() as server:
        label_groups(source, tmp_path / "out.jsonl", judge(server, passes=1, model="named"))
        (body,) = server.bodies
    parts = body["messages"][0]["content"]
    place = next(i for i, part in enumerate(parts) if part["type"] == "image_url")
    assert parts[place]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert parts[place - 1]["text"] == "before" and parts[place + 1]["text"] == "after"
    assert body["model"] == "named"


def test_the_budget_ends_the_call_and_the_rest_is_resumed(tmp_path: Path) -> None:
    source, out = groups_file(tmp_path), tmp_path / "out.jsonl"
    command = ["label", str(source), "--out", str(out), "--passes", "2", "--budget"]
    with stub() as server:
        command += ["7", "--judge", server.url]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 3 and "not reached" in result.output, result.output
        assert len(server.bodies) == 7
        reached = len(lines(out))
        assert 0 < reached < 6
        command[-3] = "99"
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0 and "agreement of the passes" in result.output
        assert len(server.bodies) == 7 + 2 * (6 - reached)
    assert len(load_preferences(out)) == 6


def test_labels_come_as_they_are_done_and_an_interruption_asks_no_more(tmp_path: Path) -> None:
    """So they are on the disk while others are waited for: they were paid for."""
    source = groups_file(tmp_path, count=4)
    slow = "question 0"
    waiting = threading.Event()

    def answer(responses: dict[str, str], number: int) -> str:
        body = shown_text(server.bodies[number - 1])
        if f"{slow}\n" in body:
            waiting.wait(20)
        return by_length(responses, number)

    with stub(answer) as server:
        labels = judge(server, passes=2, at_a_time=4).label(list(_read(source, None)))
        first = [next(labels)[0].number for _ in range(3)]
        assert sorted(first) == [2, 3, 4], "the first group has no answer yet"
        asked = len(server.bodies)
        waiting.set()
        with pytest.raises(KeyboardInterrupt):
            labels.throw(KeyboardInterrupt)
        assert asked == 2 * 3 + 1 and len(server.bodies) <= asked + 1


@pytest.mark.parametrize(("status", "message"), [(401, "key in MR_REWARD_JUDGE_KEY"), (404, "check the URL")])
def test_what_no_attempt_can_fix_ends_the_call(tmp_path: Path, status: int, message: str) -> None:
    with stub(lambda responses, number: (status, {})) as server:
        with pytest.raises(ConfigurationError, match=message):
            label_groups(groups_file(tmp_path), tmp_path / "out.jsonl", judge(server, at_a_time=1))
        assert len(server.bodies) == 1


def test_a_judge_that_is_not_there() -> None:
    with pytest.raises(ScoringServerError, match="gives no answer"):
        JudgeEndpoint("http://127.0.0.1:9", first_pause=0.01)
    with pytest.raises(ConfigurationError, match="expected http"):
        JudgeEndpoint("127.0.0.1:8000")


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    monkeypatch.delitem(sys.modules, "mr_reward.data.judge_endpoint")
    with pytest.raises(ConfigurationError, match=r"pip install 'mr-reward\[serve\]'"):
        importlib.import_module("mr_reward.data.judge_endpoint")
