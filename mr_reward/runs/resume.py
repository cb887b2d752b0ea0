"""How a stopped GRPO run is resumed, and what that needs beside TRL's checkpoint.

A checkpoint of TRL (1.16) holds weights, optimizer, schedule and random states, so a resumed run is as if it had never
stopped, with the same prompts, samples and rewards. Not in it: the order of prompts from the second epoch on (put back
by `ContinuedEpochs`), the completions between two generations (`checkpoint_to_resume` warns), and the random state
inside vLLM, whose samples after a restart are others from the same distribution. `eval_on_start` evaluates again at
each restart.
"""

from __future__ import annotations

import logging
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig

from mr_reward.grpo.groups import updates_per_generation
from mr_reward.training.saving import which_checkpoint

logger = logging.getLogger(__name__)


def checkpoint_to_resume(args: GRPOConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` stands for, see `which_checkpoint`; None is the beginning."""
    period = updates_per_generation(args)
    if args.save_strategy == "steps" and args.save_steps % period:
        logger.warning(
            "save_steps is %s, expected a multiple of %d: completions serve %d updates and are not part of a "
            "checkpoint, so a run that is resumed between two generations draws them again",
            args.save_steps,
            period,
            period,
        )
    return which_checkpoint(args.resume_from_checkpoint, str(args.output_dir), args.world_size)


class ContinuedEpochs(TrainerCallback):
    """Lets a run that is resumed in its second or a later epoch see the prompts in the order it would have seen.

    TRL's sampler draws a new order each epoch from one generator, and after a restart it draws the first epoch's
    again. Here the orders of the finished epochs are drawn and thrown away. Does nothing in a run from the start.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Skip the finished epochs."""
        sampler: Any = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(sampler, "batch_sampler"):  # accelerate's share of it for one rank
            sampler = sampler.batch_sampler
        sampler = getattr(sampler, "sampler", None)
        if getattr(sampler, "generator", None) is None:
            return
        for _ in range(int(state.epoch or 0)):
            next(iter(sampler), None)  # an order is drawn with its first row
