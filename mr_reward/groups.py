"""The two records of the package: `ResponseGroup`, a prompt with N responses, and `GroupScores`, what scoring it gave.

Files, benchmarks and trainers are read as groups; a `Scorer` turns groups into scores, here, elsewhere or over HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, Protocol, TypeVar

from mr_reward.errors import GroupError, MediaError, MRRewardError, OverLengthError, shown
from mr_reward.messages.completions import completion_text
from mr_reward.messages.prompts import MEDIA_TYPES, Message, match_media, normalise_messages, plain_json

__all__ = ["GroupScores", "ResponseGroup", "Scorer", "dense_ranks", "undo_order"]

T = TypeVar("T")


def dense_ranks(values: Sequence[float]) -> tuple[int, ...]:
    """N ranks of N numbers: the smallest has rank 1, equal ones share a rank, no gaps.

    Example:
        >>> dense_ranks([3.0, 1.0, 3.0])
        (2, 1, 2)
    """
    ranks = {value: rank for rank, value in enumerate(sorted(set(values)), start=1)}
    return tuple(ranks[value] for value in values)


def undo_order(values: Sequence[T], order: Sequence[int]) -> list[T]:
    """Put what was found slot by slot back into the group's own order; the inverse of `ResponseGroup.select(order)`.

    `order[slot]` is the response that stood in that slot; values behind the last slot (padding) are left out.

    Example:
        >>> undo_order(["b", "c", "a"], [1, 2, 0])
        ['a', 'b', 'c']
    """
    slots = sorted(range(len(order)), key=order.__getitem__)
    return [values[slot] for slot in slots]


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseGroup:
    """One prompt with its media and N candidate responses, ranked or not.

    Args:
        prompt: a string, or chat messages (`{"role": ..., "content": str | list of blocks}`). A block is
            `{"type": "text", "text": ...}`, `{"type": "image"}` or `{"type": "video"}`; a media block may carry its
            medium under the key of its type, an image also as `image_url`, `path`, `url` or `base64`. A message may
            have `tool_calls`, beside which the content may be None, `tool_call_id` and `reasoning_content`, and a
            tool's turn a `name`, for the backbone's chat template; other keys are ignored. If the last turn is the
            assistant's, the responses continue it.
        responses: N >= 1 response texts, or completions as TRL has them (lists of chat messages). The empty text is a
            response. A completion with tool calls or results becomes a text that has its turns besides
            (`mr_reward.messages.completions.Transcript`), which the backbone's chat template renders.
        images: what `mr_reward.templates.load_image` takes (PIL images, paths, bytes, arrays), in the order of the
            prompt's image placeholders. In a prompt without placeholder blocks each `<image>` of its text is one;
            without those, the images stand at the start of its first user turn (as in TRL). Without images `<image>`
            is text.
        videos: the same for videos; a video is a sequence of frames (PIL images, paths or bytes), one frame a second.
        rankings: N ranks, 1 = best, ties share a rank; dense (1, 2, 2, 3) or competition (1, 2, 2, 4) counting.
        id: a name for messages and logs.
        source: the data set it came from, for reports by source.
        tools: JSON schemas of the tools that the prompt's chat template is to name.
        ratings: N numbers that the source gave the responses, larger is better, as the strength of its preference;
            None where it only ranks. Training goes by the rankings; without these the ratings are dropped.

    Raises:
        GroupError: no responses, wrong types, mismatched lengths, rankings that are not ranks.
        MediaError: the number of media differs from the number of placeholders.

    Example:
        >>> group = ResponseGroup(prompt="2 + 2?", responses=["4", "5"], rankings=[1, 2])
        >>> group.num_responses
        2
    """

    prompt: str | Sequence[Mapping[str, Any]]
    responses: Sequence[str]
    images: Sequence[Any] = ()
    videos: Sequence[Sequence[Any]] = ()
    rankings: Sequence[int] | None = None
    id: str | None = None
    source: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    ratings: Sequence[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "responses", self._checked_responses())
        object.__setattr__(self, "tools", self._checked_tools())
        messages, embedded = normalise_messages(self.prompt, self.name)
        media = {}
        for kind, given in (("image", self.images), ("video", self.videos)):
            if given is not None and (isinstance(given, (str, bytes)) or not isinstance(given, Sequence)):
                raise MediaError(
                    f"{self.name}: {kind}s is {type(given).__name__}, expected a list; wrap a single {kind} in a list"
                )
            media[kind] = match_media(messages, kind, given or (), embedded[kind], self.name)
        object.__setattr__(self, "images", media["image"])
        object.__setattr__(self, "videos", media["video"])
        object.__setattr__(self, "_messages", messages)
        if any(embedded.values()):  # they stand in images and videos now, where `dataclasses.replace` finds them
            object.__setattr__(self, "prompt", messages)
        if self.rankings is not None:
            object.__setattr__(self, "rankings", self._checked_rankings())
        object.__setattr__(self, "ratings", self._checked_ratings())

    @property
    def name(self) -> str:
        """The id, quoted, or a stand-in, for error messages."""
        return f"group {self.id!r}" if self.id is not None else "group (no id)"

    @property
    def num_responses(self) -> int:
        """N."""
        return len(self.responses)

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages whose content is always a list of blocks; media blocks carry no media."""
        return self._messages  # type: ignore[attr-defined]  # set in __post_init__

    def select(self, indices: Sequence[int]) -> ResponseGroup:
        """The same prompt with the responses at `indices`, in that order, re-ranked densely; fewer may be chosen."""
        rankings = None if self.rankings is None else dense_ranks([self.rankings[i] for i in indices])
        return replace(
            self,
            prompt=self.messages,
            responses=[self.responses[i] for i in indices],
            rankings=rankings,
            ratings=None if self.ratings is None else [self.ratings[i] for i in indices],
        )

    def _checked_responses(self) -> tuple[str, ...]:
        if isinstance(self.responses, str) or not isinstance(self.responses, Sequence):
            raise GroupError(
                f"{self.name}: responses is {type(self.responses).__name__}, expected a list of N strings; "
                "wrap a single response in a list"
            )
        if not self.responses:
            raise GroupError(f"{self.name}: got 0 responses, expected at least 1; drop the group before scoring it")
        for i, response in enumerate(self.responses):
            messages = isinstance(response, list | tuple) and all(isinstance(turn, Mapping) for turn in response)
            if not (isinstance(response, str) or messages):
                raise GroupError(
                    f"{self.name}: response {i} is {type(response).__name__}, expected str; "
                    "pass the text of the completion, or its list of chat messages"
                )
        return tuple(
            completion_text(response, name=f"{self.name}: response {i}") for i, response in enumerate(self.responses)
        )

    def _checked_tools(self) -> tuple[dict[str, Any], ...]:
        tools = () if self.tools is None else self.tools
        if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
            raise GroupError(
                f"{self.name}: tools is {shown(tools, 80)}, expected a list of JSON schemas, one dict a tool"
            )
        return tuple(plain_json([dict(tool) for tool in tools], f"{self.name}: tools"))

    def _checked_ratings(self) -> tuple[float, ...] | None:
        if self.ratings is None or self.rankings is None:
            return None
        numbers = isinstance(self.ratings, Sequence) and all(
            isinstance(one, Real) and not isinstance(one, bool) and math.isfinite(one) for one in self.ratings
        )
        if not numbers or len(self.ratings) != self.num_responses:
            raise GroupError(
                f"{self.name}: ratings is {shown(self.ratings, 80)}, expected a number for each of the "
                f"{self.num_responses} responses"
            )
        return tuple(map(float, self.ratings))

    def _checked_rankings(self) -> tuple[int, ...]:
        if isinstance(self.rankings, Mapping) or not isinstance(self.rankings, Iterable):
            raise GroupError(
                f"{self.name}: rankings is {type(self.rankings).__name__}, expected a list, a rank for each response"
            )
        ranks = tuple(self.rankings)
        if len(ranks) != self.num_responses:
            raise GroupError(
                f"{self.name}: got {len(ranks)} rankings for {self.num_responses} responses, expected one each"
            )
        # NaN and infinity leave NaN; numpy's numbers are Real, its bool is not.
        if not all(isinstance(rank, Real) and not isinstance(rank, bool) and rank % 1 == 0 for rank in ranks):
            raise GroupError(f"{self.name}: rankings {list(ranks)} are not whole numbers; 1 = best, ties share a rank")
        dense = dense_ranks(ranks)
        competition = tuple(1 + sum(other < rank for other in ranks) for rank in ranks)
        if ranks not in (dense, competition):
            raise GroupError(
                f"{self.name}: {list(ranks)} are not ranks, expected 1 = best without gaps, here {list(dense)} or "
                f"{list(competition)}; turn scores into ranks with mr_reward.groups.dense_ranks (smallest is best)"
            )
        return tuple(int(rank) for rank in ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScores:
    """What scoring one group gave: from the scorer to the server, the log, the viewer and JSON Lines.

    Example:
        >>> GroupScores(scores=(1.7, -0.9), truncated=(False, False)).to_dict()["scores"]
        [1.7, -0.9]
    """

    scores: tuple[float, ...] | None  # N, in input order; None if the group was dropped
    truncated: tuple[bool, ...]  # N, True where the end of the response was cut off
    order_spread: float = 0.0  # standard deviation of a response's score over the K orders, averaged; 0 for K = 1
    # Share of the further orders under which another response wins than under the first, see
    # `mr_reward.metrics.order_flip_rate`; 0 where the layout has no order, None where not measured (K = 1).
    order_flip_rate: float | None = None
    drop_reason: str | None = None  # why the group was dropped

    def undo_order(self, order: Sequence[int]) -> GroupScores:
        """The result of a group, from that of `group.select(order)`."""
        scores = None if self.scores is None else tuple(undo_order(self.scores, order))
        return replace(self, scores=scores, truncated=tuple(undo_order(self.truncated, order)))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `from_dict` reads them."""
        scores = None if self.scores is None else list(self.scores)
        return {**asdict(self), "scores": scores, "truncated": list(self.truncated)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], group: ResponseGroup) -> GroupScores:
        """The result of `group` from what `to_dict` gave; other keys are ignored, all but `scores` may be missing."""
        if "scores" not in row:
            raise GroupError(f"{group.name}: has no scores; give a file that `mr-reward score` has written")
        truncated = row.get("truncated")
        return cls(
            scores=_one_each(row["scores"], "scores", (int, float), group),
            truncated=_one_each(truncated, "truncated", (bool,), group) or (False,) * group.num_responses,
            order_spread=row.get("order_spread") or 0.0,
            order_flip_rate=row.get("order_flip_rate"),
            drop_reason=row.get("drop_reason"),
        )


class Scorer(Protocol):
    """What scores groups, here or elsewhere: `GroupScorer`, `OffloadedScorer`, `RemoteScorer`."""

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """One result for each group, in input order."""


def as_groups(
    given: ResponseGroup | Mapping[str, Any] | Sequence[ResponseGroup | Mapping[str, Any]],
) -> Sequence[ResponseGroup]:
    """Groups from what a user has at hand: groups or dicts of their fields, several or one.

    Example:
        >>> [group.id for group in as_groups({"prompt": "2 + 2?", "responses": ["4", "5"]})]
        ['row 0']
    """
    several = [given] if isinstance(given, (ResponseGroup, Mapping)) else given
    if isinstance(several, (str, bytes)) or not isinstance(several, Sequence):
        raise GroupError(f"got {type(given).__name__}, expected groups: a list of ResponseGroup, or of dicts, or one")
    return [one if isinstance(one, ResponseGroup) else _from_dict(one, f"row {i}") for i, one in enumerate(several)]


def _from_dict(row: object, name: str) -> ResponseGroup:
    """A group from its fields; `image` and `video` stand for one. A key that would not be read is refused."""
    known = [each.name for each in fields(ResponseGroup)]
    if not isinstance(row, Mapping):
        raise GroupError(
            f"{name} is {type(row).__name__}, expected a ResponseGroup or a dict with prompt and responses"
        )
    given = {key: value for key, value in row.items() if value is not None}
    for kind in MEDIA_TYPES:
        if kind in given:
            if f"{kind}s" in given:
                raise GroupError(f"{name}: {kind} and {kind}s are both given; keep one of them")
            given[f"{kind}s"] = [given.pop(kind)]
    unknown = sorted(map(str, given.keys() - known))
    missing = [key for key in ("prompt", "responses") if key not in given]
    if unknown or missing:
        told = [f"{word} {', '.join(keys)}" for word, keys in (("lacks", missing), ("has", unknown)) if keys]
        raise GroupError(f"{name} {' and '.join(told)}, expected prompt, responses and any of {', '.join(known[2:])}")
    return ResponseGroup(**{"id": name, **given})


def score_each(scorer: Scorer, groups: Sequence[ResponseGroup]) -> list[GroupScores | MRRewardError]:
    """As `score_detailed`, with the error of a bad group in its place; what is no group's fault is raised.

    The halves around a bad group are scored again, so a call with none costs nothing.
    """
    if not groups:
        return []
    try:
        return [*scorer.score_detailed(groups)]
    except (GroupError, MediaError, OverLengthError) as error:
        if len(groups) == 1:
            return [error]
        half = len(groups) // 2
        return score_each(scorer, groups[:half]) + score_each(scorer, groups[half:])


def _one_each(values: Any, name: str, kinds: tuple[type, ...], group: ResponseGroup) -> tuple[Any, ...] | None:
    """A list with a value of these kinds for each response; None stays None."""
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, kinds) for value in values):
        raise GroupError(f"{group.name}: {name} is {values!r:.80}, expected a list with a value for each response")
    if len(values) != group.num_responses:
        raise GroupError(
            f"{group.name}: got {len(values)} {name} for {group.num_responses} responses, expected one each"
        )
    return tuple(values)
