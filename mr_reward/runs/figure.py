"""What a run looked like, as one figure at its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mr_reward.evaluation.plots import plot_curves

__all__ = ["RunFigure", "plot_run"]

logger = logging.getLogger(__name__)

# Panel of the figure -> the metrics it shows. One that was never logged leaves no trace.
_PANELS = {
    "score of the reward model": ("mr_reward/score_mean",),
    "spread within groups": ("mr_reward/score_spread", "mr_reward/zero_spread_groups"),
    "order": ("mr_reward/order_flip_rate",),
    "length": ("mr_reward/score_length_correlation",),
}


class RunFigure(TrainerCallback):
    """Writes `training.png` to a folder when training ends: rewards, spread, flips, correlation of score and length.

    Only the main process writes. A resumed run shows the steps before the interruption too, from the checkpoint. The
    figure needs matplotlib (the extra `eval`); without it a warning says so when training begins.

    Args:
        folder: where to write.

    Example:
        ```python
        trainer = GRPOTrainer(..., callbacks=[RunFigure("out")])
        ```
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.can_draw = find_spec("matplotlib") is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell what will be missing while there is time."""
        if state.is_world_process_zero and not self.can_draw:
            logger.warning("no matplotlib, so there will be no figure of the run; install mr-reward[eval]")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what was logged."""
        if state.is_world_process_zero and self.can_draw:
            plot_run(state.log_history, self.folder / "training.png")


def plot_run(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> bool:
    """Draw the rewards and the reward model's metrics of a run.

    Args:
        log_history: the trainer's, `trainer.state.log_history` or that of a checkpoint's `trainer_state.json`.
        path: of the PNG file; its folder is made.

    Returns:
        Whether there was anything to draw; if not, no file is written.

    Example:
        >>> plot_run([], "training.png")
        False
    """
    rewards = sorted(
        {key for entry in log_history for key in entry if key.startswith("rewards/") and key.endswith("/mean")}
    )
    panels = {}
    for title, keys in {"rewards": rewards, **_PANELS}.items():
        curves = {}
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in log_history if _is_number(entry.get(key))]
            if points:
                steps, values = zip(*points, strict=True)
                curves[key.removeprefix("rewards/").removeprefix("mr_reward/").removesuffix("/mean")] = (steps, values)
        if curves:
            panels[title] = curves
    if not panels:
        logger.warning("nothing was logged, so there is no figure %s; set logging_steps", path)
        return False
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_curves(panels, path, title="training", columns=3)
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
