"""`mr-reward data convert | stats | decontaminate | handwriting`."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

from mr_reward.cli.options import BAD_ROWS, FetchUrls
from mr_reward.errors import ConfigurationError

if TYPE_CHECKING:
    from mr_reward.groups import ResponseGroup

data = typer.Typer(help="Ranked groups: convert public data sets, look at them, clean them.", no_args_is_help=True)

logger = logging.getLogger(__name__)

_SHOWN_BAD_ROWS = 20
_TABLE_COLUMNS = 4  # more are not to be read on a screen

RankedFiles = Annotated[list[Path], typer.Argument(help=".jsonl files of ranked groups")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count and list bad rows instead of stopping")]


@data.command()
def convert(
    name: Annotated[str, typer.Argument(help="Format or data set, see the list above, or auto")],
    source: Annotated[
        str, typer.Argument(help="A file (.jsonl, .jsonl.gz, .json, .parquet), a folder of them, or a hub id")
    ],
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write; images go to a folder beside it")],
    split: Annotated[
        str | None, typer.Option(help="Split, for a hub id; start of the files' names in a folder")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Configuration, for a hub id; folder of the files")] = None,
    media: Annotated[Path | None, typer.Option(help="Folder that the rows' media paths count from")] = None,
    axis: Annotated[str | None, typer.Option(help="pku_saferlhf only: agree, better or safer")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first rows only")] = None,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Do not shuffle the responses of a group")] = False,
    skip_bad: SkipBad = False,
    fetch_urls: FetchUrls = False,
) -> None:
    """Turn preference data into ranked groups.

    Names: auto, which goes by the fields of the first row; formats of trainers: groups, preference, unpaired,
    sharegpt, sharegpt_kto, llama_factory_v1, alpaca, ms_swift, openai, verl; data sets: mm_rlhf, llava_critic,
    rlaif_v, vlfeedback, povid, wildvision, tulu, skywork, nectar, pku_saferlhf, ultrafeedback, helpsteer2,
    helpsteer2_preference, helpsteer3, rlhf_v, arena, hh_rlhf, rewardbench. docs/data-formats.md has a row of each.

    Rows without a preference (ties, both bad) are counted and left out. A row that contradicts the published schema,
    or whose images cannot be read, is an error with its file, line and field; with --skip-bad such rows are listed
    and left out, and the exit code is 3.

    Example: mr-reward data convert auto pairs.parquet train.jsonl

    Example: mr-reward data convert nectar berkeley-nest/Nectar nectar.jsonl --limit 10000
    """
    from mr_reward.data.conversion import Conversion
    from mr_reward.data.converters import get_converter, recognise, with_axis
    from mr_reward.data.groups_file import save_preferences
    from mr_reward.data.sources import read_rows

    if name == "auto":
        converter = with_axis(recognise(read_rows(source, split=split, config=config)), axis)
        logger.info("%s: its fields are those of %s", source, converter.name)
    else:
        converter = get_converter(name, axis=axis)
        if not Path(source).exists():
            split, config = split or converter.split, config or converter.config
    rows = read_rows(source, split=split, config=config, columns=converter.columns)
    choices: dict[str, Any] = {"skip_bad": skip_bad, "keep_order": keep_order, "fetch_urls": fetch_urls}
    groups = Conversion(converter, rows, media_root=media, limit=limit, **choices)
    count = save_preferences(tqdm(groups, desc=f"converting {name}", unit=" groups"), out)
    table = Table("what", "rows")
    table.add_row("rows read", str(groups.num_rows))
    table.add_row("groups written", str(count))
    for reason, number in groups.skipped.most_common():
        table.add_row(f"no preference: {escape(reason)}", str(number))
    for reason, number in groups.left_out.most_common():
        table.add_row(f"answers left out: {escape(reason)}", str(number))
    table.add_row("bad rows skipped", str(len(groups.bad_rows)))
    console = Console()
    console.print(f"{converter.name} -> {out}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    if groups.unread:
        console.print(f"columns not read: {', '.join(sorted(groups.unread))}", markup=False, highlight=False)
    for row in groups.bad_rows[:_SHOWN_BAD_ROWS]:
        console.print(f"bad: {row}", markup=False, highlight=False, soft_wrap=True)
    if len(groups.bad_rows) > _SHOWN_BAD_ROWS:
        console.print(f"... and {len(groups.bad_rows) - _SHOWN_BAD_ROWS} more")
    if converter.hub_id:
        console.print(f"licence of {converter.hub_id}: {converter.licence}")
    if groups.bad_rows:
        raise typer.Exit(BAD_ROWS)


@data.command()
def stats(files: RankedFiles, skip_bad: SkipBad = False) -> None:
    """Show sizes, ties, lengths, modalities and where the best response stands, by source.

    Example: mr-reward data stats train.jsonl val.jsonl
    """
    from mr_reward.data.groups_file import load_preferences
    from mr_reward.data.stats import group_stats, stats_table

    for path in files:
        groups = load_preferences(path, skip_bad=skip_bad)
        sources = sorted({group.source for group in groups if group.source is not None})
        entries = [group_stats(groups, path.name)]
        if len(sources) > 1:
            entries += [group_stats([g for g in groups if g.source == source], source) for source in sources]
        for start in range(0, len(entries), _TABLE_COLUMNS):
            Console().print(stats_table(entries[start : start + _TABLE_COLUMNS]))


@data.command(hidden=True)
def inspect(files: RankedFiles, skip_bad: SkipBad = False) -> None:
    """The name of `mr-reward data stats` in version 0.1.0.

    Example: mr-reward data inspect train.jsonl
    """
    logger.warning("`mr-reward data inspect` is `mr-reward data stats` now; the old name goes with the next version")
    stats(files, skip_bad)


@data.command()
def decontaminate(
    train: Annotated[list[Path], typer.Argument(help=".jsonl files of training groups")],
    benchmark: Annotated[
        list[str], typer.Option(help="NAME or NAME=SOURCE as for evaluate, or a .jsonl file of groups; repeatable")
    ],
    out: Annotated[Path, typer.Option(help="The .jsonl file of clean groups to write")],
    report: Annotated[Path | None, typer.Option(help="JSON file: each removed group and what it met")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Templates and stock phrases count too")] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Remove training groups that share an id, a picture, a prompt or a long response with a benchmark.

    A prompt beside a picture counts if it is long and no template, a response if it is no stock phrase; --strict
    counts them all. A group stands in the table below each benchmark and reason that it meets.

    Example: mr-reward data decontaminate train.jsonl --benchmark vl_rewardbench --out clean.jsonl
    """
    from mr_reward.data.decontamination import decontaminate as remove
    from mr_reward.data.groups_file import load_preferences, save_preferences

    benchmarks = dict(_benchmark(spec, skip_bad) for spec in benchmark)
    if len(benchmarks) < len(benchmark):
        raise ConfigurationError(f"got benchmarks {benchmark}, expected different names")
    groups = [group for path in train for group in load_preferences(path, skip_bad=skip_bad)]
    result = remove(groups, benchmarks, strict=strict)
    table = Table("training source", "benchmark", "same", "groups removed")
    table.title = f"{len(result.kept)} of {len(groups)} kept"
    for (source, name, reason), number in result.counts.items():
        table.add_row(escape(source), escape(name), reason, str(number))
    Console().print(table)
    if report is not None:
        removed = [
            {"id": removal.group.id, "source": removal.group.source, "matches": [[*i, r] for i, r in removal.matches]}
            for removal in result.removed
        ]
        report.write_text(json.dumps(removed, indent=1) + "\n")
    save_preferences(result.kept, out)


def _benchmark(spec: str, skip_bad: bool) -> tuple[str, list[ResponseGroup]]:
    """The name and the groups of a benchmark, with the ids that it gives itself."""
    from mr_reward.data.groups_file import load_preferences
    from mr_reward.evaluation.benchmarks import BENCHMARKS, open_benchmark

    name, _, source = spec.partition("=")
    if name not in BENCHMARKS:
        return Path(spec).stem, load_preferences(spec, skip_bad=skip_bad)
    items = open_benchmark(name, source or None)
    return name, [replace(item.group, id=item.uid.partition(":")[2] or item.uid) for item in items]


@data.command()
def handwriting(
    out: Annotated[Path, typer.Argument(help="Folder to write to")],
    num_items: Annotated[int, typer.Option(min=1, help="Items of each benchmark")] = 256,
    num_digits: Annotated[int, typer.Option(min=2, max=16, help="Digits of each item")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of digits and answers")] = 0,
) -> None:
    """Write benchmarks of each type from the handwriting world, to try `mr-reward evaluate` with.

    Example: mr-reward data handwriting outputs/handwriting
    """
    from mr_reward.worlds.handwriting import HANDWRITING_BENCHMARKS, write_handwriting_benchmarks

    counts = write_handwriting_benchmarks(out, num_items, num_digits=num_digits, seed=seed)
    table = Table("items", "evaluate with")
    for name, benchmark in HANDWRITING_BENCHMARKS.items():
        table.add_row(str(counts[name]), f"mr-reward evaluate {benchmark} RM --source {out / name} --out RESULTS")
    Console().print(table)
