"""Writes this folder with an installed earlier version: `python make.py FOLDER`, see README.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from mr_reward.data.preferences import save_preferences
from mr_reward.data.tiny import build_llama, build_tokenizer
from safetensors.torch import load_file
from transformers import PreTrainedModel

import mr_reward
from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup

RECIPES = Path(mr_reward.__file__).parents[1] / "grpo_recipes"

TRAINING = """\
model_name_or_path: backbone
output_dir: training
layout: set
train_file: groups.jsonl
eval_file: groups.jsonl
use_peft: true
lora_r: 2
max_steps: 4
save_steps: 2
per_device_train_batch_size: 2
learning_rate: 1.0e-2
lr_scheduler_type: linear
logging_steps: 1
eval_strategy: "no"
loss: plackett_luce
degenerate_negatives: 0.5
max_responses: 3
report_to: none
use_cpu: true
bf16: false
"""

POLICY = """\
model_name_or_path: backbone
reward_model: rm
output_dir: policy
dataset: prompts.jsonl
num_generations: 4
per_device_train_batch_size: 8
max_completion_length: 4
max_steps: 2
save_steps: 1
learning_rate: 1.0e-2
lr_scheduler_type: constant
logging_steps: 1
log_groups_steps: 1
report_to: none
use_cpu: true
bf16: false
gradient_checkpointing: false
"""


def main(folder: Path) -> None:
    """All of it, from the folder itself so that every path in it is relative."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    policy = build_llama(hidden_size=8, num_layers=1, num_heads=2)
    save(policy, Path("backbone"))
    torch.manual_seed(0)
    model = MultiResponseRewardModel.from_backbone("backbone", layout="set")
    with torch.no_grad():
        model.head.out.weight.normal_()
    model.save_pretrained("rm")
    groups = [
        ResponseGroup(
            prompt=[{"role": "user", "content": f"{i} + {i}?"}],
            responses=[str(2 * i), "no idea", str(i), f"{i}{i}"],
            rankings=[1, 3, 2, 2],
            id=f"sum-{i}",
        )
        for i in range(6)
    ]
    save_preferences(groups, "groups.jsonl")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} + {i}?"}) + "\n" for i in range(6)))
    Path("scores.json").write_text(json.dumps(GroupScorer.from_pretrained("rm").score(groups)))
    command("score", "rm", "groups.jsonl", "--out", "scored.jsonl")
    command("evaluate", "groups", "rm", "--source", "groups.jsonl", "--out", "evaluation", "--orders", "2")
    Path("training.yaml").write_text(TRAINING)
    Path("policy.yaml").write_text(POLICY)
    recipe("pretrain_rm.py", "training.yaml")
    recipe("train_policy.py", "policy.yaml")
    shutil.copy("training/checkpoint-4/trainer_state.json", "training_state.json")
    Path("training_scores.json").write_text(json.dumps(GroupScorer.from_pretrained("training").score(groups)))
    shutil.copy("policy/checkpoint-2/trainer_state.json", "policy_state.json")
    weights = load_file("policy/model.safetensors")
    Path("policy_weights.json").write_text(json.dumps({name: float(value.sum()) for name, value in weights.items()}))
    for figure in Path("evaluation").glob("*.png"):
        figure.unlink()
    for run, first in (("training", "checkpoint-2"), ("policy", "checkpoint-1")):
        for path in Path(run).iterdir():
            if path.name not in (first, "groups", "completions"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def save(model: PreTrainedModel, folder: Path) -> None:
    """A model and its tokenizer."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def command(*arguments: str) -> None:
    """`mr-reward` of the version that is imported."""
    subprocess.run([sys.executable, "-c", "from mr_reward.cli import main; main()", *arguments], check=True)


def recipe(script: str, config: str) -> None:
    """A recipe of the same version."""
    subprocess.run([sys.executable, str(RECIPES / script), "--config", config], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
