"""The training recipe, with a fault on rank 1: `FAULT=memory FAULT_STEP=5 ... faulty_recipe.py --config FILE`."""

from __future__ import annotations

import os
import runpy
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from mr_reward.training.trainer import RewardTrainer

RECIPE = Path(__file__).parents[2] / "grpo_recipes" / "pretrain_rm.py"

compute_loss = RewardTrainer.compute_loss


def faulty(trainer: RewardTrainer, *args: Any, **options: Any) -> Any:
    """In the middle of a step, when the other rank waits for this one's gradients."""
    if os.environ["RANK"] == "1" and trainer.state.global_step == int(os.environ["FAULT_STEP"]):
        if os.environ["FAULT"] == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if os.environ["FAULT"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)  # a stall
    return compute_loss(trainer, *args, **options)


if __name__ == "__main__":
    # On a CPU transformers does not hand ddp_timeout on, with a GPU and under DeepSpeed it does.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    RewardTrainer.compute_loss = faulty  # type: ignore[method-assign]
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert not torch.distributed.is_initialized(), "left open, a process group can abort the process at its end"
