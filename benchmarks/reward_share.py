"""The reward model's share of a GRPO step, by group size, at the same number of rollouts a step.

    make quickstart && python benchmarks/reward_share.py

Runs `grpo_recipes/train_policy.py` on the quickstart's models for a few steps with each N, sizes in turn, `--repeats`
times. The share is the time in the reward model over the time of the whole step (rollouts, scoring, update), both as
the run logs them; the first step of a run is left out. Beside it: the same for scoring the same rollouts one at a
time, one row each, with the same weights. The last line of stdout is one JSON document.
"""

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path

from speed_harness import finish, in_turn, positive, print_table, quartiles, recipe_options, run_recipe, spread

from mr_reward import GroupScorer, ResponseGroup


def run(size: int, options: argparse.Namespace, folder: str) -> dict[str, float]:
    """A short GRPO run; medians over its steps."""
    more = ("--num_generations", str(size), "--max_completion_length", str(options.max_completion_length))
    trainer = run_recipe(options, folder, *more)
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
    parser = recipe_options(__doc__, steps=8)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[4, 8, 16])
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--max_completion_length", type=positive, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways = {str(size): functools.partial(run, size, options, folder) for size in options.sizes}
        runs = in_turn(ways, options.repeats)
    keys = ("share", "one_by_one_over_together")
    rows = [
        [size, *(spread(quartiles([entry[key] for entry in found]), 3) for key in keys)]
        for size, found in runs.items()
    ]
    columns = ["N", "reward model's share of a step", "one by one / together"]
    print_table("medians (quartiles)", columns, rows)
    finish({"runs": runs}, options)


if __name__ == "__main__":
    main()
