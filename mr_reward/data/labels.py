"""Rollouts to ranked groups: a verifier, a judge or people say which response is better, and each line says who.

The output grows by a line for each group that was labelled; the same command labels the rest after an interruption,
and tries those again that had no label.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from tqdm.auto import tqdm

from mr_reward.data.groups_file import group_from_row, row_from_group
from mr_reward.data.jsonl import ResumableJsonLines
from mr_reward.data.media_files import resolve_media
from mr_reward.data.sources import read_rows
from mr_reward.errors import ConfigurationError, GroupError, MRRewardError
from mr_reward.groups import ResponseGroup, dense_ranks
from mr_reward.templates.images import load_image

logger = logging.getLogger(__name__)

_NO_COLUMNS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutsToLabel:
    """A group without ranks, and what its line has besides."""

    number: int  # of its line
    row: Mapping[str, Any]
    group: ResponseGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a labeller says of one group."""

    ratings: Sequence[float] | None = None  # N, larger is better, equal ones tie; None where there is no label
    why_not: str | None = None  # of a group without a label
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the line, like how far several passes agree


class Labeller(Protocol):
    """Who says which response is better."""

    name: str  # for the field `labelled_by`
    at_a_time: int  # groups of a call

    def label(self, items: Sequence[RolloutsToLabel]) -> Iterator[tuple[RolloutsToLabel, Label]]:
        """A label for each group, in any order; fewer where the labeller stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """What a call has done."""

    labelled: int  # groups
    before: int  # by earlier calls
    all_tied: int  # of both: they teach nothing, and training leaves them out
    single: int  # groups of one response, which nobody is asked about and no training takes
    left_out: Mapping[str, int]  # why -> groups without a label
    not_reached: int  # after a labeller has stopped
    agreement: float | None  # the mean over the groups that have one


def label_groups(
    source: str | Path, out: str | Path, labeller: Labeller, *, media_within: str | Path | None = None
) -> Labelled:
    """Label the groups of a file into another one, which `load_preferences` reads; or the rest of them."""
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve():
        raise ConfigurationError(f"--out {out} is the file that is read; name another one")
    every = list(_read(source, media_within))
    items = [item for item in every if item.group.num_responses > 1]
    before: list[dict[str, Any]] = []
    written: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    with ResumableJsonLines(out) as file:
        done = dict(_earlier(file, items, labeller.name))
        before = list(done.values())
        left = [item for item in items if item.number not in done]
        bar = tqdm(total=len(items), initial=len(done), desc="labelling", unit=" groups", disable=None)
        reached = 0
        for start in range(0, len(left), labeller.at_a_time):
            some = left[start : start + labeller.at_a_time]
            answered = 0
            for item, label in labeller.label(some):
                answered += 1
                bar.update()
                if label.ratings is None:
                    left_out[label.why_not or "no label"] += 1
                    logger.info("%s, line %d: no label (%s)", source, item.number, label.why_not)
                    continue
                row = _labelled_row(item, label, labeller.name, out)
                file.write([row])
                written.append(row)
            reached += answered
            if answered < len(some):
                break
        bar.close()
    rows = before + written
    agreements = [row["agreement"] for row in rows if row.get("agreement") is not None]
    return Labelled(
        labelled=len(written),
        before=len(before),
        all_tied=sum(len(set(row["rankings"])) == 1 for row in rows),
        single=len(every) - len(items),
        left_out=dict(left_out),
        not_reached=len(left) - reached,
        agreement=fmean(agreements) if agreements else None,
    )


class Verifier:
    """A reward function as TRL's trainers call them: it gets prompts, completions and the columns of the prompts.

    A completion is a text where the prompt is one, else a list of chat messages. The columns are those that
    `mr-reward collect` has kept, or else the further keys of a line.
    """

    at_a_time = 64

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._function = function
        self.name = f"verifier {name}"

    def label(self, items: Sequence[RolloutsToLabel]) -> Iterator[tuple[RolloutsToLabel, Label]]:
        """See `Labeller`."""
        pairs = [(item, response) for item in items for response in item.row["responses"]]
        columns = [_columns(item.row) for item in items]
        keys = sorted(set().union(*columns) - _NO_COLUMNS)
        self._check(keys, items[0])
        given: dict[str, Any] = {key: [] for key in keys}
        for item, own in zip(items, columns, strict=True):
            for key in keys:
                given[key] += [own.get(key)] * item.group.num_responses
        rewards = self._function(
            prompts=[item.row["prompt"] for item, _ in pairs],
            completions=[_completion(item, response) for item, response in pairs],
            **given,
        )
        if inspect.isawaitable(rewards):
            rewards = asyncio.run(_awaited(rewards))
        if not isinstance(rewards, Sequence) or len(rewards) != len(pairs):
            count = len(rewards) if isinstance(rewards, Sequence) else type(rewards).__name__
            raise ConfigurationError(
                f"{self.name} gave {count} rewards for {len(pairs)} responses, expected a list with one for each"
            )
        left = iter(rewards)
        for item in items:
            own_rewards = [next(left) for _ in item.row["responses"]]
            if all(reward is not None and math.isfinite(reward) for reward in own_rewards):
                yield item, Label(ratings=[float(reward) for reward in own_rewards])
            else:
                yield item, Label(why_not="no reward for some response")

    def _check(self, keys: Sequence[str], item: RolloutsToLabel) -> None:
        """Refuse a file without a column that the function asks for."""
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except ValueError:  # of a builtin
            return
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = [one.name for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty]
        missing = [name for name in needed if name not in ("prompts", "completions", *keys)]
        if missing:
            raise ConfigurationError(
                f"{self.name} needs the columns {', '.join(missing)}, line {item.number} has "
                f"{', '.join(keys) or 'none'}; collect from a data set that has them (of a run's log: give its data "
                "set as PROMPTS)"
            )


async def _awaited(rewards: Any) -> Any:
    return await rewards


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    own = row.get("columns")
    return (
        dict(own) if isinstance(own, Mapping) else {k: v for k, v in row.items() if k not in ("prompt", "responses")}
    )


def _completion(item: RolloutsToLabel, response: Any) -> Any:
    """A completion as TRL has it."""
    if isinstance(item.row["prompt"], str) or not isinstance(response, str):
        return response
    return [{"role": "assistant", "content": response}]


def _read(source: Path, media_within: str | Path | None) -> Iterator[RolloutsToLabel]:
    rows = read_rows(source)
    found = False
    for number, (place, row) in enumerate(rows, start=1):
        try:
            if isinstance(row, GroupError):
                raise row
            group = resolve_media(group_from_row(row, f"line {number}", ranked=False), rows.folder, media_within)
        except MRRewardError as error:
            raise GroupError(f"{place}: {error}") from error
        found = True
        yield RolloutsToLabel(number=number, row=row, group=group)
    if not found:
        raise GroupError(f"{source}: holds no group; give a file that `mr-reward collect` has written")


def _earlier(
    file: ResumableJsonLines, items: Sequence[RolloutsToLabel], name: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line of the input -> line of the output, for what earlier calls have labelled."""
    by_number = {item.number: item for item in items}
    for number, row in file.rows():
        item = by_number.get(row.get("line", 0)) if isinstance(row, dict) else None
        problem = None
        if item is None or row.get("responses") != item.row["responses"]:
            problem = "is of no group of this input"
        elif row.get("labelled_by") != name:
            problem = f"was labelled by {row.get('labelled_by')!r}, now it would be {name!r}"
        if item is None or problem is not None:
            raise GroupError(f"{file.path}, line {number}: {problem}; name another --out, or give what began the file")
        yield item.number, row


def _labelled_row(item: RolloutsToLabel, label: Label, name: str, out: Path) -> dict[str, Any]:
    ratings = list(label.ratings or ())
    own = row_from_group(item.group, out)
    own["responses"] = item.row["responses"]  # in the form that they had, as the prompt
    if not _holds_media(item.row["prompt"]):
        own["prompt"] = item.row["prompt"]
    kept = {key: value for key, value in item.row.items() if key not in ("image", "video") and key not in own}
    made = {"rankings": list(dense_ranks([-rating for rating in ratings])), "ratings": ratings}
    return {**own, **kept, **made, **label.facts, "labelled_by": name, "line": item.number}


def _holds_media(prompt: Any) -> bool:
    """Whether blocks of a prompt name media themselves, whose paths count from another folder now."""
    blocks = [block for turn in prompt if isinstance(turn, Mapping) for block in turn.get("content") or ()]
    return any(isinstance(block, Mapping) and block.get("type") != "text" and len(block) > 1 for block in blocks)


def shown_turns(group: ResponseGroup) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The turns of a prompt for a labeller who is somewhere else: the role, and texts and images in their order.

    An image is ("image", PNG in a `data:` URI), a video its frames.
    """
    media = {"image": iter(group.images), "video": iter(group.videos)}
    for message in group.messages:
        content: list[tuple[str, str]] = []
        for block in message["content"]:
            if block["type"] == "text":
                content.append(("text", block["text"]))
                continue
            medium = next(media[block["type"]])
            content += [("image", _data_uri(one)) for one in ([medium] if block["type"] == "image" else medium)]
        if message.get("tool_calls"):
            content.append(("text", json.dumps(message["tool_calls"])))
        yield message["role"], content


def _data_uri(image: Any) -> str:
    buffer = BytesIO()
    load_image(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
