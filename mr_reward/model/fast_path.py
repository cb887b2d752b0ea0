"""Which way the backbone reads: chosen when a model is made, checked at first use, the dense mask to fall back on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from mr_reward.attention.backends import is_flat
from mr_reward.attention.group import GROUP_ATTENTION
from mr_reward.errors import BackendError
from mr_reward.model.rows import Rows, build_row, collate
from mr_reward.templates.rendered import RenderedGroup

if TYPE_CHECKING:
    from mr_reward.model.model import MultiResponseRewardModel

__all__ = ["FastPath", "choose_attention", "load_attention"]

logger = logging.getLogger(__name__)

# How far the hidden states of the two ways may be apart, relative to their size. Two orders of summing differ by some
# units in the last place of each layer; a token that is seen wrongly differs by far more.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def choose_attention(backbone: PreTrainedModel, requested: str | None) -> None:
    """Set the attention implementation of the part of a backbone that reads the row."""
    found = backbone.config.get_text_config()._attn_implementation
    if requested is None:
        if found != "sdpa" or not backbone._can_set_attn_implementation():
            logger.info("attention of %s: %s", type(backbone).__name__, found)
            return
        requested = GROUP_ATTENTION
    logger.info("attention of %s: %s", type(backbone).__name__, requested)
    if requested == found:
        return
    text = backbone.config.get_text_config()
    parts = [name for name in backbone.config.sub_configs if getattr(backbone.config, name) is text]
    backbone.set_attn_implementation({parts[0]: requested} if parts else requested)


def load_attention(requested: str | None) -> dict[str, str]:
    """What transformers is told when it makes a model or a configuration, before `choose_attention`."""
    if requested is None:
        return {}
    return {"attn_implementation": "sdpa" if requested == GROUP_ATTENTION else requested}


class FastPath:
    """Decides whether rows are read end to end, as the backend can, or under the dense mask.

    `mr_group` is compared with the dense mask at its first use with each device and dtype. If it fails, the dense mask
    is used from then on, and each such pass is counted in `num_fallbacks`.
    """

    def __init__(self) -> None:
        self.num_fallbacks = 0
        self._passed: dict[tuple[str, torch.dtype], bool] = {}

    def is_flat(self, model: MultiResponseRewardModel, device: torch.device) -> bool:
        """Whether rows on a device are read end to end now; checks it if it was not yet."""
        return is_flat(self.attention(model, device, _dtype(model, device), training=torch.is_grad_enabled()))

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
        place = device.type, dtype
        if place not in self._passed and model.device.type == device.type and dtype == _dtype(model, device):
            self._passed[place] = _passes_check(model, device, dtype)
        return GROUP_ATTENTION if self._passed.get(place, True) else "sdpa"

    def count_fallback(self, model: MultiResponseRewardModel, device: torch.device) -> None:
        """A pass under the dense mask: counted if it is there because the check failed."""
        self.num_fallbacks += self._passed.get((device.type, _dtype(model, device))) is False


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
            media={},
            mm_token_type_ids=None,
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
