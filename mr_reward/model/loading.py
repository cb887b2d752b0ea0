"""How a reward model is made: from a backbone, from a folder or the hub, without weights; and how it is written.

What a folder must hold and what is refused is in `mr_reward.checkpoint`.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PreTrainedModel

from mr_reward.attention.backends import check_backend, load_attention
from mr_reward.backbones.base import BackboneAdapter
from mr_reward.checkpoint.card import CARD_FILE, name_in_card, read_card, write_model_card
from mr_reward.checkpoint.checksums import written_whole
from mr_reward.checkpoint.formats import (
    is_lora,
    is_paper_format,
    lora_backbone,
    merge_lora,
    paper_score_scale,
    read_head,
    trained_separator,
    with_separator,
)
from mr_reward.checkpoint.verify import (
    align_weights,
    check_checksums,
    check_config_keys,
    check_loading_info,
    check_shards,
    check_template_hash,
    check_there,
    load_backbone,
    load_processor,
    reading,
    safe_options,
)
from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.errors import CheckpointError, ConfigurationError
from mr_reward.layouts import Layout, check_layout
from mr_reward.model.configuration import MultiResponseRewardConfig
from mr_reward.model.features import settle_attention
from mr_reward.templates.rendering import JOINED_TEMPLATES, TEMPLATE, check_template, template_hash
from mr_reward.templates.thoughts import THOUGHTS, check_thoughts


class LoadedModel(PreTrainedModel):
    """The part of `MultiResponseRewardModel` that makes one and writes one."""

    config_class = MultiResponseRewardConfig
    adapter: BackboneAdapter
    backbone: PreTrainedModel
    readouts: Any  # `ReadoutVectors` or None
    head: nn.Module
    processor: Any
    model_card: str | None

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        *,
        layout: Layout | str = "set",
        template: str = TEMPLATE,
        thoughts: str = THOUGHTS[0],
        processor: Any = None,
        head_hidden_size: int | None = None,
        head_activation: str = "silu",
        score_scale: float | None = None,
        attn_implementation: str | None = None,
        **load_options: Any,
    ) -> Self:
        """Put a new value head and new readout vectors on a pretrained language or vision-language model.

        With a template of the paper's format, responses are separated by a real token instead of readout vectors. If
        the tokenizer lacks it, a copy of the processor gets it, and the backbone's embedding is resized in place; the
        new row is the mean of the others. LoRA leaves that row frozen unless `trainable_token_indices` names it.

        Args:
            backbone: hub id, local folder, or a loaded model (its weights are then shared with it, not copied; a
                language-model head is left aside).
            layout: `causal`, `isolated` or `set`.
            template: `chat`; or with layout `causal` `mr2rm-assistant` or `mr2rm-user`.
            thoughts: what is judged of responses with thoughts (`<think>`): `included`, all that was written;
                `stripped`, the answer alone; `refused`, none: an error. The same in training, scoring and GRPO.
            processor: the processor or tokenizer; None loads it from the same place.
            head_hidden_size: width of the value head's hidden layer; None for the backbone's width.
            head_activation: `selu` or a name of transformers' `ACT2FN`.
            score_scale: factor on the head's output; None for 1, or for 1 / sqrt(width) with the paper's templates.
            attn_implementation: attention backend; None for the fastest that gives the stock model's scores.
            **load_options: passed on to transformers' `from_pretrained` (`dtype`, `revision`).

        Returns:
            A reward model with an untrained head, in evaluation mode.

        Raises:
            CheckpointError: no such folder, and no hub that answers has it.
            ConfigurationError: a loaded model without a processor; unknown layout or template, or one that does not go
                with the other.
            BackendError: the attention backend cannot express the layout.
        """
        check_template(template, check_layout(layout))
        check_thoughts(thoughts)
        if isinstance(backbone, PreTrainedModel):
            if processor is None:
                raise ConfigurationError("a loaded backbone comes without its processor; pass processor=...")
            base, name = backbone.base_model, backbone.config.name_or_path or None
        else:
            name = str(backbone)
            where = {key: load_options[key] for key in ("token", "cache_dir") if key in load_options}
            check_there(name, load_options.get("revision"), **where)
            load_options |= load_attention(attn_implementation)
            base = AutoModel.from_pretrained(name, **safe_options(name, load_options))
            processor = processor if processor is not None else load_processor(name, load_options.get("revision"))
        joined = template in JOINED_TEMPLATES
        if joined:
            processor = with_separator(base, processor)
        if score_scale is None:
            score_scale = paper_score_scale(base.config.get_text_config().hidden_size) if joined else 1.0
        config = cls.config_class(
            backbone_config=base.config,
            layout=layout,
            head_hidden_size=head_hidden_size,
            head_activation=head_activation,
            head_bias=joined,
            score_scale=score_scale,
            template=template,
            template_hash=template_hash(processor, template, thoughts),
            thoughts=thoughts,
            backbone_name_or_path=name,
            backbone_revision=getattr(base.config, "_commit_hash", None),
            # A new configuration would reset the choice in the backbone's.
            **load_attention(base.config.get_text_config()._attn_implementation),
        )
        model = cls(config, backbone=base)
        settle_attention(model, attn_implementation)
        if model.readouts is not None:
            tokenizer = getattr(processor, "tokenizer", processor)
            model.readouts.initialise_from(base.get_input_embeddings(), tokenizer.eos_token_id)
        model.to(base.device)
        model.processor = processor
        return model.eval()

    @classmethod
    def without_weights(cls, config: MultiResponseRewardConfig, attn_implementation: str | None = None) -> Self:
        """A model on the meta device, to be asked what a loaded one would do; None: the fastest attention that fits.

        Raises BackendError if the backend or the backbone's layers cannot express the layout.
        """
        config = copy.deepcopy(config)
        # In a run under ZeRO-3 transformers would partition and initialise it.
        with torch.device("meta"), outside_zero3():
            model = cls(config)
        settle_attention(model, None)
        if attn_implementation is not None:  # set without a look for its packages, which this machine may lack
            model.backbone.config.get_text_config()._attn_implementation = attn_implementation
        found = model.backbone.config.get_text_config()._attn_implementation
        check_backend(check_layout(config.layout), found, model.adapter.media_blocks)
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a reward model with its processor; nothing is filled in with random weights.

        Args:
            pretrained_model_name_or_path: folder or hub id written by `save_pretrained`; or a LoRA checkpoint of
                `RewardTrainer`, which is merged into its backbone; or a checkpoint in the public format of the paper.
            *args: as transformers' `from_pretrained`.
            **kwargs: as transformers' `from_pretrained` (`dtype`, `attn_implementation`, `revision`, `device_map`);
                for the paper's format also `template`, `mr2rm-assistant` (default, how it trains) or `mr2rm-user`
                (how its README scores). `verify=True` compares every byte with `SHA256SUMS`, about a second a GB;
                without it sizes, headers and samples of the weights are compared.

        Returns:
            The model in evaluation mode; its value head is float32 whatever `dtype` is.

        Raises:
            CheckpointError: not a reward model, unknown configuration key, missing or unexpected weights, another
                template than at training time, a backbone that cannot be loaded.
            ConfigurationError: `template` for a checkpoint that says itself which one it has.
        """
        name = str(pretrained_model_name_or_path)
        revision = kwargs.get("revision")
        wants_info = kwargs.pop("output_loading_info", False)
        template = kwargs.pop("template", None)
        attention = kwargs.pop("attn_implementation", None)
        kwargs |= load_attention(attention)
        info: dict[str, Any] = {}
        check_there(name, revision)
        check_checksums(name, revision, verify=kwargs.pop("verify", False))
        check_shards(name, revision)
        with reading(name):
            if is_paper_format(name, revision):
                model = cls._from_paper_format(name, template or JOINED_TEMPLATES[0], kwargs)
            else:
                check_config_keys(name, revision, cls.config_class)
                if template is not None:
                    raise ConfigurationError(
                        f"{name}: got template={template!r}, but the checkpoint says which one it has; leave it out"
                    )
                if is_lora(name, revision):
                    model = cls._from_lora(name, kwargs)
                else:
                    try:
                        # Mismatched shapes are let through here and refused below, with the keys.
                        options = safe_options(name, kwargs) | {"ignore_mismatched_sizes": True}
                        model, info = super().from_pretrained(name, *args, **options, output_loading_info=True)
                    except (OSError, SafetensorError) as error:
                        raise CheckpointError(f"{name}: no safetensors weights could be read ({error})") from error
                    check_loading_info(name, info)
                    align_weights(model)
                    model.processor = load_processor(name, revision)
                    model.model_card = read_card(name, revision)
                found = template_hash(model.processor, model.config.template, model.config.thoughts)
                check_template_hash(name, model.config.template_hash, found)
        settle_attention(model, attention)
        return (model, info) if wants_info else model

    @classmethod
    def _from_paper_format(cls, name: str, template: str, options: dict[str, Any]) -> Self:
        if template not in JOINED_TEMPLATES:
            raise ConfigurationError(f"{name}: got template={template!r}, expected {' or '.join(JOINED_TEMPLATES)}")
        revision = options.get("revision")
        backbone = load_backbone(name, **options)
        processor = trained_separator(name, backbone, load_processor(name, revision))
        settings, weights = read_head(name, backbone.config.get_text_config().hidden_size, revision)
        model = cls.from_backbone(
            backbone,
            layout="causal",
            template=template,
            processor=processor,
            attn_implementation=options.get("attn_implementation"),
            **settings,
        )
        model.head.load_state_dict(weights)
        return model

    @classmethod
    def _from_lora(cls, name: str, options: dict[str, Any]) -> Self:
        adapter_revision = options.pop("revision", None)
        config = cls.config_class.from_pretrained(name, revision=adapter_revision)
        backbone, source, revision = lora_backbone(name, config, **options)
        if config.template in JOINED_TEMPLATES:
            with_separator(backbone, load_processor(source, revision))
        # As in from_backbone: the backend is chosen at loading.
        config.backbone_config = backbone.config
        config._attn_implementation = backbone.config.get_text_config()._attn_implementation
        model = cls(config, backbone=backbone).to(backbone.device)
        model = merge_lora(model, name, adapter_revision)
        align_weights(model)
        model.processor = load_processor(name, adapter_revision)
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a self-contained folder: configuration, safetensors weights, processor, checksums, model card.

        The files appear when all are written: a full disk leaves an earlier model in the folder as it was.

        Args:
            save_directory: the folder.
            *args: as transformers' `save_pretrained`.
            **kwargs: as transformers' `save_pretrained`, without `push_to_hub` (there is a method for it).
        """
        if not kwargs.get("is_main_process", True):
            return super().save_pretrained(save_directory, *args, **kwargs)
        with written_whole(save_directory) as unfinished:
            super().save_pretrained(unfinished, *args, **kwargs)
            if self.processor is not None:
                self.processor.save_pretrained(unfinished)
        card = Path(save_directory, CARD_FILE)
        if self.model_card is not None:
            card.write_text(self.model_card)
        elif not card.exists():
            write_model_card(save_directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; the card's snippet then names the repository.

        transformers would upload a card of its own, or keep the one of an earlier model.

        Args:
            repo_id: of the hub repository, made if it does not exist.
            **options: `private` and `token`, and those of `HfApi.upload_folder` (`commit_message`, `revision`,
                `create_pr`).

        Returns:
            The address of the commit.
        """
        api = HfApi(token=options.pop("token", None))
        repo_id = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            name_in_card(folder, repo_id)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
