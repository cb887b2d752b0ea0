"""Checkpoints in other forms: LoRA merged into its backbone, the public format of the paper.

Both are read by `MultiResponseRewardModel.from_pretrained`; here they are written.
"""

from __future__ import annotations

from pathlib import Path

from mr_reward.checkpoint.checksums import written_whole
from mr_reward.checkpoint.formats import is_lora, write_head
from mr_reward.checkpoint.verify import check_there
from mr_reward.errors import CheckpointError
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.templates.rendering import JOINED_TEMPLATES


def merge(adapter: str | Path, folder: str | Path) -> MultiResponseRewardModel:
    """Write the folder of a LoRA checkpoint merged into its backbone; scores stay the same, to rounding."""
    check_there(str(adapter))
    if not is_lora(str(adapter)):
        raise CheckpointError(
            f"{adapter}: no adapter_config.json there, so nothing is to be merged; pass a checkpoint folder of a "
            "run with LoRA"
        )
    model = MultiResponseRewardModel.from_pretrained(adapter)
    model.save_pretrained(folder)
    return model


def export_paper_format(model: MultiResponseRewardModel, folder: str | Path) -> None:
    """Write a model with a template `mr2rm-*` in the public format of arXiv 2604.10966.

    The backbone is written as this release of transformers does: a release that knows the family reads it. It has no
    language-model head, which the format's readers do not use either.
    """
    if model.config.template not in JOINED_TEMPLATES:
        raise CheckpointError(
            f"the model has template {model.config.template!r} and layout {model.config.layout!r}; its readout "
            "vectors have no place in the paper's format, which reads scores at text. Train with layout='causal' and "
            f"template={JOINED_TEMPLATES[0]!r} to export, or share the folder of save_pretrained"
        )
    with written_whole(folder) as unfinished:
        write_head(unfinished, model.head.state_dict(), model.config.head_activation)
        model.backbone.save_pretrained(unfinished)
        model.processor.save_pretrained(unfinished)
