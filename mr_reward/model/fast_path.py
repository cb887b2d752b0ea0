"""Which way the backbone reads: chosen when a model is made, checked at first use, the dense mask to fall back on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mr_reward.attention.backends import is_flat
from mr_reward.attention.group import GROUP_ATTENTION
from mr_reward.attention.plan import GroupPlan
from mr_reward.errors import BackendError
from mr_reward.layouts import PADDING_SEGMENT, plan_row
from mr_reward.model.reader import Reader, Rows

__all__ = ["FastPath", "choose_attention", "load_attention"]

logger = logging.getLogger(__name__)

# How far the hidden states of the two ways may be apart, relative to their size. Two orders of summing differ by some
# units in the last place of each layer; a token that is seen wrongly differs by far more.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def choose_attention(backbone: PreTrainedModel, requested: str | None) -> None:
    """Set the attention implementation of the part of a backbone that reads the row.

    Args:
        backbone: a base model.
        requested: transformers' `attn_implementation`; None takes `mr_group` in place of `sdpa`, where the backbone
            calls attention through transformers' interface. Without a plan `mr_group` is `sdpa`, so that a
            backbone that is used elsewhere too reads there as before.
    """
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
    """What transformers is told when it makes a model or a configuration, before `choose_attention`.

    Args:
        requested: transformers' `attn_implementation`, or None.

    Returns:
        Keyword arguments. `mr_group` is not among them: the vision tower would get it too.
    """
    if requested is None:
        return {}
    return {"attn_implementation": "sdpa" if requested == GROUP_ATTENTION else requested}


class FastPath:
    """Reads rows end to end where the backend can, and under the dense mask otherwise.

    `mr_group` is compared with the dense mask at its first use with each device and dtype. If it fails, or is off,
    the dense mask is used from then on; each such pass is counted.

    Args:
        num_fallbacks: passes under the dense mask because the check failed.
    """

    def __init__(self) -> None:
        self.num_fallbacks = 0
        self._passed: dict[tuple[str, torch.dtype], bool] = {}

    def read(self, reader: Reader, rows: Rows, plan: GroupPlan | None = None) -> Tensor:
        """Read rows.

        Args:
            reader: what reads.
            rows: the rows.
            plan: see `Reader.flat`.

        Returns:
            (B, N, H) hidden states at the score sites.
        """
        if self.is_flat(reader, rows.input_ids.device):
            return reader.flat(rows, plan)
        device, dtype = _place(reader, rows.input_ids.device)
        self.num_fallbacks += self._passed.get((device.type, dtype)) is False
        return reader.padded(rows)

    def is_flat(self, reader: Reader, device: torch.device) -> bool:
        """Whether rows are read end to end; checks it if it was not yet."""
        return is_flat(self.attention(reader, *_place(reader, device), training=torch.is_grad_enabled()))

    def attention(self, reader: Reader, device: torch.device, dtype: torch.dtype, *, training: bool) -> str | None:
        """The name of what computes attention there: the backend, or `sdpa` where `mr_group` cannot be used.

        A model that is on that device is checked if it was not yet; of any other the check is taken to pass.
        """
        if reader.backend != GROUP_ATTENTION:
            return reader.backend
        if not _has_kernel(device.type, dtype, training=training):
            return "sdpa"
        place = device.type, dtype
        found = _place(reader, device)
        if place not in self._passed and place == (found[0].type, found[1]) and _is_on(reader, device):
            self._passed[place] = _passes_check(reader, device, dtype)
        return GROUP_ATTENTION if self._passed.get(place, True) else "sdpa"


def _place(reader: Reader, device: torch.device) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype that attention gets to see there."""
    dtype = reader.backbone.get_input_embeddings().weight.dtype  # type: ignore[operator]
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return device, dtype


def _is_on(reader: Reader, device: torch.device) -> bool:
    return reader.backbone.get_input_embeddings().weight.device.type == device.type  # type: ignore[operator]


def _has_kernel(device_type: str, dtype: torch.dtype, *, training: bool) -> bool:
    """On CUDA there is one for half precision without gradients."""
    if device_type == "cuda":
        return dtype in (torch.bfloat16, torch.float16) and not training
    return device_type == "cpu"


def _passes_check(reader: Reader, device: torch.device, dtype: torch.dtype) -> bool:
    """Compare both ways on two small rows of different shape."""
    rows = _sample_rows(reader, device)
    try:
        with torch.no_grad(), _evaluation_mode(reader.backbone):
            expected, found = reader.padded(rows).double(), reader.flat(rows).double()
    except (RuntimeError, BackendError, TypeError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        real = torch.tensor([[True] * 3, [True, False, False]], device=device)
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


def _sample_rows(reader: Reader, device: torch.device) -> Rows:
    """Three responses of different length, and a shorter row with one, padded on the left."""
    plans = [plan_row(reader.layout, 5, [3, 0, 2]), plan_row(reader.layout, 2, [1])]
    longest = len(plans[0].segments)

    def pad(values: list[Tensor], fill: int) -> Tensor:
        padded = torch.full((2, longest), fill, dtype=torch.long)
        for row, value in zip(padded, values, strict=True):
            row[longest - len(value) :] = value
        return padded.to(device)

    vocabulary = reader.backbone.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    shift = longest - len(plans[1].segments)
    return Rows(
        input_ids=(torch.arange(2 * longest).view(2, -1) * 37 % max(vocabulary, 1)).to(device),
        segments=pad([plan.segments for plan in plans], PADDING_SEGMENT),
        kinds=pad([plan.kinds for plan in plans], 0),
        offsets=pad([plan.offsets for plan in plans], 0),
        score_sites=torch.tensor([plans[0].score_sites, (plans[1].score_sites[0] + shift, 0, 0)], device=device),
    )


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
