"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mr_reward.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

BAD_ROWS = 3  # exit code of a command that has done everything but some rows, which were bad

Model = Annotated[str, typer.Argument(help="Reward model: a folder or hub id")]
Device = Annotated[str | None, typer.Option(help="As torch spells it; else cuda if there is one")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else the checkpoint's")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of a forward pass, and of the longest group")]
OverLength = Annotated[str, typer.Option(help="drop_group, truncate_responses or error")]
NumOrders = Annotated[int, typer.Option(min=1, help="Orders of the responses to average over (layout causal)")]

FetchUrls = Annotated[
    bool, typer.Option("--fetch-urls", help="Download images that are http or https URLs; else they are bad")
]


def refuse_unread(context: typer.Context, needed: str, names: Sequence[str]) -> None:
    """Refuse options that were given without the one that reads them."""
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name != "DEFAULT"]
    if given:
        raise ConfigurationError(f"got {', '.join(given)} without {needed}, which alone reads it; leave it out")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of `--dtype`, None if it was not given."""
    from mr_reward.scorers.opening import DTYPES

    if name is not None and name not in DTYPES:
        raise ConfigurationError(f"--dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]
