"""One GRPO run with vLLM rollouts in a process of its own: python vllm_worker.py SYNC [arguments of train_policy.py].

SYNC is `sync`, or `stale` for a run whose updates never reach vLLM. Prints one JSON object as its last line: the log,
and how far the policy's weights have moved.
"""

import json
import sys
from pathlib import Path

import torch
from trl import ModelConfig, TrlParser
from trl.generation.vllm_generation import VLLMGeneration

from mr_reward.runs.recipe import PolicyTrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2] / "grpo_recipes"))
import train_policy  # noqa: E402


def main(sync: str, arguments: list[str]) -> None:
    if sync == "stale":
        VLLMGeneration.sync_weights = lambda self: None  # type: ignore[method-assign]
    parser = TrlParser((train_policy.WorldPolicyArguments, PolicyTrainingArguments, ModelConfig))
    policy, args, model_config = parser.parse_args_and_config(args=arguments)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if policy.dataset == "handwriting" else AutoModelForCausalLM
    before = auto.from_pretrained(model_config.model_name_or_path).state_dict()
    trainer = train_policy.train_policy(policy, args, model_config)
    after = trainer.model.state_dict()
    moved = torch.stack([(after[name] - value).abs().max() for name, value in before.items()]).max().item()
    sys.stdout.write("\n" + json.dumps({"log": trainer.state.log_history, "moved": moved}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
