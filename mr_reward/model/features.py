"""What a backbone's attention does beyond plain attention, found out by trying: ours against the stock model.

transformers has some 190 families of decoders, and each release adds features (windows, chunks, sinks, soft caps,
alibi, recurrent layers, indexers, ...). A list of them would miss the next one. So a small copy of the backbone, with
random weights and each limit shrunk below the length of the rows, reads some rows in the way that is about to be used,
and each score site is compared with the stock model under `eager`, which reads prompt and response alone. This takes
some tenths of a second and does not depend on the size of the backbone.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from mr_reward.attention.backends import GROUP_ATTENTION, choose_attention, is_flat, load_attention
from mr_reward.attention.plan import PromptCache
from mr_reward.attention.reach import describe_reach
from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.errors import BackendError, MRRewardError
from mr_reward.model.configuration import MultiResponseRewardConfig
from mr_reward.model.rows import Rows, build_row, collate
from mr_reward.templates.rendering import RenderedGroup

logger = logging.getLogger(__name__)

# Of the copy, by the names of several families. Heads keep their width, which rotary embeddings are made for.
# Two heads of keys: with one, it would not matter which of them a query head is given.
_HEADS, _KEY_HEADS, _VOCABULARY = 4, 2, 128
_SIZES = {
    "vocab_size": _VOCABULARY,
    "vocab_size_per_layer_input": _VOCABULARY,
    "intermediate_size": 64,
    "ffn_hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_key_heads": _KEY_HEADS,
    "linear_num_value_heads": _HEADS,
    "index_n_heads": _HEADS,
}
_EMBEDDING_WIDTHS = ("embedding_size", "word_embed_proj_dim")  # the same as `hidden_size`
_LAYERS, _LIMIT = 4, 8
_LIMITS = re.compile(r"(?<!max_)(?<!layers_)window(_size)?$|^attention_chunk_size$|^local_attention$|^index_topk$")
_TELLING = re.compile(
    r"window(_size)?$|attention_chunk_size|softcap|alibi|bidirectional|prefix_lm|index_topk|is_decoder"
    r"|^layer_types$|block_types?$|mamba_d_state|conv_kernel|^attention_types$|add_cross_attention|per_layer_input"
)
# (prompt, responses): longer than every limit, an empty response, and rows so short that what leaks in has not faded.
_GROUPS = ((21, (13, 0, 6)), (2, (1,)), (10, (9, 1)))
_TOLERANCE = 1e-3
_FLEX, _NOT_RUN = "flex_attention", "does not run"
# What a family may raise that cannot do what it is asked for.
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MRRewardError,
    RuntimeError,
    StrictDataclassError,  # a configuration that does not take a size of the copy
    TypeError,
    ValueError,
)


def settle_attention(model: Any, requested: str | None) -> None:
    """Choose the attention of a new model: what was asked for, or the fastest that equals the stock model.

    Raises BackendError if what was asked for, or every way there is, gives other scores; the message names the
    features that the configuration names.
    """
    backbone, config = model.backbone, model.config
    found = backbone.config.get_text_config()._attn_implementation
    ours = requested is None and found == "sdpa" and backbone._can_set_attn_implementation()
    candidates = [GROUP_ATTENTION, "sdpa", "eager"] if ours else [requested or found]
    reasons: list[str] = []
    for backend in candidates:
        reason = why_not(type(model), config, backend)
        if reason is None:
            level = logging.WARNING if reasons else logging.INFO
            logger.log(level, "attention of %s: %s", type(backbone).__name__, "; ".join([repr(backend), *reasons]))
            choose_attention(backbone, backend)
            return
        reasons.append(reason)
    raise BackendError(
        f"{type(backbone).__name__} in layout {config.layout!r}: {'; '.join(reasons)}. The configuration names "
        f"{_telling(config.get_text_config()) or 'nothing that tells why'}; use "
        + ("another attn_implementation, " if requested else "")
        + ("" if config.layout == "causal" else "layout='causal', or ")
        + "another backbone"
    )


def why_not(model_class: Any, config: MultiResponseRewardConfig, backend: str) -> str | None:
    """Why an attention backend cannot be used for a backbone in a layout; None if it can, or if it was not tried."""
    if getattr(config.backbone_config, "is_encoder_decoder", False):
        return "an encoder with a decoder does not read prompt and responses as one row"
    reach = describe_reach(config.backbone_config)
    if backend == GROUP_ATTENTION and reach:
        return f"{GROUP_ATTENTION!r} does not have the backbone's {reach}"
    text = config.get_text_config().to_dict()
    layout = "causal" if config.layout == "causal" else "isolated"
    # Flash attention needs a GPU. FlexAttention reads the rows end to end too, and has the same features; on a GPU
    # more of it runs (sinks).
    tried = _FLEX if backend.startswith("flash") else backend
    reason = _try(model_class, json.dumps(text, sort_keys=True, default=str), layout, tried)
    return None if reason is None or (tried == _FLEX and _NOT_RUN in reason) else reason.replace(tried, backend)


@functools.lru_cache(maxsize=64)
def _try(model_class: Any, text: str, layout: str, backend: str) -> str | None:
    """As `why_not`, once for each configuration."""
    settings = json.loads(text)
    family = settings.pop("model_type")
    settings.pop("quantization_config", None)
    with _undisturbed():
        try:
            small = small_config(AutoConfig.for_model(family, **settings))
            model = _build(model_class, small, layout, "eager")
            _randomise(model)
            rows = _sample_rows(model)
            ids = _VOCABULARY // 2 + torch.arange(_GROUPS[0][0])[None]
            by_ids = model.backbone(input_ids=ids, use_cache=False).last_hidden_state
        except BackendError:
            raise
        except _ERRORS as error:
            logger.warning("attention %r of %s was not compared with the stock model: %r", backend, family, error)
            return None
        try:
            embeds = model.get_input_embeddings()(ids)
            by_embeds = model.backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state
            if not _difference(by_embeds, by_ids) <= _TOLERANCE:
                return "the backbone reads token ids besides their embeddings, and readout tokens have none"
            expected = _read_alone(model, rows)
        except _ERRORS as error:
            return f"the backbone does not read embeddings in place of token ids ({type(error).__name__}: {error})"
        try:
            weights = model.state_dict()
            model = _build(model_class, small, layout, backend)
            model.load_state_dict(weights)
            if model.attention_backend != backend:
                return f"the family does not take {backend!r}"
            with _uncompiled() if backend == _FLEX else nullcontext():
                found = _read_rows(model, rows)
        except _ERRORS as error:
            return f"{backend!r} {_NOT_RUN} ({type(error).__name__}: {error})"
    for way, states in found.items():
        difference = _difference(states, expected)
        if not difference <= _TOLERANCE:
            return f"{backend!r} {way} differs from the stock model by {difference:.1e} of the hidden states"
    return None


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Draw and compute on the CPU from one seed in float32, wherever a model is loaded; the caller's state stays."""
    with (
        outside_zero3(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
    ):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed CUDA too
        yield


@contextmanager
def _uncompiled() -> Iterator[None]:
    """FlexAttention would be compiled, and warns if it is not. The compiler is slow to import."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sample_rows(model: Any) -> list[Rows]:
    """Rows of one group each, without padding."""
    rows = []
    for length, sizes in _GROUPS:
        ids = [torch.randint(_VOCABULARY, (size,)) for size in (length, *sizes)]
        group = RenderedGroup(prompt_ids=ids[0], response_ids=[one.tolist() for one in ids[1:]])
        rows.append(build_row(group, model.config.layout))
    return rows


def _read_alone(model: Any, rows: list[Rows]) -> Tensor:
    """The stock model's hidden states at each score site (S, H): no mask, no positions, nothing behind the site."""
    states = []
    for row in rows:
        embeds = model._embed(row.input_ids, row.kinds)[0]
        for i, site in enumerate(row.score_sites[0].tolist(), start=1):
            segments = row.segments[0, : site + 1]
            seen = segments >= 0 if model.config.layout == "causal" else (segments == 0) | (segments == i)
            alone = embeds[: site + 1][seen][None]
            mask = torch.ones(alone.shape[:2], dtype=torch.long)
            output = model.backbone(inputs_embeds=alone, attention_mask=mask, use_cache=False)
            states.append(output.last_hidden_state[0, -1])
    return torch.stack(states)


def _read_rows(model: Any, rows: list[Rows]) -> dict[str, Tensor]:
    """The same by the ways in which scoring may read them."""
    batch = collate(rows, model.adapter, "left")
    if not is_flat(model.attention_backend):
        return {"over padded rows": model._read_padded(batch)[batch.response_mask]}
    found = {"over rows end to end": model._read_flat(batch)[batch.response_mask]}
    if model.config.layout != "causal" and model.attention_backend == GROUP_ATTENTION:
        over_prompt = []
        for row, (length, _) in zip(rows, _GROUPS, strict=True):
            parts = [_part(row, slice(0, length)), _part(row, slice(length, None))]
            parts[0] = replace(parts[0], score_sites=row.score_sites[:, :0])
            parts[1] = replace(parts[1], score_sites=row.score_sites - length)
            cache = PromptCache()
            model._read_flat(parts[0], cache)
            cache.freeze(model._positions(parts[0]))
            over_prompt.append(model._read_flat(parts[1], cache)[0])
        found["over a prompt that was read before"] = torch.cat(over_prompt)
    return found


def _part(row: Rows, tokens: slice) -> Rows:
    names = ("input_ids", "segments", "kinds", "offsets")
    return replace(row, **{name: getattr(row, name)[:, tokens] for name in names})


def _build(model_class: Any, small: PreTrainedConfig, layout: str, backend: str) -> Any:
    small = copy.deepcopy(small)
    backbone = AutoModel.from_config(small, dtype=torch.float32, **load_attention(backend))
    choose_attention(backbone, backend)
    config = MultiResponseRewardConfig(
        backbone_config=backbone.config,
        layout=layout,
        **load_attention(backbone.config.get_text_config()._attn_implementation),
    )
    model = model_class(config, backbone=backbone)
    choose_attention(backbone, backend)
    return model.eval()


def small_config(config: PreTrainedConfig) -> Any:
    """A copy with few and narrow layers, each kind of layer among them, and every limit shrunk to some tokens."""
    small: Any = copy.deepcopy(config)
    settings = small.to_dict()
    count, hidden = small.num_hidden_layers, small.hidden_size
    of_layers = {key: value for key, value in settings.items() if isinstance(value, list) and len(value) == count}
    numbers = {
        key for key, value in of_layers.items() if value == [*range(count)]
    }  # of the layers that have something
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(str([value[i] for key, value in of_layers.items() if key not in numbers]), i)
    first = [*kinds.values()]
    kept = sorted([*first, *[i for i in range(count) if i not in first][: max(0, _LAYERS - len(first))]])
    if getattr(small, "num_kv_shared_layers", 0):  # the last layers take keys and values of earlier ones of their kind
        kept = sorted(first) * 2
        small.num_kv_shared_layers = len(first)
    small.num_hidden_layers = len(kept)
    for key, value in of_layers.items():
        setattr(small, key, [*range(len(kept))] if key in numbers else [value[i] for i in kept])
    for key, value in settings.items():
        if _LIMITS.search(key) and type(value) is int and value > _LIMIT:
            setattr(small, key, _LIMIT)
    heads = getattr(small, "num_attention_heads", None)
    if heads is not None:
        width = _HEADS * (settings.get("head_dim") or hidden // heads)
        shared = getattr(small, "num_key_value_heads", None) not in (None, heads)
        keys = _KEY_HEADS if shared else _HEADS
        sizes = {"num_attention_heads": _HEADS, "num_key_value_heads": keys, "hidden_size": width}
    else:
        sizes = {"hidden_size": 2 * _VOCABULARY}
    sizes |= dict.fromkeys(_EMBEDDING_WIDTHS, sizes["hidden_size"])
    for key, size in (_SIZES | sizes).items():
        found = getattr(small, key, None)
        if found is not None:
            setattr(small, key, [size] * len(found) if isinstance(found, list) else size)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(found := getattr(small, key, None), int):
            setattr(small, key, min(found, _VOCABULARY - 1))
    return small


def _randomise(module: torch.nn.Module) -> None:
    """Weights under which everything matters: large logits, no bias and no norm that is left out."""
    for weight in module.parameters():
        if weight.ndim > 1:
            weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
        else:
            weight.add_(0.3 * torch.randn_like(weight))


def _telling(text: PreTrainedConfig) -> str:
    """What the configuration says that may tell why, by its names."""
    found = {key: value for key, value in text.to_dict().items() if _TELLING.search(key) and value}
    shown = {key: sorted(set(map(str, value))) if isinstance(value, list) else value for key, value in found.items()}
    return ", ".join(f"{key}={value}" for key, value in shown.items())
