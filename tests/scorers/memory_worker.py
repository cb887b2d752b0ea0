"""A process of its own that scores again and again and reports its memory: python memory_worker.py PLACEMENT CALLS.

Prints one JSON object: resident set in MB before the first call, after each call, and the highest inside a call.
"""

import json
import os
import random
import sys
from pathlib import Path

import torch
from tiny_models import random_group
from transformers import LlamaConfig, LlamaForCausalLM

from mr_reward import MultiResponseReward, MultiResponseRewardModel
from mr_reward.worlds import tiny


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def build() -> MultiResponseRewardModel:
    """About 100 MB of weights, so that they stand out from the noise."""
    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    return MultiResponseRewardModel.from_backbone(LlamaForCausalLM(config), processor=tokenizer)


def main(placement: str, calls: int) -> None:
    reward = MultiResponseReward(build(), num_generations=4, placement=placement, max_tokens_per_batch=512)
    inside: list[float] = []
    reward._scorer.model.register_forward_hook(lambda *_: inside.append(resident_mb()))
    rng = random.Random(0)
    before, after = resident_mb(), []
    for _ in range(calls):
        groups = [random_group(rng, 4) for _ in range(rng.randint(1, 3))]
        prompts = [group.messages for group in groups for _ in range(4)]
        reward(prompts, [response for group in groups for response in group.responses])
        after.append(resident_mb())
    weights = sum(tensor.nbytes for tensor in reward._scorer.model.parameters()) / 1e6
    json.dump({"weights": weights, "before": before, "after": after, "inside": inside}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
