"""The converters by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

from mr_reward.data.conversion import Converter
from mr_reward.data.paper_mixture import PAPER_MIXTURE
from mr_reward.errors import ConfigurationError

AXES = ("agree", "better", "safer")  # of PKU-SafeRLHF

CONVERTERS: Mapping[str, Converter] = MappingProxyType({converter.name: converter for converter in PAPER_MIXTURE})
"""By name."""


def get_converter(name: str, *, axis: str | None = None) -> Converter:
    """The converter of a public data set; `axis` is for `pku_saferlhf`, one of `AXES`."""
    if name not in CONVERTERS:
        raise ConfigurationError(f"unknown data set {name!r}, expected one of {', '.join(CONVERTERS)}")
    converter = CONVERTERS[name]
    if axis is None:
        return converter
    if name != "pku_saferlhf" or axis not in AXES:
        raise ConfigurationError(
            f"got axis {axis!r} with {name!r}; only pku_saferlhf has axes, one of {', '.join(AXES)}"
        )
    return dataclasses.replace(converter, convert=functools.partial(converter.convert, axis=axis))
