"""Where the groups to look at come from: scored groups, TRL's completions table, the folder of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from mr_reward.data.groups_file import ScoredGroup, read_groups, read_scored
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import GroupScores, ResponseGroup, Scorer
from mr_reward.grpo.groups import completion_text

__all__ = ["Inspected", "load_source", "score_file"]

_STEP_FILE = re.compile(r"(eval_)?step_(\d+)\.rank\d+\.jsonl")
_TABLE_FILE = re.compile(r"completions_(\d+)\.parquet")
_REWARD, _GROUP, _ADVANTAGE = "multi_response_reward", "mr_reward_group", "advantage"
Inspected = tuple[ScoredGroup, tuple[float, ...] | None]  # and the trainer's own advantages, if it logged them


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
    found: dict[int, list[Path]] = {}
    for path in sorted((folder / "groups").glob("*.jsonl")):
        match = _STEP_FILE.fullmatch(path.name)
        if match and not match[1]:
            found.setdefault(int(match[2]), []).append(path)
    tables = {}
    for path in sorted((folder / "completions").glob("*.parquet")):
        if match := _TABLE_FILE.fullmatch(path.name):
            tables[int(match[1])] = [path]
    steps = found or tables
    if not steps:
        raise ConfigurationError(
            f"{folder} holds neither groups/step_*.jsonl nor completions/*.parquet; train with log_groups_steps: 20 "
            "or log_completions: true"
        )
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise ConfigurationError(f"{folder} has no step {chosen}; it has {', '.join(map(str, sorted(steps)))}")
    inspected: list[Inspected] = []
    for path in steps[chosen]:
        inspected += load_source(path)[1]
    return f"{folder.name}, step {chosen}", inspected


def _read_table(path: Path) -> Iterator[Inspected]:
    """TRL's table has a row for each completion, and no images."""
    columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    missing = [name for name in (_GROUP, "prompt", "completion", "mr_reward_score") if name not in columns]
    if missing:
        raise GroupError(
            f"{path}: lacks {', '.join(missing)}; it was not written by a run with MultiResponseReward of this version"
        )
    rows = range(len(columns[_GROUP]))
    groups: dict[tuple[int, int], list[int]] = {}
    batch = -1
    for row in rows:  # a table may hold several batches, and their groups are numbered from 0 on each
        if row and columns[_GROUP][row] < columns[_GROUP][row - 1]:
            batch += 1
        groups.setdefault((batch, columns[_GROUP][row]), []).append(row)
    for (_, index), members in groups.items():
        scores = [columns["mr_reward_score"][row] for row in members]
        dropped = any(score is None or score != score for score in scores)
        advantages = tuple(columns[_ADVANTAGE][row] for row in members) if _ADVANTAGE in columns else None
        rewards = tuple(columns[_REWARD][row] for row in members) if _REWARD in columns else None
        yield (
            ScoredGroup(
                group=ResponseGroup(
                    prompt=_without_images(columns["prompt"][members[0]]),
                    responses=[completion_text(columns["completion"][row]) for row in members],
                    id=f"group {index}",
                ),
                result=GroupScores(
                    scores=None if dropped else tuple(scores),
                    truncated=tuple(columns["mr_reward_truncated"][row] for row in members),
                    drop_reason="no reward" if dropped else None,
                ),
                rewards=rewards,
                step=columns["step"][members[0]],
            ),
            advantages,
        )


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
