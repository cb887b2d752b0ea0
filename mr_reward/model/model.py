"""`MultiResponseRewardModel`: rows -> backbone -> hidden states at the score sites -> value head -> N scores per row.

The backbone reads rows end to end without padding where its attention can, and padded under a dense mask, which is the
reference, elsewhere.

Legend: B rows (one group each), N responses, L tokens of the longest row, T tokens of all rows, H width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from mr_reward.attention.backends import GROUP_ATTENTION, attention_mask, check_backend, flat_arguments, is_flat
from mr_reward.attention.plan import GroupPlan, PromptCache
from mr_reward.attention.reach import describe_reach, has_attention_dropout, layer_reaches
from mr_reward.backbones import get_adapter
from mr_reward.backbones.base import continue_positions
from mr_reward.checkpoint.zero3 import whole_weights
from mr_reward.errors import BackendError, ConfigurationError
from mr_reward.layouts import PADDING_SEGMENT, TokenKind, check_layout
from mr_reward.model.configuration import (
    MultiResponseRewardConfig,
    RewardMemory,
    activation_bytes,
    check_layers,
    context_tokens,
)
from mr_reward.model.loading import LoadedModel
from mr_reward.model.rows import Rows, build_row, collate
from mr_reward.templates.rendering import JOINED_TEMPLATES, RenderedGroup, check_template

__all__ = ["MultiResponseRewardConfig", "MultiResponseRewardModel", "ReadoutVectors", "RewardOutput", "ValueHead"]

logger = logging.getLogger(__name__)

_FORBIDDEN_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "inputs_embeds")
_INIT_STD = 0.02
# How far the hidden states of the two ways may be apart, relative to their size. Two orders of summing differ by some
# units in the last place of each layer; a token that is seen wrongly differs by far more.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}


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
        layout = check_layout(config.layout)
        check_template(config.template, layout)
        if config.backbone_config is None:
            raise ConfigurationError(
                "backbone_config is missing; build the model with from_backbone or from_pretrained"
            )
        self.adapter = get_adapter(config.backbone_config)
        check_layers(config)
        self.backbone = backbone if backbone is not None else AutoModel.from_config(config.backbone_config)
        self._check_backend()
        hidden_size = config.get_text_config().hidden_size
        width = getattr(self.backbone.get_input_embeddings(), "embedding_dim", hidden_size)
        if width != hidden_size:
            raise ConfigurationError(
                f"{type(self.backbone).__name__} has embeddings of width {width} and layers of width {hidden_size}, "
                "expected one width; use another backbone"
            )
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
    def attention_backend(self) -> str | None:
        """transformers' `attn_implementation` of the part that reads the row."""
        return self.backbone.config.get_text_config()._attn_implementation

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
        flat = prompt is not None or is_flat(self.attention_for(rows.device, training=torch.is_grad_enabled()))
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

    def attention_for(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, training: bool = False
    ) -> str:
        """The name of what computes attention there, as forward itself decides it; no weights are needed to ask.

        Args:
            device: type of the device; None for where the model is.
            dtype: in which the backbone computes; None for what it would be there now.
            training: with gradients.

        Returns:
            `mr_group` if it has a kernel there and its self-check did not fail, `sdpa` if not; another backend's name
            if the model has that.
        """
        device = self.device if device is None else torch.device(device)
        dtype = _dtype(self, device) if dtype is None else dtype
        return str(self.fast_path.attention(self, device, dtype, training=training))

    def reads_flat(self) -> bool:
        """Whether scoring reads rows end to end, without padding, on the device and in the dtype of now."""
        return is_flat(self.attention_for())

    def memory(
        self, max_tokens: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RewardMemory:
        """Bytes of the weights and of a forward pass of `max_tokens` tokens, there or where the model is.

        The mask counts where attention there is dense and the layout needs one.
        """
        dtype = self.backbone.dtype if dtype is None else dtype
        dense = not is_flat(self.attention_for(device, dtype)) and self.config.layout != "causal"
        return RewardMemory(
            weights=sum(parameter.numel() for parameter in self.parameters()) * dtype.itemsize,
            activations=activation_bytes(self.config.get_text_config(), dtype, max_tokens, dense),
        )

    def _check(self, rows: Rows, arguments: dict[str, Any]) -> None:
        """Refuse what would replace the layout's mask or positions, or what nobody reads."""
        layout = self.config.layout
        self._check_backend()
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

    def _check_backend(self) -> None:
        reach = describe_reach(self.backbone.config)
        check_backend(self.config.layout, self.attention_backend, self.adapter.media_blocks, reach)

    def _read_padded(self, rows: Rows) -> Tensor:
        """The rows as they are under a dense mask, the reference: (B, N, H), anything in empty slots."""
        embeds = self._embed(rows.input_ids, rows.kinds)
        blocks = self.adapter.media_block_ids(rows.media)
        hidden = self.backbone(
            inputs_embeds=embeds,
            attention_mask=attention_mask(
                self.config.layout,
                self.attention_backend,
                rows.segments,
                rows.kinds,
                embeds.dtype,
                blocks,
                _places(rows),
                layer_reaches(self.backbone.config),
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
            **flat_arguments(
                self.config.layout,
                self.attention_backend,
                plan,
                rows.segments,
                rows.kinds,
                blocks,
                _places(rows),
                layer_reaches(self.backbone.config),
            ),
            **self.adapter.forward_arguments(self.backbone, input_ids, media),
        ).last_hidden_state[0]
        places = torch.zeros(rows.segments.numel(), dtype=torch.long, device=tokens.device)
        places[tokens] = torch.arange(len(tokens), device=tokens.device)
        return hidden[places.view_as(rows.segments).gather(1, rows.score_sites)]

    def _plan(self, rows: Rows, prompt: PromptCache | None, device: torch.device | None = None) -> GroupPlan:
        blocks = self.adapter.media_block_ids(rows.media)
        return GroupPlan.of(self.config.layout, rows.segments, rows.kinds, blocks, device, prompt)

    def _embed(self, input_ids: Tensor, kinds: Tensor) -> Tensor:
        embeds = self.backbone.get_input_embeddings()(input_ids)
        return embeds if self.readouts is None else self.readouts(embeds, kinds)

    def _positions(self, rows: Rows, cache: PromptCache | None = None) -> Tensor:
        if cache is not None and cache.frozen:
            return cache.positions(rows.offsets)
        return self.adapter.position_ids(self.backbone, rows.input_ids, rows.segments, rows.offsets, rows.media)


class ValueHead(nn.Module):
    """Linear, activation, Linear: one score per response, always computed in float32.

    bf16 has steps of 0.008 near 1; jitter of that size between equal completions becomes a full-size GRPO advantage.
    The last layer has no bias unless asked for: a constant shift of all scores of a group has no meaning, but the
    public heads of arXiv 2604.10966 have one.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str = "silu", *, bias: bool = False
    ) -> None:
        super().__init__()
        if activation != "selu" and activation not in ACT2FN:
            raise ConfigurationError(
                f"unknown head activation {activation!r}, expected one of selu, {', '.join(ACT2FN)}"
            )
        self.dense = nn.Linear(hidden_size, intermediate_size, dtype=torch.float32)
        self.activation = nn.SELU() if activation == "selu" else ACT2FN[activation]
        self.out = nn.Linear(intermediate_size, 1, bias=bias, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, N, H) of any float dtype -> scores (B, N) float32."""
        # Weights are cast too: an engine that casts the whole module (DeepSpeed bf16) must not change the arithmetic.
        with torch.autocast(hidden.device.type, enabled=False):
            inner = F.linear(hidden.float(), self.dense.weight.float(), self.dense.bias.float())
            bias = None if self.out.bias is None else self.out.bias.float()
            return F.linear(self.activation(inner), self.out.weight.float(), bias).squeeze(-1)


class ReadoutVectors(nn.Module):
    """The learned input embeddings of the summary and the comparison token.

    They are vectors put into the row by position, not entries of a vocabulary: no text tokenizes to them, so a policy
    cannot write one, and no embedding matrix is resized.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Parameter(torch.empty(hidden_size))
        self.comparison = nn.Parameter(torch.empty(hidden_size))
        nn.init.normal_(self.summary, std=_INIT_STD)
        nn.init.normal_(self.comparison, std=_INIT_STD)

    @torch.no_grad()
    def initialise_from(self, embedding: nn.Embedding, end_of_turn: int | None) -> None:
        """Start as the token that ends a turn, with which the backbone knows what to do behind a response.

        From random vectors training takes long, or short, to leave the plateau of the first steps, by luck. Without
        such a token: the mean input embedding plus small noise, vectors of a scale that the backbone knows.
        """
        with whole_weights(embedding):
            if end_of_turn is not None:
                starts = [embedding.weight[end_of_turn].float()] * 2
            else:
                mean, std = embedding.weight.float().mean(0), embedding.weight.float().std(0)
                starts = [mean + 0.5 * std * torch.randn_like(mean) for _ in range(2)]
            for vector, start in zip((self.summary, self.comparison), starts, strict=True):
                vector.copy_(start)

    def forward(self, inputs_embeds: Tensor, kinds: Tensor) -> Tensor:
        """Put the vectors at their sites in (B, L, H) by kinds (B, L); text is untouched."""
        kinds = kinds[..., None]
        summary, comparison = (vector.to(inputs_embeds.dtype) for vector in (self.summary, self.comparison))
        inputs_embeds = torch.where(kinds == TokenKind.SUMMARY, summary, inputs_embeds)
        return torch.where(kinds == TokenKind.COMPARISON, comparison, inputs_embeds)


class FastPath:
    """Decides whether rows are read end to end, as the backend can, or under the dense mask.

    `mr_group` is compared with the dense mask at its first use with each device and dtype. If it fails, the dense mask
    is used from then on, and each such pass is counted in `num_fallbacks`.
    """

    def __init__(self) -> None:
        self.num_fallbacks = 0
        self._passed: dict[tuple[str, torch.dtype], bool] = {}

    def attention(
        self, model: MultiResponseRewardModel, device: torch.device, dtype: torch.dtype, *, training: bool
    ) -> str | None:
        """The name of what computes attention there: the backend, or `sdpa` where `mr_group` cannot be used.

        A model that is on that device is checked if it was not yet; of any other the check is taken to pass.
        """
        if model.attention_backend != GROUP_ATTENTION:
            return model.attention_backend
        if not _has_kernel(device.type, dtype, training=training):
            return "sdpa"
        if training and has_attention_dropout(model.backbone.config):
            return "sdpa"
        place = device.type, dtype
        if place not in self._passed and model.device.type == device.type and dtype == _dtype(model, device):
            self._passed[place] = _passes_check(model, device, dtype)
        return GROUP_ATTENTION if self._passed.get(place, True) else "sdpa"

    def count_fallback(self, model: MultiResponseRewardModel, device: torch.device) -> None:
        """A pass under the dense mask: counted if it is there because the check failed."""
        self.num_fallbacks += self._passed.get((device.type, _dtype(model, device))) is False


def _places(rows: Rows) -> Tensor:
    """(B, L), which token of its row each would be if its response stood alone behind the prompt."""
    counted = (rows.segments != PADDING_SEGMENT).long().cumsum(-1) - 1
    return continue_positions(counted, rows.segments, rows.offsets)


def _dtype(model: MultiResponseRewardModel, device: torch.device) -> torch.dtype:
    """What attention gets to see there."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.get_input_embeddings().weight.dtype  # type: ignore[return-value]


def _has_kernel(device_type: str, dtype: torch.dtype, *, training: bool) -> bool:
    """On CUDA there is one for half precision without gradients."""
    if device_type == "cuda":
        return dtype in (torch.bfloat16, torch.float16) and not training
    return device_type == "cpu"


def _passes_check(model: MultiResponseRewardModel, device: torch.device, dtype: torch.dtype) -> bool:
    """Compare both ways on two small rows of different shape."""
    rows = _sample_rows(model).to(device)
    try:
        with torch.no_grad(), _evaluation_mode(model.backbone):
            expected, found = model._read_padded(rows).double(), model._read_flat(rows).double()
    except (RuntimeError, BackendError, TypeError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        real = rows.response_mask
        difference = (found - expected)[real].norm() / expected[real].norm()
        tolerance = _TOLERANCES.get(dtype, max(_TOLERANCES.values()))
        if difference <= tolerance:
            return True
        reason = f"hidden states differ by {difference:.1e} of their size, expected at most {tolerance:.0e}"
    logger.warning(
        "%s on %s in %s fails its self-check and is not used; the dense mask is slower, its scores are right (%s)",
        GROUP_ATTENTION,
        device.type,
        dtype,
        reason,
    )
    return False


def _sample_rows(model: MultiResponseRewardModel) -> Rows:
    """Three responses of different length, and a shorter row with one, padded on the left."""
    groups = [
        RenderedGroup(
            prompt_ids=torch.zeros(length, dtype=torch.long),
            response_ids=[[0] * size for size in sizes],
        )
        for length, sizes in ((5, [3, 0, 2]), (2, [1]))
    ]
    rows = collate([build_row(group, model.config.layout) for group in groups], model.adapter, "left")
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    input_ids = torch.arange(rows.num_tokens).view_as(rows.input_ids) * 37 % max(vocabulary, 1)
    return replace(rows, input_ids=input_ids)


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout; each part gets back the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
