"""`RewardTrainer`: transformers' Trainer on N-way preferences.

Legend: B groups, N responses.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, Trainer

from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.losses import get_loss
from mr_reward.metrics import ranking_metrics
from mr_reward.modeling import MultiResponseRewardModel
from mr_reward.packing import Packer
from mr_reward.rendering import Renderer
from mr_reward.training.arguments import RewardTrainingArguments
from mr_reward.training.collator import GroupCollator

__all__ = ["RewardTrainer", "check_groups"]

logger = logging.getLogger(__name__)

# Trained in full beside a LoRA adapter: both are new, an adapter on top of random weights could not learn them.
_NEW_MODULES = ["head", "readouts"]


def check_groups(groups: Sequence[ResponseGroup], packer: Packer, name: str, show_progress: bool = True) -> list[Any]:
    """Read every group once before the first step: images open, rankings are there, rows fit.

    Args:
        groups: ranked groups.
        packer: with the training's budget and over-length policy.
        name: of the data set, for messages.
        show_progress: show a bar.

    Returns:
        The groups that are kept; what was dropped or will be truncated is logged with its count.

    Raises:
        GroupError: a group without rankings or with a single response, or no group left.
        MediaError: an image that cannot be read.
        OverLengthError: a group that does not fit, under the policy `error`.
    """
    kept = []
    num_truncated = 0
    for group in tqdm(groups, desc=f"checking {name} groups", disable=not show_progress):
        if group.rankings is None or group.num_responses < 2:
            raise GroupError(
                f"{group.name}: {group.num_responses} responses and rankings {group.rankings}, training needs at "
                "least 2 ranked responses; remove the group or rank it"
            )
        row = packer.pack(group)
        if row is not None:
            kept.append(group)
            num_truncated += sum(row.truncated)
    if len(kept) < len(groups) or num_truncated:
        logger.warning(
            "%s: dropped %d of %d groups and truncated %d responses, rows are limited to %d tokens",
            name,
            len(groups) - len(kept),
            len(groups),
            num_truncated,
            packer.max_tokens,
        )
    if not kept:
        raise GroupError(f"{name}: no group is left of {len(groups)}; raise max_tokens or give more data")
    return kept


class RewardTrainer(Trainer):
    """Trains a reward model on ranked groups; the order of the responses is drawn anew every time.

    Evaluation reports `mr_reward.metrics.ranking_metrics` beside the loss.

    Args:
        model: the reward model.
        args: training arguments.
        train_dataset: ranked groups, each with at least 2 responses.
        eval_dataset: ranked groups or None.
        peft_config: LoRA configuration or None for full training. Empty `target_modules` means the linear layers of
            the language part; the value head and the readout vectors are trained in full beside it.
        **options: as transformers' `Trainer` (`callbacks`, `optimizers`).

    Raises:
        GroupError: see `check_groups`.
        MediaError: see `check_groups`.
        OverLengthError: see `check_groups`.

    Example:
        >>> trainer = RewardTrainer(model, RewardTrainingArguments("out"), groups)  # doctest: +SKIP
        >>> trainer.train(); trainer.save_reward_model("rm")  # doctest: +SKIP
    """

    # The loss is a mean over the groups of a batch; the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: MultiResponseRewardModel,
        args: RewardTrainingArguments,
        train_dataset: Sequence[ResponseGroup],
        eval_dataset: Sequence[ResponseGroup] | None = None,
        peft_config: LoraConfig | None = None,
        **options: Any,
    ) -> None:
        packer = Packer(
            Renderer(model.processor),
            layout=model.config.layout,
            max_tokens=args.max_tokens,
            context_tokens=model.context_tokens,
            over_length=args.over_length,
        )
        show_progress = args.local_process_index == 0 and not args.disable_tqdm
        train_dataset = check_groups(train_dataset, packer, "training", show_progress)
        if eval_dataset is not None:
            eval_dataset = check_groups(eval_dataset, packer, "evaluation", show_progress)
        self.group_loss = get_loss(args.loss)
        super().__init__(
            model=model if peft_config is None else _with_lora(model, peft_config),
            args=args,
            data_collator=GroupCollator(packer),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=model.processor,
            compute_metrics=_ranking_metrics,
            **options,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The configured loss over the scores of a batch.

        Args:
            model: the (wrapped) reward model.
            inputs: a batch of `GroupCollator`.
            return_outputs: also return the scores.
            num_items_in_batch: not used, the loss is a mean over groups.

        Returns:
            The loss, or the loss and `{"scores": (B, N)}`.
        """
        rankings = inputs["rankings"]
        scores = model(**{key: value for key, value in inputs.items() if key != "rankings"}).scores
        loss = self.group_loss(scores, rankings, inputs["response_mask"])
        return (loss, {"scores": scores}) if return_outputs else loss

    def save_reward_model(self, folder: str | Path) -> None:
        """Write a folder that `MultiResponseRewardModel.from_pretrained` loads; LoRA is merged into the backbone.

        Args:
            folder: where to. Training cannot go on after a merge.
        """
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        if self.args.should_save:
            model.save_pretrained(folder)


def _with_lora(model: MultiResponseRewardModel, config: LoraConfig) -> nn.Module:
    config.modules_to_save = _NEW_MODULES
    config.task_type = None  # the task wrappers of peft know only their own heads
    if not config.target_modules:
        config.target_modules = model.adapter.lora_targets
        config.exclude_modules = rf".*({'|'.join(_NEW_MODULES)})\..*"
    return get_peft_model(model, config)


def _ranking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics of padded (groups, N) arrays; a ranking of 0 or -100 marks an empty slot."""
    scores, rankings = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    real = rankings > 0
    return ranking_metrics(
        [row[keep].tolist() for row, keep in zip(scores, real, strict=True)],
        [row[keep].tolist() for row, keep in zip(rankings, real, strict=True)],
    )
