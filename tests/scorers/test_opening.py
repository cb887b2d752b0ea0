"""`open_scorer`: the same scores from folder, URL and loaded model, and good reasons where none can be opened."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import running
from tiny_models import checkpoint_groups, reward_model

from mr_reward import GroupScorer
from mr_reward.checkpoint import weights_digest
from mr_reward.errors import CheckpointError, ConfigurationError, ScoringServerError
from mr_reward.scorers import OffloadedScorer, RemoteScorer, open_scorer
from mr_reward.scorers.opening import require_local, scored_by
from mr_reward.serving import build_app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    reward_model("llama").save_pretrained(folder)
    return folder


def test_each_source_gives_the_same_scores(folder: Path) -> None:
    groups = checkpoint_groups("llama")
    expected = GroupScorer(reward_model("llama")).score(groups)
    local: dict[str, Any] = {"device": "cpu", "over_length": "drop_group"}
    opened: list[Any] = [open_scorer(source, **local) for source in (folder, str(folder), reward_model("llama"))]
    opened.append(open_scorer(folder, placement="offload", **local))
    with running(build_app(opened[0])) as url:
        opened.append(open_scorer(url, deadline=60.0, expected_hash=weights_digest(reward_model("llama"))))
        for scorer in opened:
            found = [list(result.scores or ()) for result in scorer.score_detailed(groups)]
            assert found == [pytest.approx(scores, rel=0, abs=1e-6) for scores in expected]
            assert scored_by(scorer) == scored_by(opened[0])
        opened[-1].close()
    assert [type(scorer) for scorer in opened[2:]] == [GroupScorer, OffloadedScorer, RemoteScorer]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("/no/such/folder", {}, CheckpointError, "/no/such/folder"),
        ("127.0.0.1:8765", {}, ConfigurationError, "if a scoring server is meant, give http://127.0.0.1:8765"),
        ("ftp://host", {}, ConfigurationError, "expected http://host:port"),
        ("http://host", {"device": "cpu", "num_orders": 3}, ConfigurationError, "num_orders, device cannot be given"),
        ("rm", {"token": "abc"}, ConfigurationError, "got a token with 'rm'"),
        ("rm", {"placement": "disk"}, ConfigurationError, "placement is 'disk', expected one of resident, offload"),
        (torch.nn.Linear(1, 1), {}, ConfigurationError, "the reward model is Linear, expected a folder, a hub id"),
        (None, {}, ConfigurationError, "the reward model is NoneType"),
    ],
)
def test_what_cannot_be_opened(source: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_scorer(source, **options)


def test_a_folder_without_a_reward_model(tmp_path: Path) -> None:
    reward_model("llama").backbone.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        open_scorer(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError):
        open_scorer(tmp_path)


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(ScoringServerError, match=r"ConnectError.*check that the server runs"):
        open_scorer(f"http://127.0.0.1:{port}", deadline=1.0)


def test_another_model_than_expected(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="expected abc"):
        open_scorer(folder, device="cpu", expected_hash="abc")


def test_whatever_decides_the_scores_is_told() -> None:
    model = reward_model("llama", "causal")
    for options in ({"max_tokens_per_batch": 300}, {"num_orders": 3}, {"over_length": "truncate_responses"}):
        expected = {"max_tokens_per_batch": 16384, "num_orders": 1, "over_length": "error", **options}
        scorer = GroupScorer(model, **{"over_length": "error", **options})  # type: ignore[arg-type]
        assert scored_by(scorer) == (weights_digest(model), expected)


def test_what_needs_the_model_says_so() -> None:
    scorer = OffloadedScorer(GroupScorer(reward_model("llama", fresh=True)), "cpu")
    with pytest.raises(ConfigurationError, match="mr-reward attack needs the model itself, got OffloadedScorer"):
        require_local(scorer, "mr-reward attack")
