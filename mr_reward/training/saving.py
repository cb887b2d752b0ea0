"""Write a trained reward model, whatever its weights are spread over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, init_empty_weights
from peft import PeftModel, get_peft_model
from torch import Tensor

from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.errors import ConfigurationError
from mr_reward.model.model import MultiResponseRewardModel

__all__ = ["check_can_save", "naming_a_full_disk", "save_whole_model"]


def check_can_save(accelerator: Accelerator) -> None:
    """Refuse a DeepSpeed configuration under which a trained model could not be written.

    Args:
        accelerator: the Trainer's.

    Raises:
        ConfigurationError: ZeRO-3 that does not collect the weights for saving.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        raise ConfigurationError(
            "got a ZeRO-3 configuration that leaves the weights in parts when it saves; set zero3_save_16bit_model: "
            "true in accelerate's file (stage3_gather_16bit_weights_on_model_save in DeepSpeed's), as "
            "configs/deepspeed/zero3.yaml does"
        )


@contextmanager
def naming_a_full_disk(output_dir: str | Path | None) -> Iterator[None]:
    """A block that writes checkpoints; torch's own message about a full disk speaks of positions in a file only.

    Args:
        output_dir: of the run.

    Raises:
        OSError: torch could not write a file; the message says what is left and how to go on.

    Example:
        >>> with naming_a_full_disk("out"):
        ...     trainer.train()  # doctest: +SKIP
    """
    try:
        yield
    except RuntimeError as error:
        # What torch says when it writes; the same file of it reads archives too, and then names its reader.
        writes = any(words in str(error) for words in ("inline_container", "iostream error"))
        if not writes or "PytorchStreamReader" in str(error):
            raise
        raise OSError(
            f"a checkpoint in {output_dir} could not be written ({error}); is the disk full? Earlier checkpoints are "
            "whole: make room, and go on with resume_from_checkpoint"
        ) from error


def save_whole_model(
    model: MultiResponseRewardModel | PeftModel, weights: dict[str, Tensor], folder: str | Path
) -> None:
    """Write a folder that `MultiResponseRewardModel.from_pretrained` loads; LoRA is merged into the backbone.

    The model itself is not touched: its weights may be partitioned over several ranks, and training may go on.

    Args:
        model: the trained model.
        weights: its whole state dict, as `Accelerator.get_state_dict` collects it.
        folder: where to.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=weights)
        return
    trained: Any = model.get_base_model()
    with outside_zero3(), init_empty_weights():
        plain = MultiResponseRewardModel(trained.config)
        adapted = get_peft_model(plain, model.peft_config[model.active_adapter])
    # Copies: merging changes the weights in place. On the CPU there is room for them.
    adapted.load_state_dict({key: value.to("cpu", copy=True) for key, value in weights.items()}, assign=True)
    merged: Any = adapted.merge_and_unload()
    merged.processor = trained.processor
    merged.save_pretrained(folder)
