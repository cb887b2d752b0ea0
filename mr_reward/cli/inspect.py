"""`mr-reward inspect`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm.auto import tqdm

from mr_reward.cli.options import Device, Dtype, torch_dtype
from mr_reward.errors import ConfigurationError

if TYPE_CHECKING:
    from mr_reward.layouts import Layout
    from mr_reward.templates.rendering import Renderer
    from mr_reward.viewer.views import Inspected

logger = logging.getLogger(__name__)


def inspect(
    source: Annotated[Path, typer.Argument(help="Scored groups (.jsonl), TRL's completions (.parquet), or a run")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; else beside the source")] = None,
    png: Annotated[Path | None, typer.Option(help="PNG file to write as well")] = None,
    model: Annotated[str | None, typer.Option(help="Reward model: its layout and tokens are shown")] = None,
    score: Annotated[bool, typer.Option("--score", help="Score the groups with --model; they have no scores")] = False,
    group: Annotated[str | None, typer.Option(help="Only the group with this id, or number from 0 on")] = None,
    step: Annotated[int | None, typer.Option(help="Step of a run; else the last one")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Groups on the page")] = 200,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Look at groups in a browser: prompt, images, responses by score, who sees whom, what is suspicious.

    The page is one file without anything from elsewhere. Of a run, `log_groups_steps` keeps groups with their images.

    Example: mr-reward inspect outputs/quickstart/policy --model outputs/quickstart/rm --out step.html

    Example: mr-reward inspect groups.jsonl --model rm --score --group 7 --png group.png
    """
    from mr_reward.viewer.page import plot_views, render_page
    from mr_reward.viewer.views import Lengths, load_source, make_view, score_file

    if score:
        if model is None:
            raise ConfigurationError("--score needs --model, the reward model to score with")
        from mr_reward.scorers.opening import open_scorer

        scorer = open_scorer(model, dtype=torch_dtype(dtype), device=device, over_length="drop_group")
        title, inspected = source.name, score_file(source, scorer)
    else:
        title, inspected = load_source(source, step)
    inspected = _choose(inspected, group)
    if len(inspected) > limit:
        logger.warning("the page shows the first %d of %d groups; --limit shows more", limit, len(inspected))
    read = None if model is None else _read_model(model)
    views = []
    for scored, advantages in tqdm(inspected[:limit], unit=" groups", desc="reading", disable=None):
        lengths = None if read is None else Lengths.of(scored, *read)
        views.append(make_view(scored, advantages, lengths))
    target = out if out is not None else (source / "groups.html" if source.is_dir() else source.with_suffix(".html"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render_page(views, title), encoding="utf-8")
    logger.info("wrote %s", target)
    if png is not None:
        plot_views(views, png, title)
        logger.info("wrote %s", png)


def _choose(inspected: list[Inspected], group: str | None) -> list[Inspected]:
    if group is None:
        return inspected
    found = [one for one in inspected if one[0].group.id == group]
    if not found and group.isdecimal() and int(group) < len(inspected):
        found = [inspected[int(group)]]
    if not found:
        raise ConfigurationError(f"--group {group}: no group has this id, and there are {len(inspected)} of them")
    return found


def _read_model(name: str) -> tuple[Renderer, Layout]:
    """What turns groups into tokens, and the layout; no weights are loaded."""
    from mr_reward.backbones import get_adapter
    from mr_reward.checkpoint.verify import check_there, load_processor
    from mr_reward.layouts import check_layout
    from mr_reward.model.configuration import MultiResponseRewardConfig
    from mr_reward.templates.rendering import Renderer

    check_there(name)
    config = MultiResponseRewardConfig.from_pretrained(name)
    adapter = get_adapter(config.backbone_config)
    return Renderer(load_processor(name), config.template, thoughts=config.thoughts, adapter=adapter), check_layout(
        config.layout
    )
