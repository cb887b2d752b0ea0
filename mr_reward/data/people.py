"""People as labellers: a page on this machine shows a group and takes an order from the keyboard.

The page is a form without scripts: `b > a = c` and Enter. The responses stand in an order drawn for each group.
"""

from __future__ import annotations

import html
import logging
import queue
import random
import re
import secrets
import string
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs

from mr_reward.data.labels import Label, RolloutsToLabel, shown_turns
from mr_reward.errors import ConfigurationError
from mr_reward.groups import ResponseGroup, dense_ranks, undo_order

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_LONGEST_FORM = 10_000  # bytes
_SKIP, _STOP = "?", "stop"
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'self'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:1em auto;padding:0 1em}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f3f3f3;padding:.6em;margin:.2em 0}"
    "img{max-width:100%;min-width:8em;image-rendering:pixelated}input{font:inherit;width:20em}"
    ".wrong{color:#a00}@media(prefers-color-scheme:dark){body{background:#111;color:#eee}pre{background:#222}}"
)


class People:
    """Somebody at this machine's browser; use it as a context, which opens and closes the page."""

    at_a_time = 1

    def __init__(self, who: str, *, seed: int = 0, port: int = 0) -> None:
        if not who.strip():
            raise ConfigurationError("the name of who labels is empty; it is written beside each label")
        self.name = f"people {who.strip()}"
        self._seed = seed
        self._desk = _Desk()
        try:
            self._server = _PageServer((_HOST, port), self._desk)
        except OSError as error:
            raise ConfigurationError(f"port {port} cannot be listened at ({error}); give another --port") from error
        self.url = f"http://{_HOST}:{self._server.server_address[1]}/{self._desk.token}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, name="mr-reward-page", daemon=True)
        self._thread.start()
        logger.info("open %s (on this machine only)", self.url)
        return self

    def __exit__(self, *exception: object) -> None:
        self._desk.show(None)
        self._server.shutdown()
        self._server.server_close()  # after the last page has gone out
        self._thread.join()

    def label(self, items: Sequence[RolloutsToLabel]) -> Iterator[tuple[RolloutsToLabel, Label]]:
        """See `Labeller`; ends early when somebody says stop."""
        for item in items:
            if item.group.num_responses > len(string.ascii_lowercase):
                yield item, Label(why_not="more than 26 responses")
                continue
            order = list(range(item.group.num_responses))
            random.Random(f"{self._seed} {item.number}").shuffle(order)
            self._desk.show(_Sheet(item.number, item.group, order))
            answer = self._desk.answers.get()
            if answer == _STOP:
                return
            if answer == _SKIP:
                yield item, Label(why_not="skipped")
            else:
                places = read_places(answer, len(order))
                yield item, Label(ratings=[-float(rank) for rank in undo_order(dense_ranks(places), order)])


def read_places(text: str, count: int) -> list[int]:
    """The place of each slot in `b > a = c`, 0 for the best; `>`, commas and blanks may be left out, `=` ties.

    >>> read_places("b a=c", 3)
    [1, 0, 1]
    """
    letters = string.ascii_lowercase[:count]
    signs = re.sub(r"[\s,>]+", "", text.lower())
    places: dict[str, int] = {}
    place, ties = -1, True
    for i, sign in enumerate(signs):
        if sign == "=" and i > 0 and signs[i - 1] != "=":
            ties = True
        elif sign in letters and sign not in places:
            place += 0 if ties and places else 1
            places[sign], ties = place, False
        else:
            raise ValueError(f"{sign!r} at place {i + 1} is no new letter of {', '.join(letters)}")
    missing = [letter for letter in letters if letter not in places]
    if missing or signs.endswith("="):
        raise ValueError(f"{', '.join(missing) or 'a letter after ='} is missing")
    return [places[letter] for letter in letters]


@dataclass(frozen=True, slots=True)
class _Sheet:
    """The group that is shown."""

    number: int
    group: ResponseGroup
    order: list[int]


@dataclass
class _Desk:
    """What the page and the labelling share."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))  # other pages in the browser do not know it
    answers: queue.Queue[str] = field(default_factory=queue.Queue)
    sheet: _Sheet | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)
    count: int = 0  # sheets shown so far
    is_open: bool = False  # the sheet has no answer yet

    def show(self, sheet: _Sheet | None) -> None:
        """Put another group, or the end, before whoever looks."""
        with self.changed:
            self.sheet, self.count, self.is_open = sheet, self.count + 1, sheet is not None
            self.changed.notify_all()

    def take(self, number: int, answer: str) -> None:
        """Hand an answer on and wait for what comes next; one for a group that is no longer shown is ignored."""
        with self.changed:
            if self.sheet is None or self.sheet.number != number or not self.is_open:
                return
            before, self.is_open = self.count, False
            self.answers.put(answer)
            self.changed.wait_for(lambda: self.count > before, timeout=60.0)


class _PageServer(ThreadingHTTPServer):
    daemon_threads = False  # the last page goes out before the server closes

    def __init__(self, address: tuple[str, int], desk: _Desk) -> None:
        super().__init__(address, _PageHandler)
        self.desk = desk


class _PageHandler(BaseHTTPRequestHandler):
    server: _PageServer
    timeout = 30.0  # seconds of an idle connection, which must not keep the program from its end

    def log_message(self, *arguments: Any) -> None:
        """Nothing: the terminal has a progress bar."""

    def do_GET(self) -> None:
        if self._allowed():
            self._send(_page(self.server.desk))

    def do_POST(self) -> None:
        if not self._allowed():
            return
        desk, size = self.server.desk, int(self.headers.get("Content-Length") or 0)
        form = parse_qs(self.rfile.read(min(size, _LONGEST_FORM)).decode(errors="replace"))
        answer, number = (form.get(name, [""])[0].strip() for name in ("order", "number"))
        sheet, wrong = desk.sheet, ""
        if sheet is not None and number == str(sheet.number):
            try:
                if answer not in (_SKIP, _STOP):
                    read_places(answer, len(sheet.order))
                desk.take(sheet.number, answer)
            except ValueError as error:
                wrong = f"{answer}: {error}"
        self._send(_page(desk, wrong))

    def _allowed(self) -> bool:
        """A page of another site that has this address under its own name knows neither token nor host."""
        host = f"{_HOST}:{self.server.server_address[1]}"
        if self.path == f"/{self.server.desk.token}" and self.headers.get("Host") == host:
            return True
        self.send_error(404)
        return False

    def _send(self, page: str) -> None:
        content = page.encode(errors="replace")
        self.send_response(200)
        for name, value in {**_HEADERS, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _page(desk: _Desk, wrong: str = "") -> str:
    sheet = desk.sheet
    if sheet is None:
        text = "No group to label: it is done, or was stopped." if desk.count else "Wait, and load the page again."
        return _whole(f"<p>{text}</p>")
    parts = [f"<h1>Group {sheet.number}</h1>"]
    for role, content in shown_turns(sheet.group):
        parts.append(f"<p><b>{html.escape(role)}</b></p>")
        for kind, what in content:
            parts.append(f"<pre>{html.escape(what)}</pre>" if kind == "text" else f'<img alt="image" src="{what}">')
    for letter, i in zip(string.ascii_lowercase, sheet.order, strict=False):
        parts.append(f"<p><b>{letter}</b></p><pre>{html.escape(sheet.group.responses[i])}</pre>")
    parts.append(
        f'<form method="post"><p class="wrong" role="alert">{html.escape(wrong)}</p>'
        f'<input type="hidden" name="number" value="{sheet.number}"><label>Best first, as in b &gt; a = c '
        f"({_SKIP} for no answer, {_STOP} to stop), then Enter: "
        '<input name="order" autofocus autocomplete="off" spellcheck="false"></label></form>'
    )
    return _whole("".join(parts))


def _whole(body: str) -> str:
    head = f'<meta charset="utf-8"><title>Which response is better?</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
