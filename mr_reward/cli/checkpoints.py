"""`mr-reward merge | export | card | verify`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from mr_reward.cli.options import Model
from mr_reward.errors import CheckpointError, ConfigurationError

logger = logging.getLogger(__name__)


def merge(
    adapter: Annotated[str, typer.Argument(help="LoRA checkpoint: a folder or hub id")],
    out: Annotated[Path, typer.Argument(help="Folder to write")],
) -> None:
    """Merge a LoRA checkpoint into its backbone; the folder scores the same and needs neither.

    Example: mr-reward merge outputs/rm/checkpoint-400 rm
    """
    from mr_reward.model.export import merge as merge_checkpoint

    merge_checkpoint(adapter, out)
    logger.info("wrote %s", out)


def export(
    model: Annotated[str, typer.Argument(help="Reward model with a template mr2rm-*: a folder or hub id")],
    out: Annotated[Path, typer.Argument(help="Folder to write")],
) -> None:
    """Write a reward model in the public format of arXiv 2604.10966.

    Example: mr-reward export rm public
    """
    from mr_reward.model.export import export_paper_format
    from mr_reward.model.model import MultiResponseRewardModel

    export_paper_format(MultiResponseRewardModel.from_pretrained(model), out)
    logger.info("wrote %s", out)


def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a reward model")],
    training_data: Annotated[Path | None, typer.Option(help="JSON file: a list with an object per data set")] = None,
    metrics: Annotated[Path | None, typer.Option(help="JSON file: evaluation set -> metric -> value")] = None,
    attacks: Annotated[Path | None, typer.Option(help="JSON file that `mr-reward attack --out` has written")] = None,
    licence: Annotated[str | None, typer.Option(help="Identifier as the hub spells it")] = None,
    limitation: Annotated[list[str] | None, typer.Option(help="A sentence; may be given several times")] = None,
    repo_id: Annotated[str | None, typer.Option(help="What the card's snippet loads")] = None,
) -> None:
    """Write the model card of a folder; what is not given is said not to be.

    Example: mr-reward card rm --metrics metrics.json --licence apache-2.0
    """
    from mr_reward.checkpoint.card import write_model_card

    path = write_model_card(
        folder,
        training_data=_read_json(training_data, list),
        metrics=_read_json(metrics, dict),
        attacks=None if attacks is None else _load(attacks),
        licence=licence,
        limitations=limitation or (),
        repo_id=repo_id,
    )
    logger.info("wrote %s", path)


def verify(model: Model) -> None:
    """Compare every byte of a reward model with its list of checksums; a load compares sizes and samples only.

    Example: mr-reward verify rm
    """
    from mr_reward.checkpoint.checksums import CHECKSUM_FILE
    from mr_reward.checkpoint.verify import check_checksums, check_there, has_file

    check_there(model)
    if not has_file(model, CHECKSUM_FILE):
        raise CheckpointError(f"{model}: no {CHECKSUM_FILE} there; pass a folder that save_pretrained has written")
    check_checksums(model, verify=True)
    logger.info("%s: every file is the one that was saved", model)


def _read_json(path: Path | None, kind: type[list] | type[dict]) -> Any:
    """The content of a JSON file of objects, an empty one without a file."""
    if path is None:
        return kind()
    content = _load(path)
    entries = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(content, kind) or not all(isinstance(entry, dict) for entry in entries):
        expected = "a list of objects" if kind is list else "an object of objects"
        raise ConfigurationError(f"{path} holds {type(content).__name__}, expected {expected}")
    return content


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON ({error})") from error
