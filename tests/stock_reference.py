"""Scores from the stock transformers models alone: no layout, no packing, no mask of ours.

The two readout vectors are written into the two spare rows of the tiny vocabulary, so that a row is plain token ids
for the full `...ForConditionalGeneration` or `...ForCausalLM` model with its own positions and its own causal mask.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from tiny_models import family, reward_model
from torch import Tensor

from mr_reward import MultiResponseRewardModel, ResponseGroup


class StockReference:
    """Scores responses one by one with the stock model of a family and the head of a reward model.

    Args:
        name: of the family.
        model: the reward model whose readout vectors, head and backbone weights are used.
    """

    def __init__(self, name: str, model: MultiResponseRewardModel) -> None:
        self.model = model
        self.members = family(name)
        self.full = copy.deepcopy(self.members.full_model).eval()
        self.has_axes = hasattr(self.full.model, "get_rope_index")  # positions of time, height and width
        self.summary, self.comparison = len(self.members.tokenizer), len(self.members.tokenizer) + 1
        with torch.no_grad():
            embedding = self.full.get_input_embeddings().weight
            assert len(embedding) > self.comparison, "the tiny vocabulary must have two spare rows"
            embedding[self.summary] = model.readouts.summary
            embedding[self.comparison] = model.readouts.comparison

    def prompt(self, group: ResponseGroup) -> dict[str, Any]:
        """The processor's own answer for the prompt."""
        media = {"image": iter(group.images), "video": iter(group.videos)}
        messages = [
            {
                "role": message["role"],
                "content": [
                    {**block, block["type"]: next(media[block["type"]])} if block["type"] in media else block
                    for block in message["content"]
                ],
            }
            for message in group.messages
        ]
        options: dict[str, Any] = {}
        if not self.members.sees_images:
            messages = [{**m, "content": "".join(block["text"] for block in m["content"])} for m in messages]
        if group.videos:
            metadata = [
                {"total_num_frames": len(v), "fps": 1.0, "frames_indices": [*range(len(v))]} for v in group.videos
            ]
            options["processor_kwargs"] = {"do_sample_frames": False, "video_metadata": [metadata]}
        inputs = self.members.processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **options
        )
        return dict(inputs)

    def response_ids(self, text: str) -> list[int]:
        return self.members.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def alone(self, group: ResponseGroup) -> Tensor:
        """Scores from one forward for each response, over prompt, response and readout tokens: (N,)."""
        prompt = self.prompt(group)
        return torch.stack([self._alone(dict(prompt), group, i) for i in range(group.num_responses)])

    def _alone(self, inputs: dict[str, Any], group: ResponseGroup, i: int) -> Tensor:
        ids = [*self.response_ids(group.responses[i]), *self._readout_ids()]
        tail = torch.tensor([ids])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(tail).to(types.dtype)], 1)
        output = self.full(**inputs, use_cache=False, output_hidden_states=True)
        return self.head(output.hidden_states[-1][0, -1])

    @torch.no_grad()
    def generated(self, group: ResponseGroup) -> Tensor:
        """Scores of the responses read as a policy writes them, a copy of the prompt's cache for each: (N,)."""
        prompt_cache, position = self._prefill(group)
        scores = []
        for response in group.responses:
            ids = [*self.response_ids(response), *self._readout_ids()]
            hidden, _ = self._continue(copy.deepcopy(prompt_cache), position, ids)
            scores.append(self.head(hidden))
        return torch.stack(scores)

    @torch.no_grad()
    def set_scores(self, group: ResponseGroup) -> Tensor:
        """Scores of the `set` layout from caches: c_i reads the prompt, r_i, s_i and all other summaries: (N,)."""
        prompt_cache, start = self._prefill(group)
        states = []
        for response in group.responses:
            cache = copy.deepcopy(prompt_cache)
            _, position = self._continue(cache, start, [*self.response_ids(response), self.summary])
            states.append((cache, position))
        summaries = [
            [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in cache.layers] for cache, _ in states
        ]
        scores = []
        for i, (cache, position) in enumerate(states):
            for depth, layer in enumerate(cache.layers):
                others = [summary[depth] for j, summary in enumerate(summaries) if j != i]
                layer.keys = torch.cat([layer.keys, *(keys for keys, _ in others)], 2)
                layer.values = torch.cat([layer.values, *(values for _, values in others)], 2)
            hidden, _ = self._continue(cache, position, [self.comparison])
            scores.append(self.head(hidden))
        return torch.stack(scores)

    def head(self, hidden: Tensor) -> Tensor:
        """Linear, SiLU, Linear, scale, written out."""
        head = self.model.head
        inner = head.dense.weight @ hidden + head.dense.bias
        return (head.out.weight @ (inner * torch.sigmoid(inner)))[0].detach() * self.model.config.score_scale

    def _readout_ids(self) -> list[int]:
        return [self.summary, self.comparison] if self.model.config.layout == "set" else [self.summary]

    def _prefill(self, group: ResponseGroup) -> tuple[Any, int]:
        """The prompt's cache and the position of the token after it, as `generate` counts it."""
        inputs = self.prompt(group)
        cache = self.full(**inputs, use_cache=True).past_key_values
        deltas = getattr(self.full.model, "rope_deltas", None) if len(inputs) > 3 else None
        return cache, inputs["input_ids"].shape[1] + (int(deltas) if deltas is not None else 0)

    def _continue(self, cache: Any, position: int, ids: list[int]) -> tuple[Tensor, int]:
        """Read more tokens: hidden state of the last one (H,) and the next position."""
        positions = torch.arange(position, position + len(ids))[None]
        if self.has_axes:
            positions = positions.expand(4, -1, -1)
        output = self.full(
            input_ids=torch.tensor([ids]),
            past_key_values=cache,
            position_ids=positions,
            use_cache=True,
            output_hidden_states=True,
        )
        return output.hidden_states[-1][0, -1], position + len(ids)


@functools.cache
def stock_reference(name: str, layout: str) -> StockReference:
    """The reference of `reward_model(name, layout)`."""
    return StockReference(name, reward_model(name, layout))
