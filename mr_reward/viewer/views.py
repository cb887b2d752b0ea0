"""Groups to look at: where they come from, and what a page shows of them.

They come from scored groups, TRL's completions table or the folder of a run. Shown are ranks, advantages, flags,
images, the layout as a small matrix.
"""

from __future__ import annotations

import base64
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet

from mr_reward.data.groups_file import ScoredGroup, read_groups, read_scored
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import GroupScores, ResponseGroup, Scorer, dense_ranks
from mr_reward.layouts import Layout, plan_row, readout_kinds, visible
from mr_reward.templates.images import load_image
from mr_reward.templates.rendering import Renderer

# Name -> the rule, as the page tells it.
FILTERS = {
    "zero-spread": "all scores are equal: the group teaches GRPO nothing",
    "dropped": "the group got no scores",
    "truncated": "a response was cut off before it was scored",
    "suspicious": "scores follow the length: correlation of 0.9 or more, either way, over at least four lengths",
    "duplicates": "two responses have the same text",
}
_SUSPICIOUS, _MIN_LENGTHS = 0.9, 4
_MAX_PIXELS = 512  # longer side of an embedded image
_EPSILON = 1e-4  # trl 1.16 adds it to the standard deviation
_CONTROLS = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200b-\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\ufeff]"
)
_STEP_FILE = re.compile(r"step_(\d+)\.rank\d+\.jsonl")  # not eval_step_...
_TABLE_FILE = re.compile(r"completions_(\d+)\.parquet")
_REWARD, _GROUP, _ADVANTAGE = "multi_response_reward", "mr_reward_group", "advantage"
Inspected = tuple[ScoredGroup, tuple[float, ...] | None]  # and the trainer's own advantages, if it logged them


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a row."""

    prompt: int  # with its media
    responses: tuple[int, ...]
    layout: Layout

    @classmethod
    def of(cls, scored: ScoredGroup, renderer: Renderer, layout: Layout) -> Lengths:
        """Count with a reward model's own processor."""
        rendered = renderer.render(scored.group)
        return cls(len(rendered.prompt_ids), tuple(len(ids) for ids in rendered.response_ids), layout)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Who sees whom, one cell for each part of the row."""

    labels: tuple[str, ...]  # P, then 1 s (c) 2 s (c) ...
    cells: tuple[tuple[bool, ...], ...]  # [query][key], True where it sees it

    @classmethod
    def of(cls, layout: Layout, num_responses: int) -> Matrix:
        """The layout with one token for the prompt and for each response."""
        plan = plan_row(layout, 1, [1] * num_responses)
        mask = visible(layout, plan.segments[None], plan.kinds[None])[0]
        readouts = [kind.name[0].lower() for kind in readout_kinds(layout)]
        labels = ["P"]
        for i in range(num_responses):
            labels += [str(i + 1), *readouts]
        return cls(tuple(labels), tuple(tuple(row) for row in mask.tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseView:
    """A response as it is shown."""

    slot: int  # its number in the group, from 1 on
    text: str  # with control characters made visible
    score: float | None  # None if the group was dropped
    rank: int | None  # 1 = best
    share: float  # of the way from the lowest to the highest score, for a bar
    advantage: float | None
    length: int  # in the group's `unit`
    flags: tuple[str, ...]  # what is special about it
    true_rank: int | None  # from the data, if it was ranked


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """A group as it is shown."""

    name: str
    turns: tuple[tuple[str, tuple[dict[str, str], ...]], ...]  # role, pieces: text, or an image's data URI and caption
    responses: tuple[ResponseView, ...]  # best first
    result: GroupScores
    spread: float | None  # standard deviation of the scores, None without scores
    correlation: float | None  # of score and length, None where it is not defined
    advantage_note: str  # where the advantages come from
    unit: str  # tokens or characters
    prompt_length: int | None  # in tokens, None if they were not counted
    matrix: Matrix | None  # of the layout, None if that is not known
    layout: Layout | None
    filters: tuple[str, ...]  # the names of `FILTERS` that apply


def load_source(source: Path, step: int | None = None) -> tuple[str, list[Inspected]]:
    """Where the groups of a file, or of one step (None: the last) of a run, come from, and the groups.

    `source` is a `.jsonl` file of scored groups, a `.parquet` file of TRL's completions, or the folder of a run: its
    `groups` (images and all), else its `completions`.
    """
    if source.is_dir():
        return _from_run(source, step)
    if not source.is_file():
        raise ConfigurationError(f"{source} is neither a file nor a folder; give scored groups or the folder of a run")
    if source.suffix == ".parquet":
        return source.name, list(_read_table(source))
    return source.name, [(scored, None) for scored in read_scored(source)]


def score_file(path: Path, scorer: Scorer) -> list[Inspected]:
    """Read groups that have no scores and score them."""
    groups = read_groups(path, lambda group, _: group, expected="a .jsonl file with one group per line")
    results = scorer.score_detailed(groups)
    return [(ScoredGroup(group=group, result=one), None) for group, one in zip(groups, results, strict=True)]


def _from_run(folder: Path, step: int | None) -> tuple[str, list[Inspected]]:
    steps: dict[int, list[Path]] = {}
    for place, name in (("groups", _STEP_FILE), ("completions", _TABLE_FILE)):
        for path in sorted((folder / place).glob("*")) if not steps else ():
            if match := name.fullmatch(path.name):
                steps.setdefault(int(match[1]), []).append(path)
    if not steps:
        raise ConfigurationError(
            f"{folder} holds neither groups/step_*.jsonl nor completions/*.parquet; train with log_groups_steps: 20 "
            "or log_completions: true"
        )
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise ConfigurationError(f"{folder} has no step {chosen}; it has {', '.join(map(str, sorted(steps)))}")
    return f"{folder.name}, step {chosen}", [one for path in steps[chosen] for one in load_source(path)[1]]


def _read_table(path: Path) -> Iterator[Inspected]:
    """TRL's table has a row for each completion, and no images."""
    table = pyarrow.parquet.read_table(path)
    missing = [name for name in (_GROUP, "prompt", "completion", "mr_reward_score") if name not in table.column_names]
    if missing:
        raise GroupError(
            f"{path}: lacks {', '.join(missing)}; it was not written by a run with MultiResponseReward of this version"
        )
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    batch, last = 0, -1
    for row in table.to_pylist():  # a table may hold several batches, and their groups are numbered from 0 on each
        batch += row[_GROUP] < last
        last = row[_GROUP]
        groups.setdefault((batch, last), []).append(row)
    for (_, index), rows in groups.items():
        scores = tuple(row["mr_reward_score"] for row in rows)
        dropped = any(score is None or score != score for score in scores)
        group = ResponseGroup(
            prompt=_without_images(rows[0]["prompt"]),
            responses=[row["completion"] for row in rows],
            id=f"group {index}",
        )
        result = GroupScores(
            scores=None if dropped else scores,
            truncated=tuple(row["mr_reward_truncated"] for row in rows),
            drop_reason="no reward" if dropped else None,
        )
        rewards, advantages = (
            tuple(row[name] for row in rows) if name in rows[0] else None for name in (_REWARD, _ADVANTAGE)
        )
        yield ScoredGroup(group=group, result=result, rewards=rewards, step=rows[0]["step"]), advantages


def _without_images(prompt: Any) -> Any:
    """The table keeps the place of an image, not the image."""
    if isinstance(prompt, str):
        return prompt
    turns = []
    for turn in prompt:
        content = turn["content"]
        if not isinstance(content, str):
            content = "".join(f"[{block['type']}]" if block["type"] != "text" else block["text"] for block in content)
        turns.append({"role": turn["role"], "content": content})
    return turns


def make_view(scored: ScoredGroup, advantages: Sequence[float] | None, lengths: Lengths | None) -> GroupView:
    """Prepare a group for a page.

    `advantages` are those that the trainer logged; None computes them from the rewards, or from the scores. Without
    `lengths` characters are counted.
    """
    group, result = scored.group, scored.result
    scores = result.scores
    note = "as the trainer logged it" if advantages is not None else "from this reward alone, scaled by the group"
    if advantages is None:
        advantages = _advantages(scored.rewards if scored.rewards is not None else scores)
    counts = lengths.responses if lengths is not None else tuple(len(text) for text in group.responses)
    ranks = None if scores is None else dense_ranks([-score for score in scores])
    low, high = (min(scores), max(scores)) if scores else (0.0, 0.0)
    views = []
    for i, text in enumerate(group.responses):
        flags = [flag for flag, holds in (("cut off", result.truncated[i]), ("empty", not text.strip())) if holds]
        if text in group.responses[:i]:
            flags.append(f"same as {group.responses.index(text) + 1}")
        score = None if scores is None else scores[i]
        views.append(
            ResponseView(
                slot=i + 1,
                text=visible_text(text),
                score=score,
                rank=None if ranks is None else ranks[i],
                share=1.0 if high == low or score is None else (score - low) / (high - low),
                advantage=None if advantages is None else advantages[i],
                length=counts[i],
                flags=tuple(flags),
                true_rank=None if group.rankings is None else group.rankings[i],
            )
        )
    correlation = _correlation(scores, counts)
    holds = {
        "zero-spread": scores is not None and len(scores) > 1 and low == high,
        "dropped": scores is None,
        "truncated": any(result.truncated),
        "suspicious": correlation is not None and abs(correlation) >= _SUSPICIOUS and len(set(counts)) >= _MIN_LENGTHS,
        "duplicates": len(set(group.responses)) < group.num_responses,
    }
    layout = None if lengths is None else lengths.layout
    return GroupView(
        name=visible_text(group.id or "group"),
        turns=_turns(scored),
        responses=tuple(sorted(views, key=lambda view: (-(view.score or 0.0), view.slot))),
        spread=None if scores is None else (statistics.stdev(scores) if len(scores) > 1 else 0.0),
        correlation=correlation,
        result=result,
        advantage_note=note,
        unit="characters" if lengths is None else "tokens",
        prompt_length=None if lengths is None else lengths.prompt,
        matrix=None if layout is None else Matrix.of(layout, group.num_responses),
        layout=layout,
        filters=tuple(name for name in FILTERS if holds[name]),
    )


def visible_text(text: str) -> str:
    """Text that hides nothing: control, zero-width and direction characters and lone surrogates by number."""
    return _CONTROLS.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def _advantages(rewards: Sequence[float | None] | None) -> list[float] | None:
    """(r - mean) / (std + eps), as GRPO with `scale_rewards="group"`."""
    if rewards is None or any(reward is None for reward in rewards):
        return None
    values = [reward for reward in rewards if reward is not None]
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return [(value - mean) / (spread + _EPSILON) for value in values]


def _correlation(scores: Sequence[float] | None, lengths: Sequence[int]) -> float | None:
    if scores is None or min(scores) == max(scores) or min(lengths) == max(lengths):
        return None
    return statistics.correlation(scores, lengths)


def _turns(scored: ScoredGroup) -> tuple[tuple[str, tuple[dict[str, str], ...]], ...]:
    images, videos = iter(scored.group.images), iter(scored.group.videos)
    turns = []
    for message in scored.group.messages:
        pieces: list[dict[str, str]] = []
        for block in message["content"]:
            if block["type"] == "text":
                pieces.append({"text": visible_text(block["text"])})
            elif block["type"] == "image":
                pieces.append(_embedded(next(images), "image"))
            else:
                frames = next(videos)
                pieces += [_embedded(frame, f"frame {i} of {len(frames)}") for i, frame in enumerate(frames, start=1)]
        turns.append((visible_text(message["role"]), tuple(pieces)))
    return tuple(turns)


def _embedded(medium: Any, name: str) -> dict[str, str]:
    image = load_image(medium).convert("RGB")
    caption = f"{name}, {image.width} x {image.height}"
    if max(image.size) > _MAX_PIXELS:
        image.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
        caption += f", shown at {image.width} x {image.height}"
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return {"uri": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), "caption": caption}
