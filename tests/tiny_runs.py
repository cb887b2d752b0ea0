"""What short runs of TRL's trainers on the CPU share: a tiny policy, prompts, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from mr_reward.worlds import tiny
from mr_reward.worlds.handwriting import make_policy_rows, make_tasks

# Of GRPOConfig or RLOOConfig: groups of four short completions, every step logged.
SHORT_RUN: dict[str, Any] = {
    "num_generations": 4,
    "max_completion_length": 4,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def handwriting_rows(split: str, count: int) -> Dataset:
    """Prompts with an image of two digits."""
    return Dataset.from_list(make_policy_rows(make_tasks(split, count, num_digits=2)))


def save_policy_that_sees(folder: Path) -> None:
    """Write a tiny Qwen3-VL with its processor."""
    tiny.build_qwen3_vl(0, hidden_size=64, num_layers=2).save_pretrained(folder)
    tiny.build_qwen3_vl_processor().save_pretrained(folder)
