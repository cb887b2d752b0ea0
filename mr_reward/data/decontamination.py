"""Remove the training groups that share ids, prompts, media or responses with benchmarks.

The paper's mixture holds the sources of two of its benchmarks: VL-RewardBench was built from POVID, RLAIF-V,
WildVision and VLFeedback, and MM-RLHF-RewardBench shares ids and media with MM-RLHF.

A training group is removed if one of these matches an item of a benchmark:

- `id`: an id of a data set that VL-RewardBench quotes (`RLAIF-V-12`), or a path of MM-RLHF's media (`mcq/073712.png`);
- `image`: the same picture, see below; `video`: the same for at least half of its frames (16 are looked at);
- `prompt`: the same text up to case and white space. Text alone says little where an image or video belongs to it
  ("Describe this image."), so that there it counts only if it is long (`MIN_PROMPT`) and no template (`STOCK_LIMIT`);
- `response`: the same text of more than `MIN_RESPONSE` characters, unless it is a stock phrase: "I'm sorry, but I
  can't help with that." is the answer to thousands of prompts and tells nothing about one.

`strict` drops the conditions on templates and stock phrases, and the length of prompts.

Two images are the same if their decoded RGB pixels are, or if all of this holds: their 64-bit perceptual hashes (signs
of the low frequencies of a 32 x 32 thumbnail, as in the pHash library) differ in at most 4 bits, their shapes agree
within 10 %, and their 64 x 64 thumbnails correlate at 0.993 or more. The last condition is for diagrams and pages:
drawings of one kind have the same low frequencies. Of 44,700 pairs of drawn pages, lines of text, bar charts and
triangles that differ in words and numbers, 4,959 have similar hashes and 9 pass the last condition, while JPEG at
quality 30 or at half the size leaves a correlation of at least 0.996. All of 122 cartoons are found again after such
changes, and about 19 of 20 line drawings, whose hashes turn more easily. Flat images have no hash: equal pixels only.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn
from tqdm.auto import tqdm

from mr_reward.errors import MediaError
from mr_reward.groups import ResponseGroup
from mr_reward.templates.images import load_image

MIN_RESPONSE = 40  # characters, normalised
MIN_PROMPT = 80
# Training prompts (of a response) or groups (of a prompt); what more of them share is no trace of one.
STOCK_LIMIT = 10
VIDEO_FRAMES = 16

_QUOTED_ID = re.compile(r"(?:rlaif-v|rlhf-v|hallucination_pair|wildvision-battle|lrvinstruction|svit|jailbreak)[-_].+")
_MM_RLHF_PATH = re.compile(r"(?:^|/)((?:mcq|long|short|safety|video)/\d{5,})(?=[./]|$)")

MAX_DISTANCE = 4
MIN_CORRELATION = 0.993
MAX_SHAPE_CHANGE = math.log(1.1)
FLAT = 2.0  # standard deviation of the thumbnail's grey values, of 255
_HASH_SIDE = 32
_THUMBNAIL_SIDE = 64
# Two hashes that differ in at most 4 of 64 bits agree in at least one of 5 bands (pigeonhole), so that looking up the
# bands finds every one of them.
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit, bits


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

    def __init__(self, benchmarks: Mapping[str, Sequence[ResponseGroup]]) -> None:
        self.ids: dict[str, set[Item]] = defaultdict(set)
        self.prompts: dict[bytes, dict[Item, bool]] = defaultdict(dict)  # whether the item has media
        self.responses: dict[bytes, set[Item]] = defaultdict(set)
        self._images = ImageIndex()
        self._frames = ImageIndex()
        # Data sets show one picture in several groups; what it met, by path.
        self._found: dict[str, set[Any]] = {}
        for name, groups in benchmarks.items():
            for number, group in enumerate(tqdm(groups, desc=f"reading {name}"), start=1):
                self._add(group, Item(name, group.id if group.id is not None else str(number)))

    def _add(self, group: ResponseGroup, item: Item) -> None:
        for name in _ids(group):
            self.ids[name].add(item)
        self.prompts[_prompt_key(group)][item] = bool(group.images or group.videos)
        for key in _response_keys(group):
            self.responses[key].add(item)
        for image in group.images:
            self._images.add(_fingerprint(image, group), item)
        for number, video in enumerate(group.videos):
            for frame in _sampled(video):
                self._frames.add(_fingerprint(frame, group), (item, number))

    def text_matches(self, group: ResponseGroup, stock: frozenset[bytes], strict: bool) -> Iterator[tuple[Item, str]]:
        """Items with the group's id, prompt or one of its responses, and which of them it is."""
        yield from ((item, "id") for key in _ids(group) for item in self.ids.get(key, ()))
        prompt = _prompt_key(group)
        distinctive = strict or (prompt not in stock and len(normalised_prompt(group)) >= MIN_PROMPT)
        for item, item_has_media in self.prompts.get(prompt, {}).items():
            if distinctive or not (item_has_media or group.images or group.videos):
                yield item, "prompt"
        for key in _response_keys(group) - stock:
            yield from ((item, "response") for item in self.responses.get(key, ()))

    def media_matches(self, group: ResponseGroup) -> Iterator[tuple[Item, str]]:
        """Items with one of the group's pictures or videos."""
        for image in group.images:
            yield from ((item, "image") for item in self._find(image, group))
        for video in group.videos:
            frames = _sampled(video)
            owners = Counter(owner for frame in frames for owner in self._frames.find(_fingerprint(frame, group)))
            yield from ((item, "video") for (item, _), count in owners.items() if 2 * count >= len(frames))

    def _find(self, image: Any, group: ResponseGroup) -> set[Any]:
        if not isinstance(image, (str, Path)):
            return self._images.find(_fingerprint(image, group))
        if str(image) not in self._found:
            self._found[str(image)] = self._images.find(_fingerprint(image, group))
        return self._found[str(image)]


def decontaminate(
    groups: Sequence[ResponseGroup], benchmarks: Mapping[str, Sequence[ResponseGroup]], *, strict: bool = False
) -> Decontamination:
    """Remove the training groups that meet a benchmark (name -> groups), by the rules at the head of this file."""
    index = _Index(benchmarks)
    stock: frozenset[bytes] = frozenset() if strict else _stock_texts(groups, index)
    result = Decontamination([], [])
    for group in tqdm(groups, desc="comparing"):
        found = {*index.text_matches(group, stock, strict), *index.media_matches(group)}
        if found:
            result.removed.append(Removal(group, sorted(found)))
        else:
            result.kept.append(group)
    return result


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
    return _digest(f"prompt {normalised_prompt(group)}")


def _response_keys(group: ResponseGroup) -> set[bytes]:
    texts = {_normalised(response) for response in group.responses}
    return {_digest(f"response {text}") for text in texts if len(text) > MIN_RESPONSE}


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()  # a response may hold a lone surrogate


def _fingerprint(image: Any, group: ResponseGroup) -> Fingerprint:
    try:
        return fingerprint(image)
    except MediaError as error:
        raise MediaError(f"{group.name}: {error}") from error


def _sampled(video: Sequence[Any]) -> list[Any]:
    """At most `VIDEO_FRAMES` frames, evenly spread."""
    count = min(len(video), VIDEO_FRAMES)
    return [video[i * len(video) // count] for i in range(count)]


def normalised_prompt(group: ResponseGroup) -> str:
    """The prompt's text without system turns, which do not change what is asked; several turns with their roles."""
    turns = [message for message in group.messages if message["role"] != "system"]
    lines = []
    for message in turns:
        text = "\n".join(block["text"] for block in message["content"] if block["type"] == "text")
        lines.append(text if len(turns) == 1 else f"{message['role']}: {text}")
    return _normalised("\n".join(lines))


def _normalised(text: str) -> str:
    """Lower case, white space collapsed, Unicode in one form (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """What of an image is compared."""

    digest: bytes  # SHA-256 of size and RGB pixels
    phash: int | None  # 64 bits, None for a flat image
    thumbnail: np.ndarray  # (4096,) grey values, uint8
    log_aspect: float  # logarithm of width / height


def fingerprint(image: Any) -> Fingerprint:
    """Decode an image (anything that `load_image` takes) and take its fingerprint."""
    rgb = load_image(image)
    digest = sha256(f"{rgb.size}".encode() + rgb.tobytes()).digest()
    grey = rgb.convert("L")
    thumbnail = _shrunk(grey, _THUMBNAIL_SIDE).ravel()
    log_aspect = math.log(rgb.width / rgb.height)
    if thumbnail.std() < FLAT:
        return Fingerprint(digest, None, thumbnail, log_aspect)
    low = dctn(_shrunk(grey, _HASH_SIDE).astype(np.float64), norm="ortho")[:8, :8].ravel()
    # The first coefficient is the brightness; it takes part in no median.
    bits = low > np.median(low[1:])
    return Fingerprint(digest, int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail, log_aspect)


def same_picture(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether two images show the same picture."""
    if a.digest == b.digest:
        return True
    if a.phash is None or b.phash is None or (a.phash ^ b.phash).bit_count() > MAX_DISTANCE:
        return False
    if abs(a.log_aspect - b.log_aspect) > MAX_SHAPE_CHANGE:
        return False
    return float(np.corrcoef(a.thumbnail, b.thumbnail)[0, 1]) >= MIN_CORRELATION


class ImageIndex:
    """Images with their owners; looking one up costs a few dictionary look-ups, whatever the size."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, list[tuple[Fingerprint, Any]]] = defaultdict(list)

    def add(self, image: Fingerprint, owner: Hashable) -> None:
        """Add an image; `find` returns its owner."""
        for key in _keys(image):
            self._by_key[key].append((image, owner))

    def find(self, image: Fingerprint) -> set[Any]:
        """The owners of the same picture."""
        candidates = {entry for key in _keys(image) for entry in self._by_key.get(key, ())}
        return {owner for known, owner in candidates if same_picture(known, image)}


def _shrunk(grey: Image.Image, side: int) -> np.ndarray:
    return np.asarray(grey.resize((side, side), Image.Resampling.LANCZOS))


def _keys(image: Fingerprint) -> Iterator[Hashable]:
    yield image.digest
    if image.phash is not None:
        for first, width in _BANDS:
            yield first, image.phash >> first & (1 << width) - 1
