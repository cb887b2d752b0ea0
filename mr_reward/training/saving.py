"""Checkpoints of a run: a full disk is named, and what a kill in the middle of saving leaves is not resumed from."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mr_reward.checkpoint.checksums import changed_file

logger = logging.getLogger(__name__)


@contextmanager
def naming_a_full_disk(output_dir: str | Path | None) -> Iterator[None]:
    """A block that writes checkpoints; torch's own message about a full disk speaks of positions in a file only."""
    try:
        yield
    except RuntimeError as error:
        # What torch says when it writes; the same file of it reads archives too, and then names its reader.
        writes = any(words in str(error) for words in ("inline_container", "iostream error"))
        if not writes or "PytorchStreamReader" in str(error):
            raise
        raise OSError(
            f"a checkpoint in {output_dir} could not be written ({error}); is the disk full? Earlier checkpoints are "
            "whole: make room, and resume with resume_from_checkpoint"
        ) from error


def which_checkpoint(name: str | bool | None, output_dir: str | Path, num_ranks: int = 1) -> str | None:
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

    Each of `num_ranks` processes of the run needs its random state.
    """
    for folder in saved_checkpoints(output_dir):
        reason = incomplete_reason(folder, num_ranks)
        if reason is None:
            logger.info("resuming from %s", folder)
            return str(folder)
        logger.warning("%s is not whole (%s), looking for an older checkpoint", folder, reason)
    logger.info("%s holds no whole checkpoint, training starts from the beginning", output_dir)
    return None


def saved_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-*` folders of a run, the newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: -int(path.name.split("-")[-1]))


def incomplete_reason(folder: Path, num_ranks: int = 1) -> str | None:
    """Why a checkpoint folder cannot be resumed from.

    `trainer_state.json` is written last, so a run killed while saving leaves none, or half of one. Every weight and
    state file is opened besides: a full disk truncates files as well. Weights are compared with their checksums.
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
        if path.suffix in (".bin", ".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                return f"{path.name} is cut off: {error}"
    changed = changed_file(folder)
    return f"{changed} is missing or not the file that was saved" if changed else None
