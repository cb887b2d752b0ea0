"""`MultiResponseReward(server=...)` and `mr-reward serve`, with real models in processes of their own."""

from __future__ import annotations

import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_worker import call
from tiny_models import random_image, reward_model
from tiny_runs import SHORT_RUN, save_policy_that_sees
from typer.testing import CliRunner

from mr_reward import GroupScorer, MultiResponseReward, ResponseGroup
from mr_reward.checkpoint import weights_digest
from mr_reward.cli.app import app
from mr_reward.errors import CheckpointError, ConfigurationError, ScoringServerError
from mr_reward.integrations import openrlhf
from mr_reward.scorers import RemoteScorer, opening
from mr_reward.serving import ServerLimits
from mr_reward.serving import server as server_module

Groups = Callable[..., list[ResponseGroup]]
SAME = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    reward_model("qwen3_vl").save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and process of a server as a user starts it."""
    command = [sys.executable, "-c", "from mr_reward.cli import main; main()", "serve", str(folder), *options]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, **environment})
        try:
            yield _url_in(Path(log.name), process), process
        finally:
            process.terminate()
            process.wait(20)


def _url_in(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Waits until the server has told where it listens."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and process.poll() is None:
        if found := re.search(r"http://[\d.]+:\d+", log.read_text()):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {log.read_text()}")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with serving(folder, "--port", "0", "--dtype", "float32") as (url, _):
        yield url


def rollouts(n: int, prompts: int, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """What TRL hands over: images in the prompts, strange texts in the completions."""
    rng = random.Random(seed)
    found: tuple[list[Any], list[Any]] = ([], [])
    for i in range(prompts):
        image = random_image(rng)
        content = [{"type": "image", "image": image}, {"type": "text", "text": f"What is it? ({i})"}]
        for k in range(n):
            text = rng.choice(["a 🙂", "\ud800 b", "<|im_end|>", "same", "c " * k])
            found[0].append([{"role": "user", "content": content}])
            found[1].append([{"role": "assistant", "content": text}])
    return found


@pytest.mark.parametrize("transform", ["centred", "raw", "rank", "win_rate"])
def test_rewards_are_those_of_the_process(server: str, folder: Path, transform: str) -> None:
    prompts, completions = rollouts(4, 6)
    here = MultiResponseReward(folder, num_generations=4, reward=transform)
    there = MultiResponseReward(server=server, num_generations=4, reward=transform)
    expected, found = call(here, prompts, completions), call(there, prompts, completions)
    assert found["rewards"] == pytest.approx(expected["rewards"], rel=0, abs=SAME)
    assert max(expected["rewards"]) - min(expected["rewards"]) > 1000 * SAME
    for key in expected["metrics"].keys() - {"mr_reward/ms_per_group"}:
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-4, abs=1e-5), key
    assert found["extra"]["mr_reward_truncated"] == expected["extra"]["mr_reward_truncated"]
    groups = [[scored.group.responses for scored in reward.last_scored] for reward in (there, here)]
    assert groups[0] == groups[1]


def test_a_copy_asks_the_same_server(server: str) -> None:
    prompts, completions = rollouts(4, 2)
    reward = MultiResponseReward(server=server, num_generations=4)
    copy = pickle.loads(pickle.dumps(reward))
    assert call(copy, prompts, completions)["rewards"] == pytest.approx(
        call(reward, prompts, completions)["rewards"], rel=0, abs=SAME
    )


def test_the_ranks_compare_the_servers_model(server: str, folder: Path) -> None:
    """Both placements give the checksum of the same weights, so that ranks may even mix them."""
    here = MultiResponseReward(folder, num_generations=4)
    there = MultiResponseReward(server=server, num_generations=4)
    assert here._weights_digest() == there._weights_digest() == weights_digest(reward_model("qwen3_vl"))


def test_refusals(server: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="got neither a model nor a server"):
        MultiResponseReward(num_generations=4)
    with pytest.raises(ConfigurationError, match="model cannot be given together with server"):
        MultiResponseReward(folder, server=server, num_generations=4)
    with pytest.raises(ConfigurationError, match="over_length, num_orders cannot be given together with server"):
        MultiResponseReward(server=server, num_generations=4, over_length="error", num_orders=3)
    with pytest.raises(CheckpointError, match="expected abc"):
        MultiResponseReward(server=server, num_generations=4, server_hash="abc")
    with pytest.raises(ConfigurationError, match="num_generations is 0"):
        MultiResponseReward(server=server)


def test_the_recipe_trains_with_a_server(server: str, folder: Path, tmp_path: Path) -> None:
    recipes = Path(__file__).parents[2] / "grpo_recipes"
    sys.path.insert(0, str(recipes))
    from train_policy import WorldPolicyArguments, train_policy
    from trl import GRPOConfig, ModelConfig

    save_policy_that_sees(tmp_path / "policy")
    arguments = WorldPolicyArguments(reward_server=server, num_prompts=8, num_digits=2)
    args = GRPOConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=8,
        max_steps=2,
        gradient_checkpointing=False,
        **SHORT_RUN,
    )
    trainer = train_policy(arguments, args, ModelConfig(model_name_or_path=str(tmp_path / "policy")))
    logged = [entry for entry in trainer.state.log_history if "mr_reward/score_spread" in entry]
    assert len(logged) == 2 and all(entry["mr_reward/dropped_groups"] == 0 for entry in logged)


def test_one_of_two_workers_is_killed(folder: Path, groups: Groups) -> None:
    """200 groups in flight over one port, kill -9 in the middle: every score is right, none is lost."""
    given = groups(200)
    expected = GroupScorer.from_pretrained(folder, over_length="drop_group").score(given)
    options = ("--port", str(free_port()), "--reuse-port", "--dtype", "float32")
    with ExitStack() as stack:
        (url, first), (_, second) = (stack.enter_context(serving(folder, *options)) for _ in range(2))
        remote = RemoteScorer(url, deadline=120.0, attempt_timeout=20.0, max_in_flight=32, groups_per_request=2)
        found: list[list[float] | None] = []
        asking = threading.Thread(target=lambda: found.extend(remote.score(given)))
        remote.connect()
        asking.start()
        time.sleep(0.3)
        assert asking.is_alive(), "the answers came before anything could happen"
        first.send_signal(signal.SIGKILL)
        asking.join(120)
        assert not asking.is_alive() and second.poll() is None and first.wait(5) == -signal.SIGKILL
        remote.close()
    assert len(found) == 200
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=0, abs=SAME)


def test_workers_with_different_models(folder: Path, tmp_path: Path, groups: Groups) -> None:
    reward_model("qwen3_vl", "isolated").save_pretrained(tmp_path / "other")
    port = str(free_port())
    with serving(folder, "--port", port) as (url, first):
        remote = RemoteScorer(url, deadline=30.0, attempt_timeout=5.0)
        remote.score(groups(2))
        first.kill()
        first.wait(10)
        with serving(tmp_path / "other", "--port", port), pytest.raises(CheckpointError, match="scores with model"):
            remote.score(groups(2))
        remote.close()


def test_stopping_the_server_answers_what_is_on_its_way(folder: Path, groups: Groups) -> None:
    given = groups(60)
    with serving(folder, "--port", "0", "--dtype", "float32") as (url, process):
        remote = RemoteScorer(url, deadline=60.0, groups_per_request=60)
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.extend(remote.score(given)))
        remote.connect()
        asking.start()
        time.sleep(0.3)
        process.terminate()
        asking.join(60)
        assert process.wait(20) in (0, -signal.SIGTERM)
        remote.close()
    assert len(found) == 60


def test_token_from_file_and_environment(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("abc123\n")
    with serving(folder, "--port", "0", "--token-file", str(tmp_path / "token")) as (url, _):
        with pytest.raises(ScoringServerError, match="refuses the token"):
            MultiResponseReward(server=url, num_generations=2)
        assert MultiResponseReward(server=url, num_generations=2, server_token="abc123")
        monkeypatch.setenv("MR_REWARD_TOKEN", "abc123")
        assert MultiResponseReward(server=url, num_generations=2)


def test_every_option_of_serve_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}
    scorer = GroupScorer(reward_model("qwen3_vl"))

    def recording(name: str, result: Any = None) -> Any:
        return lambda *given, **options: calls.update({name: (given, options)}) or result

    monkeypatch.setattr(opening, "open_scorer", recording("open", scorer))
    monkeypatch.setattr(openrlhf, "build_collecting_app", recording("collect", "collecting app"))
    monkeypatch.setattr(server_module, "build_app", recording("build", "app"))
    monkeypatch.setattr(server_module, "run_app", recording("run"))
    (tmp_path / "token").write_text("abc\n")
    common = {"--port": 1, "--device": "cpu", "--dtype": "bfloat16", "--max-tokens": 77, "--over-length": "error"}
    common |= {"--num-orders": 3, "--max-groups": 2, "--max-request-mb": 0.5, "--max-megapixels": 0.25}
    common |= {"--max-pending": 5, "--max-wait-ms": 7}
    limits = ServerLimits(max_groups=2, max_request_bytes=2**19, max_pixels=250_000, max_pending=5, max_wait=0.007)
    opened = {"device": "cpu", "dtype": torch.bfloat16, "max_tokens_per_batch": 77, "over_length": "error"}

    def serve(*options: object, **others: object) -> None:
        calls.clear()
        parts = [part for name, value in {**common, **others}.items() for part in (name, value)]
        command = ["serve", "rm", *map(str, [*parts, *options])]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        assert calls["open"] == (("rm",), {**opened, "num_orders": 3})

    serve("--host", "0.0.0.0", "--token-file", tmp_path / "token", "--reuse-port")
    assert calls["build"] == ((scorer,), {"token": "abc", "limits": limits})
    assert calls["run"] == (("app",), {"host": "0.0.0.0", "port": 1, "reuse_port": True})
    serve()
    assert calls["build"][1]["token"] is None and calls["run"][1] == {
        "host": "127.0.0.1",
        "port": 1,
        "reuse_port": False,
    }
    serve("--collect", 4, "--reward", "rank", "--deadline", 9.5, "--media", tmp_path)
    assert "build" not in calls and calls["run"] == (("collecting app",), {"host": "127.0.0.1", "port": 1})
    given = {"num_generations": 4, "reward": "rank", "deadline": 9.5, "media_root": tmp_path, "limits": limits}
    assert calls["collect"] == ((scorer,), given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines and there is no token"),
        (["--dtype", "float33"], "--dtype is 'float33', expected one of float32"),
        (["--max-groups", "0"], "max_groups is 0"),
        (["--over-length", "cut"], "unknown over-length policy 'cut'"),
    ],
)
def test_options_of_serve(folder: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["serve", str(folder), *options])
    assert isinstance(result.exception, ConfigurationError) and message in str(result.exception)
