"""A rank of test_zero.py: GRPO under DeepSpeed with reward models that were built before and after the configuration.

Run as `accelerate launch --config_file FILE zero_policy_worker.py POLICY REWARD_MODEL OUTPUT`. Writes
`OUTPUT-rank{RANK}.json`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset
from transformers import set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state
from trl import GRPOConfig, GRPOTrainer

from mr_reward import MultiResponseReward, MultiResponseRewardModel
from mr_reward.checkpoint import weights_digest
from mr_reward.errors import MRRewardError

NUM_GENERATIONS, NUM_GENERATIONS_EVAL = 4, 2


def main(policy: str, reward_model: str, output: str) -> None:
    """Train, evaluate, and load the reward model in the ways that must not work."""
    rank = int(os.environ["RANK"])  # there is no process group yet
    set_seed(100 + rank)  # what a rank draws instead of loading is its own
    rewards = {"before": MultiResponseReward(reward_model, NUM_GENERATIONS, num_generations_eval=NUM_GENERATIONS_EVAL)}
    args = GRPOConfig(
        output,
        gradient_accumulation_steps=1,
        ddp_backend="gloo",
        num_generations=NUM_GENERATIONS,
        per_device_train_batch_size=2,
        num_generations_eval=NUM_GENERATIONS_EVAL,
        per_device_eval_batch_size=3,
        max_completion_length=8,
        steps_per_generation=3,  # six rows of each rank at once: groups 0 and 2 whole, group 1 on both ranks
        max_steps=6,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        bf16=False,
        disable_tqdm=True,
    )
    set_seed(200 + rank)
    rewards["after"] = MultiResponseReward(reward_model, NUM_GENERATIONS, num_generations_eval=NUM_GENERATIONS_EVAL)
    digests = {name: weights_digest(reward._scorer.model) for name, reward in rewards.items()}
    record: dict[str, Any] = {"zero3": is_deepspeed_zero3_enabled(), "digests": digests, "calls": []}

    def recording(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        results = {name: reward(prompts, completions, **kwargs) for name, reward in rewards.items()}
        record["calls"].append({"prompts": prompts, "completions": completions, "rewards": results})
        return results["after"]

    words = ("a", "not", "so many", "42", "even", "again")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {word}"}]} for word in words])
    trainer = GRPOTrainer(
        policy, reward_funcs=[recording], args=args, train_dataset=rows, eval_dataset=rows.select(range(5))
    )
    trainer.train()
    record["metrics"] = trainer.evaluate()  # ten rows in batches of six: the last batch lacks two
    record["partitioned"] = any(hasattr(weight, "ds_id") for weight in trainer.model.parameters())
    if record["zero3"]:
        record["plain"] = plain_load(reward_model)
        record["set_zero3_state"] = set_zero3_state_load(reward_model)
    Path(f"{output}-rank{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


def plain_load(reward_model: str) -> str:
    """What one gets without thinking of ZeRO-3."""
    try:
        model = MultiResponseRewardModel.from_pretrained(reward_model)
        MultiResponseReward(model, NUM_GENERATIONS)
    except MRRewardError as error:
        return f"{type(error).__name__}: {error}"
    return "not noticed"


def set_zero3_state_load(reward_model: str) -> str:
    """The often advised way: whole weights on every rank, but only rank 0 has read them."""
    with set_zero3_state():
        model = MultiResponseRewardModel.from_pretrained(reward_model)
    reward = MultiResponseReward(model, NUM_GENERATIONS)
    try:
        reward(["p"] * 2, ["a", "b"])
    except MRRewardError as error:
        return f"{type(error).__name__}: {error}"
    return "not noticed"


if __name__ == "__main__":
    main(*sys.argv[1:])
