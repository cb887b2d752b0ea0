"""Where the time of one `MultiResponseReward` call goes: the model's forward, and everything around it.

    make quickstart && python benchmarks/reward_profile.py

Runs `grpo_recipes/train_policy.py` with the handwriting recipe on the quickstart's models for a few steps, so that the
calls are those that TRL makes, with the policy's own rollouts. The first step is left out. The last line of stdout is
one JSON document.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

from speed_harness import finish, print_table, quartiles, recipe_options, run_recipe, spread

from mr_reward import MultiResponseReward
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.rows import Packer
from mr_reward.templates.rendering import Renderer

# Preparation runs beside the forward of the passes before, so the parts need not add up to the call.
PARTS = {
    "call": (MultiResponseReward, "__call__"),
    "forward": (MultiResponseRewardModel, "forward"),
    "rendering": (Renderer, "render_all"),
    "layout": (Packer, "lay_out"),
}


def watch(seconds: dict[str, list[float]]) -> list[Callable[[], None]]:
    """Count the seconds in each part, from now until the returned functions are called."""
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
    options = recipe_options(__doc__, steps=12).parse_args()
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        undo = watch(seconds)
        try:
            run_recipe(options, folder)
        finally:
            for restore in undo:
                restore()
    calls = {part: values[1 : options.steps] for part, values in seconds.items()}
    shares = {
        part: [own / call for own, call in zip(values, calls["call"], strict=True)] for part, values in calls.items()
    }
    outside = [1 - share for share in shares["forward"]]
    rows = [[part, spread(quartiles(own), 1, 100)] for part, own in {**shares, "outside the forward": outside}.items()]
    print_table(f"one MultiResponseReward call, {len(outside)} calls", ["", "% of the call"], rows)
    medians = {part: quartiles(own)["median"] for part, own in shares.items()}
    finish({"shares": medians, "outside_forward": outside, "seconds": calls}, options)


if __name__ == "__main__":
    main()
