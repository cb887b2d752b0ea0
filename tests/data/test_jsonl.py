"""JSON Lines files: read, written whole, and resumed after a kill, a full disk or a second command."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mr_reward.data.jsonl import ResumableJsonLines, read_json_lines, write_json_lines
from mr_reward.errors import ConfigurationError, GroupError

WRITER = """
import sys
from itertools import count
from mr_reward.data.jsonl import ResumableJsonLines
with ResumableJsonLines(sys.argv[1]) as file:
    done = sum(1 for _ in file.rows())
    for number in count(done):
        file.write([{"number": number, "text": "x" * 5000}])
"""


def resumed(path: Path, *more: object) -> list[object]:
    """What the file held, after which `more` is written."""
    with ResumableJsonLines(path) as file:
        found = [row for _, row in file.rows()]
        file.write(more)
    return found


def test_lines_are_numbered_and_blank_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n[2]\n{no\n' + b"[" * 100_000 + b"\n\xff\nnull")
    found = list(read_json_lines(path))
    assert [number for number, _ in found] == [1, 4, 5, 6, 7, 8]
    assert [row for _, row in found if not isinstance(row, GroupError)] == [{"a": 1}, [2], None]
    assert [number for number, row in found if isinstance(row, GroupError)] == [5, 6, 7]
    assert list(read_json_lines([b"1\n", b"2"])) == [(1, 1), (2, 2)]


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    def rows(count: int) -> Iterator[str]:
        yield from ["\ud800"] * count
        raise KeyboardInterrupt

    path = tmp_path / "deep" / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_json_lines(path, rows(3))
    assert list(path.parent.iterdir()) == []
    assert write_json_lines(path, [{"a": 1}, "\ud800"]) == 2
    with pytest.raises(KeyboardInterrupt):
        write_json_lines(path, rows(100_000))
    assert [row for _, row in read_json_lines(path)] == [{"a": 1}, "\ud800"], "the earlier file stays"
    assert write_json_lines(path, []) == 0 and path.read_bytes() == b""


def test_a_torn_line_is_written_again(tmp_path: Path) -> None:
    """Cut at any byte: whole lines are kept, the rest is not read, and cut off by the next write only."""
    path = tmp_path / "a.jsonl"
    rows = [{"n": 1}, {"n": 22}, {"n": 333}]
    assert resumed(path, *rows) == [] and resumed(path) == rows
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        count = whole[:size].count(b"\n")
        with ResumableJsonLines(path) as file:
            assert [row for _, row in file.rows()] == rows[:count]
            assert path.read_bytes() == whole[:size], "a file that is refused stays as it is"
            file.write(rows[count:])
        assert path.read_bytes() == whole


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with ResumableJsonLines(path) as file:
        file.write([1])
        with pytest.raises(ConfigurationError, match=r"a.jsonl: another process writes to this file"):
            resumed(path)
        file.write([2])
    assert resumed(path) == [1, 2]


def test_one_process_at_a_time_writes_a_whole_file(tmp_path: Path) -> None:
    """`mr-reward data convert` in two processes: the second is refused, the first ends well, nothing is left over."""
    pipe, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    row = json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"}).encode() + b"\n"
    pipe.write_bytes(row)
    code = (
        "import sys; from mr_reward.data.jsonl import write_json_lines\n"
        "def rows():\n yield 1\n print('writing', flush=True)\n sys.stdin.read()\n yield 2\n"
        "write_json_lines(sys.argv[1], rows())"
    )
    first = subprocess.Popen([sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == b"writing\n"
    command = [sys.executable, "-c", "from mr_reward.cli import main; main()", "data", "convert", "auto", pipe, out]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"error: {out}: another process writes to this file" in second.stderr
    first.communicate(timeout=60)
    assert out.read_bytes() == b"1\n2\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "pairs.jsonl"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert [list(found["responses"]) for _, found in read_json_lines(out)][0] in (["a", "b"], ["b", "a"])


@pytest.mark.parametrize("how", ["kill", "full disk"])
def test_a_run_that_stops_anywhere_is_resumed(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    count = 0
    for _ in range(3):
        limit = 17_000 + (path.stat().st_size if path.exists() else 0)
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], stderr=subprocess.PIPE)
        if how == "full disk":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if how == "kill" and path.exists() and path.stat().st_size > limit:
                process.send_signal(signal.SIGKILL)
        _, told = process.communicate(timeout=60)
        if how == "full disk":
            assert b"File too large" in told, told
            assert path.read_bytes().endswith(b"\n"), "whole lines only"
        found = resumed(path)
        assert [row["number"] for row in found if isinstance(row, dict)] == list(range(len(found)))
        assert len(found) > count
        count = len(found)
    assert json.loads(path.read_bytes().splitlines()[0])["number"] == 0
