"""`mr-reward data convert | inspect | decontaminate`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mr_reward.errors import GroupError, MRRewardError

if TYPE_CHECKING:
    from mr_reward.data.converters import Converter
    from mr_reward.groups import ResponseGroup

__all__ = ["data"]

logger = logging.getLogger(__name__)

data = typer.Typer(help="Ranked groups: convert public data sets, look at them, clean them.", no_args_is_help=True)

_SHOWN_BAD_ROWS = 20


@data.command()
def convert(
    name: Annotated[str, typer.Argument(help="Data set, see the list below")],
    source: Annotated[str, typer.Argument(help="A .jsonl, .json or .parquet file, or a hub id")],
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write; images go to a folder beside it")],
    split: Annotated[str | None, typer.Option(help="Split, for a hub id")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration, for a hub id")] = None,
    media: Annotated[Path | None, typer.Option(help="Folder that the rows' media paths count from")] = None,
    axis: Annotated[str | None, typer.Option(help="pku_saferlhf only: agree, better or safer")] = None,
    limit: Annotated[int | None, typer.Option(help="Read the first rows only")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Count and list bad rows instead of stopping")] = False,
) -> None:
    """Turn a public data set into ranked groups.

    Data sets: mm_rlhf, llava_critic, rlaif_v, vlfeedback, povid, wildvision, tulu, skywork, nectar, pku_saferlhf.

    Example: mr-reward data convert nectar berkeley-nest/Nectar nectar.jsonl --limit 10000
    """
    from mr_reward.data.converters import get_converter
    from mr_reward.data.preferences import save_preferences

    converter = get_converter(name, axis=axis)
    rows = _read_rows(source, config or converter.config, split or converter.split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    folder = media or (Path(source).parent if Path(source).is_file() else None)
    skipped: Counter[str] = Counter()
    bad: list[str] = []
    groups = _converted(rows, converter, source, folder, skipped, bad if skip_bad else None)
    count = save_preferences(tqdm(groups, desc=f"converting {name}", total=len(rows)), out)
    table = Table("what", "rows", title=f"{name} -> {out}")
    table.add_row("groups written", str(count))
    for reason, number in skipped.most_common():
        table.add_row(f"no preference: {reason}", str(number))
    table.add_row("bad rows skipped", str(len(bad)))
    console = Console()
    console.print(table)
    for line in bad[:_SHOWN_BAD_ROWS]:
        console.print(f"bad: {line}", markup=False, highlight=False, soft_wrap=True)
    if len(bad) > _SHOWN_BAD_ROWS:
        console.print(f"... and {len(bad) - _SHOWN_BAD_ROWS} more")
    console.print(f"licence of the data: {converter.licence}")


def _read_rows(source: str, config: str | None, split: str) -> Any:
    """A `datasets.Dataset` of a local file or of the hub, images left encoded."""
    import datasets

    path = Path(source)
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if path.is_file() and path.suffix in kinds:
        rows = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    elif path.exists():
        raise GroupError(f"{source}: expected a file that ends with {', '.join(kinds)}, or a hub id")
    else:
        rows = datasets.load_dataset(source, config, split=split)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _converted(
    rows: Iterable[dict[str, Any]],
    converter: Converter,
    source: str,
    folder: Path | None,
    skipped: Counter[str],
    bad: list[str] | None,
) -> Iterator[ResponseGroup]:
    """Groups of the good rows; a bad one is an error, or is noted if there is a list for it."""
    from mr_reward.data.converters import SkippedRow
    from mr_reward.data.preferences import resolve_media

    to_group = converter.make(rows)
    for number, row in enumerate(rows, start=1):
        try:
            group = to_group(row)
            yield group if folder is None else resolve_media(group, folder)
        except SkippedRow as reason:
            skipped[str(reason)] += 1
        except MRRewardError as error:
            if bad is None:
                raise GroupError(f"{source}, row {number}: {error}; --skip-bad leaves such rows out") from error
            bad.append(f"row {number}: {error}")


@data.command()
def inspect(
    files: Annotated[list[Path], typer.Argument(help=".jsonl files of ranked groups")],
    skip_bad: Annotated[bool, typer.Option(help="Count and list bad lines instead of stopping")] = False,
) -> None:
    """Show sizes, ties, lengths, modalities and where the best response stands, by source.

    Example: mr-reward data inspect train.jsonl val.jsonl
    """
    from mr_reward.data.inspection import inspect_groups, render_inspections
    from mr_reward.data.preferences import load_preferences

    for path in files:
        groups = load_preferences(path, skip_bad=skip_bad)
        sources = sorted({group.source for group in groups if group.source is not None})
        entries = [inspect_groups(groups, path.name)]
        if len(sources) > 1:
            entries += [inspect_groups([g for g in groups if g.source == source], source) for source in sources]
        Console().print(render_inspections(entries))


@data.command()
def decontaminate(
    train: Annotated[list[Path], typer.Argument(help=".jsonl files of training groups")],
    benchmark: Annotated[list[Path], typer.Option(help=".jsonl file of a benchmark, can be repeated")],
    out: Annotated[Path, typer.Option(help="The .jsonl file of clean groups to write")],
) -> None:
    """Remove training groups that share a picture, a prompt or a long response with a benchmark.

    Example: mr-reward data decontaminate train.jsonl --benchmark vl_rewardbench.jsonl --out clean.jsonl
    """
    from mr_reward.data.decontamination import decontaminate as remove
    from mr_reward.data.preferences import load_preferences, save_preferences

    benchmarks = {path.stem: load_preferences(path) for path in benchmark}
    groups = [group for path in train for group in load_preferences(path)]
    result = remove(tqdm(groups, desc="comparing"), benchmarks)
    count = save_preferences(result.kept, out)
    table = Table("training source", "benchmark", "same", "groups removed", title=f"{count} of {len(groups)} kept")
    for (source, name, reason), number in sorted(result.counts.items()):
        table.add_row(source, name, reason, str(number))
    Console().print(table)
