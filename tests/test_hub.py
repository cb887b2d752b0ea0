"""A name behind which nothing stands is told at once, wherever a model or a data set is named.

Against a little hub on this machine: one that answers, one that is not there, and one that takes the call and says
nothing.
"""

from __future__ import annotations

import http.server
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tiny_models import reward_model
from typer.testing import CliRunner

from mr_reward import GroupScorer, MultiResponseReward, MultiResponseRewardModel, ResponseGroup
from mr_reward.cli.app import app
from mr_reward.data.groups_file import save_preferences
from mr_reward.data.sources import read_rows
from mr_reward.doctor import examine_machine
from mr_reward.errors import CheckpointError, ConfigurationError, MRRewardError
from mr_reward.evaluation import load_scorer
from mr_reward.hub import why_missing
from mr_reward.runs.recipe import PolicyArguments, load_prompts
from mr_reward.scorers import open_scorer

MISSING = "is no folder, and no hub within reach has it"


class Hub(http.server.ThreadingHTTPServer):
    """Knows `owner/known`, of which it has no file, and `owner/gated`; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        if "/resolve/" in self.path:  # once a process the library asks for something of its own
            self.server.asked.append(self.path)
        known, gated = "owner/known" in self.path, "owner/gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "EntryNotFound" if known else "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: Any) -> None:
        """Not on the screen."""


def point_to(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """What HF_ENDPOINT does to a process that starts."""
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    point_to(monkeypatch, server.server_port)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def silence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes the call and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        point_to(monkeypatch, listening.getsockname()[1])
        monkeypatch.setattr("mr_reward.hub._SECONDS", 0.5)
        yield


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "../rm", "a/b/c", "outputs/", "~/rm", "rm.safetensors", "a\\b", "x y", "rm:1"]
)
def test_no_hub_is_asked_for_a_path(name: str, hub: Hub) -> None:
    assert str(why_missing(name)).startswith(MISSING) and not hub.asked


def test_a_hub_is_asked_once(hub: Hub) -> None:
    assert str(why_missing("owner/none")).startswith(MISSING) and len(hub.asked) == 1
    assert why_missing("owner/known") is None and why_missing("owner/gated") is None
    reason = why_missing("owner/none", kind="dataset")
    assert str(reason).startswith("is no file, no folder and no hub id within reach")
    assert [path.split("/resolve")[0] for path in hub.asked[1:]] == [
        "/owner/known",
        "/owner/gated",
        "/datasets/owner/none",
    ]  # noqa: E501
    assert str(why_missing("train.jsonl", kind="dataset")).startswith("is no file") and len(hub.asked) == 4


def test_what_is_here_is_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "outputs" / "rm").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text("")
    assert why_missing("outputs/rm") is why_missing("rows.jsonl", kind="dataset") is None
    assert str(why_missing("rows.jsonl")).startswith("is a file, expected a folder")
    assert not hub.asked
    for wrong in ("outputs/rn", "./outputs/rm2"):
        assert f"(there is {Path('outputs/rm')})" in str(why_missing(wrong))


def test_a_hub_that_does_not_answer(silence: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    assert "The hub does not answer (ReadTimeout" in str(why_missing("owner/none"))
    assert time.monotonic() - started < 3
    snapshot = tmp_path / "cache" / "models--owner--none" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert why_missing("owner/none") is not None, "an empty snapshot is none"
    (snapshot / "config.json").write_text("{}")
    assert why_missing("owner/none") is None and "HF_HUB_OFFLINE=1 reads the cache" in caplog.text
    assert why_missing("owner/none", kind="dataset") is not None


def test_offline_only_the_cache_counts(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in str(why_missing("owner/none"))
    (tmp_path / "other" / "models--owner--none" / "snapshots" / "abc" / "x").mkdir(parents=True)
    assert why_missing("owner/none", cache_dir=tmp_path / "other") is None and why_missing("owner/none") is not None
    assert not hub.asked


def command(*arguments: str) -> Callable[[str], Any]:
    def run(name: str) -> None:
        given = [argument.replace("NAME", name) for argument in arguments]
        result = CliRunner().invoke(app, given)
        assert result.exception is not None
        raise result.exception

    return run


def doctor(name: str) -> None:
    (red,) = [finding for finding in examine_machine(name) if finding.level == "red"]
    raise CheckpointError(red.text)


NAMED: dict[str, Callable[[str], Any]] = {
    "score": command("score", "NAME", "groups.jsonl"),
    "evaluate": command("evaluate", "groups", "NAME", "--source", "groups.jsonl", "--out", "r"),
    "evaluate classifier": command("evaluate", "groups", "classifier:NAME", "--source", "groups.jsonl", "--out", "r"),
    "evaluate alone": command("evaluate", "groups", "NAME", "--source", "groups.jsonl", "--out", "r", "--alone"),
    "attack": command("attack", "NAME", "groups.jsonl"),
    "serve": command("serve", "NAME"),
    "inspect": command("inspect", "groups.jsonl", "--score", "--model", "NAME"),
    "merge": command("merge", "NAME", "out"),
    "export": command("export", "NAME", "out"),
    "verify": command("verify", "NAME"),
    "doctor": doctor,
    "reward": lambda name: MultiResponseReward(name, num_generations=2),
    "scorer": GroupScorer.from_pretrained,
    "open_scorer": open_scorer,
    "load_scorer": load_scorer,
    "backbone": MultiResponseRewardModel.from_backbone,
}
DATA: dict[str, Callable[[str], Any]] = {
    "evaluate": command("evaluate", "vl_rewardbench", "./no/model", "--source", "NAME", "--out", "r"),
    "convert": command("data", "convert", "skywork", "NAME", "out.jsonl"),
    "rows": read_rows,
    "prompts": lambda name: load_prompts(PolicyArguments(dataset=name)),
    "held out": lambda name: load_prompts(PolicyArguments(eval_dataset=name), evaluation=True),
}


@pytest.fixture
def groups_file(hub: Hub, tmp_path: Path) -> None:
    group = ResponseGroup(prompt="?", responses=["a", "b"], rankings=[1, 2])
    save_preferences([group], tmp_path / "groups.jsonl")


@pytest.mark.parametrize("what", NAMED)
@pytest.mark.parametrize("name", ["./nowhere", "outputs/rm"])
def test_a_model_that_is_nowhere(what: str, name: str, groups_file: None, hub: Hub, caplog: Any) -> None:
    started = time.monotonic()
    with pytest.raises(MRRewardError, match=re.escape(f"{name} {MISSING}")):
        NAMED[what](name)
    assert len(hub.asked) == (name == "outputs/rm") and time.monotonic() - started < 10
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize("what", DATA)
@pytest.mark.parametrize("name", ["./nowhere", "nowhere.jsonl", "owner/none"])
def test_data_that_are_nowhere(what: str, name: str, groups_file: None, hub: Hub) -> None:
    with pytest.raises(MRRewardError, match=rf"{re.escape(name)}.* is no file"):
        DATA[what](name)
    assert len(hub.asked) == (name == "owner/none")


def test_the_backbone_of_an_adapter_that_is_nowhere(hub: Hub, tmp_path: Path) -> None:
    reward_model("llama").config.save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    config = json.loads((tmp_path / "lora" / "config.json").read_text())
    config["backbone_name_or_path"] = "owner/none"
    (tmp_path / "lora" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"owner/none: no backbone .*: it {MISSING}"):
        GroupScorer.from_pretrained(tmp_path / "lora")
    assert len(hub.asked) == 1


def test_the_address_of_a_server_without_its_scheme() -> None:
    for name in ("localhost:8765", "127.0.0.1:8765"):
        with pytest.raises(ConfigurationError, match=f"give http://{name}"):
            open_scorer(name)
