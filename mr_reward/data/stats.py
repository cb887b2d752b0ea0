"""What a set of ranked groups looks like: sizes, ties, lengths, media, and whether the order gives the answer away."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mr_reward.data.decontamination import normalised_prompt
from mr_reward.groups import ResponseGroup
from mr_reward.templates.images import DecodedImages

# A best response at one place more often than this many times the even share lets a model learn the place, if it is no
# chance: so many standard errors above it (counted as a Poisson variable, which has more spread than a share).
_LEAK_FACTOR = 1.2
_LEAK_ERRORS = 3.0
_LEAK_MIN_GROUPS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """Counts of one set of groups."""

    name: str
    num_groups: int
    sizes: dict[int, int]  # N -> groups of that size
    with_ties: int  # groups in which two responses share a rank
    tied_pairs: float  # share of the pairs of responses of a ranked group that share a rank
    all_tied: int  # groups without an ordered pair; they teach nothing
    unranked: int  # groups without rankings
    lengths: tuple[float, float, float]  # characters of a response: mean, median, 95th percentile
    best_length: float  # mean characters of the best responses
    other_length: float  # of the others
    # Share of the groups with an order in which the longest response (the first of equally long ones) is a best one:
    # what a judge of length would get.
    longest_is_best: float
    best_positions: dict[int, float]  # place -> how often a best response stands there, ties counted in parts
    expected_positions: dict[int, float]  # the same, were the places drawn evenly
    modalities: dict[str, int]  # text, image, video, or several joined by + -> groups
    repeated_prompts: int  # groups whose prompt, media included, occurred before

    @property
    def leaking_position(self) -> int | None:
        """The place that holds the best response far more often than chance, counted from 0; None if none does."""
        if self.num_groups < _LEAK_MIN_GROUPS:
            return None
        ratios = {
            place: self.best_positions.get(place, 0.0) / expected
            for place, expected in self.expected_positions.items()
            if self.best_positions.get(place, 0.0) - expected > _LEAK_ERRORS * math.sqrt(expected)
        }
        place = max(ratios, key=lambda key: ratios[key], default=None)
        return place if place is not None and ratios[place] > _LEAK_FACTOR else None


def group_stats(groups: Sequence[ResponseGroup], name: str = "all") -> GroupStats:
    """Count, for any groups, ranked or not."""
    ranked = [group for group in groups if group.rankings is not None]
    lengths = sorted(len(text) for group in groups for text in group.responses) or [0]
    best_lengths: list[int] = []
    other_lengths: list[int] = []
    longest_wins: list[bool] = []
    pairs = tied = 0
    positions: defaultdict[int, float] = defaultdict(float)
    expected: defaultdict[int, float] = defaultdict(float)
    for group in ranked:
        ranks = group.rankings or ()
        pairs += math.comb(len(ranks), 2)
        tied += sum(math.comb(count, 2) for count in Counter(ranks).values())
        best = [i for i, rank in enumerate(ranks) if rank == 1]
        for i, text in enumerate(group.responses):
            (best_lengths if i in best else other_lengths).append(len(text))
        if len(set(ranks)) > 1:
            own_lengths = [len(text) for text in group.responses]
            longest_wins.append(own_lengths.index(max(own_lengths)) in best)
            for i in range(len(ranks)):
                positions[i] += (i in best) / len(best)
                expected[i] += 1 / len(ranks)
    prompts = Counter(_prompt_key(group) for group in groups)
    return GroupStats(
        name=name,
        num_groups=len(groups),
        sizes=dict(sorted(Counter(group.num_responses for group in groups).items())),
        with_ties=sum(len(set(group.rankings or ())) < group.num_responses for group in ranked),
        tied_pairs=tied / pairs if pairs else 0.0,
        all_tied=sum(len(set(group.rankings or ())) == 1 and group.num_responses > 1 for group in ranked),
        unranked=len(groups) - len(ranked),
        lengths=(_mean(lengths), statistics.median(lengths), float(lengths[int(0.95 * (len(lengths) - 1))])),
        best_length=_mean(best_lengths),
        other_length=_mean(other_lengths),
        longest_is_best=_mean(longest_wins),
        best_positions=dict(sorted(positions.items())),
        expected_positions=dict(sorted(expected.items())),
        modalities=dict(Counter(_modality(group) for group in groups).most_common()),
        repeated_prompts=sum(count - 1 for count in prompts.values()),
    )


def stats_table(sets: Sequence[GroupStats]) -> Table:
    """One column for each set."""
    table = Table("", *(escape(entry.name) for entry in sets))
    rows = {
        "groups": lambda x: str(x.num_groups),
        "responses per group": lambda x: ", ".join(f"{n}: {count}" for n, count in x.sizes.items()),
        "modality": lambda x: ", ".join(f"{name}: {count}" for name, count in x.modalities.items()),
        "groups with ties": lambda x: _share(x.with_ties, x.num_groups),
        "pairs tied": lambda x: f"{x.tied_pairs:.1%}",
        "groups all tied": lambda x: _share(x.all_tied, x.num_groups),
        "groups without ranks": lambda x: _share(x.unranked, x.num_groups),
        "repeated prompts": lambda x: _share(x.repeated_prompts, x.num_groups),
        "characters: mean, median, p95": lambda x: ", ".join(f"{value:.0f}" for value in x.lengths),
        "characters: best, others": lambda x: f"{x.best_length:.0f}, {x.other_length:.0f}",
        "longest response is best": lambda x: f"{x.longest_is_best:.1%}",
        "best response at place": lambda x: ", ".join(
            f"{i + 1}: {count / max(sum(x.best_positions.values()), 1):.0%}" for i, count in x.best_positions.items()
        ),
        "order gives it away": lambda x: (
            "no" if x.leaking_position is None else f"[red]yes, place {x.leaking_position + 1}; shuffle[/red]"
        ),
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(entry) for entry in sets))
    return table


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _share(count: int, total: int) -> str:
    return f"{count} ({count / max(total, 1):.1%})"


def _prompt_key(group: ResponseGroup) -> tuple[str, ...]:
    media = [*group.images, *(frame for video in group.videos for frame in video)]
    return normalised_prompt(group), *map(_media_key, media)


def _media_key(medium: Any) -> str:
    """Files by their path: `save_preferences` names them by content. In memory, by content."""
    if isinstance(medium, (str, Path)):
        return str(medium)
    if isinstance(medium, (bytes, bytearray)):
        return sha256(medium).hexdigest()
    return DecodedImages().digest(medium)


def _modality(group: ResponseGroup) -> str:
    kinds = [name for name, media in (("image", group.images), ("video", group.videos)) if media]
    return "+".join(kinds) or "text"
