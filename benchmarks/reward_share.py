"""The reward model's share of a GRPO step, by group size, at the same number of rollouts a step.

    make quickstart && python benchmarks/reward_share.py

Runs `grpo_recipes/train_policy.py` on the quickstart's models for a few steps with each N, sizes in turn, `--repeats`
times. The share is the time in the reward model over the time of the whole step (rollouts, scoring, update), both as
the run logs them; the first step of a run is left out. Beside it: the same for scoring the same rollouts one at a
time, one row each, with the same weights. The last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from trl import GRPOConfig, ModelConfig, TrlParser

from mr_reward import GroupScorer, ResponseGroup

RECIPES = Path(__file__).parents[1] / "grpo_recipes"
sys.path.insert(0, str(RECIPES))
import train_policy  # noqa: E402


def run(size: int, options: argparse.Namespace, folder: str) -> dict[str, float]:
    """A short GRPO run; medians over its steps."""
    command = ["--config", str(RECIPES / "policy_tiny_handwriting_cpu.yaml"), "--output_dir", folder]
    command += ["--model_name_or_path", str(options.policy), "--reward_model", str(options.reward_model)]
    command += ["--num_generations", str(size), "--max_steps", str(options.steps), "--disable_tqdm", "true"]
    command += ["--max_completion_length", str(options.max_completion_length), "--seed", str(options.seed)]
    parser = TrlParser((train_policy.HandwritingArguments, GRPOConfig, ModelConfig))
    trainer = train_policy.train_policy(*parser.parse_args_and_config(args=command))
    rollouts = trainer.args.per_device_train_batch_size
    steps = [entry for entry in trainer.state.log_history if "step_time" in entry][1:]
    reward = [entry["mr_reward/ms_per_group"] * rollouts / size / 1000 for entry in steps]
    whole = [entry["step_time"] for entry in steps]
    (scored,) = [function for function in trainer.reward_funcs if hasattr(function, "last_scored")]
    groups = [found.group for found in scored.last_scored]
    alone = one_by_one(options.reward_model, groups)
    together = timed(GroupScorer.from_pretrained(options.reward_model), groups)
    return {
        "reward_seconds": statistics.median(reward),
        "step_seconds": statistics.median(whole),
        "share": statistics.median(part / step for part, step in zip(reward, whole, strict=True)),
        "one_by_one_over_together": alone / together,
    }


def timed(scorer: GroupScorer, groups: list[ResponseGroup]) -> float:
    """Seconds of the second of two calls."""
    scorer.score(groups)
    started = time.perf_counter()
    scorer.score(groups)
    return time.perf_counter() - started


def one_by_one(folder: Path, groups: list[ResponseGroup]) -> float:
    """Seconds for the same responses as groups of one, batched within the same token budget.

    A text that a group holds several times is scored once, as the scorer does within a group. Under the dense mask,
    where groups do not share a prompt.
    """
    singles = [
        group.select([group.responses.index(text)]) for group in groups for text in dict.fromkeys(group.responses)
    ]
    return timed(GroupScorer.from_pretrained(folder, attn_implementation="sdpa"), singles)


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("outputs/quickstart/sft/checkpoint-50"))
    parser.add_argument("--reward_model", type=Path, default=Path("outputs/quickstart/rm"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_completion_length", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in options.sizes}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            for size in options.sizes:
                runs[size].append(run(size, options, folder))
    table = Table(
        "N", "reward model's share of a step", "one by one / together", title="medians (smallest to largest)"
    )
    for size, found in runs.items():
        table.add_row(
            str(size), *(cell([entry[key] for entry in found]) for key in ("share", "one_by_one_over_together"))
        )
    Console().print(table)
    settings: dict[str, Any] = {key: str(value) for key, value in vars(options).items()}
    print(json.dumps({"settings": settings, "runs": runs}))


def cell(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
