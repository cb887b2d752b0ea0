"""vLLM in server mode: look at the server before the policy is loaded.

Rollouts then come from a `trl vllm-serve` on other GPUs; TRL (1.16) sends the weights over NCCL, so both sides need
CUDA.
"""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from typing import Any

import torch
from trl import GRPOConfig

from mr_reward.errors import ConfigurationError

__all__ = ["check_vllm_server", "vllm_server_url"]

logger = logging.getLogger(__name__)

_REQUEST_SECONDS = 10.0
_RETRY_SECONDS = 2.0


def vllm_server_url(args: GRPOConfig) -> str:
    """Where a configuration expects the server.

    Args:
        args: with `vllm_server_base_url`, or `vllm_server_host` and `vllm_server_port`.

    Returns:
        The URL without a slash at its end.

    Example:
        >>> vllm_server_url(GRPOConfig("out", vllm_server_host="gpu2", bf16=False, use_cpu=True))
        'http://gpu2:8000'
    """
    return (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")


def check_vllm_server(args: GRPOConfig, policy: str, *, wait: float = 0.0) -> None:
    """Refuse a server that cannot serve this run, while nothing is loaded yet.

    Args:
        args: of the run.
        policy: folder or hub id of the policy; for messages, and compared with what the server says it serves.
        wait: seconds to wait for a server that does not answer yet.

    Raises:
        ConfigurationError: nobody answers; the server cannot take weights; its context is too short; no CUDA here.

    Example:
        ```python
        if args.use_vllm and args.vllm_mode == "server":
            check_vllm_server(args, "my-policy", wait=args.vllm_server_timeout)
        ```
    """
    url = vllm_server_url(args)
    start = f"start it with: trl vllm-serve --model {policy}"
    _wait_for(url, wait, start)
    info = _get(f"{url}/server_info?config_format=json")
    if info is None:
        raise ConfigurationError(
            f"{url} is a vLLM server without the endpoints for new weights (/server_info is not there), expected one "
            f"that can be trained with; {start}"
        )
    if info.get("weight_transfer_config") is None:
        raise ConfigurationError(
            f"{url} is a vLLM server without weight transfer, expected --weight-transfer-config; {start}"
        )
    length = info.get("model_config", {}).get("max_model_len")
    if length is not None and args.max_completion_length is not None and length <= args.max_completion_length:
        raise ConfigurationError(
            f"{url} has a context of {length} tokens, expected more than max_completion_length="
            f"{args.max_completion_length}; {start} --max_model_len with room for prompt and completion"
        )
    served = [model.get("id") for model in (_get(f"{url}/v1/models") or {}).get("data", [])]
    if policy not in served:
        logger.warning("%s serves %s, the policy is %s: they have to be the same model", url, served, policy)
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "vllm_mode is 'server' on a machine without CUDA, expected a GPU: TRL sends the weights to the server "
            "over NCCL; use vllm_mode: colocate, which runs on a CPU too"
        )


def _wait_for(url: str, wait: float, start: str) -> None:
    deadline = time.monotonic() + wait
    while True:
        try:
            if _get(f"{url}/health") is not None:
                return
            cause = "it has no /health"
        except ConfigurationError as error:
            cause = str(error)
        if time.monotonic() >= deadline:
            raise ConfigurationError(f"no vLLM server at {url} ({cause}), waited {wait:.0f} s; {start}")
        time.sleep(min(_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))


def _get(url: str) -> dict[str, Any] | None:
    """The JSON object at a URL ({} for another body); None if there is no such page."""
    try:
        with urllib.request.urlopen(url, timeout=_REQUEST_SECONDS) as response:
            body = response.read()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise ConfigurationError(f"{url} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no URL at all
        raise ConfigurationError(f"{url} cannot be read: {error}") from error
    try:
        content = json.loads(body)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
