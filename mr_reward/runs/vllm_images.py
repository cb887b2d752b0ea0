"""Images and colocated vLLM in TRL 1.16: one placeholder for each image in, and a check of what comes out.

TRL hands vLLM token ids in which every image has its full run of image tokens already, together with the images; vLLM
expands the first token of each run once more, and the policy sees a corrupted prompt (huggingface/trl issue 6294; no
error, on any device). Once TRL sends single placeholders itself, this does nothing but check.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from mr_reward.errors import GroupAssemblyError

__all__ = ["collapse_image_tokens", "send_single_placeholders"]

_NEVER = -100.0  # added to a logit: the smallest that vLLM takes


def collapse_image_tokens(token_ids: Sequence[int], image_token_id: int, num_images: int) -> list[int]:
    """Shorten each run of image tokens to one.

    Args:
        token_ids: of a prompt.
        image_token_id: the token that stands for a patch of an image.
        num_images: images of the prompt; there have to be as many runs.

    Returns:
        The shorter prompt.

    Raises:
        GroupAssemblyError: the number of runs is another one.

    Example:
        >>> collapse_image_tokens([5, 9, 9, 9, 6, 9, 7], 9, 2)
        [5, 9, 6, 9, 7]
    """
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
    the policy cannot write image tokens.

    Args:
        trainer: a `GRPOTrainer` or `RLOOTrainer`; without vLLM, in server mode or with a text-only policy nothing is
            done.

    Raises:
        GroupAssemblyError: during generation, if the prompts differ.

    Example:
        ```python
        trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, vllm_mode="colocate", ...))
        send_single_placeholders(trainer)
        ```
    """
    image_token_id = getattr(trainer.processing_class, "image_token_id", None)
    llm = getattr(getattr(trainer, "vllm_generation", None), "llm", None)
    if llm is not None and image_token_id is not None:
        llm.generate = _aligned(llm.generate, image_token_id)


def _aligned(generate: Callable[..., Any], image_token_id: int) -> Callable[..., Any]:
    @functools.wraps(generate)
    def wrapper(prompts: Sequence[dict[str, Any]], *, sampling_params: Any, **options: Any) -> Any:
        sent = []
        for row in prompts:
            images = row.get("multi_modal_data", {}).get("image", ())
            count = len(images) if isinstance(images, list) else 1 if images else 0
            ids = collapse_image_tokens(row["prompt_token_ids"], image_token_id, count)
            sent.append({**row, "prompt_token_ids": ids})
        # A policy that writes an image token has no image for it. TRL keeps it from that with transformers' generate.
        sampling_params.logit_bias = {**(sampling_params.logit_bias or {}), image_token_id: _NEVER}
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
