"""`mr-reward score`: groups in, the same lines with scores out."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mr_reward.cli.options import Device, Dtype, MaxTokens, NumOrders, OverLength, torch_dtype
from mr_reward.errors import ConfigurationError, GroupError, MRRewardError

if TYPE_CHECKING:
    from mr_reward.groups import GroupScores, ResponseGroup, Scorer

__all__ = ["score"]

logger = logging.getLogger(__name__)

_RESULT_KEYS = ("scores", "truncated", "order_spread", "drop_reason", "error", "scored_with")
_MEDIA_KEYS = ("image", "images", "video", "videos")
_STREAM = "-"


def score(
    model: Annotated[str, typer.Argument(help="Reward model (folder or hub id), or the URL of `mr-reward serve`")],
    source: Annotated[str, typer.Argument(help=".jsonl file with a group on each line; - for standard input")] = "-",
    out: Annotated[str, typer.Option(help=".jsonl file to write, or to go on with; - for standard output")] = "-",
    media: Annotated[
        Path | None, typer.Option(help="Folder that paths of images and videos count from; else the source's")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Write the error of a bad line in its place instead of stopping")
    ] = False,
    chunk: Annotated[int, typer.Option(min=1, help="Groups that are read, scored and written at a time")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 16384,
    over_length: OverLength = "drop_group",
    num_orders: NumOrders = 1,
) -> None:
    """Score groups: each line comes back with `scores`, in the order of its responses.

    A line is an object with `prompt` (text or chat messages), `responses` and, if there are any, `images` or `videos`
    as paths; other keys come back as they are. With --out, a run that was interrupted goes on when the same command is
    given again: lines that are in the file are not scored again, and none is lost.

    Example: mr-reward score rm groups.jsonl --out scores.jsonl

    Example: cat groups.jsonl | mr-reward score rm | jq .scores
    """
    root = media if media is not None else Path() if source == _STREAM else Path(source).parent
    target = None if out == _STREAM else Path(out)
    if source != _STREAM and not Path(source).is_file():
        raise GroupError(f"{source}: is not a file; give a .jsonl file with one group per line, or - to read a pipe")
    if target is not None and source != _STREAM and target.resolve() == Path(source).resolve():
        raise ConfigurationError(f"--out {out} is the file that is read; name another one")
    scorer, scored_with = _open_scorer(
        model,
        device=device,
        dtype=dtype,
        max_tokens_per_batch=max_tokens,
        over_length=over_length,
        num_orders=num_orders,
    )
    with nullcontext(sys.stdin.buffer) if source == _STREAM else Path(source).open("rb") as stream:
        total = None
        if source != _STREAM:
            total = sum(1 for line in stream if line.strip())
            stream.seek(0)
        lines = _parse(stream, "standard input" if source == _STREAM else source, root, target)
        done, size = _check_done(target, lines, scored_with)
        with _writing(target, size) as output, tqdm(total=total, initial=done, unit=" groups", desc="scoring") as bar:
            counts = _run(lines, scorer, scored_with, output, bar, chunk=chunk, skip_bad=skip_bad)
    _show(counts, done, out)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the input.

    Args:
        where: file and number, for messages.
        row: what comes back beside the scores.
        group: the group, or why it is none.
    """

    where: str
    row: dict[str, Any]
    group: ResponseGroup | MRRewardError


def _check_done(target: Path | None, lines: Iterator[_Line], scored_with: str) -> tuple[int, int]:
    """What an earlier run has written: how many whole lines of this input, and their bytes.

    Takes as many lines of the input. A torn last line does not count: it is scored again.
    """
    count = size = 0
    if target is None or not target.exists():
        return count, size
    with target.open("rb") as written:
        for content in written:
            if not content.endswith(b"\n"):
                break
            count, size = count + 1, size + len(content)
            where = f"{target}, line {count}"
            row = _read_done(content)
            if row is None:
                raise GroupError(
                    f"{where}: is no line that this command wrote, so it cannot be gone on with; name another --out"
                )
            if row["scored_with"] != scored_with:
                raise GroupError(
                    f"{where}: was scored with another model or other options ({row['scored_with']}, now "
                    f"{scored_with}); name another --out, or give the command that wrote it"
                )
            line = next(lines, None)
            if line is None:
                raise GroupError(
                    f"{where}: the input has {count - 1} lines only, so the file belongs to another input; name "
                    "another --out"
                )
            if _without_results(row) != line.row:
                raise GroupError(
                    f"{where}: is not {line.where} with its scores, so the file belongs to another input; name "
                    "another --out"
                )
    return count, size


def _read_done(content: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(content)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "scored_with" in row else None


def _open_scorer(name: str, *, dtype: str | None, device: str | None, **options: Any) -> tuple[Scorer, str]:
    """The scorer, and a checksum of everything that decides its scores."""
    from mr_reward.checkpoint.digest import weights_digest
    from mr_reward.model.scorer import GroupScorer
    from mr_reward.scorers.opening import default_device

    if name.startswith(("http://", "https://")):
        from mr_reward.scorers import RemoteScorer

        remote = RemoteScorer(name)
        health = remote.connect()
        return remote, _checksum(health.model_hash, health.options)
    scorer = GroupScorer.from_pretrained(name, dtype=torch_dtype(dtype), device=device or default_device(), **options)
    return scorer, _checksum(weights_digest(scorer.model), options)


def _checksum(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _parse(stream: BinaryIO, name: str, root: Path, target: Path | None) -> Iterator[_Line]:
    from mr_reward.data.group_rows import group_from_row
    from mr_reward.data.jsonl import read_json_lines
    from mr_reward.data.media_files import resolve_media

    for number, value in read_json_lines(stream):
        where = f"{name}, line {number}"
        if isinstance(value, GroupError) or not isinstance(value, dict):
            error = value if isinstance(value, GroupError) else GroupError(f"the row is no object: {value!r:.60}")
            yield _Line(where, {"line": number}, error)
            continue
        row = _without_results(value)
        group: ResponseGroup | MRRewardError
        try:
            group = resolve_media(group_from_row(row, f"line {number}", ranked=False), root)
        except MRRewardError as error:
            group = error
        yield _Line(where, row if target is None else _rebase(row, root, target.parent), group)


def _without_results(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _RESULT_KEYS}


def _rebase(row: dict[str, Any], root: Path, folder: Path) -> dict[str, Any]:
    """The row with its relative paths counted from the folder of the output."""
    from mr_reward.data.media_files import rebase_path

    if root.resolve() == folder.resolve():
        return row

    def rebased(value: Any) -> Any:
        if isinstance(value, list):
            return [rebased(entry) for entry in value]
        return rebase_path(value, root, folder) if isinstance(value, str) else value

    row = {key: rebased(value) if key in _MEDIA_KEYS else value for key, value in row.items()}
    if isinstance(row.get("prompt"), list):
        row["prompt"] = [_rebase_turn(turn, rebased) for turn in row["prompt"]]
    return row


def _rebase_turn(turn: Any, rebased: Any) -> Any:
    """Chat messages may carry paths in their media blocks."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    blocks = [
        {key: rebased(value) if key in _MEDIA_KEYS else value for key, value in block.items()}
        if isinstance(block, dict)
        else block
        for block in turn["content"]
    ]
    return {**turn, "content": blocks}


@contextmanager
def _writing(target: Path | None, size: int) -> Iterator[BinaryIO]:
    """Standard output, or the file behind its first `size` bytes."""
    if target is None:
        yield sys.stdout.buffer
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("r+b" if target.exists() else "wb") as output:
        output.truncate(size)
        output.seek(size)
        try:
            yield output
        except KeyboardInterrupt:
            logger.warning("stopped; %s is whole, the same command goes on with it", target)
            raise


def _run(
    lines: Iterator[_Line],
    scorer: Scorer,
    scored_with: str,
    output: BinaryIO,
    bar: tqdm,
    *,
    chunk: int,
    skip_bad: bool,
) -> dict[str, int]:
    """Score and write chunk by chunk; what has been scored is written, whatever comes after it."""
    counts = dict.fromkeys(("scored", "dropped", "truncated", "bad"), 0)
    while batch := list(islice(lines, chunk)):
        stop = next(
            (i for i, line in enumerate(batch) if isinstance(line.group, MRRewardError) and not skip_bad), None
        )
        for line, row in _score(batch[:stop], scorer, counts):
            output.write(json.dumps({**line.row, **row, "scored_with": scored_with}).encode() + b"\n")
        output.flush()
        bar.update(len(batch[:stop]))
        if stop is not None:
            raise GroupError(f"{batch[stop].where}: {batch[stop].group}. Mend it, or give --skip-bad")
    return counts


def _score(batch: list[_Line], scorer: Scorer, counts: dict[str, int]) -> Iterator[tuple[_Line, dict[str, Any]]]:
    groups = [line.group for line in batch if not isinstance(line.group, MRRewardError)]
    results: Iterator[GroupScores] = iter(scorer.score_detailed(groups))
    for line in batch:
        if isinstance(line.group, MRRewardError):
            counts["bad"] += 1
            yield line, {"scores": None, "error": str(line.group)}
            continue
        result = next(results)
        counts["scored" if result.scores is not None else "dropped"] += 1
        counts["truncated"] += sum(result.truncated)
        yield (
            line,
            {
                "scores": None if result.scores is None else list(result.scores),
                "truncated": list(result.truncated),
                "order_spread": result.order_spread,
                "drop_reason": result.drop_reason,
            },
        )


def _show(counts: Mapping[str, int], before: int, out: str) -> None:
    table = Table("groups", "", title=None if out == _STREAM else out)
    for name, count in (("scored now", counts["scored"]), ("scored before", before), ("dropped", counts["dropped"])):
        table.add_row(name, str(count))
    table.add_row("bad lines", str(counts["bad"]))
    table.add_row("responses cut off", str(counts["truncated"]))
    Console(stderr=True).print(table)
