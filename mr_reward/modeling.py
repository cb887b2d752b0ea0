"""`MultiResponseRewardModel`: backbone -> hidden states at the score sites -> value head -> N scores per row.

Legend: B rows (one group each), N responses, L tokens, H width of the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mr_reward.attention import attention_mask, check_backend
from mr_reward.backbones import get_adapter
from mr_reward.errors import BackendError, CheckpointError, ConfigurationError
from mr_reward.head import ReadoutVectors, ValueHead
from mr_reward.integrity import check_config_keys, check_loading_info, load_processor
from mr_reward.layouts import check_layout
from mr_reward.rendering import TEMPLATE, check_template, template_hash

__all__ = ["MultiResponseRewardConfig", "MultiResponseRewardModel", "RewardOutput"]

# Layers that a 4-D mask can isolate. A recurrent layer carries one response into the next whatever the mask says.
_ISOLATING_LAYERS = {"full_attention", "sliding_attention"}
_FORBIDDEN_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "inputs_embeds")


@strict
class MultiResponseRewardConfig(PreTrainedConfig):
    """Everything that says how to score, saved beside the weights.

    Args:
        backbone_config: configuration of the backbone.
        layout: `causal`, `isolated` or `set` (see `mr_reward.layouts`).
        head_hidden_size: width of the value head's hidden layer; None for the backbone's width.
        head_activation: a name of transformers' `ACT2FN`.
        score_scale: factor on the head's output.
        template: name of the prompt template (see `mr_reward.rendering`).
        template_hash: hash of the template and of the processor's chat template at training time.
        backbone_name_or_path: where the backbone came from.
        backbone_revision: its commit on the hub, if known.
        schema_version: of this configuration.
    """

    model_type = "multi_response_reward"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    layout: str = "set"
    head_hidden_size: int | None = None
    head_activation: str = "silu"
    score_scale: float = 1.0
    template: str = TEMPLATE
    template_hash: str | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    schema_version: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            settings = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The backbone's text configuration, where transformers and DeepSpeed look for the width."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(*args, **kwargs)  # type: ignore[union-attr]


@dataclass
class RewardOutput(ModelOutput):
    """Scores of a batch.

    Args:
        scores: (B, N) float32; slots beyond a row's responses hold 0.
    """

    scores: Tensor | None = None


class MultiResponseRewardModel(PreTrainedModel):
    """Scores all responses of a row in one forward pass (arXiv 2604.10966), in one of three layouts.

    Make one with `from_backbone` or `from_pretrained`; score with `mr_reward.GroupScorer`.

    Args:
        config: the configuration.
        backbone: a base model that fits `config.backbone_config`; None builds a randomly initialised one.

    Raises:
        ConfigurationError: unknown layout or template, a multimodal family without an adapter.
        BackendError: the attention backend or the backbone's layers cannot express the layout.

    Example:
        >>> model = MultiResponseRewardModel.from_backbone("Qwen/Qwen3-VL-4B-Instruct", layout="set")  # doctest: +SKIP
        >>> model.save_pretrained("rm")  # doctest: +SKIP
    """

    config_class = MultiResponseRewardConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["head"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MultiResponseRewardConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        check_layout(config.layout)
        check_template(config.template)
        if config.backbone_config is None:
            raise ConfigurationError(
                "backbone_config is missing; build the model with from_backbone or from_pretrained"
            )
        self.adapter = get_adapter(config.backbone_config)
        _check_layers(config)
        self.backbone = backbone if backbone is not None else AutoModel.from_config(config.backbone_config)
        check_backend(config.layout, self.attention_backend, self.adapter.media_blocks)
        hidden_size = config.get_text_config().hidden_size
        self.readouts = ReadoutVectors(hidden_size)
        self.head = ValueHead(hidden_size, config.head_hidden_size or hidden_size, config.head_activation)
        self.processor: Any = None
        self._no_split_modules = getattr(self.backbone, "_no_split_modules", None)
        # The parts initialise themselves and a given backbone is trained: nothing is drawn again. On the meta device
        # (from_pretrained) transformers has to fill buffers that are not saved, such as rotary frequencies.
        if self.readouts.summary.device.type != "meta":
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        *,
        layout: str = "set",
        processor: Any = None,
        head_hidden_size: int | None = None,
        head_activation: str = "silu",
        score_scale: float = 1.0,
        **load_options: Any,
    ) -> MultiResponseRewardModel:
        """Put a new value head and new readout vectors on a pretrained language or vision-language model.

        Args:
            backbone: hub id, local folder, or a loaded model (its weights are then shared with it, not copied; a
                language-model head is left aside).
            layout: `causal`, `isolated` or `set`.
            processor: the processor or tokenizer; None loads it from the same place.
            head_hidden_size: width of the value head's hidden layer; None for the backbone's width.
            head_activation: a name of transformers' `ACT2FN`.
            score_scale: factor on the head's output.
            **load_options: passed on to transformers' `from_pretrained` (`dtype`, `attn_implementation`, `revision`).

        Returns:
            A reward model with an untrained head, in evaluation mode.

        Raises:
            ConfigurationError: a loaded model without a processor; unknown layout.
            BackendError: the attention backend cannot express the layout.
        """
        check_layout(layout)
        if isinstance(backbone, PreTrainedModel):
            if processor is None:
                raise ConfigurationError("a loaded backbone comes without its processor; pass processor=...")
            base, name = backbone.base_model, backbone.config.name_or_path or None
        else:
            name = str(backbone)
            base = AutoModel.from_pretrained(name, **load_options)
            processor = processor if processor is not None else load_processor(name, load_options.get("revision"))
        config = cls.config_class(
            backbone_config=base.config,
            layout=layout,
            head_hidden_size=head_hidden_size,
            head_activation=head_activation,
            score_scale=score_scale,
            template_hash=template_hash(processor),
            backbone_name_or_path=name,
            backbone_revision=getattr(base.config, "_commit_hash", None),
            # A new configuration would reset the choice in the backbone's.
            attn_implementation=base.config.get_text_config()._attn_implementation,
        )
        model = cls(config, backbone=base)
        model.readouts.initialise_from(base.get_input_embeddings().weight)
        model.to(base.device)
        model.processor = processor
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a reward model with its processor; nothing is filled in with random weights.

        Args:
            pretrained_model_name_or_path: folder or hub id written by `save_pretrained`.
            *args: as transformers' `from_pretrained`.
            **kwargs: as transformers' `from_pretrained` (`dtype`, `attn_implementation`, `revision`, `device_map`).

        Returns:
            The model in evaluation mode; its value head is float32 whatever `dtype` is.

        Raises:
            CheckpointError: not a reward model, unknown configuration key, missing or unexpected weights, another
                template than at training time.
        """
        name = str(pretrained_model_name_or_path)
        revision = kwargs.get("revision")
        check_config_keys(name, revision, cls.config_class)
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            # Mismatched shapes are let through here and refused below, with the keys.
            options = {"use_safetensors": True, **kwargs, "ignore_mismatched_sizes": True}
            model, info = super().from_pretrained(name, *args, **options, output_loading_info=True)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{name}: no safetensors weights could be read ({error})") from error
        check_loading_info(name, info)
        for parameter in model.parameters():
            # Weights read from a file lie wherever its header ends, and the CPU's kernels sum in another order when
            # they are not aligned. Fresh memory is, and so scores stay equal bit for bit over saving and loading.
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        model.processor = load_processor(name, revision)
        found = template_hash(model.processor)
        if found != model.config.template_hash:
            raise CheckpointError(
                f"{name}: trained with template hash {model.config.template_hash}, this processor and release give "
                f"{found}; restore the chat template the model was trained with, or train again with the new one"
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a self-contained folder: configuration, safetensors weights, processor.

        Args:
            save_directory: the folder.
            *args: as transformers' `save_pretrained`.
            **kwargs: as transformers' `save_pretrained`.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.processor is not None:
            self.processor.save_pretrained(save_directory)

    @property
    def attention_backend(self) -> str | None:
        """transformers' `attn_implementation` of the part that reads the row."""
        return self.backbone.config.get_text_config()._attn_implementation

    @property
    def context_tokens(self) -> int | None:
        """The largest number of positions the backbone can tell apart, None if its configuration does not say.

        A sliding window counts as the limit: a 4-D mask replaces the window, so longer rows would be read in a way
        the backbone was never trained for.
        """
        text = self.backbone.config.get_text_config()
        limits = [getattr(text, "max_position_embeddings", None)]
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            limits.append(text.sliding_window)
        return min((limit for limit in limits if limit), default=None)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        segments: Tensor,
        kinds: Tensor,
        offsets: Tensor,
        score_sites: Tensor,
        response_mask: Tensor,
        **media: Any,
    ) -> RewardOutput:
        """Score packed rows; `PackedBatch.model_inputs()` gives the arguments.

        Args:
            input_ids: (B, L) int64; what stands at readout sites and padding does not matter.
            segments: (B, L) int64, see `mr_reward.layouts`.
            kinds: (B, L) int64.
            offsets: (B, L) int64.
            score_sites: (B, N) int64 token indices; 0 in empty slots.
            response_mask: (B, N) bool, True where there is a response.
            **media: the family's media tensors.

        Returns:
            Scores (B, N) float32.

        Raises:
            BackendError: an argument that would replace the layout's mask or positions, or a backend changed after
                construction to one that cannot express the layout.
        """
        for key in _FORBIDDEN_ARGUMENTS:
            value = media.pop(key, None)
            if value is not None and value is not False:  # by identity: a mask tensor cannot be compared
                raise BackendError(
                    f"forward got {key}, but mask and positions follow from the layout {self.config.layout!r}; "
                    f"{key} would silently let responses see each other; leave it out"
                )
        unknown = set(media) - set(self.adapter.media_keys) - {"mm_token_type_ids"}
        if unknown:
            raise ConfigurationError(
                f"forward got unknown arguments {sorted(unknown)}; "
                f"this backbone takes the media tensors {self.adapter.media_keys}"
            )
        inputs_embeds = self.readouts(self.get_input_embeddings()(input_ids), kinds)
        hidden = self.backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask(
                self.config.layout,
                self.attention_backend,
                segments,
                kinds,
                inputs_embeds.dtype,
                self.adapter.media_block_ids(media),
            ),
            position_ids=self.adapter.position_ids(self.backbone, input_ids, segments, offsets, media),
            use_cache=False,
            **self.adapter.forward_arguments(input_ids, media),
        ).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        scores = self.head(hidden[rows, score_sites]) * self.config.score_scale
        return RewardOutput(scores=scores.masked_fill(~response_mask, 0.0))


def _check_layers(config: MultiResponseRewardConfig) -> None:
    """Refuse layers through which responses would leak into each other whatever the mask says."""
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _ISOLATING_LAYERS
    if layers and config.layout != "causal":
        raise BackendError(
            f"the backbone has layers of type {', '.join(sorted(layers))}, which layout {config.layout!r} cannot "
            "isolate; use layout='causal' or a backbone with attention layers only"
        )


AutoConfig.register(MultiResponseRewardConfig.model_type, MultiResponseRewardConfig)
