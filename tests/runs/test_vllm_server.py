"""The look at a vLLM server before training: a real HTTP server that answers as one, or does not."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from trl import GRPOConfig

from mr_reward.errors import ConfigurationError
from mr_reward.runs.vllm import check_vllm_server, vllm_server_url

GOOD: dict[str, Any] = {
    "/health": "",
    "/v1/models": {"data": [{"id": "policy"}]},
    "/server_info?config_format=json": {
        "weight_transfer_config": {"backend": "nccl"},
        "model_config": {"max_model_len": 4096, "logprobs_mode": "processed_logprobs"},
    },
}


@contextmanager
def serve(pages: dict[str, Any], status: int = 200) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            body = b"" if page is None else page.encode() if isinstance(page, str) else json.dumps(page).encode()
            self.send_response(404 if page is None else status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def config(port: int, **options: Any) -> GRPOConfig:
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "127.0.0.1", "vllm_server_port": port}
    return GRPOConfig("out", **{**settings, "max_completion_length": 64, "use_cpu": True, "bf16": False, **options})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_a_good_server_passes(cuda: None, caplog: pytest.LogCaptureFixture) -> None:
    with serve(GOOD) as port:
        check_vllm_server(config(port), "policy")
        assert not caplog.records
        check_vllm_server(config(port), "another")
    assert "serves ['policy'], the policy is another" in caplog.text


def test_without_a_gpu_a_good_server_is_of_no_use() -> None:
    with serve(GOOD) as port, pytest.raises(ConfigurationError, match="without CUDA.*vllm_mode: colocate"):
        check_vllm_server(config(port), "policy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"/server_info?config_format=json": None}, "without the endpoints for new weights.*trl vllm-serve --model p"),
        ({"/server_info?config_format=json": {"weight_transfer_config": None}}, "without weight transfer"),
        (
            {"/server_info?config_format=json": {"weight_transfer_config": {}, "model_config": {"max_model_len": 64}}},
            "context of 64 tokens, expected more than max_completion_length=64",
        ),
        ({"/health": None}, "no vLLM server at.*it has no /health"),
    ],
)
def test_servers_that_cannot_serve_the_run(cuda: None, change: dict[str, Any], message: str) -> None:
    with serve({**GOOD, **change}) as port, pytest.raises(ConfigurationError, match=message):
        check_vllm_server(config(port), "policy")


def test_a_server_in_trouble(cuda: None) -> None:
    with serve(GOOD, status=503) as port, pytest.raises(ConfigurationError, match="answered 503"):
        check_vllm_server(config(port), "policy")


def test_nobody_there(cuda: None) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=f"no vLLM server at http://127.0.0.1:{port}.*start it with"):
        check_vllm_server(config(port), "policy")
    assert time.monotonic() - started < 5
    with pytest.raises(ConfigurationError, match="no vLLM server at nonsense"):
        check_vllm_server(config(port, vllm_server_base_url="nonsense/"), "policy")


def test_waits_for_a_server_that_is_still_starting(cuda: None) -> None:
    pages = {**GOOD, "/health": None}
    with serve(pages) as port:
        threading.Timer(1.0, lambda: pages.update({"/health": ""})).start()
        check_vllm_server(config(port), "policy", wait=30.0)


def test_url() -> None:
    assert vllm_server_url(config(1234)) == "http://127.0.0.1:1234"
    assert vllm_server_url(config(1, vllm_server_base_url="https://gpu:9/")) == "https://gpu:9"
