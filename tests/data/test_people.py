"""The page for people: what it shows, what it takes, and who else may ask for it."""

from __future__ import annotations

import http.client
import json
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from tiny_models import random_image

from mr_reward.data.groups_file import load_preferences
from mr_reward.data.labels import Labelled, label_groups
from mr_reward.data.people import People, read_places
from mr_reward.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "places"),
    [("b>a=c", [1, 0, 1]), ("B a c", [1, 0, 2]), ("cab", [1, 2, 0]), ("a=b=c", [0, 0, 0]), (" c , b = a ", [1, 1, 0])],
)
def test_orders_are_read(text: str, places: list[int]) -> None:
    assert read_places(text, 3) == places


@pytest.mark.parametrize("text", ["", "a", "a b", "a b d", "a a b c", "=a b c", "a b c=", "a == b c", "a<b c", "abcc"])
def test_half_orders_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="missing|no new letter"):
        read_places(text, 3)


def rollouts(folder: Path) -> Path:
    random_image(random.Random(0)).save(folder / "a.png")
    rows: list[dict[str, Any]] = [
        {"prompt": "<script>alert(1)</script>", "responses": ["one", "two", "three"]},
        {"prompt": [{"role": "user", "content": "see"}], "images": ["a.png"], "responses": ["<b>x</b>", "y"]},
        {"prompt": "third", "responses": ["p", "q", "r", "s"]},
    ]
    path = folder / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Browser:
    """Loads the page and sends the form."""

    def __init__(self, url: str) -> None:
        self.parts = urlsplit(url)

    def ask(self, form: dict[str, str] | None = None, path: str | None = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(str(self.parts.netloc), timeout=30)
        body = None if form is None else urlencode(form)
        connection.request("GET" if form is None else "POST", path or self.parts.path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def send(self, page: str, order: str) -> str:
        number = re.findall(r'name="number" value="(\d+)"', page)[0]
        return self.ask({"number": number, "order": order})[1]


def shown(page: str) -> list[str]:
    """The responses in the order of the page."""
    return re.findall(r"<p><b>[a-z]</b></p><pre>(.*?)</pre>", page)


def at_the_page(source: Path, out: Path, work: Callable[[Browser], None], **options: Any) -> Labelled:
    found: list[Labelled] = []
    people = People("anna", **options)

    def label() -> None:
        with people:
            found.append(label_groups(source, out, people))

    thread = threading.Thread(target=label)
    thread.start()
    browser = Browser(people.url)
    while "Group" not in browser.ask()[1]:
        pass
    work(browser)
    thread.join(30)
    return found[0]


def test_a_person_labels_is_stopped_and_resumes(tmp_path: Path) -> None:
    source, out = rollouts(tmp_path), tmp_path / "out.jsonl"
    seen: list[list[str]] = []

    def first(browser: Browser) -> None:
        page = browser.ask()[1]
        assert "&lt;script&gt;" in page and "<script" not in page
        assert "is missing" in browser.send(page, "a")
        seen.append(shown(page))
        stale = page
        page = browser.send(page, "b > a = c")
        assert 'src="data:image/png;base64,' in page and "&lt;b&gt;x" in page
        assert browser.ask({"number": "1", "order": "c b a"})[1] == page, "a form sent twice counts once"
        assert stale != page
        assert "done, or was stopped" in browser.send(page, "stop")

    done = at_the_page(source, out, first)
    assert (done.labelled, done.not_reached) == (1, 2)

    def second(browser: Browser) -> None:
        page = browser.send(browser.ask()[1], "?")
        seen.append(shown(page))
        assert "done, or was stopped" in browser.send(page, "d=a b c")

    done = at_the_page(source, out, second)
    assert (done.before, done.labelled, done.left_out) == (1, 1, {"skipped": 1})
    groups = load_preferences(out)
    for group, texts, ranks in zip(groups, seen, ([2, 1, 2], [1, 2, 3, 1]), strict=True):
        assert dict(zip(group.responses, group.rankings or (), strict=True)) == dict(zip(texts, ranks, strict=True))
    assert {json.loads(line)["labelled_by"] for line in out.read_text().splitlines()} == {"people anna"}


def test_the_order_on_the_page_is_drawn(tmp_path: Path) -> None:
    source = rollouts(tmp_path)
    orders = set()

    def look(browser: Browser) -> None:
        page = browser.ask()[1]
        orders.add(tuple(shown(page)))
        browser.send(page, "stop")

    for seed in range(8):
        at_the_page(source, tmp_path / f"{seed}.jsonl", look, seed=seed)
    assert len(orders) > 1


def test_others_get_nothing(tmp_path: Path) -> None:
    """Without the token, or under another name of this address."""

    def look(browser: Browser) -> None:
        page = browser.ask()[1]
        for answer in (browser.ask(path="/"), browser.ask(path="/wrong"), browser.ask(Host="evil.example:80")):
            assert answer[0] == 404 and "Group" not in answer[1]
        assert browser.ask({"number": "1", "order": "a b c"}, Host="evil.example")[0] == 404
        browser.send(page, "stop")

    assert at_the_page(rollouts(tmp_path), tmp_path / "out.jsonl", look).labelled == 0


def test_what_cannot_start_is_told() -> None:
    with pytest.raises(ConfigurationError, match="name of who labels is empty"):
        People(" ")
    with People("anna") as people:
        port = urlsplit(people.url).port
        with pytest.raises(ConfigurationError, match="cannot be listened at"):
            People("anna", port=int(port or 0))
