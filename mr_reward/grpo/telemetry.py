"""What a reward call leaves to look at: metrics, columns of the completions table, and its groups as files.

Every rank computes metrics and columns from the same gathered data, so all ranks log the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mr_reward.data.groups_file import ScoredGroup, write_scored
from mr_reward.errors import whole_number
from mr_reward.groups import GroupScores, dense_ranks
from mr_reward.grpo.groups import PlannedGroup
from mr_reward.metrics import right_above_wrong

COLUMN_KEYS = (
    "mr_reward_group",
    "mr_reward_score",
    "mr_reward_rank",
    "mr_reward_slot",
    "mr_reward_duplicate_of",
    "mr_reward_truncated",
)
RIGHT_ABOVE_WRONG = "mr_reward/right_above_wrong"


def measure(plan: Sequence[PlannedGroup], results: Sequence[GroupScores], seconds: float) -> dict[str, float]:
    """All metrics of one call, by their names in TRL's log.

    `score_mean` is over all scored responses, before any transform. `score_spread` is the mean within-group standard
    deviation (with Bessel's correction, as TRL's `reward_std`). `zero_spread_groups` is the share of scored groups
    whose scores are all equal: they teach GRPO nothing. `straddling_groups` is the share of groups spread over ranks.
    `dropped_groups` and `truncated_responses` are counts. `duplicate_responses` is the share of responses that
    repeat an earlier one of their group. `repeated_text` is the mean share of a response that it has said before, see
    `repeated_share`. `score_length_correlation` is the mean within-group Pearson correlation of score and length in
    characters, over the groups where both vary. `order_flip_rate` is the mean over the groups where it was measured: 0
    for layouts without an order, and for `causal` only with `num_orders` of 2 or more. `ms_per_group` is the scoring
    time in milliseconds of one group on the rank that owns it; `seconds` is summed over ranks.

    NaN where nothing is defined; TRL (1.16) leaves NaN out when it averages over the steps of a log, and logs None if
    there is nothing else.
    """
    scored = [(group, result.scores) for group, result in zip(plan, results, strict=True) if result.scores is not None]
    spreads = (statistics.stdev(scores) if len(scores) > 1 else 0.0 for _, scores in scored)
    duplicates = (1.0 - len(set(group.responses)) / len(group.responses) for group in plan)
    flips = (result.order_flip_rate for result in results if result.order_flip_rate is not None)
    return {
        "mr_reward/score_mean": _mean(score for _, scores in scored for score in scores),
        "mr_reward/score_spread": _mean(spreads),
        "mr_reward/zero_spread_groups": _mean(float(min(scores) == max(scores)) for _, scores in scored),
        "mr_reward/straddling_groups": _mean(float(group.straddles) for group in plan),
        "mr_reward/dropped_groups": float(len(plan) - len(scored)),
        "mr_reward/truncated_responses": float(sum(sum(result.truncated) for result in results)),
        "mr_reward/duplicate_responses": _mean(duplicates),
        "mr_reward/repeated_text": _mean(repeated_share(text) for group in plan for text in group.responses),
        "mr_reward/score_length_correlation": _mean(_length_correlations(scored)),
        "mr_reward/order_flip_rate": _mean(flips),
        "mr_reward/ms_per_group": 1000.0 * seconds / len(plan) if plan else math.nan,
    }


def win_rate(shares: Iterable[float]) -> dict[str, float]:
    """The metric of prompts that have a reference: the mean over groups of the share of responses that beat it."""
    return {"mr_reward/win_rate": _mean(shares)}


def agreement(results: Sequence[GroupScores], truths: Iterable[float | None]) -> dict[str, float]:
    """The metric of runs with a truth, which has a value for each row of the global batch, or None.

    The mean of `mr_reward.metrics.right_above_wrong` over the scored groups with right and wrong responses.
    """
    rows, shares = iter(truths), []
    for result in results:
        own = list(islice(rows, len(result.truncated)))
        known = [
            (score, truth)
            for score, truth in zip(result.scores or (), own, strict=result.scores is not None)
            if truth is not None and not math.isnan(truth)
        ]
        if known:
            shares.append(right_above_wrong(*zip(*known, strict=True)))
    return {RIGHT_ABOVE_WRONG: _mean(share for share in shares if not math.isnan(share))}


def describe_rows(plan: Sequence[PlannedGroup], results: Sequence[GroupScores]) -> dict[str, list[Any]]:
    """Columns of the completions table, `COLUMN_KEYS` -> a value for each row of the global batch.

    `mr_reward_group` is the number of the group in the global batch. `mr_reward_score` is the score before the
    transform, and `mr_reward_rank` its rank in the group (1 = best, ties share a rank); both are None in a dropped
    group. `mr_reward_slot` is the place of the response in the reward model's row: equal texts of a group are read
    once and share it. `mr_reward_duplicate_of` is the slot of an earlier response with the same text, -1 for none.
    `mr_reward_truncated` tells whether the response was cut before scoring.
    """
    columns: dict[str, list[Any]] = {key: [] for key in COLUMN_KEYS}
    for group, result in zip(plan, results, strict=True):
        texts, nothing = group.responses, [None] * len(group.responses)
        slots = {text: slot for slot, text in enumerate(dict.fromkeys(texts))}
        values = (
            [group.index] * len(texts),
            nothing if result.scores is None else result.scores,
            nothing if result.scores is None else dense_ranks([-score for score in result.scores]),
            [slots[text] for text in texts],
            [slots[text] if text in texts[:i] else -1 for i, text in enumerate(texts)],
            result.truncated,
        )
        for key, column in zip(COLUMN_KEYS, values, strict=True):
            columns[key].extend(column)
    return columns


def repeated_share(text: str, *, width: int = 8) -> float:
    """How much of a text repeats what it has said before: 1 - (different runs / runs), 0 if shorter than two runs.

    Counted over all runs of `width` characters, so it needs no words and no tokenizer. Ordinary prose of a few hundred
    characters has under 0.1, a sentence said four times about 0.75.
    """
    runs = len(text) - width + 1
    if len(text) < 2 * width:
        return 0.0
    return 1.0 - len({text[i : i + width] for i in range(runs)}) / runs


def _length_correlations(scored: Iterable[tuple[PlannedGroup, tuple[float, ...]]]) -> Iterable[float]:
    for group, scores in scored:
        lengths = [len(response) for response in group.responses]
        if min(lengths) != max(lengths) and min(scores) != max(scores):
            yield statistics.correlation(scores, lengths)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else math.nan


METRIC_KEYS = tuple(measure([], [], 0.0))


class GroupLog:
    """Writes the groups that a rank has scored to `step_00005.rank0.jsonl`, in an evaluation `eval_step_...`.

    Steps are numbered as in the trainer's log and in TRL's `completions_00005.parquet`: the first one is 1. Rollouts
    that serve several steps stand under the first of them. A file holds all groups of a step, whatever the number of
    reward calls, and appears when it is whole. A run that is resumed writes the files of the steps that it repeats
    again. Images lie beside a file, each once.

    Args:
        folder: where to write; `mr-reward inspect` looks for `groups` in the output folder of a run.
        every: write what serves a step that is a multiple of it; an evaluation is always written.

    Raises:
        ConfigurationError: `every` is no whole number from 1 on.

    Example:
        >>> reward = MultiResponseReward("rm", 8, group_log=GroupLog("out/groups", every=20))  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, *, every: int = 1) -> None:
        self.folder = Path(folder)
        self.every = whole_number(every, "every", "log each so many steps")
        self._path: Path | None = None
        self._groups: list[ScoredGroup] = []

    def write(
        self, groups: Sequence[ScoredGroup], *, step: int, rank: int, evaluating: bool, num_steps: int = 1
    ) -> None:
        """Write the groups that this rank has scored in a reward call, for `num_steps` optimizer steps from `step` on.

        In an evaluation `step` is the last step that was done.
        """
        if not groups or not (evaluating or any(each % self.every == 0 for each in range(step, step + num_steps))):
            return
        path = self.folder / f"{'eval_' if evaluating else ''}step_{step:05d}.rank{rank}.jsonl"
        if path != self._path:
            self._path, self._groups = path, []
        self._groups.extend(groups)
        write_scored(self._groups, path)
