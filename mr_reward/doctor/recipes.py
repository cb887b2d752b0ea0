"""What the checks of both kinds of recipe share: how one is read, its fields, and the files of the model it trains."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import AutoConfig, TrainingArguments
from trl import TrlParser

from mr_reward.checkpoint.verify import has_file, weight_shapes
from mr_reward.doctor.findings import Finding
from mr_reward.doctor.machine import check_output_folder
from mr_reward.errors import ConfigurationError
from mr_reward.hub import near_name, why_missing
from mr_reward.runs.launch import Launch
from mr_reward.runs.pretraining import RewardModelArguments
from mr_reward.runs.recipe import PolicyArguments, PolicyTrainingArguments
from mr_reward.training.trainer import RewardTrainingArguments

_REPORT_MODULES = ("wandb", "trackio", "tensorboard", "mlflow", "swanlab")
_OTHER_WEIGHTS = ("adapter_model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def read_recipe(arguments: Sequence[str], *types: type) -> tuple[list[Any], list[Finding]]:
    """A recipe from `--config FILE` and `--name value`, and a finding for each field of it that does not exist."""
    parser = TrlParser(types)
    parser.error = _refuse  # argparse would end the process
    *parsed, unknown = parser.parse_args_and_config(args=list(arguments), return_remaining_strings=True)
    return parsed, list(_unknown_fields(unknown, [name for part in parsed for name in vars(part)]))


def _unknown_fields(given: Sequence[str], known: Sequence[str]) -> Iterator[Finding]:
    """A line for each field that does not exist, with the nearest that does."""
    for name in (part.removeprefix("--") for part in given if part.startswith("--")):
        near = difflib.get_close_matches(name, known, n=1)
        text = f"there is no field {name}; {f'{near[0]} is one' if near else 'take it out'}"
        yield Finding("red", "configuration", text)


def given_fields(arguments: Sequence[str]) -> dict[str, Any]:
    """What the file and the command line set, without a look at whether such fields exist; nothing of no file."""
    given = list(arguments)
    named = {name.removeprefix("--"): value for name, value in zip(given, given[1:], strict=False) if name[:2] == "--"}
    try:
        found = yaml.safe_load(Path(named["config"]).read_text())
    except (OSError, ValueError, LookupError, yaml.YAMLError):
        found = None  # the reading says it
    return {**(found if isinstance(found, Mapping) else {}), **named}


def trains_reward_model(arguments: Sequence[str]) -> bool:
    """Whether the fields that a recipe sets are those of a reward model's training, and not those of a policy's."""
    reward, policy = (
        {one.name for kind in kinds for one in fields(kind)}
        for kinds in ((RewardModelArguments, RewardTrainingArguments), (PolicyArguments, PolicyTrainingArguments))
    )
    given = given_fields(arguments).keys()
    return len(given & (reward - policy)) > len(given & (policy - reward))


def needed_packages(args: TrainingArguments, launch: Launch) -> dict[str, str]:
    """Modules that a run of any kind cannot do without -> the field that asks for them."""
    reports = args.report_to if isinstance(args.report_to, list) else [args.report_to or "none"]
    needed = {name: f"report_to: {name}" for name in reports if name in _REPORT_MODULES}
    return needed | ({"deepspeed": f"ZeRO stage {launch.zero_stage}"} if launch.zero_stage else {})


def check_folder_of_run(args: TrainingArguments, launch: Launch) -> Iterator[Finding]:
    """Whether the output folder can be written, and what would be resumed there."""
    given = str(args.resume_from_checkpoint or "false")  # on the command line everything is text
    resume = given.lower() == "true" if given.lower() in ("true", "false") else given
    yield from check_output_folder(str(args.output_dir), resume=resume, num_processes=launch.num_processes)


def check_model_files(name: str, what: str, *, is_here: bool) -> Finding:
    """Whether transformers would find the files of the model that is trained; no weight is loaded.

    `is_here`: whether the run is meant for this machine; elsewhere a name of the hub may well be right.
    """
    folder = Path(name)
    try:
        if why_missing(name) is None and has_file(name, "config.json"):
            if folder.is_dir() and not any((folder / file).is_file() for file in _OTHER_WEIGHTS):
                weight_shapes(folder)
            AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            return Finding("green", what, f"{name}: its files are there")
    except (OSError, ValueError) as error:
        return Finding("red", what, f"{name}: {error}")
    if (folder / "adapter_config.json").is_file():
        return Finding("yellow", what, f"{name}: an adapter; merge it to have it checked")
    text = f"{name} is no folder with a config.json, and no hub within reach has it; give the {what}'s folder"
    text += f" as model_name_or_path{near_name(folder)}"
    return Finding("red" if is_here or not is_hub_name(name) else "yellow", what, text)


def is_hub_name(name: str) -> bool:
    """Whether it may be the name of a model of a hub."""
    return bool(_HUB_ID.fullmatch(name))


def _refuse(message: str) -> NoReturn:
    raise ConfigurationError(message)
