"""Where the time of one `MultiResponseReward` call goes: the model's forward, and everything around it.

    make quickstart && python benchmarks/reward_profile.py

Runs `grpo_recipes/train_policy.py` with the handwriting recipe on the quickstart's models for a few steps, so that the
calls are those that TRL makes, with the policy's own rollouts. The first step is left out. The last line of stdout is
one JSON document.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from trl import GRPOConfig, ModelConfig, TrlParser

from mr_reward import MultiResponseReward
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.rows import Packer
from mr_reward.templates.rendering import Renderer

RECIPES = Path(__file__).parents[1] / "grpo_recipes"
sys.path.insert(0, str(RECIPES))
import train_policy  # noqa: E402

# Preparation runs beside the forward of the passes before, so the parts need not add up to the call.
PARTS = {
    "call": (MultiResponseReward, "__call__"),
    "forward": (MultiResponseRewardModel, "forward"),
    "rendering": (Renderer, "render_all"),
    "layout": (Packer, "lay_out"),
}


def watch(seconds: dict[str, list[float]]) -> list[Callable[[], None]]:
    """Count the seconds in each part, from now until the returned functions are called.

    Args:
        seconds: for each part a list with the seconds of each call of the reward; "call" begins a new entry.

    Returns:
        Functions that undo it.
    """
    undo = []
    for part, (owner, name) in PARTS.items():
        original = getattr(owner, name)

        def timed(*args: Any, part: str = part, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            if part == "call":
                for values in seconds.values():
                    values.append(0.0)
            started = time.perf_counter()
            result = original(*args, **kwargs)
            if seconds[part]:
                seconds[part][-1] += time.perf_counter() - started
            return result

        setattr(owner, name, timed)
        undo.append(lambda owner=owner, name=name, original=original: setattr(owner, name, original))
    return undo


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("outputs/quickstart/sft/checkpoint-50"))
    parser.add_argument("--reward_model", type=Path, default=Path("outputs/quickstart/rm"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        command = ["--config", str(RECIPES / "policy_tiny_handwriting_cpu.yaml"), "--output_dir", folder]
        command += ["--model_name_or_path", str(options.policy), "--reward_model", str(options.reward_model)]
        command += ["--max_steps", str(options.steps), "--disable_tqdm", "true", "--seed", str(options.seed)]
        arguments = TrlParser((train_policy.HandwritingArguments, GRPOConfig, ModelConfig))
        undo = watch(seconds)
        try:
            train_policy.train_policy(*arguments.parse_args_and_config(args=command))
        finally:
            for restore in undo:
                restore()
    calls = {part: values[1 : options.steps] for part, values in seconds.items()}
    outside = [1 - forward / call for forward, call in zip(calls["forward"], calls["call"], strict=True)]
    table = Table("part", "share of the call (median)", title=f"one MultiResponseReward call, {len(outside)} calls")
    shares = {
        part: statistics.median(own / call for own, call in zip(values, calls["call"], strict=True))
        for part, values in calls.items()
    }
    for part, share in shares.items():
        table.add_row(part, f"{share:.1%}")
    table.add_row(
        "outside the forward", f"{statistics.median(outside):.1%} ({min(outside):.1%} to {max(outside):.1%})"
    )
    Console().print(table)
    settings = {key: str(value) for key, value in vars(options).items()}
    print(json.dumps({"settings": settings, "shares": shares, "outside_forward": outside, "seconds": calls}))


if __name__ == "__main__":
    main()
