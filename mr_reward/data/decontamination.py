"""Remove the training groups that share ids, prompts, media or responses with benchmarks.

The paper's mixture holds the sources of two of its benchmarks: VL-RewardBench was built from POVID, RLAIF-V,
WildVision and VLFeedback, and MM-RLHF-RewardBench shares ids and media with MM-RLHF.

A training group is removed if one of these matches an item of a benchmark:

- `id`: an id of a data set that VL-RewardBench quotes (`RLAIF-V-12`), or a path of MM-RLHF's media (`mcq/073712.png`);
- `image`: the same picture, see `matching`; `video`: the same for at least half of its frames (16 are looked at);
- `prompt`: the same text up to case and white space. Text alone says little where an image or video belongs to it
  ("Describe this image."), so that there it counts only if it is long (`MIN_PROMPT`) and no template (`STOCK_LIMIT`);
- `response`: the same text of more than `MIN_RESPONSE` characters, unless it is a stock phrase: "I'm sorry, but I
  can't help with that." is the answer to thousands of prompts and tells nothing about one.

`strict` drops the conditions on templates and stock phrases, and the length of prompts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from mr_reward.data.matching import Fingerprint, ImageIndex, fingerprint, normalised_text, prompt_text
from mr_reward.errors import MediaError
from mr_reward.groups import ResponseGroup

__all__ = ["Decontamination", "Item", "Removal", "decontaminate"]

MIN_RESPONSE = 40  # characters, normalised
MIN_PROMPT = 80
# Training prompts (of a response) or groups (of a prompt); what more of them share is no trace of one.
STOCK_LIMIT = 10
VIDEO_FRAMES = 16

_QUOTED_ID = re.compile(r"(?:rlaif-v|rlhf-v|hallucination_pair|wildvision-battle|lrvinstruction|svit|jailbreak)[-_].+")
_MM_RLHF_PATH = re.compile(r"(?:^|/)((?:mcq|long|short|safety|video)/\d{5,})(?=[./]|$)")


class Item(NamedTuple):
    """An item of a benchmark."""

    benchmark: str
    id: str  # its number if it has none


@dataclass(frozen=True, slots=True)
class Removal:
    """A training group that was removed."""

    group: ResponseGroup
    matches: list[tuple[Item, str]]  # sorted; the reason is `id`, `prompt`, `image`, `video` or `response`


@dataclass(frozen=True, slots=True)
class Decontamination:
    """What is left, in its order, and what was removed."""

    kept: list[ResponseGroup]
    removed: list[Removal]

    @property
    def counts(self) -> dict[tuple[str, str, str], int]:
        """(training source, benchmark, reason) -> removed groups, sorted; a group counts under each that it meets."""
        found = Counter(
            (removal.group.source or "unknown", benchmark, reason)
            for removal in self.removed
            for benchmark, reason in {(item.benchmark, reason) for item, reason in removal.matches}
        )
        return dict(sorted(found.items()))


class _Index:
    """Everything of the benchmarks that training groups are compared with."""

    def __init__(self, benchmarks: Mapping[str, Sequence[ResponseGroup]], show_progress: bool) -> None:
        self.ids: dict[str, set[Item]] = defaultdict(set)
        self.prompts: dict[bytes, dict[Item, bool]] = defaultdict(dict)  # whether the item has media
        self.responses: dict[bytes, set[Item]] = defaultdict(set)
        self.images = ImageIndex()
        self.frames = ImageIndex()
        for name, groups in benchmarks.items():
            for number, group in enumerate(tqdm(groups, desc=f"reading {name}", disable=not show_progress), start=1):
                self._add(group, Item(name, group.id if group.id is not None else str(number)))

    def _add(self, group: ResponseGroup, item: Item) -> None:
        for name in _ids(group):
            self.ids[name].add(item)
        self.prompts[_prompt_key(group)][item] = _has_media(group)
        for key in _response_keys(group):
            self.responses[key].add(item)
        for image in group.images:
            self.images.add(_fingerprint(image, group), item)
        for number, video in enumerate(group.videos):
            for frame in _sampled(video):
                self.frames.add(_fingerprint(frame, group), (item, number))


def decontaminate(
    groups: Sequence[ResponseGroup],
    benchmarks: Mapping[str, Sequence[ResponseGroup]],
    *,
    strict: bool = False,
    show_progress: bool = False,
) -> Decontamination:
    """Remove the training groups that meet a benchmark (name -> groups), by the rules at the head of this file."""
    index = _Index(benchmarks, show_progress)
    stock: frozenset[bytes] = frozenset() if strict else _stock_texts(groups, index)
    kept: list[ResponseGroup] = []
    removed: list[Removal] = []
    # Data sets show one picture in several groups; what it met, by path.
    seen: dict[str, set[Any]] = {}
    for group in tqdm(groups, desc="comparing", disable=not show_progress):
        found = {*_text_matches(group, index, stock, strict), *_media_matches(group, index, seen)}
        if found:
            removed.append(Removal(group, sorted(found)))
        else:
            kept.append(group)
    return Decontamination(kept, removed)


def _text_matches(
    group: ResponseGroup, index: _Index, stock: frozenset[bytes], strict: bool
) -> Iterator[tuple[Item, str]]:
    yield from ((item, "id") for key in _ids(group) for item in index.ids.get(key, ()))
    prompt = _prompt_key(group)
    distinctive = strict or (prompt not in stock and len(normalised_text(prompt_text(group))) >= MIN_PROMPT)
    for item, item_has_media in index.prompts.get(prompt, {}).items():
        if distinctive or not (item_has_media or _has_media(group)):
            yield item, "prompt"
    for key in _response_keys(group):
        if key not in stock:
            yield from ((item, "response") for item in index.responses.get(key, ()))


def _media_matches(group: ResponseGroup, index: _Index, seen: dict[str, set[Any]]) -> Iterator[tuple[Item, str]]:
    for image in group.images:
        yield from ((item, "image") for item in _find(image, index.images, group, seen))
    for video in group.videos:
        frames = _sampled(video)
        owners = Counter(owner for frame in frames for owner in _find(frame, index.frames, group, {}))
        yield from ((item, "video") for (item, _), count in owners.items() if 2 * count >= len(frames))


def _stock_texts(groups: Iterable[ResponseGroup], index: _Index) -> frozenset[bytes]:
    """Texts of the benchmarks that too many training groups hold, or too many items, to be a trace of one."""
    in_training: Counter[bytes] = Counter()
    prompts_of: dict[bytes, set[bytes]] = defaultdict(set)
    for group in groups:
        prompt = _prompt_key(group)
        if prompt in index.prompts:
            in_training[prompt] += 1
        for key in _response_keys(group):
            if key in index.responses:
                prompts_of[key].add(prompt)
    sizes = [(key, len(items)) for key, items in index.prompts.items()]
    sizes += [*in_training.items(), *((key, len(found)) for key, found in prompts_of.items())]
    return frozenset(key for key, size in sizes if size > STOCK_LIMIT)


def _ids(group: ResponseGroup) -> set[str]:
    """The names under which benchmarks and training data know the same row."""
    found = {group.id.lower()} if group.id is not None and _QUOTED_ID.fullmatch(group.id.lower()) else set()
    media = [*group.images, *(frame for video in group.videos for frame in video)]
    paths = [Path(medium).as_posix() for medium in media if isinstance(medium, (str, Path))]
    return found | {f"mm-rlhf {match[1]}" for path in paths if (match := _MM_RLHF_PATH.search(path))}


def _prompt_key(group: ResponseGroup) -> bytes:
    return _digest(f"prompt {normalised_text(prompt_text(group))}")


def _response_keys(group: ResponseGroup) -> set[bytes]:
    texts = {normalised_text(response) for response in group.responses}
    return {_digest(f"response {text}") for text in texts if len(text) > MIN_RESPONSE}


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()  # a response may hold a lone surrogate


def _has_media(group: ResponseGroup) -> bool:
    return bool(group.images or group.videos)


def _find(image: Any, index: ImageIndex, group: ResponseGroup, seen: dict[str, set[Any]]) -> set[Any]:
    if not isinstance(image, (str, Path)):
        return set(index.find(_fingerprint(image, group)))
    if str(image) not in seen:
        seen[str(image)] = set(index.find(_fingerprint(image, group)))
    return seen[str(image)]


def _fingerprint(image: Any, group: ResponseGroup) -> Fingerprint:
    try:
        return fingerprint(image)
    except MediaError as error:
        raise MediaError(f"{group.name}: {error}") from error


def _sampled(video: Sequence[Any]) -> list[Any]:
    """At most `VIDEO_FRAMES` frames, evenly spread."""
    count = min(len(video), VIDEO_FRAMES)
    return [video[i * len(video) // count] for i in range(count)]
