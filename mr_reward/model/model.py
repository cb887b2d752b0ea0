"""`MultiResponseRewardModel`: rows -> backbone -> hidden states at the score sites -> value head -> N scores per row.

The backbone reads rows end to end without padding where its attention can, and padded under a dense mask, which is the
reference, elsewhere.

Legend: B rows (one group each), N responses, L tokens of the longest row, T tokens of all rows, H width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from mr_reward.attention.backends import attention_mask, check_backend, flat_arguments, is_flat
from mr_reward.attention.plan import Cached, GroupPlan
from mr_reward.attention.prompt_cache import PromptCache
from mr_reward.backbones import get_adapter
from mr_reward.errors import BackendError, ConfigurationError
from mr_reward.layouts import check_layout
from mr_reward.model.configuration import MultiResponseRewardConfig, check_layers, context_tokens
from mr_reward.model.fast_path import FastPath
from mr_reward.model.head import ReadoutVectors, ValueHead
from mr_reward.model.loading import LoadedModel
from mr_reward.model.memory import RewardMemory, activation_bytes
from mr_reward.model.rows import Rows
from mr_reward.templates.rendering import JOINED_TEMPLATES, check_template

__all__ = ["MultiResponseRewardConfig", "MultiResponseRewardModel", "RewardOutput"]

_FORBIDDEN_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "inputs_embeds")


@dataclass
class RewardOutput(ModelOutput):
    """Scores of a batch."""

    scores: Tensor | None = None  # (B, N) float32; slots beyond a row's responses hold 0


class MultiResponseRewardModel(LoadedModel):
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
        check_template(config.template, config.layout)
        if config.backbone_config is None:
            raise ConfigurationError(
                "backbone_config is missing; build the model with from_backbone or from_pretrained"
            )
        self.adapter = get_adapter(config.backbone_config)
        check_layers(config)
        self.backbone = backbone if backbone is not None else AutoModel.from_config(config.backbone_config)
        check_backend(config.layout, self.attention_backend, self.adapter.media_blocks)
        hidden_size = config.get_text_config().hidden_size
        # Templates that separate the responses by text read the scores at that text.
        self.readouts = None if config.template in JOINED_TEMPLATES else ReadoutVectors(hidden_size)
        self.head = ValueHead(
            hidden_size, config.head_hidden_size or hidden_size, config.head_activation, bias=config.head_bias
        )
        self.fast_path = FastPath()
        self.processor: Any = None
        self.model_card: str | None = None
        self._no_split_modules = getattr(self.backbone, "_no_split_modules", None)
        # The parts initialise themselves and a given backbone is trained: nothing is drawn again. On the meta device
        # (from_pretrained) transformers has to fill buffers that are not saved, such as rotary frequencies.
        if self.head.dense.weight.device.type != "meta":
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()

    def train(self, mode: bool = True) -> MultiResponseRewardModel:
        """As `nn.Module.train`; a model that is trained on is no longer the one that its card describes."""
        if mode:
            self.model_card = None
        return super().train(mode)

    @property
    def context_tokens(self) -> int | None:
        """See `mr_reward.model.configuration.context_tokens`."""
        return context_tokens(self.backbone.config)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def forward(self, rows: Rows, prompt: PromptCache | None = None, **arguments: Any) -> RewardOutput:
        """Score packed rows.

        Args:
            rows: B rows of `collate`; `place` brings them to the model's device.
            prompt: of `read_prompt`, for rows that hold responses of that prompt only.
            **arguments: none; those that a trainer adds and that say nothing are taken.

        Returns:
            Scores (B, N) float32.

        Raises:
            BackendError: an argument that would replace the layout's mask or positions, or a backend changed after
                construction to one that cannot express the layout.
            ConfigurationError: an unknown argument, or media of another family.
        """
        self._check(rows, arguments)
        flat = prompt is not None or self.fast_path.is_flat(self, rows.device)
        if not flat:
            self.fast_path.count_fallback(self, rows.device)
        hidden = self._read_flat(rows, prompt) if flat else self._read_padded(rows)
        scores = self.head(hidden) * self.config.score_scale
        return RewardOutput(scores=scores.masked_fill(~rows.response_mask, 0.0))

    @torch.inference_mode()
    def read_prompt(self, rows: Rows) -> PromptCache:
        """Read one row that is a prompt without responses, and keep its keys and values for `forward`."""
        self._check(rows, {})
        cache = PromptCache()
        self._read_flat(rows, cache)
        cache.freeze(self._positions(rows))
        return cache

    def place(self, rows: Rows, prompt: PromptCache | None = None) -> Rows:
        """Rows on the model's device, for scoring.

        The plan is made before the tensors leave the CPU, so that no GPU is waited for.
        """
        device, plan = self.device, rows.plan
        if prompt is not None or self.reads_flat():
            plan = self._plan(rows, prompt, device)
        pinned = rows.pin_memory() if device.type == "cuda" else rows
        return replace(pinned.to(device, non_blocking=True), plan=plan)

    def attention_for(self, device: torch.device | str, dtype: torch.dtype, training: bool = False) -> str:
        """The name of what computes attention there, as forward itself decides it; no weights are needed to ask.

        Args:
            device: type of the device.
            dtype: in which the backbone computes.
            training: with gradients.

        Returns:
            `mr_group` if it has a kernel there and its self-check did not fail, `sdpa` if not; another backend's name
            if the model has that.
        """
        return str(self.fast_path.attention(self, torch.device(device), dtype, training=training))

    @torch.no_grad()
    def reads_flat(self) -> bool:
        """Whether scoring reads rows end to end, without padding, on the device and in the dtype of now."""
        return self.fast_path.is_flat(self, self.device)

    def memory(
        self, max_tokens: int, *, device: torch.device | str, dtype: torch.dtype, training: bool = False
    ) -> RewardMemory:
        """Bytes of the weights in `dtype`, and of a forward pass of `max_tokens` tokens on a device.

        The mask counts where attention there is dense and the layout needs one.
        """
        dense = not is_flat(self.attention_for(device, dtype, training)) and self.config.layout != "causal"
        return RewardMemory(
            weights=sum(parameter.numel() for parameter in self.parameters()) * dtype.itemsize,
            activations=activation_bytes(self.config.get_text_config(), dtype, max_tokens, dense),
        )

    def _check(self, rows: Rows, arguments: dict[str, Any]) -> None:
        """Refuse what would replace the layout's mask or positions, or what nobody reads."""
        layout = self.config.layout
        check_backend(layout, self.attention_backend, self.adapter.media_blocks)
        for key, value in arguments.items():
            if value is None or value is False:  # by identity: a mask tensor cannot be compared
                continue
            if key in _FORBIDDEN_ARGUMENTS:
                raise BackendError(
                    f"forward got {key}, but mask and positions follow from the layout {layout!r}; "
                    f"{key} would silently let responses see each other; leave it out"
                )
            raise ConfigurationError(f"forward got the unknown argument {key!r}; it takes rows of `collate`")
        unknown = rows.media.keys() - {*self.adapter.media_keys, "mm_token_type_ids"}
        if unknown:
            raise ConfigurationError(
                f"forward got unknown media {sorted(unknown)}; this backbone takes {self.adapter.media_keys}"
            )

    def _read_padded(self, rows: Rows) -> Tensor:
        """The rows as they are under a dense mask, the reference: (B, N, H), anything in empty slots."""
        embeds = self._embed(rows.input_ids, rows.kinds)
        blocks = self.adapter.media_block_ids(rows.media)
        hidden = self.backbone(
            inputs_embeds=embeds,
            attention_mask=attention_mask(
                self.config.layout, self.attention_backend, rows.segments, rows.kinds, embeds.dtype, blocks
            ),
            position_ids=self._positions(rows),
            use_cache=False,
            **self.adapter.forward_arguments(self.backbone, rows.input_ids, rows.media),
        ).last_hidden_state
        row = torch.arange(len(hidden), device=hidden.device)[:, None]
        return hidden[row, rows.score_sites]

    def _read_flat(self, rows: Rows, cache: PromptCache | None = None) -> Tensor:
        """The rows end to end, without padding: as `_read_padded`.

        An empty cache takes the row in; a frozen one holds the prompt of the rows.
        """
        plan = self._plan(rows, cache) if rows.plan is None else rows.plan
        tokens = plan.tokens

        def squeeze(values: Tensor) -> Tensor:
            """(..., B, L) -> (..., 1, T)."""
            return values.flatten(-2)[..., tokens].unsqueeze(-2)

        media = {
            name: squeeze(values) if name == "mm_token_type_ids" else values for name, values in rows.media.items()
        }
        blocks = self.adapter.media_block_ids(rows.media)
        input_ids = squeeze(rows.input_ids)
        hidden = self.backbone(
            inputs_embeds=self._embed(input_ids, squeeze(rows.kinds)),
            position_ids=squeeze(self._positions(rows, cache)),
            use_cache=cache is not None,
            past_key_values=cache,
            **flat_arguments(self.config.layout, self.attention_backend, plan, rows.segments, rows.kinds, blocks),
            **self.adapter.forward_arguments(self.backbone, input_ids, media),
        ).last_hidden_state[0]
        places = torch.zeros(rows.segments.numel(), dtype=torch.long, device=tokens.device)
        places[tokens] = torch.arange(len(tokens), device=tokens.device)
        return hidden[places.view_as(rows.segments).gather(1, rows.score_sites)]

    def _plan(self, rows: Rows, prompt: PromptCache | None, device: torch.device | None = None) -> GroupPlan:
        blocks = self.adapter.media_block_ids(rows.media)
        cached = Cached() if prompt is None else prompt.cached
        return GroupPlan.of(self.config.layout, rows.segments, rows.kinds, blocks, device, cached)

    def _embed(self, input_ids: Tensor, kinds: Tensor) -> Tensor:
        embeds = self.backbone.get_input_embeddings()(input_ids)
        return embeds if self.readouts is None else self.readouts(embeds, kinds)

    def _positions(self, rows: Rows, cache: PromptCache | None = None) -> Tensor:
        if cache is not None and cache.frozen:
            return cache.positions(rows.offsets)
        return self.adapter.position_ids(self.backbone, rows.input_ids, rows.segments, rows.offsets, rows.media)
