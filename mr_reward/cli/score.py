"""`mr-reward score`: groups in, the same lines with scores out."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mr_reward.cli.options import BAD_ROWS, Device, Dtype, FetchUrls, MaxTokens, NumOrders, OverLength, torch_dtype
from mr_reward.data.jsonl import ResumableJsonLines, json_line, read_json_lines
from mr_reward.data.sources import is_hub_id
from mr_reward.errors import ConfigurationError, GroupError, MediaError, MRRewardError
from mr_reward.groups import GroupScores, score_each

if TYPE_CHECKING:
    from mr_reward.groups import ResponseGroup, Scorer

logger = logging.getLogger(__name__)

_RESULT_KEYS = {*GroupScores.__slots__, "error", "scored_with"}
_ALL_RESULTS = {*GroupScores.__slots__} - {"order_flip_rate"}  # the youngest of them
_MEDIA_KEYS = ("image", "images", "video", "videos")
_PATH_KEYS = (*_MEDIA_KEYS, "image_url", "path", "url")  # in content blocks
_STREAM = "-"


def score(
    model: Annotated[str, typer.Argument(help="Reward model (folder or hub id), or the URL of `mr-reward serve`")],
    source: Annotated[
        str,
        typer.Argument(help="A file (.jsonl, .jsonl.gz, .json, .parquet), saved data set or hub id; - for a pipe"),
    ] = "-",
    out: Annotated[str, typer.Option(help=".jsonl file to write, or to resume; - for standard output")] = "-",
    media: Annotated[
        Path | None, typer.Option(help="Folder that paths of images and videos count from; else the source's")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Write the error of a bad line in its place and go on; exit code 3")
    ] = False,
    chunk: Annotated[int, typer.Option(min=1, help="Groups that are read, scored and written at a time")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 16384,
    over_length: OverLength = "drop_group",
    num_orders: NumOrders = 1,
    fetch_urls: FetchUrls = False,
) -> None:
    """Score groups: each line comes back with `scores`, in the order of its responses.

    A line is an object with `prompt` (text or chat messages), `responses` and, if there are any, `images` or `videos`
    as paths; other keys come back as they are, those that results would replace as `input_scores`. With --out, the
    same command given again resumes a run that was interrupted: lines that are in the file are not scored again, and
    none is lost. With --skip-bad a line that is no group, or whose images cannot be read or are not taken by the
    model, comes back with `error`; the exit code is 3.

    Example: mr-reward score rm groups.jsonl --out scores.jsonl

    Example: cat groups.jsonl | mr-reward score rm | jq .scores
    """
    root = media if media is not None else Path() if source == _STREAM else Path(source).parent
    target = None if out == _STREAM else Path(out)
    if source != _STREAM and not Path(source).exists() and not is_hub_id(source):
        raise GroupError(f"{source}: is not a file; give a .jsonl file with one group per line, or - to read a pipe")
    if target is not None and source != _STREAM and target.resolve() == Path(source).resolve():
        raise ConfigurationError(f"--out {out} is the file that is read; name another one")
    given: dict[str, Any] = {"max_tokens_per_batch": max_tokens, "over_length": over_length, "num_orders": num_orders}
    scorer, known = _open_scorer(model, device=device, dtype=dtype, **given)
    with ExitStack() as stack:
        stream: BinaryIO = sys.stdin.buffer
        if Path(source).is_file():
            stream = stack.enter_context(Path(source).open("rb"))
        total = None
        if source.endswith(".jsonl"):
            total = sum(1 for line in stream if line.strip())
            stream.seek(0)
        lines = _parse(stream, "standard input" if source == _STREAM else source, root, target, fetch_urls)
        done, bad, write = 0, 0, _write_to_standard_output
        if target is not None:
            file = stack.enter_context(ResumableJsonLines(target))
            (done, bad), write = _check_done(file, lines, known), file.write
        bar = stack.enter_context(tqdm(total=total, initial=done, unit=" groups", desc="scoring"))
        try:
            counts = _run(lines, scorer, known[0], write, bar, chunk=chunk, skip_bad=skip_bad)
        except KeyboardInterrupt:
            if target is not None:
                logger.warning("stopped; %s holds whole lines, the same command resumes it", target)
            raise
    console = Console(stderr=True)
    if target is not None:
        console.print(out, markup=False, highlight=False, soft_wrap=True)  # a title would be cut to the table's width
    table = Table("groups", "")
    numbers = {"scored now": counts["scored"], "scored before": done, "dropped": counts["dropped"]}
    bad += counts["bad"]
    numbers |= {"bad lines": bad, "responses cut off": counts["truncated"]}
    for name, number in numbers.items():
        table.add_row(name, str(number))
    console.print(table)
    if bad:
        raise typer.Exit(BAD_ROWS)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the input."""

    where: str  # file and number, for messages
    row: dict[str, Any]  # what comes back beside the scores
    group: ResponseGroup | MRRewardError  # or why it is none


def _check_done(file: ResumableJsonLines, lines: Iterator[_Line], known: Sequence[str]) -> tuple[int, int]:
    """How many lines of this input an earlier run has written, and how many are bad; as many are taken from it."""
    count = bad = 0
    for count, (number, row) in enumerate(file.rows(), start=1):
        line = next(lines, None)
        if not isinstance(row, dict) or "scored_with" not in row:
            problem = "was not written by this command, so it cannot be resumed"
        elif row["scored_with"] not in known:
            problem = f"was scored with another model or other options ({row['scored_with']}, now {known[0]})"
        elif line is None:
            problem = f"the input has {count - 1} lines only, so the file belongs to another input"
        elif _without_results(row) != line.row:
            problem = f"is not {line.where} with its scores, so the file belongs to another input"
        else:
            bad += row.get("error") is not None
            continue
        where = f"{file.path}, line {number}"
        raise GroupError(f"{where}: {problem}; name another --out, or give the command that wrote it")
    return count, bad


def _write_to_standard_output(rows: Iterable[Any]) -> None:
    sys.stdout.buffer.write(b"".join(map(json_line, rows)))
    sys.stdout.buffer.flush()


def _open_scorer(name: str, *, dtype: str | None, device: str | None, **options: Any) -> tuple[Scorer, list[str]]:
    """The scorer, and a checksum of everything that decides its scores; behind it the one of version 0.1.0.

    That one was taken over the orders asked for, also where the layout needs one only.
    """
    from mr_reward.scorers.opening import is_url, open_scorer, scored_by

    def checksum(model_hash: str, settings: dict[str, Any]) -> str:
        parts = json.dumps((model_hash, settings), sort_keys=True, default=str)
        return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()

    local = {"dtype": torch_dtype(dtype), "device": device, **options}
    scorer = open_scorer(name, **({} if is_url(name) else local))
    model_hash, settings = scored_by(scorer)
    return scorer, [checksum(model_hash, found) for found in ([settings] if is_url(name) else [settings, options])]


def _parse(stream: BinaryIO, name: str, root: Path, target: Path | None, fetch_urls: bool) -> Iterator[_Line]:
    from mr_reward.data.groups_file import group_from_row
    from mr_reward.data.media_files import resolve_media

    for where, value in _read(name, stream):
        place = where.removeprefix(f"{name}, ")  # "line 7"
        row: dict[str, Any] = {"line": int(place.rpartition(" ")[2])}
        group: ResponseGroup | MRRewardError
        try:
            if isinstance(value, GroupError):
                raise value
            if not isinstance(value, dict):
                raise GroupError(f"the row is no object: {value!r:.60}")
            row = _own_row(value)
            group = resolve_media(group_from_row(row, place, ranked=False), root, fetch_urls=fetch_urls)
        except MRRewardError as error:
            group = error
        yield _Line(where, _with_files(row if target is None else _rebase(row, root, target.parent), target), group)


def _with_files(row: dict[str, Any], target: Path | None) -> dict[str, Any]:
    """The row with images that it holds itself, as parquet and data sets do, written beside the output."""
    from mr_reward.data.media_files import write_image

    def outside(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else outside(value["bytes"])
        if isinstance(value, dict):
            return {key: outside(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [outside(entry) for entry in value]
        if not isinstance(value, bytes):
            return value
        if target is None:
            raise GroupError("the rows hold images, which are written beside the scores; give --out FILE")
        try:
            return write_image(value, target.with_name(f"{target.stem}_media")).relative_to(target.parent).as_posix()
        except MediaError:
            return None  # the group's error says it

    return {key: outside(value) for key, value in row.items()}


def _read(name: str, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row: of a table, of a .json file with a list, of a packed file, of lines."""
    from mr_reward.data.sources import read_rows

    if name != "standard input" and (name.endswith(".parquet") or not Path(name).is_file()):
        yield from read_rows(name)
        return
    if name.endswith(".json"):
        is_list = stream.read(4096).lstrip()[:1] == b"["
        stream.seek(0)
        if is_list:
            yield from read_rows(name)
            return
    lines = gzip.open(stream) if name.endswith(".jsonl.gz") else stream
    yield from ((f"{name}, line {number}", row) for number, row in read_json_lines(lines))


def _own_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without what an earlier scoring gave; the user's own keys of such names become `input_...`."""
    if "scored_with" in row or _ALL_RESULTS <= row.keys():
        return _without_results(row)
    own = {f"input_{key}" if key in _RESULT_KEYS else key: value for key, value in row.items()}
    if len(own) < len(row):
        names = ", ".join(sorted(key for key in _RESULT_KEYS & row.keys() if f"input_{key}" in row))
        raise GroupError(f"the keys {names} would come back as input_..., which the row has too; rename one of them")
    return own


def _without_results(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _RESULT_KEYS}


def _rebase(row: dict[str, Any], root: Path, folder: Path) -> dict[str, Any]:
    """The row with its relative paths counted from the folder of the output; chat messages may hold some too."""
    from mr_reward.data.media_files import rebase_path

    def rebased(value: Any, is_path: bool) -> Any:
        if isinstance(value, dict):
            return {key: rebased(entry, key in _PATH_KEYS) for key, entry in value.items()}
        if isinstance(value, list):
            return [rebased(entry, is_path) for entry in value]
        return rebase_path(value, root, folder) if is_path and isinstance(value, str) else value

    if root.resolve() == folder.resolve():
        return row
    keys = {"prompt", *_MEDIA_KEYS}
    return {key: rebased(value, key in _MEDIA_KEYS) if key in keys else value for key, value in row.items()}


def _run(
    lines: Iterator[_Line],
    scorer: Scorer,
    scored_with: str,
    write: Callable[[Iterable[Any]], None],
    bar: tqdm,
    *,
    chunk: int,
    skip_bad: bool,
) -> Counter[str]:
    """Score and write chunk by chunk; what has been scored is written, whatever comes after it."""
    counts: Counter[str] = Counter()
    while batch := list(islice(lines, chunk)):
        if not skip_bad:  # no time is spent on what comes after a bad line
            batch = batch[: next((i + 1 for i, line in enumerate(batch) if _is_error(line.group)), None)]
        groups = [line.group for line in batch if not isinstance(line.group, MRRewardError)]
        found = iter(score_each(scorer, groups))
        results = [line.group if isinstance(line.group, MRRewardError) else next(found) for line in batch]
        stop = None if skip_bad else next((i for i, result in enumerate(results) if _is_error(result)), None)
        write(
            {**line.row, **_result(line, result, counts), "scored_with": scored_with}
            for line, result in zip(batch[:stop], results[:stop], strict=True)
        )
        bar.update(len(batch[:stop]))
        if stop is not None:
            raise GroupError(f"{batch[stop].where}: {results[stop]}. Fix it, or give --skip-bad")
    return counts


def _is_error(value: object) -> bool:
    return isinstance(value, MRRewardError)


def _result(line: _Line, result: GroupScores | MRRewardError, counts: Counter[str]) -> dict[str, Any]:
    """What comes back with the line."""
    if isinstance(result, MRRewardError):
        counts["bad"] += 1
        return {"scores": None, "error": f"{line.where}: {result}"}
    counts["scored" if result.scores is not None else "dropped"] += 1
    counts["truncated"] += sum(result.truncated)
    return result.to_dict()
