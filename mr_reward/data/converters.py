"""The converters by name, and the one that fits a file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mr_reward.data.conversion import Converter
from mr_reward.data.paper_mixture import PAPER_MIXTURE
from mr_reward.data.published import PUBLISHED
from mr_reward.data.sources import Row, RowSource
from mr_reward.data.trainer_formats import TRAINER_FORMATS
from mr_reward.errors import ConfigurationError, GroupError

AXES = ("agree", "better", "safer")  # of PKU-SafeRLHF

CONVERTERS: Mapping[str, Converter] = MappingProxyType(
    {converter.name: converter for converter in (*TRAINER_FORMATS, *PAPER_MIXTURE, *PUBLISHED)}
)
"""By name."""


def get_converter(name: str, *, axis: str | None = None) -> Converter:
    """The converter of a format or a public data set; `axis` is for `pku_saferlhf`, one of `AXES`."""
    if name not in CONVERTERS:
        raise ConfigurationError(
            f"unknown format or data set {name!r}, expected auto or one of {', '.join(CONVERTERS)}"
        )
    return with_axis(CONVERTERS[name], axis)


def with_axis(converter: Converter, axis: str | None) -> Converter:
    """The converter that takes this axis of the preferences; None for its own choice."""
    if axis is None:
        return converter
    if converter.name != "pku_saferlhf" or axis not in AXES:
        raise ConfigurationError(
            f"got axis {axis!r} with {converter.name!r}; only pku_saferlhf has axes, one of {', '.join(AXES)}"
        )
    return dataclasses.replace(converter, convert=functools.partial(converter.convert, axis=axis))


def recognise(rows: RowSource) -> Converter:
    """The converter whose columns the first row has; of two the one that knows more of them.

    Raises ConfigurationError, with the nearest ones, where the columns leave a doubt.
    """
    row = next((row for _, row in rows if isinstance(row, Mapping)), None)
    if row is None:
        raise ConfigurationError(f"{rows.name}: holds no row; give a file with one object per row")
    columns = {name for name, value in row.items() if value is not None}
    fitting = [
        (converter, form)
        for converter in CONVERTERS.values()
        for form in converter.columns
        if form <= columns and _fits(converter, row)
    ]
    best = [(one, form) for one, form in fitting if not any(form < other for _, other in fitting)]
    if len({one.name for one, _ in best}) == 1:
        return best[0][0]
    forms = best or [(one, form) for one in CONVERTERS.values() for form in one.columns]
    nearest = sorted(forms, key=lambda pair: -_likeness(pair[1], columns))[:3]
    near = "; ".join(f"{one.name} ({', '.join(sorted(form))})" for one, form in nearest)
    raise ConfigurationError(
        f"{rows.name}: a row with the fields {sorted(row)} fits {'several formats' if best else 'no format'}; the "
        f"nearest are {near}. Name one of them, or rename the fields"
    )


def _fits(converter: Converter, row: Row) -> bool:
    try:
        return converter.fits is None or converter.fits(row)
    except GroupError:
        return False


def _likeness(form: frozenset[str], columns: set[Any]) -> float:
    common = len(form & columns)
    return common / len(form | columns) + common / len(form)
