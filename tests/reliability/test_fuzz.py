"""Inputs from outside, damaged at random, within the time of a test; `fuzz.py` does it for as long as you like."""

from __future__ import annotations

import pickle
import random
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzz_targets import RequestTarget, fuzz_checkpoint, fuzz_image, fuzz_jsonl, prepare
from guard import SECRET, ForbiddenError, guarded
from random_groups import TIMES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = tmp_path_factory.mktemp("root") / "given"
    given.mkdir()
    prepare(given)
    return given


@pytest.fixture(scope="module")
def request_target() -> Iterator[RequestTarget]:
    target = RequestTarget()
    yield target
    target.close()


def tried(target: Callable[[random.Random, Path], str], folder: Path, runs: int) -> Counter[str]:
    """What became of the inputs; an exception names the seed that brings it back."""
    counts = Counter[str]()
    for seed in range(runs * TIMES):
        try:
            counts[target(random.Random(seed), folder)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert counts["taken"] > 0 and counts["refused"] > 0, "one that is always refused shows little"
    return counts


@pytest.mark.filterwarnings("ignore")
def test_json_lines(folder: Path) -> None:
    tried(fuzz_jsonl, folder, 1500)


@pytest.mark.filterwarnings("ignore")
def test_checkpoints(folder: Path) -> None:
    tried(fuzz_checkpoint, folder, 120)


@pytest.mark.filterwarnings("ignore")
def test_images(folder: Path) -> None:
    tried(fuzz_image, folder, 800)


@pytest.mark.filterwarnings("ignore")
def test_requests(folder: Path, request_target: RequestTarget) -> None:
    tried(request_target, folder, 150)


class Evil:
    """Calls a function when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return len, ("x",)


def test_the_guard_sees_what_it_is_there_for(folder: Path) -> None:
    """Or the fuzzers would show nothing."""
    data = pickle.dumps(Evil())
    with pytest.raises(ForbiddenError, match=r"pickle\.find_class"), guarded():
        pickle.loads(data)
    with pytest.raises(ForbiddenError, match=f"open .*{SECRET}"), guarded():
        (folder / ".." / SECRET / "a.png").read_bytes()
    with pytest.raises(ForbiddenError, match=r"socket\.connect"), guarded(), socket.socket() as probe:
        probe.connect_ex(("127.0.0.1", 9))
    with pytest.raises(ForbiddenError, match=r"subprocess\.Popen"), guarded():
        subprocess.run(["true"], check=True)
    with guarded():
        (folder / "ranked.jsonl").read_bytes()
