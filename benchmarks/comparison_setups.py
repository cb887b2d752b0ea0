"""What the comparisons of judges ask in each world, and the two models that they start from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mr_reward.worlds.named import world_options

RECIPES = Path(__file__).parents[1] / "grpo_recipes"


@dataclass(frozen=True)
class Setup:
    """What is particular to a world."""

    questions: tuple[str, ...]
    sft_steps: int  # of the reward models' backbone
    start_step: int  # its checkpoint that GRPO starts from
    num_digits: int = 3  # of handwriting


SETUPS: Mapping[str, Setup] = {
    "handwriting": Setup(("read", "largest", "even"), sft_steps=540, start_step=270),
    "shapes": Setup(("shape", "color"), sft_steps=150, start_step=50),
}


def options_of(world: str, setup: Setup) -> dict[str, Any]:
    """What `make_tasks` and `make_groups` of a world take beside split, number and seed."""
    return world_options(world, num_digits=setup.num_digits, questions=setup.questions)


def train_backbone(world: str, setup: Setup, folder: Path, seed: int) -> Path:
    """Supervised training, if it is not there: the folder is the backbone, a checkpoint in it the weak policy."""
    if not (folder / "config.json").is_file():
        sys.path.insert(0, str(RECIPES))
        import quickstart

        options = quickstart.QuickstartArguments(
            seed=seed,
            world=world,
            num_digits=setup.num_digits,
            questions=list(setup.questions),
            sft_steps=setup.sft_steps,
        )
        quickstart.train_reader(options, folder, setup.start_step)
    return folder
