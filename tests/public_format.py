"""An independent script for the paper's public format: stock transformers and torch, nothing of `mr_reward`.

It takes the weights of the tiny models (stock classes as well), and it finds the separators by searching the token
ids, as the code of the paper does.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import family, random_image, random_responses, random_text
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

SEPARATOR = "<|resp_sep|>"
ACTIVATIONS = {"selu": nn.SELU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}
# Scores are 0.1 to 1 apart; another summation order makes a difference of a few 1e-7.
TOLERANCE = 1e-5


def write_public_checkpoint(
    name: str, folder: Path, *, kind: str = "mlp", activation: str = "silu", width: int = 24, seed: int = 5
) -> None:
    """A merged backbone with a separator row, its processor, the head and its settings."""
    backbone = copy.deepcopy(family(name).full_model)
    processor = copy.deepcopy(family(name).processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    hidden_size = backbone.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        # Spread scores: at the usual 0.01 all responses would score alike, whatever is read where.
        return torch.randn(*shape, generator=generator) * 2 / math.sqrt(shape[-1])

    tokenizer.add_special_tokens({"additional_special_tokens": [SEPARATOR]}, replace_extra_special_tokens=False)
    index = tokenizer.convert_tokens_to_ids(SEPARATOR)
    row = weights(1, hidden_size) * 0.1
    if name != "molmo2":
        with torch.no_grad():
            backbone.get_input_embeddings().weight[index] = row[0]
    backbone.save_pretrained(folder)
    if name == "molmo2":  # the separator is a further row of a parameter of its own, which ends with it
        tensors = load_file(folder / "model.safetensors")
        (key,) = [key for key in tensors if key.endswith("new_embedding")]
        base_key = key.replace("new_embedding", "embedding")
        rows = torch.cat([tensors[base_key], tensors[key]])[:index]  # transformers writes two halves of any size
        config = json.loads((folder / "config.json").read_text())
        size = config["text_config"]["vocab_size"]
        tensors[base_key], tensors[key] = rows[:size].clone(), torch.cat([rows[size:], row])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config["text_config"]["additional_vocab_size"] = len(tensors[key])
        (folder / "config.json").write_text(json.dumps(config))
    processor.save_pretrained(folder)
    head = {"0.weight": weights(width, hidden_size), "0.bias": weights(width)}
    head |= {"2.weight": weights(1, width) * 3, "2.bias": weights(1)}
    if kind == "linear":
        head = {"weight": weights(1, hidden_size) * 3, "bias": weights(1)}
    torch.save(head, folder / "value_head.pt")
    settings = {
        "value_head_type": kind,
        "value_head_hidden_dim": width,
        "value_head_activation": activation,
        "value_head_input_dim": hidden_size,
        "resp_repr_mode": "last",
    }
    (folder / "reward_model_config.json").write_text(json.dumps(settings))


class PublicModel:
    """Loads such a folder with stock transformers and scores one group at a time."""

    def __init__(self, folder: Path) -> None:
        vision = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
        loader = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        self.model = loader.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        settings = json.loads((folder / "reward_model_config.json").read_text())
        hidden_size = self.model.config.get_text_config().hidden_size
        if settings["value_head_type"] == "linear":
            self.head: nn.Module = nn.Linear(hidden_size, 1)
        else:
            width = settings["value_head_hidden_dim"] or hidden_size
            activation = ACTIVATIONS[settings["value_head_activation"]]()
            self.head = nn.Sequential(nn.Linear(hidden_size, width), activation, nn.Linear(width, 1))
        self.head.load_state_dict(torch.load(folder / "value_head.pt", weights_only=True))
        self.scale = math.sqrt(hidden_size)

    def messages(self, template: str, prompt: str, media: list[dict[str, Any]], responses: Sequence[str]) -> Any:
        joined = f"\n\n{SEPARATOR}\n\n".join(responses)
        if template == "mr2rm-user":
            return [{"role": "user", "content": [*media, {"type": "text", "text": f"{prompt}\n\n{joined}"}]}]
        return [
            {"role": "user", "content": [*media, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": joined}]},
        ]

    def inputs(self, messages: Any) -> dict[str, Tensor]:
        if self.tokenizer is self.processor:
            messages = [{**m, "content": "".join(block["text"] for block in m["content"])} for m in messages]
        return dict(
            self.processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
        )

    @torch.no_grad()
    def scores(self, template: str, prompt: str, responses: Sequence[str], images: Sequence[Any] = ()) -> Tensor:
        media = [{"type": "image", "image": image} for image in images]
        inputs = self.inputs(self.messages(template, prompt, media, responses))
        ids = inputs["input_ids"][0]
        separator = self.tokenizer.convert_tokens_to_ids(SEPARATOR)
        sites = [int(i) - 1 for i in (ids == separator).nonzero()[:, 0]] + [len(ids) - 1]
        assert len(sites) == len(responses)
        hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        return self.head(hidden[sites])[:, 0] / self.scale


def plain_groups(seed: int, images: int, sizes: Sequence[int]) -> list[tuple[str, list[str], list[Any]]]:
    rng = random.Random(seed)
    return [
        (random_text(rng, 20, 1), random_responses(rng, n, 30), [random_image(rng) for _ in range(images)])
        for n in sizes
    ]
