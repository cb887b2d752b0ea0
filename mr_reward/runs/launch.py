"""How a GRPO run is started: on how many processes and machines, with which ZeRO stage."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mr_reward.errors import ConfigurationError


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
