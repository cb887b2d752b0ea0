"""Which checkpoint a run can go on from: a kill in the middle of saving leaves a folder that looks like one."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mr_reward.checkpoint.checksums import changed_file

__all__ = ["checkpoint_to_resume", "incomplete_reason", "last_complete_checkpoint"]

logger = logging.getLogger(__name__)

_TORCH_SUFFIXES = {".bin", ".pt", ".pth"}


def checkpoint_to_resume(name: str | bool | None, output_dir: str | Path, num_ranks: int = 1) -> str | None:
    """What `resume_from_checkpoint` stands for: a folder, or with true the newest whole one below `output_dir`.

    With true a run without a checkpoint starts from the beginning, so that one command serves the first launch and
    every restart. On the command line everything is text, "true" and "false" too.
    """
    if isinstance(name, str) and name.lower() in ("true", "false"):
        name = name.lower() == "true"
    if name is True:
        return last_complete_checkpoint(output_dir, num_ranks)
    return name or None


def last_complete_checkpoint(output_dir: str | Path, num_ranks: int = 1) -> str | None:
    """The newest whole `checkpoint-*` folder; newer broken ones are named in a warning and left alone.

    Args:
        output_dir: of the training run.
        num_ranks: of the run that goes on; each rank needs its random state.

    Returns:
        The folder, or None if there is none.

    Example:
        >>> last_complete_checkpoint("outputs/rm")  # doctest: +SKIP
        'outputs/rm/checkpoint-300'
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda path: -int(path.name.split("-")[-1])):
        reason = incomplete_reason(folder, num_ranks)
        if reason is None:
            logger.info("going on from %s", folder)
            return str(folder)
        logger.warning("%s is not whole (%s), looking for an older checkpoint", folder, reason)
    logger.info("%s holds no whole checkpoint, training starts from the beginning", output_dir)
    return None


def incomplete_reason(folder: Path, num_ranks: int = 1) -> str | None:
    """Why a checkpoint folder cannot be resumed from.

    `trainer_state.json` is written last, so a run killed while saving leaves none, or half of one. Every weight and
    state file is opened besides: a full disk truncates files as well. Weights are compared with their checksums.

    Args:
        folder: `checkpoint-<step>` as the Trainer writes it.
        num_ranks: number of ranks whose random states have to be there.

    Returns:
        The reason, or None if the folder is whole.
    """
    try:
        step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError) as error:
        return f"trainer_state.json cannot be read: {error}"
    if f"checkpoint-{step}" != folder.name:
        return f"its state is of step {step}"
    names = ["rng_state.pth"] if num_ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(num_ranks)]
    for name in names:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TORCH_SUFFIXES and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                return f"{path.name} is cut off: {error}"
    changed = changed_file(folder)
    return f"{changed} is missing or not the file that was saved" if changed else None
