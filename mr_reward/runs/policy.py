"""A policy that writes N answers to each prompt, by transformers' `generate` or by vLLM, as TRL's trainers do it."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from trl.chat_template_utils import parse_response

from mr_reward.checkpoint.verify import check_there, has_file, load_processor, reading, safe_options
from mr_reward.errors import ConfigurationError, GroupError, MediaError
from mr_reward.groups import ResponseGroup
from mr_reward.messages.completions import Completion
from mr_reward.runs.vllm import aligned_generate, prepare_vllm_on_cpu
from mr_reward.scorers.opening import DTYPES, default_device
from mr_reward.templates.chat import is_prefilled
from mr_reward.templates.images import image_source, is_url, load_image

_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TEMPLATE_ERRORS = (ValueError, TypeError, KeyError, IndexError)  # jinja2's own are ValueErrors in transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptToAnswer:
    """A prompt as the file has it, and as a group of one empty response, which holds its media."""

    prompt: str | Sequence[dict[str, Any]]  # text goes to the policy as it is, messages by its chat template
    group: ResponseGroup


@dataclass(frozen=True, slots=True)
class Answer:
    """One rollout."""

    completion: Completion
    cut_off: bool  # it has not come to its end within `max_completion_length`


class AnsweringPolicy(Protocol):
    """What writes rollouts."""

    def answer(self, prompts: Sequence[PromptToAnswer], seed: int) -> list[list[Answer]]:
        """N rollouts of each prompt; the same seed and prompts give the same ones."""


def open_policy(arguments: Any) -> AnsweringPolicy:
    """The policy of a `CollectArguments`."""
    check_there(arguments.policy)
    return (VllmPolicy if arguments.use_vllm else TransformersPolicy)(arguments)


class _Template:
    """Prompts to what a policy reads, and its tokens to completions; both as `GRPOTrainer` of TRL 1.16."""

    def __init__(self, arguments: Any) -> None:
        self.processor = load_processor(arguments.policy)
        self.sees_images = hasattr(self.processor, "tokenizer")
        self.tokenizer: Any = self.processor.tokenizer if self.sees_images else self.processor
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.name = arguments.policy
        self.options = dict(arguments.chat_template_kwargs or {})
        names = ("response_template", "response_schema")
        self._parses = any(getattr(self.tokenizer, name, None) is not None for name in names)

    def render(self, prompts: Sequence[PromptToAnswer], **options: Any) -> Any:
        """Token ids and media tensors of prompts of one kind; `options` of the call for the batch (padding)."""
        first = prompts[0].group
        if isinstance(prompts[0].prompt, str):
            return self.processor(text=[one.prompt for one in prompts], **options)
        prefilled = is_prefilled(first.messages)
        if self.sees_images:
            options = {"processor_kwargs": {**options, **({"padding_side": "left"} if options else {})}}
            if first.videos:  # frames are one second apart, as the reward model is told
                options["processor_kwargs"] |= {
                    "do_sample_frames": False,
                    "video_metadata": [[_metadata(video) for video in one.group.videos] for one in prompts],
                }
        elif any(one.group.images or one.group.videos for one in prompts):
            raise MediaError(f"{first.name}: has images or videos, {self.name} reads text; take another policy")
        try:
            return self.processor.apply_chat_template(
                [self._messages(one) for one in prompts],
                tools=list(first.tools) or None,
                add_generation_prompt=not prefilled,
                continue_final_message=prefilled,
                tokenize=True,
                return_dict=True,
                **options,
                **self.options,
            )
        except _TEMPLATE_ERRORS as error:
            raise GroupError(
                f"{first.name}: the chat template of {self.name} does not take the prompt ({error}); change the "
                "prompt, its media or the template"
            ) from error

    def _messages(self, one: PromptToAnswer) -> list[dict[str, Any]]:
        """Blocks with media for a processor; a tokenizer gets what the file has, since many templates want text."""
        if not self.sees_images:
            return [dict(turn) for turn in one.prompt if not isinstance(turn, str)]
        media = {"image": iter(one.group.images), "video": iter(one.group.videos)}

        def filled(block: dict[str, Any]) -> dict[str, Any]:
            if block["type"] == "text":
                return block
            medium = next(media[block["type"]])
            opened = _opened(medium) if block["type"] == "image" else [_opened(frame) for frame in medium]
            return {"type": block["type"], block["type"]: opened}

        return [{**turn, "content": [filled(block) for block in turn["content"]]} for turn in one.group.messages]

    def completion(self, one: PromptToAnswer, prompt_ids: list[int], ids: list[int]) -> Completion:
        """What the policy wrote, with its tool calls where the tokenizer can read them."""
        if self._parses and not isinstance(one.prompt, str):
            return [parse_response(self.tokenizer, ids, prefix=prompt_ids, tools=list(one.group.tools) or None)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @staticmethod
    def kinds(prompts: Sequence[PromptToAnswer]) -> list[list[PromptToAnswer]]:
        """Neighbours that one call can render."""

        def kind(one: PromptToAnswer) -> Any:
            group = one.group
            is_text = isinstance(one.prompt, str)
            return is_text, group.tools, not is_text and is_prefilled(group.messages), bool(group.videos)

        return [list(run) for _, run in groupby(prompts, kind)]


class TransformersPolicy:
    """By `generate`: the sampling of `GRPOTrainer`, which repeats a prompt for each of its completions."""

    def __init__(self, arguments: Any) -> None:
        self._template = _Template(arguments)
        self._count = arguments.num_generations
        auto: Any = AutoModelForImageTextToText if self._template.sees_images else AutoModelForCausalLM
        dtype = DTYPES[arguments.dtype] if arguments.dtype else "auto"
        with reading(arguments.policy):
            model = auto.from_pretrained(arguments.policy, **safe_options(arguments.policy, {"dtype": dtype}))
        self._model = model.to(default_device()).eval()
        tokenizer = self._template.tokenizer
        declared = self._model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
        self._ends: set[int] = ends
        image_token = getattr(self._model.config, "image_token_id", None)
        # In place of the model's own: what it leaves open would be filled in from there.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=arguments.max_completion_length,
            do_sample=arguments.temperature > 0,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted(ends) or None,
            repetition_penalty=arguments.repetition_penalty,
            suppress_tokens=[image_token] if image_token is not None else None,  # it has no image for one
            disable_compile=True,
            **(_sampling(arguments) if arguments.temperature > 0 else {}),
        )

    def answer(self, prompts: Sequence[PromptToAnswer], seed: int) -> list[list[Answer]]:
        """See `AnsweringPolicy`."""
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(seed)
            return [found for run in _Template.kinds(prompts) for found in self._answer(run)]

    def _answer(self, prompts: Sequence[PromptToAnswer]) -> list[list[Answer]]:
        repeated = [one for one in prompts for _ in range(self._count)]
        inputs = self._template.render(repeated, padding=True, return_tensors="pt").to(self._model.device)
        length = inputs["input_ids"].shape[1]
        written = self._model.generate(**inputs)[:, length:].tolist()
        answers = []
        rows = zip(repeated, inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), written, strict=True)
        for one, row, mask, ids in rows:
            end = next((i for i, token in enumerate(ids) if token in self._ends), None)
            ids = ids if end is None else ids[: end + 1]
            prompt_ids = [token for token, seen in zip(row, mask, strict=True) if seen]
            answers.append(Answer(self._template.completion(one, prompt_ids, ids), end is None))
        return [answers[i : i + self._count] for i in range(0, len(answers), self._count)]


class VllmPolicy:
    """By a vLLM of this process alone, from the token ids that transformers makes of the prompt."""

    def __init__(self, arguments: Any) -> None:
        if has_file(arguments.policy, "adapter_config.json"):
            raise ConfigurationError(
                f"{arguments.policy} is a LoRA adapter, and vLLM is given whole policies here; merge it into its "
                "base, or leave out use_vllm"
            )
        own_gpu(os.environ)
        prepare_vllm_on_cpu()
        from mr_reward.runs.vllm import load_llm

        self._template = _Template(arguments)
        self._llm, make_sampling = load_llm(
            arguments.policy,
            gpu_memory_utilization=arguments.vllm_gpu_memory_utilization,
            max_model_len=arguments.vllm_max_model_length,
            dtype=arguments.dtype or "auto",
        )
        image_token = getattr(self._template.processor, "image_token_id", None)
        if image_token is not None:
            self._llm.generate = aligned_generate(self._llm.generate, image_token)
        self._count = arguments.num_generations
        options = {**_sampling(arguments), "min_p": arguments.min_p or 0.0, "n": self._count}
        options["repetition_penalty"] = arguments.repetition_penalty
        self._sampling = partial(make_sampling, **options, max_tokens=arguments.max_completion_length)

    def answer(self, prompts: Sequence[PromptToAnswer], seed: int) -> list[list[Answer]]:
        """See `AnsweringPolicy`."""
        rows: list[dict[str, Any]] = []
        for one in prompts:
            if one.group.videos:
                raise MediaError(f"{one.group.name}: has videos, which vLLM is not given here; leave out use_vllm")
            ids = [int(token) for token in self._template.render([one])["input_ids"][0]]
            images = [_opened(image) for image in one.group.images]
            rows.append({"prompt_token_ids": ids} | ({"multi_modal_data": {"image": images}} if images else {}))
        # vLLM gives rollout k of a prompt the seed s + k. Prompts of one seed would be answered with the same luck.
        seeds = [(seed + i * self._count) % 2**31 for i in range(len(rows))]
        samplings = [self._sampling(seed=one) for one in seeds]
        outputs = self._llm.generate(rows, sampling_params=samplings, use_tqdm=False)
        found = []
        for one, row, output in zip(prompts, rows, outputs, strict=True):
            ids = row["prompt_token_ids"]
            found.append(
                [
                    Answer(self._template.completion(one, ids, list(text.token_ids)), text.finish_reason == "length")
                    for text in output.outputs
                ]
            )
        return found


def own_gpu(environment: MutableMapping[str, str]) -> None:
    """Let a process of several see its own GPU only, and itself as the only one: each has a vLLM of its own."""
    local = environment.get("LOCAL_RANK")
    if local is None or environment.get("WORLD_SIZE", "1") == "1":
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible != "":  # the empty list is a machine without GPUs
        names = visible.split(",") if visible else [str(number) for number in range(int(local) + 1)]
        if int(local) >= len(names):
            raise ConfigurationError(
                f"process {local} of this machine finds {len(names)} GPUs (CUDA_VISIBLE_DEVICES={visible}), expected "
                "one for each process; start fewer processes"
            )
        environment["CUDA_VISIBLE_DEVICES"] = names[int(local)]
    for name in _LAUNCH_VARIABLES:
        environment.pop(name, None)


def _sampling(arguments: Any) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "min_p")
    return {name: getattr(arguments, name) for name in names}


def _opened(image: Any) -> Any:
    """An image for a processor; one that is open already goes as it is, as TRL passes it."""
    found = image_source(image)
    return found if hasattr(found, "convert") and not is_url(found) else load_image(found)


def _metadata(video: Sequence[Any]) -> dict[str, Any]:
    return {"total_num_frames": len(video), "fps": 1.0, "frames_indices": list(range(len(video)))}
