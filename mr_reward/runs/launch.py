"""How a GRPO run starts: on how many processes, with which ZeRO stage, and from which checkpoint.

A checkpoint of TRL (1.16) holds weights, optimizer, schedule and random states, so a resumed run is as if it had never
stopped, with the same prompts, samples and rewards. Not in it: the order of prompts from the second epoch on (put back
by `ContinuedEpochs`), the completions between two generations (`checkpoint_to_resume` warns), and the random state
inside vLLM, whose samples after a restart are others from the same distribution. `eval_on_start` evaluates again at
each restart.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig

from mr_reward.errors import ConfigurationError
from mr_reward.training.saving import which_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a run is started."""

    num_processes: int = 1  # in all, over all machines
    num_machines: int = 1
    zero_stage: int = 0  # of DeepSpeed; 0 without it

    @property
    def num_local_processes(self) -> int:
        """Processes on one machine."""
        return max(1, self.num_processes // self.num_machines)


def read_launch(path: str | Path) -> Launch:
    """Read the YAML file that `accelerate launch --config_file` gets.

    By hand: accelerate's own reader takes anything as num_processes, and its errors name no file.
    """
    path = Path(path)
    try:
        content: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read as an accelerate file ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("num_processes"), int):
        raise ConfigurationError(f"{path} has no num_processes, expected an accelerate file; see configs/deepspeed/")
    deepspeed = content.get("deepspeed_config") or {}
    if "deepspeed_config_file" in deepspeed:
        stage = _read_deepspeed(deepspeed["deepspeed_config_file"])
    else:
        stage = deepspeed.get("zero_stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigurationError(f"{path} has zero_stage {stage!r}, expected 0, 1, 2 or 3")
    return Launch(
        num_processes=content["num_processes"], num_machines=content.get("num_machines", 1), zero_stage=stage
    )


def read_environment() -> Launch:
    """The launch of which this process is a part, as `accelerate launch` or `torchrun` told it; else a single one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    machines = max(1, processes // local)
    stage = 0
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        if file.lower() != "none":
            stage = _read_deepspeed(file)
    return Launch(num_processes=processes, num_machines=machines, zero_stage=stage)


def _read_deepspeed(file: str) -> int:
    """The ZeRO stage in DeepSpeed's own JSON file."""
    try:
        stage: int = json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage", 0)
        return stage
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{file} cannot be read as DeepSpeed's configuration ({error})") from error


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


def updates_per_generation(args: GRPOConfig) -> int:
    """How many optimizer updates one generation of completions serves, at least one."""
    batches = args.steps_per_generation * args.num_iterations
    return max(1, batches // args.gradient_accumulation_steps)


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
