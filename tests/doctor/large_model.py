"""A reward model of any size whose weights take no room."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from mr_reward import MultiResponseRewardConfig, MultiResponseRewardModel

# Qwen3-VL-4B-Instruct as published: 4.44 billion parameters.
QWEN3_VL_4B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "tie_word_embeddings": True,
}


def large_reward_model(target: Path, source: Path, backbone: PreTrainedConfig) -> int:
    """A whole reward model of any size that takes no room on the disk: behind the header its file is a hole.

    Returns the number of its weights.
    """
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "SHA256SUMS"))
    config = json.loads((target / "config.json").read_text())
    config["backbone_config"] = backbone.to_dict()
    (target / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        weights = MultiResponseRewardModel(MultiResponseRewardConfig.from_pretrained(target)).state_dict()
    header, end = {}, 0
    for name, tensor in weights.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (target / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return end // 2
