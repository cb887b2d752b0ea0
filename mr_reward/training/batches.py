"""From ranked groups to batches: checked once, then mixed, subsampled, augmented and shuffled by index; and back.

Everything random about an item follows from (seed, epoch, index), never from a global generator, so that a resumed run
sees the same items whatever was prefetched when it was cut off.

Legend: N responses.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from mr_reward.data.degenerate import MASTER_KEYS, with_degenerate_negative
from mr_reward.errors import ConfigurationError, GroupError, OverLengthError
from mr_reward.groups import ResponseGroup, dense_ranks, undo_order
from mr_reward.metrics import ranking_metrics
from mr_reward.model.rows import Packer, Rows, collate
from mr_reward.templates.rendering import Renderer

logger = logging.getLogger(__name__)

# Groups that can be trained on, each with the tokens of its row: of the longest one if responses are drawn or added.
CheckedGroups = list[tuple[ResponseGroup, int]]


def _without_repeats(group: ResponseGroup) -> ResponseGroup:
    """The group with each text once, or its pairs would count twice. Where its ranks differ, their mean decides."""
    places: dict[str, list[int]] = {}
    for i, text in enumerate(group.responses):
        places.setdefault(text, []).append(i)
    if len(places) == group.num_responses:
        return group
    ranks: Any = group.rankings
    once = group.select([own[0] for own in places.values()])
    means = [fmean(ranks[i] for i in own) for own in places.values()]
    return replace(once, prompt=once.messages, rankings=dense_ranks(means))


def _best_against_rest(group: ResponseGroup) -> ResponseGroup:
    """The group with rankings that say no more than which responses are best, all of them: 1, and 2 for the others."""
    ranks: Any = group.rankings
    return replace(group, prompt=group.messages, rankings=[1 + (rank > 1) for rank in ranks])


def check_groups(
    groups: Sequence[ResponseGroup],
    packer: Packer,
    name: str,
    *,
    training: bool = True,
    max_responses: int | None = None,
    degenerate_negatives: bool = False,
    same_text_once: bool = False,
    binary_labels: bool = False,
    show_progress: bool = True,
) -> CheckedGroups:
    """Read every group once before the first step: images open, rankings are there, rows fit.

    Training leaves out groups whose responses are all tied, which teach nothing; with `same_text_once` it takes a text
    that a group holds several times once, with `binary_labels` it knows no more than which responses are best. What is
    dropped or will be truncated is logged with its count; a prompt that fills the row by itself drops the group under
    `truncate_responses` too.
    """
    kept: CheckedGroups = []
    num_truncated = num_tied = num_dropped = num_repeats = 0
    for group in tqdm(groups, desc=f"checking {name} groups", disable=not show_progress):
        if group.rankings is None or group.num_responses < 2:
            raise GroupError(
                f"{group.name}: {group.num_responses} responses and rankings {group.rankings}, training needs at "
                "least 2 ranked responses; remove the group or rank it"
            )
        if training:
            once = _without_repeats(group) if same_text_once else group
            num_repeats += group.num_responses - once.num_responses
            group = _best_against_rest(once) if binary_labels else once
            if len(set(group.rankings or ())) == 1:
                num_tied += 1
                continue
        longest = _longest(group, packer.renderer, max_responses, degenerate_negatives)
        try:
            row = packer.pack(longest)
        except OverLengthError:
            if packer.over_length == "error":
                raise
            row = None  # the prompt alone is too long, there is no response to cut
        if row is None:
            num_dropped += 1
            continue
        kept.append((group, row.num_tokens))
        num_truncated += sum(row.truncated[0])
    if num_repeats:
        logger.warning("%s: left out %d responses, a group holds the same text before them", name, num_repeats)
    if num_tied:
        logger.warning("%s: dropped %d of %d groups, all their responses are tied", name, num_tied, len(groups))
    if num_dropped or num_truncated:
        logger.warning(
            "%s: dropped %d of %d groups and truncated %d responses, rows are limited to %d tokens",
            name,
            num_dropped,
            len(groups),
            num_truncated,
            packer.max_tokens,
        )
    if not kept:
        raise GroupError(
            f"{name}: no group is left of {len(groups)} ({num_tied} all tied, {num_dropped} too long); "
            "raise max_tokens or give more data"
        )
    return kept


class TrainingGroups(Dataset):
    """The groups of one or several sources, in a new order of the responses at every draw.

    With weights, source k takes up the share `weights[k]` of an epoch, whose length is such that no source is cut
    short: the others are repeated, each time with other orders and subsets.
    """

    def __init__(
        self,
        sources: Sequence[CheckedGroups],
        *,
        weights: Sequence[float] | None = None,
        max_responses: int | None = None,
        degenerate_negatives: float = 0.0,
        seed: int = 0,
    ) -> None:
        problems = []
        if weights is not None and (len(weights) != len(sources) or min(weights) <= 0):
            given = f"got mixture weights {list(weights)} for {len(sources)} data sets"
            problems.append(f"{given}, expected one positive weight each")
        if max_responses is not None and max_responses < 2:
            problems.append(f"got max_responses={max_responses}, expected at least 2: a row compares")
        if not 0.0 <= degenerate_negatives <= 1.0:
            given = f"got degenerate_negatives={degenerate_negatives}"
            problems.append(f"{given}, expected a probability from 0 to 1")
        if problems:
            raise ConfigurationError("; ".join(problems))
        counts = sizes = [len(source) for source in sources]
        if weights is not None:
            per_weight = max(size / weight for size, weight in zip(sizes, weights, strict=True))
            counts = [round(per_weight * weight) for weight in weights]
        self.counts = counts  # of each source, in an epoch
        self._items = [
            source[i % len(source)] for source, count in zip(sources, counts, strict=True) for i in range(count)
        ]
        self.max_responses = max_responses
        self.degenerate_negatives = degenerate_negatives
        self.seed = seed
        self.epoch = 0

    @property
    def num_tokens(self) -> list[int]:
        """The longest row of each item, in tokens."""
        return [tokens for _, tokens in self._items]

    def set_epoch(self, epoch: int) -> None:
        """Draw other orders, subsets and negatives; accelerate's data loader calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> ResponseGroup:
        group, _ = self._items[index]
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        group = group.select(_draw(group, self.max_responses, rng))
        if rng.random() < self.degenerate_negatives:
            group = with_degenerate_negative(group, rng)
            group = group.select(rng.sample(range(group.num_responses), group.num_responses))
        return group


class EvaluationGroups(Dataset):
    """Every group in its own order and, if asked for, once more in a fixed random one."""

    def __init__(self, groups: Sequence[ResponseGroup], *, num_orders: int = 2, seed: int = 0) -> None:
        if num_orders not in (1, 2):
            raise ConfigurationError(f"got eval_orders={num_orders}, expected 1, or 2 to measure flips")
        self.groups = list(groups)
        self.orders = [list(range(group.num_responses)) for group in groups]
        if num_orders == 2:
            rng = random.Random(seed)
            self.orders += [rng.sample(order, len(order)) for order in self.orders]

    def __len__(self) -> int:
        return len(self.orders)

    def __getitem__(self, index: int) -> ResponseGroup:
        return self.groups[index % len(self.groups)].select(self.orders[index])


class GroupCollator:
    """Packs B ranked groups into `rows` for the model and `rankings` (B, N) int64, 0 in empty slots."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer

    def __call__(self, groups: Sequence[ResponseGroup]) -> dict[str, Tensor | Rows]:
        """Make one batch; groups that the packer drops are left out."""
        # A dropped group leaves with its rankings, or the labels of the following ones would shift.
        kept = [(group, row) for group in groups if (row := self.packer.pack(group)) is not None]
        if not kept:
            raise OverLengthError(
                f"all {len(groups)} groups of a batch were dropped, rows are limited to {self.packer.max_tokens} "
                "tokens; raise max_tokens, or take out such groups with check_groups first"
            )
        rows = collate([row for _, row in kept], self.packer.renderer.adapter)
        rankings = torch.zeros_like(rows.response_mask, dtype=torch.long)
        for i, (group, _) in enumerate(kept):
            rankings[i, : group.num_responses] = torch.tensor(group.rankings)
        return {"rankings": rankings, "rows": rows}


def evaluation_metrics(data: EvaluationGroups, predictions: Any) -> dict[str, float]:
    """`ranking_metrics` of the groups in their own order and, where there are two orders, `order_flip_rate`.

    `predictions`: (items, N) scores in the order of `data`; slots beyond an item's responses hold anything.
    """
    rows = np.asarray(predictions, dtype=np.float64)
    scores = [undo_order(row.tolist(), order) for row, order in zip(rows, data.orders, strict=True)]
    count = len(data.groups)
    return ranking_metrics(
        scores[:count],
        [group.rankings or () for group in data.groups],
        lengths=[[len(response) for response in group.responses] for group in data.groups],
        reordered=scores[count:] or None,
    )


def _longest(
    group: ResponseGroup, renderer: Renderer, max_responses: int | None, degenerate_negatives: bool
) -> ResponseGroup:
    """The longest row that `TrainingGroups` can make of a group."""
    if max_responses is None and not degenerate_negatives:
        return group

    def num_tokens(text: str) -> int:
        return len(renderer.encode_text(text))

    by_length = sorted(range(group.num_responses), key=lambda i: -num_tokens(group.responses[i]))
    longest = group.select(by_length[:max_responses])
    if not degenerate_negatives:
        return longest
    added = max([longest.responses[0], *MASTER_KEYS], key=num_tokens)
    return replace(longest, prompt=group.messages, responses=[*longest.responses, added], rankings=None)


def _draw(group: ResponseGroup, max_responses: int | None, rng: random.Random) -> list[int]:
    """Positions in a random order, at most `max_responses` of them, with at least two ranks."""
    ranks: Any = group.rankings
    everyone = range(group.num_responses)
    drawn = rng.sample(everyone, min(max_responses or len(everyone), len(everyone)))
    if len({ranks[i] for i in drawn}) == 1:
        drawn[-1] = rng.choice([i for i in everyone if ranks[i] != ranks[drawn[0]]])
        rng.shuffle(drawn)
    return drawn
