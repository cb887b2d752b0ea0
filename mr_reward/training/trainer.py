"""`RewardTrainer`: transformers' Trainer on N-way preferences, and its arguments.

Legend: B groups, N responses.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator, init_empty_weights
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from mr_reward.checkpoint.checksums import write_checksums
from mr_reward.checkpoint.verify import non_finite_cause
from mr_reward.checkpoint.zero3 import match_partitioned_dtype, outside_zero3
from mr_reward.data.groups_file import load_preferences
from mr_reward.errors import ConfigurationError, NonFiniteScoreError
from mr_reward.groups import ResponseGroup
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.rows import Packer, check_over_length
from mr_reward.model.scorer import memory_advice
from mr_reward.training.batches import (
    EvaluationGroups,
    GroupCollator,
    TrainingGroups,
    check_groups,
    evaluation_metrics,
)
from mr_reward.training.losses import LossFunction, get_loss
from mr_reward.training.saving import naming_a_full_disk, which_checkpoint

logger = logging.getLogger(__name__)

# Trained in full beside a LoRA adapter: both are new, an adapter on top of random weights could not learn them.
_NEW_MODULES = ["head", "readouts"]

Groups: TypeAlias = Sequence[ResponseGroup] | Dataset


@dataclass
class RewardTrainingArguments(TrainingArguments):
    """Arguments of `RewardTrainer`.

    transformers' own fields cover the rest: `label_smoothing_factor` (for the losses of `mr_reward.training.losses`),
    `train_sampling_strategy` (`batch_rebalance` forms micro-batches of equal cost in tokens, `group_by_length` batches
    of equal length), `gradient_checkpointing`, `bf16`, `deepspeed`, `metric_for_best_model`, `resume_from_checkpoint`.

    Args:
        loss: `best_of_n`, `plackett_luce` or `bradley_terry`, see `mr_reward.training.losses`.
        margin: score difference that `bradley_terry` asks for per rank of difference.
        center_rewards_coefficient: weight of the penalty on the groups' mean scores; the name is TRL's.
        max_tokens: largest number of tokens of a training row (prompt, media and all responses of a group).
        eval_max_tokens: the same in evaluation, where groups are whole; None for `max_tokens`.
        over_length: `error`, `drop_group` or `truncate_responses`, applied and counted before the first step.
        max_responses: train on random subsets of at most so many responses per row, drawn again every epoch; None for
            all responses.
        degenerate_negatives: probability with which a training row gets one worthless response, ranked last.
        mixture_weights: share of each training set, in their order; None for their sizes. What comes of it is logged.
        same_text_once: take a text that a group holds several times once; where its ranks differ, their mean decides.
        binary_labels: train on the best responses of a group, all that share rank 1, against all others, whatever else
            its rankings say. A degenerate negative still is below both.
        eval_orders: 2 scores every evaluation group in a second order and reports `order_flip_rate`; 1 saves the time.

    Raises:
        ConfigurationError: an unknown loss or policy, options that the loss cannot take, `use_cpu` with DeepSpeed.

    Example:
        >>> RewardTrainingArguments("rm", loss="plackett_luce", max_tokens=4096, use_cpu=True).loss
        'plackett_luce'
    """

    loss: str = field(default="best_of_n", metadata={"help": "best_of_n, plackett_luce or bradley_terry"})
    margin: float = field(default=0.0, metadata={"help": "Score difference per rank that bradley_terry asks for"})
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of the penalty on the groups' mean scores"}
    )
    max_tokens: int = field(default=16384, metadata={"help": "Largest number of tokens of a group's row"})
    eval_max_tokens: int | None = field(default=None, metadata={"help": "The same in evaluation, None for max_tokens"})
    over_length: str = field(default="error", metadata={"help": "error, drop_group or truncate_responses"})
    max_responses: int | None = field(default=None, metadata={"help": "Responses of a training row, None for all"})
    degenerate_negatives: float = field(
        default=0.0, metadata={"help": "Probability of a worthless response in a training row"}
    )
    mixture_weights: list[float] | None = field(
        default=None, metadata={"help": "Share of each training set, None for their sizes"}
    )
    same_text_once: bool = field(
        default=False, metadata={"help": "Take a text that a group holds several times once, at its mean rank"}
    )
    binary_labels: bool = field(
        default=False, metadata={"help": "Train on best against rest: ranks become 1, and 2 for all others"}
    )
    eval_orders: int = field(default=2, metadata={"help": "2 measures order flips in evaluation, 1 saves the time"})
    ddp_backend: str | None = field(default=None, metadata={"help": "gloo without a GPU if DeepSpeed runs"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Groups are no columns; keep False"})
    label_names: list[str] | None = field(default_factory=lambda: ["rankings"], metadata={"help": "Keep as it is"})

    def __post_init__(self) -> None:
        self.ddp_backend = backend_for_deepspeed(self.ddp_backend, use_cpu=self.use_cpu)
        super().__post_init__()
        problems = []  # known before a model is loaded, and all at once
        for check in (self.group_loss, lambda: check_over_length(self.over_length)):
            try:
                check()
            except ConfigurationError as error:
                problems.append(str(error))
        if problems:
            raise ConfigurationError("; ".join(problems))

    def group_loss(self) -> LossFunction:
        """The loss that the arguments describe."""
        return get_loss(
            self.loss,
            margin=self.margin,
            label_smoothing=self.label_smoothing_factor,
            centring_coefficient=self.center_rewards_coefficient or 0.0,
        )


def backend_for_deepspeed(ddp_backend: str | None, *, use_cpu: bool) -> str | None:
    """The backend of a run that may have been launched with DeepSpeed on a machine without a GPU.

    accelerate knows none for it, and then every process takes itself for a whole run.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return ddp_backend
    if use_cpu:
        raise ConfigurationError(
            "got use_cpu=true in a run that was launched with DeepSpeed; accelerate would leave DeepSpeed "
            "out. Remove use_cpu: on a machine without a GPU DeepSpeed runs on the CPU by itself"
        )
    return "gloo" if ddp_backend is None and not torch.accelerator.is_available() else ddp_backend


class RewardTrainer(Trainer):
    """Trains a reward model on ranked groups; the order of the responses is drawn again every epoch.

    Evaluation reports `mr_reward.training.batches.evaluation_metrics` beside the loss. `shares` holds the share of an
    epoch that each training set has, by name.

    Args:
        model: the reward model.
        args: training arguments.
        train_dataset: ranked groups, each with at least 2 responses, or a `datasets.Dataset` as `load_preferences`
            takes it, such as one in TRL's preference format; or several sets by name, mixed with
            `args.mixture_weights`.
        eval_dataset: the same for evaluation, or None.
        peft_config: LoRA configuration or None for full training. Empty `target_modules` means the linear layers of
            the language part; the value head and the readout vectors are trained in full beside it.
        **options: as transformers' `Trainer` (`callbacks`, `optimizers`).

    Raises:
        ConfigurationError: mixture weights that do not match the sets.
        GroupError: see `check_groups`.
        MediaError: see `check_groups`.
        OverLengthError: see `check_groups`.

    Example:
        >>> trainer = RewardTrainer(model, RewardTrainingArguments("out"), groups)  # doctest: +SKIP
        >>> trainer.train(); trainer.save_reward_model("rm")  # doctest: +SKIP
    """

    # The loss is divided by the number of groups of the whole accumulated batch, see compute_loss.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: MultiResponseRewardModel,
        args: RewardTrainingArguments,
        train_dataset: Groups | Mapping[str, Groups],
        eval_dataset: Groups | Mapping[str, Groups] | None = None,
        peft_config: LoraConfig | None = None,
        **options: Any,
    ) -> None:
        packer, eval_packer = (
            Packer.of(model, max_tokens=max_tokens, over_length=args.over_length)
            for max_tokens in (args.max_tokens, args.eval_max_tokens or args.max_tokens)
        )
        show_progress = args.local_process_index == 0 and not args.disable_tqdm
        training_sets = _by_name(train_dataset, "training")
        data = TrainingGroups(
            [
                check_groups(
                    groups,
                    packer,
                    name,
                    max_responses=args.max_responses,
                    degenerate_negatives=args.degenerate_negatives > 0.0,
                    same_text_once=args.same_text_once,
                    binary_labels=args.binary_labels,
                    show_progress=show_progress,
                )
                for name, groups in training_sets.items()
            ],
            weights=args.mixture_weights,
            max_responses=args.max_responses,
            degenerate_negatives=args.degenerate_negatives,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )
        self.shares = {name: count / len(data) for name, count in zip(training_sets, data.counts, strict=True)}
        mixed = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        logger.info("an epoch has %d groups: %s", len(data), mixed)

        def evaluation_set(groups: Sequence[ResponseGroup], name: str) -> EvaluationGroups:
            checked = check_groups(groups, eval_packer, name, training=False, show_progress=show_progress)
            return EvaluationGroups([group for group, _ in checked], num_orders=args.eval_orders, seed=args.seed)

        evaluation: Any = None
        if eval_dataset is not None:
            evaluation = {
                name: evaluation_set(groups, name) for name, groups in _by_name(eval_dataset, "evaluation").items()
            }
            if not isinstance(eval_dataset, Mapping):
                evaluation = evaluation["evaluation"]
        if args.n_gpu > 1:  # transformers would cut the tensors of a batch for them, and media do not lie row by row
            logger.warning("training on one of %d GPUs; start with accelerate launch to use all", args.n_gpu)
            args._n_gpu = 1
        self.group_loss = args.group_loss()
        self._train_collator, self._eval_collator = GroupCollator(packer), GroupCollator(eval_packer)
        trained = model if peft_config is None else _with_lora(model, peft_config)
        match_partitioned_dtype(trained)
        super().__init__(
            model=trained,
            args=args,
            data_collator=self._train_collator,
            train_dataset=data,
            eval_dataset=evaluation,
            processing_class=model.processor,
            **options,
        )
        _check_can_save(self.accelerator)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a folder; or True for the newest whole checkpoint below `args.output_dir`, the
                start if there is none, so that one command serves the first launch and every restart.
            **options: as transformers' `Trainer.train`.

        Returns:
            transformers' `TrainOutput`.
        """
        # Nobody writes before every rank is here, so all ranks find the same folder.
        folder = which_checkpoint(resume_from_checkpoint, str(self.args.output_dir), self.args.world_size)
        return super().train(resume_from_checkpoint=folder, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss over the scores of a batch of `GroupCollator`, and if asked for the scores (B, N).

        `num_items_in_batch`: groups of one optimizer step over all ranks, so that every group weighs the same whatever
        micro-batch and rank it is on; None for the plain mean (evaluation).
        """
        rankings, rows = inputs["rankings"], inputs["rows"]
        mask = rows.response_mask
        scores = model(rows=rows).scores
        if not scores.isfinite().all():
            raise NonFiniteScoreError(
                f"step {self.state.global_step}: scores {scores[mask].tolist()} are not finite: "
                f"{non_finite_cause(self.accelerator.unwrap_model(model))}. Lower the learning rate, use bf16 instead "
                "of fp16, and resume from the last checkpoint"
            )
        loss = self.group_loss(scores, rankings, mask)
        if num_items_in_batch is not None:
            # Ranks average their gradients: times the number of ranks makes that a sum.
            loss = loss * (len(rankings) * self.accelerator.num_processes / num_items_in_batch)
        return (loss, {"scores": scores}) if return_outputs else loss

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """As transformers', and a device without memory says what to lower."""
        with memory_advice(
            f"step {self.state.global_step} has up to {self.args.per_device_train_batch_size} groups of "
            f"{self.args.max_tokens} tokens: lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps) or max_tokens, or set gradient_checkpointing; then resume with "
            "resume_from_checkpoint"
        ):
            return super().training_step(*args, **options)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers', which looks for `input_ids` in the batch."""
        return 6 * inputs["rows"].num_tokens * self.model.num_parameters(exclude_embeddings=True)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Groups of one optimizer step over all ranks."""
        count = torch.tensor(sum(len(batch["rankings"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """transformers' samplers by length, with the lengths that `check_groups` has counted."""
        data = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.train_sampling_strategy == "group_by_length":
            batch = args.train_batch_size * args.gradient_accumulation_steps
            return LengthGroupedSampler(batch, dataset=data, lengths=data.num_tokens)
        if args.train_sampling_strategy == "batch_rebalance":
            return BatchRebalanceSampler(
                lengths=data.num_tokens,
                effective_batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                dp_size=args.world_size,
                grad_accum=args.gradient_accumulation_steps,
                seed=data.seed,
                rank=args.process_index,
                drop_last=args.dataloader_drop_last,
            )
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """Always in order: `evaluation_loop` matches scores with groups by position."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As transformers', with the evaluation's token budget."""
        self.data_collator = self._eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self._train_collator

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As transformers', with the metrics of `evaluation_metrics`."""
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        data: Any = dataloader.dataset
        metrics = evaluation_metrics(data, output.predictions)
        prefixed = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **prefixed})

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """As transformers', and a full disk is named."""
        with naming_a_full_disk(self.args.output_dir):
            super()._save_checkpoint(*args, **options)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As transformers'; an adapter's folder also gets the reward model's configuration, to be loaded by it."""
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save and isinstance(model, PeftModel):
            folder = output_dir or self.args.output_dir
            model.get_base_model().config.save_pretrained(folder)
            # Where the backbone lies may have to be corrected in it.
            write_checksums(folder, leave_out=["config.json"])

    def save_reward_model(self, folder: str | Path) -> None:
        """Write a folder that `MultiResponseRewardModel.from_pretrained` loads; LoRA is merged into the backbone.

        Args:
            folder: where to. Every rank has to call this, one of them writes.
        """
        # DeepSpeed ZeRO-3 collects the parts of all ranks here, on the CPU of the one that writes.
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            model.save_pretrained(folder, state_dict=weights)
            return
        # The model itself is not touched: its weights may be partitioned over several ranks, training may continue.
        trained: Any = model.get_base_model()
        with outside_zero3(), init_empty_weights():
            plain = MultiResponseRewardModel(trained.config)
            adapted = get_peft_model(plain, model.peft_config[model.active_adapter])
        # Copies: merging changes the weights in place. On the CPU there is room for them.
        adapted.load_state_dict({key: value.to("cpu", copy=True) for key, value in weights.items()}, assign=True)
        merged: Any = adapted.merge_and_unload()
        merged.processor = trained.processor
        merged.save_pretrained(folder)


def _by_name(given: Groups | Mapping[str, Groups], name: str) -> dict[str, Sequence[ResponseGroup]]:
    """Sets of groups by name; a `Dataset` is read as one."""
    if isinstance(given, DatasetDict):
        raise ConfigurationError(f"the {name} data are a DatasetDict with {list(given)}; give one split of it")
    sets = given if isinstance(given, Mapping) else {name: given}
    for key, groups in sets.items():
        if not isinstance(groups, Sequence | Dataset):
            raise ConfigurationError(f"{key}: got {type(groups).__name__}, expected a list of groups or a Dataset")
    return {key: load_preferences(one) if isinstance(one, Dataset) else one for key, one in sets.items()}


def _with_lora(model: MultiResponseRewardModel, config: LoraConfig) -> nn.Module:
    config.modules_to_save = _NEW_MODULES
    config.task_type = None  # the task wrappers of peft know only their own heads
    if not config.target_modules:
        config.target_modules = model.adapter.lora_targets
        config.exclude_modules = rf".*({'|'.join(_NEW_MODULES)})\..*"
    return get_peft_model(model, config)


def _check_can_save(accelerator: Accelerator) -> None:
    """Refuse a DeepSpeed configuration under which a trained model could not be written."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        raise ConfigurationError(
            "got a ZeRO-3 configuration that leaves the weights in parts when it saves; set zero3_save_16bit_model: "
            "true in accelerate's file (stage3_gather_16bit_weights_on_model_save in DeepSpeed's), as "
            "configs/deepspeed/zero3.yaml does"
        )
