"""The model card of a reward model: what it is, what it was trained on, how good it is, how to run it.

A card says only what it was told or what the configuration holds; what is absent is "not given".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mr_reward.checkpoint.verify import find_file
from mr_reward.errors import CheckpointError, ConfigurationError

CARD_FILE = "README.md"
_LOADING = 'GroupScorer.from_pretrained("{}")'


def write_model_card(
    folder: str | Path,
    *,
    training_data: Sequence[Mapping[str, Any]] = (),
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    attacks: Mapping[str, Any] | None = None,
    licence: str | None = None,
    limitations: Sequence[str] = (),
    repo_id: str | None = None,
) -> Path:
    """Write `README.md` into a folder of `save_pretrained`.

    Args:
        folder: the folder.
        training_data: one row for each data set: `name`, and anything else worth telling (`groups`, `licence`);
            `hub_id` also goes into the card's metadata.
        metrics: for each evaluation set its metrics by name.
        attacks: what `mr-reward attack --out` has written.
        licence: identifier as the hub spells it (`apache-2.0`).
        limitations: sentences, beside those that follow from the layout.
        repo_id: what the snippet loads; None for the folder's name.

    Returns:
        The file.

    Raises:
        CheckpointError: the folder holds no reward model.
        ConfigurationError: `attacks` is something else.

    Example:
        >>> write_model_card(
        ...     "rm", training_data=[{"name": "handwriting", "groups": 12800}], metrics={"test": {"best_of_n": 0.92}}
        ... )  # doctest: +SKIP
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no config.json could be read ({error})") from error
    if config.get("model_type") != "multi_response_reward":
        raise CheckpointError(
            f"{folder}: holds a {config.get('model_type')!r} model, expected 'multi_response_reward'; pass a folder "
            "written by MultiResponseRewardModel.save_pretrained"
        )
    backbone = config["backbone_config"]
    name = config.get("backbone_name_or_path")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "columns": _columns}
    text = environment.get_template("card.md.j2").render(
        metadata=_metadata(config, training_data, licence).to_yaml(),
        config={"backbone_revision": None, **config},
        backbone=(_hub_id(name) or "a local folder") if name else None,
        hidden_size=backbone.get("text_config", backbone)["hidden_size"],
        loading=_LOADING.format(repo_id or folder),
        sees_images=_sees_images(config),
        training_data=training_data,
        metrics=[{"evaluation set": name, **values} for name, values in (metrics or {}).items()],
        attacks=_attacks(attacks),
        limitations=limitations,
        licence=licence,
    )
    path = folder / CARD_FILE
    path.write_text(text + "\n")
    return path


def read_card(name: str, revision: str | None = None) -> str | None:
    """The card of a checkpoint (folder or hub id), None if there is none."""
    path = find_file(name, CARD_FILE, revision)
    return None if path is None else path.read_text()


def name_in_card(folder: str | Path, name: str) -> None:
    """Let the snippet of a folder's card load another name, a hub id for example."""
    path = Path(folder, CARD_FILE)
    found = re.escape(_LOADING).replace(re.escape("{}"), '[^"]*')
    path.write_text(re.sub(found, lambda _: _LOADING.format(name), path.read_text()))


def _metadata(config: dict[str, Any], training_data: Sequence[Mapping[str, Any]], licence: str | None) -> Any:
    hub_ids = [str(row["hub_id"]) for row in training_data if "hub_id" in row]
    return ModelCardData(
        license=licence,
        base_model=_hub_id(config.get("backbone_name_or_path")),
        datasets=hub_ids or None,
        library_name="mr_reward",
        pipeline_tag="image-text-to-text" if _sees_images(config) else "text-ranking",
        tags=["reward-model", "multi-response", "trl", f"layout-{config['layout']}"],
    )


def _hub_id(name: str | None) -> str | None:
    """The name, if it is of a hub repository; a folder of the training machine means nothing to a reader."""
    if not name or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _sees_images(config: dict[str, Any]) -> bool:
    return "vision_config" in config["backbone_config"]


def _attacks(report: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """The rows of the table about attacks."""
    if report is None:
        return None
    try:
        return [
            {
                "attack": one["name"],
                "shift of the margin": f"{one['shift']:+.2f} [{one['shift_low']:+.2f}, {one['shift_high']:+.2f}]",
                "bad answer wins before": f"{one['wins_before']:.1%}",
                "after": f"{one['wins_after']:.1%}",
                "groups": one["num_items"],
            }
            for one in report["attacks"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"attacks cannot be read ({error!r}); give what `mr-reward attack --out` has written"
        ) from error


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _cell(value: Any) -> str:
    """A value within a table of Markdown."""
    if value is None:
        return "not given"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
