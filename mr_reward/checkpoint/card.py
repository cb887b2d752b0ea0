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
from transformers.utils import cached_file

from mr_reward.checkpoint.verify import has_file
from mr_reward.errors import CheckpointError, ConfigurationError

__all__ = ["CARD_FILE", "name_in_card", "read_card", "write_model_card"]

CARD_FILE = "README.md"
_NOT_GIVEN = "Not given."
_LOADING = 'GroupScorer.from_pretrained("{}")'
_LAYOUTS = {
    "causal": "a response sees the ones before it, so scores depend on the order",
    "isolated": "each response is scored as if it stood alone, so scores do not depend on the order",
    "set": "responses are compared through summaries, so scores do not depend on the order",
}


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
    sections = {
        "What it is": _description(config),
        "Use": _snippet(repo_id or str(folder), _sees_images(config)),
        "Training data": _table(list(training_data)),
        "Metrics": _table([{"evaluation set": name, **values} for name, values in (metrics or {}).items()]),
        "Reward hacking": _attacks(attacks),
        "Limitations": "\n".join(f"- {text}" for text in (*_limitations(config), *limitations)),
        "Licence": licence or _NOT_GIVEN,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    metadata = _metadata(config, training_data, licence).to_yaml()
    path = folder / CARD_FILE
    path.write_text(f"---\n{metadata}\n---\n\n# Multi-response reward model\n\n{body}\n")
    return path


def read_card(name: str, revision: str | None = None) -> str | None:
    """The card of a checkpoint.

    Args:
        name: folder or hub id.
        revision: of the hub repository.

    Returns:
        Its text, None if there is none.
    """
    if not has_file(name, CARD_FILE, revision):
        return None
    return Path(str(cached_file(name, CARD_FILE, revision=revision))).read_text()


def name_in_card(folder: str | Path, name: str) -> None:
    """Let the snippet of a card load another name.

    Args:
        folder: holds the card.
        name: hub id or folder.
    """
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


def _description(config: dict[str, Any]) -> str:
    backbone = config["backbone_config"]
    text = backbone.get("text_config", backbone)
    name = config.get("backbone_name_or_path")
    source = (_hub_id(name) or "a local folder") if name else "not given"
    rows = {
        "backbone": f"{source} ({backbone['model_type']})",
        "backbone revision": config.get("backbone_revision") or "not given",
        "layout": f"`{config['layout']}`: {_LAYOUTS[config['layout']]}",
        "template": f"`{config['template']}`, hash `{config['template_hash']}`",
        "value head": f"{config['head_hidden_size'] or text['hidden_size']} hidden units, {config['head_activation']}",
        "score scale": config["score_scale"],
    }
    table = _table([{"": key, " ": value} for key, value in rows.items()])
    return (
        "A reward model that scores all responses to a prompt in one forward pass "
        f"([arXiv 2604.10966](https://arxiv.org/abs/2604.10966)), made with `mr_reward`.\n\n{table}"
    )


def _attacks(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return _NOT_GIVEN
    try:
        rows = [
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
    return (
        "A bad answer of each group is changed and compared with a good one. Shift: of the bad answer's score minus "
        "the good one's, in standard deviations of that margin without an attack, with 95 % interval; above 0 the "
        f"attack works.\n\n{_table(rows)}"
    )


def _limitations(config: dict[str, Any]) -> list[str]:
    texts = ["A score says how a response compares within its group; it is no absolute measure of quality."]
    if config["layout"] == "causal":
        texts.append("Scores depend on the order of the responses; average over orders with `num_orders`.")
    if config["layout"] != "isolated":
        texts.append("Scores depend on which other responses are in the group.")
    return texts


def _snippet(name: str, sees_images: bool) -> str:
    # A picture made in code: the snippet runs as it is.
    picture = 'Image.new("RGB", (64, 64), "white")'
    question = "What is shown?" if sees_images else "What is 2 + 2?"
    images = f", images=[{picture}]" if sees_images else ""
    lines = [
        *(["from PIL import Image"] if sees_images else []),
        "from mr_reward import GroupScorer, ResponseGroup",
        "",
        f"scorer = {_LOADING.format(name)}",
        'responses = ["A white square.", "A dog."]' if sees_images else 'responses = ["4", "5"]',
        f'group = ResponseGroup(prompt="{question}", responses=responses{images})',
        "(scores,) = scorer.score([group])  # one score for each response, higher is better",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return _NOT_GIVEN
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "not given"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
