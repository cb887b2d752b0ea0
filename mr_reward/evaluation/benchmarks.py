"""The benchmarks: where they are, which columns they have, how a row becomes an item, and their metric.

Written against the published schemas. Where a schema could not be looked at (VideoRewardBench, MR2Bench), several
names are recognised for a column, and the error for others shows what the row has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as default
from hashlib import sha256
from pathlib import Path
from typing import Any

from mr_reward.data.fields import field, image_field, strip_placeholders, texts_field, wrong_field
from mr_reward.data.groups_file import group_from_row
from mr_reward.data.media_files import resolve_media
from mr_reward.data.sources import RowSource, read_rows
from mr_reward.errors import ConfigurationError, GroupError, MediaError, MRRewardError, shown
from mr_reward.evaluation import official
from mr_reward.groups import ResponseGroup, dense_ranks
from mr_reward.hub import why_missing

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationItem:
    """A ranked group of a benchmark."""

    uid: str  # unique in the benchmark; the ids that benchmarks give are not always
    category: str  # the benchmark's own, by its official rule
    group: ResponseGroup  # with rankings, 1 = best; its id is the uid
    facts: Mapping[str, Any] = default(default_factory=dict)  # what the official metric needs beside them, JSON values
    place: str = ""  # file and line, for messages
    error: str | None = None  # why its group cannot be scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark."""

    name: str  # on the command line
    title: str  # for people
    hub_id: str | None = None  # where it is published; None for local files only
    split: str = "test"  # of the hub data set
    columns: tuple[tuple[str, ...], ...] = ()  # what a row has to have; one of the names of each tuple
    # Makes an item of a row, with the row's own id as uid; gives None for a row that belongs to another benchmark of
    # the same data set. No function: ranked groups of this package, as `load_preferences` reads them.
    read: Callable[[Row], EvaluationItem | None] | None = None
    summarise: official.Metric  # the official numbers
    headline: tuple[str, ...]  # those of the leaderboard row, the main one first
    counts: Mapping[str, int] = default(default_factory=dict)  # published numbers of items, by category


@dataclass(frozen=True, slots=True)
class BenchmarkData:
    """A benchmark's items, read from the start at each iteration."""

    benchmark: Benchmark
    source: str  # file, folder or hub id
    rows: RowSource
    media: Path | None = None  # folder that relative paths count from; None for that of the source
    skip_bad: bool = False  # give a bad row as an item with its error, or, if it is no item, count it, and go on
    fetch_urls: bool = False  # download images that are http or https URLs
    bad_rows: list[str] = default(default_factory=list)  # that are no item: place and reason

    def __iter__(self) -> Iterator[EvaluationItem]:
        root = self.media or self.rows.folder
        self.bad_rows.clear()
        for number, (place, row) in enumerate(self.rows):
            item = None
            try:
                if isinstance(row, GroupError):
                    raise row
                item = self._read(row, place, number)
                if item is not None:
                    yield replace(item, group=resolve_media(item.group, root, fetch_urls=self.fetch_urls))
            except MRRewardError as error:
                reason = str(error)
                if isinstance(error, MediaError) and self.media is None:
                    reason += " (paths count from the source's folder; `mr-reward evaluate` takes --media FOLDER)"
                if not self.skip_bad:
                    raise type(error)(f"{place}: {reason}") from error
                if item is None:
                    self.bad_rows.append(f"{place}: {reason}")
                else:
                    yield replace(item, error=reason)

    def _read(self, row: Any, place: str, number: int) -> EvaluationItem | None:
        """The item of a row, with its media as the row names them."""
        if self.benchmark.read is None:
            found = group_from_row(row, f"{Path(self.source).name}:{place.rpartition(' ')[2]}", ranked=True)
            item = EvaluationItem(uid=found.id or "", category=found.source or "all", group=found)
        else:
            _check_columns(self.benchmark, row)
            read = self.benchmark.read(row)
            if read is None:
                return None
            item = replace(read, group=replace(read.group, prompt=read.group.messages, source=self.benchmark.name))
        uid = _numbered(number, item.uid)
        return replace(item, uid=uid, place=place, group=replace(item.group, id=uid, prompt=item.group.messages))


def open_benchmark(
    name: str,
    source: str | Path | None = None,
    split: str | None = None,
    *,
    media: str | Path | None = None,
    skip_bad: bool = False,
    fetch_urls: bool = False,
) -> BenchmarkData:
    """Open a benchmark; its rows are read when they are asked for.

    `source`: file, folder or hub id, None for where it is published. `split` of a folder: how its files begin.
    `media`, `skip_bad` and `fetch_urls`: see `BenchmarkData`.
    """
    benchmark, place = locate_benchmark(name, source)
    if not Path(place).exists():
        split = split or benchmark.split
    media = None if media is None else Path(media)
    if media is not None and not media.is_dir():
        raise ConfigurationError(f"--media {media} is no folder; give the one that the rows' paths count from")
    return BenchmarkData(benchmark, place, read_rows(place, split=split), media, skip_bad, fetch_urls)


def locate_benchmark(name: str, source: str | Path | None = None) -> tuple[Benchmark, str]:
    """A benchmark, and where it is read from; what is not there is told before a model is loaded."""
    benchmark = get_benchmark(name)
    place = benchmark.hub_id if source is None else str(source)
    if place is None:
        raise ConfigurationError(f"benchmark {name} is not published on the hub; give its file or folder")
    if reason := why_missing(place, kind="dataset"):
        raise ConfigurationError(f"{benchmark.title}: {place} {reason}")
    return benchmark, place


def get_benchmark(name: str) -> Benchmark:
    """A benchmark of `BENCHMARKS` by its name."""
    if name not in BENCHMARKS:
        raise ConfigurationError(f"there is no benchmark {name!r}, expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _numbered(number: int, uid: str | None) -> str:
    """The number makes it unique: VL-RewardBench has ids that occur twice, others have none."""
    return f"{number:05d}" + (f":{uid}" if uid else "")


def _check_columns(benchmark: Benchmark, row: Any) -> None:
    if not isinstance(row, Mapping):
        raise GroupError(f"the row is {row!r:.60}, expected an object; check the file")
    missing = [names for names in benchmark.columns if not any(row.get(name) is not None for name in names)]
    if missing:
        wanted = ", ".join(" or ".join(names) for names in benchmark.columns)
        raise GroupError(
            f"{benchmark.title}: no column {', '.join(' or '.join(names) for names in missing)}; found "
            f"{', '.join(map(str, row))}, expected {wanted}; check data set, split and version"
        )


def _first(row: Row, names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _item(
    uid: object, category: str, prompt: str, responses: Sequence[str], ranks: Sequence[int], **media: Any
) -> EvaluationItem:
    group = ResponseGroup(prompt=strip_placeholders(prompt), responses=responses, rankings=dense_ranks(ranks), **media)
    return EvaluationItem(uid="" if uid is None else str(uid), category=category, group=group)


def _vl_rewardbench(row: Row) -> EvaluationItem:
    """The rank of a response counts from 0; the category follows from how the id starts (`cal.py`)."""
    uid = str(field(row, "id", (str, int)))
    category = "general"
    if uid.lower().startswith(("rlaif", "rlhf", "hallucination")):
        category = "hallucination"
    elif uid.lower().startswith(("mathverse", "mmmu")):
        category = "reasoning"
    ranks = field(row, "human_ranking", list)
    if sorted(ranks) != [0, 1]:
        raise wrong_field("human_ranking", ranks, "[0, 1] or [1, 0]")
    responses = texts_field(row, "response")
    if len(responses) != 2:
        raise wrong_field("response", responses, "2 texts")
    return _item(uid, category, field(row, "query", str), responses, ranks, images=[image_field(row, "image")])


def _multimodal_rewardbench(row: Row) -> EvaluationItem:
    """Reasoning and safety are split by how the id starts (`2_get_accuracy.py`)."""
    uid, category, better = field(row, "ID", str), field(row, "Category", str), field(row, "Better", str)
    if better not in ("Output1", "Output2"):
        raise wrong_field("Better", better, "'Output1' or 'Output2'")
    if category == "reasoning":
        category = "reasoning/math" if uid.lower().startswith("math") else "reasoning/coding"
    elif category == "safety":
        category = "safety/bias" if uid.lower().startswith("pairs") else "safety/toxicity"
    responses = [field(row, "Output1", str), field(row, "Output2", str)]
    ranks = [0, 1] if better == "Output1" else [1, 0]
    return _item(uid, category, field(row, "Text", str), responses, ranks, images=[image_field(row, "Image")])


_MM_RLHF_CATEGORIES = ("mcq", "long", "short", "safety", "video")
# Columns that tell the category of a row whose image is embedded: `datasets` keeps the last part of its path only.
_MM_RLHF_PLACES = ("path", "image_path", "video_path", "subset", "category", "type")


def _mm_rlhf_rewardbench(row: Row) -> EvaluationItem:
    """The category is the first of the five that the path of the medium contains."""
    medium = row.get("video") or row.get("image")
    if medium is None:
        medium = _first(row, ("path", "image_path", "video_path"))
    path = medium.get("path") if isinstance(medium, Mapping) else medium
    places = [path if isinstance(path, str) else None, *(row.get(name) for name in _MM_RLHF_PLACES)]
    told = [place for place in places if isinstance(place, str)]
    category = next((name for place in told for name in _MM_RLHF_CATEGORIES if name in place), None)
    if category is None:
        raise GroupError(
            f"the path {shown(told or path)} holds none of {', '.join(_MM_RLHF_CATEGORIES)}, and no column of "
            f"{', '.join(_MM_RLHF_PLACES)} does; check the data set"
        )
    uid = str(field(row, "id", (str, int)))
    in_video = bool(row.get("video")) or (not row.get("image") and category == "video")
    media: dict[str, Any] = {"videos": _video({"video": medium})} if in_video else {"images": [medium]}
    responses = [field(row, "chosen", str), field(row, "rejected", str)]
    item = _item(uid, category, field(row, "prompt", str), responses, [0, 1], **media)
    return replace(item, facts={"id": uid})


_PROMPT = ("prompt", "question", "query", "instruction")
_CHOSEN = ("chosen", "chosen_response", "response_chosen", "preferred")
_REJECTED = ("rejected", "rejected_response", "response_rejected", "dispreferred")
_VIDEO = ("video", "video_path", "videos", "frames")
_DIMENSION = ("dimension", "category", "task", "type", "subset")


def _video_rewardbench(row: Row) -> EvaluationItem:
    dimension = str(_first(row, _DIMENSION)).lower().replace("_", "-").replace(" ", "-")
    responses = [_first(row, _CHOSEN), _first(row, _REJECTED)]
    return _item(row.get("id"), dimension, str(_first(row, _PROMPT)), responses, [0, 1], videos=_video(row))


def _video(row: Row) -> list[Any]:
    """One video: the path of a folder of frames, or the frames."""
    value = _first(row, _VIDEO)
    if value is None:
        return []
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    return [value if isinstance(value, list) else [value]]


_RESPONSES = ("responses", "candidates", "response")
_RANKINGS = ("rankings", "ranking", "ranks", "human_ranking")
_IMAGE = ("image", "images", "image_path")


def _mr2bench(modality: str) -> Callable[[Row], EvaluationItem | None]:
    """Both benchmarks stand in one data set: a row with a video belongs to the one, others to the other."""

    def read(row: Row) -> EvaluationItem | None:
        videos = _video(row)
        if bool(videos) != (modality == "video"):
            return None
        images = _first(row, _IMAGE)
        images = [] if images is None else images if isinstance(images, list) else [images]
        responses, ranks = _first(row, _RESPONSES), _first(row, _RANKINGS)
        whole = isinstance(ranks, list) and all(isinstance(r, int) and not isinstance(r, bool) for r in ranks)
        if not whole or not isinstance(responses, list) or len(ranks) != len(responses) or min(ranks) not in (0, 1):
            raise GroupError(
                f"rankings {ranks!r:.80} for {responses!r:.40}, expected one whole number for each response, counted "
                "from 0 or 1, the smallest is the best; check data set and version"
            )
        category = str(row.get("category") or row.get("source") or "all")
        prompt = str(_first(row, _PROMPT))
        return _item(row.get("id"), category, prompt, responses, ranks, images=images, videos=videos)

    return read


def _rewardbench_2(row: Row) -> EvaluationItem:
    """Right answers first. In Ties the id is `tied:12` or `ref:12`."""
    uid, domain = str(field(row, "id", (str, int))), field(row, "subset", str)
    chosen, rejected = texts_field(row, "chosen"), texts_field(row, "rejected")
    facts: dict[str, Any] = {}
    if domain.lower() == "ties":
        kind, _, prompt = uid.partition(":")
        if kind not in ("tied", "ref") or not prompt:
            raise wrong_field("id", uid, "'tied:NUMBER' or 'ref:NUMBER' in Ties")
        facts = {"kind": kind, "prompt": prompt}
    ranks = [0] * len(chosen) + [1] * len(rejected)
    item = _item(uid, domain.lower(), field(row, "prompt", str), [*chosen, *rejected], ranks)
    return replace(item, facts=facts)


def _rollouts(row: Row) -> EvaluationItem:
    """A ranked group as `load_preferences` reads it. Groups of one prompt (media by their names) belong together."""
    group = group_from_row(row, "", ranked=True)
    prompt = repr((group.messages, group.images, group.videos)).encode("utf-8", "backslashreplace")
    facts = {"prompt": sha256(prompt).hexdigest()[:16]}
    return EvaluationItem(uid=group.id or "", category=group.source or "all", group=group, facts=facts)


_BENCHMARKS = (
    Benchmark(
        name="vl_rewardbench",
        title="VL-RewardBench",
        hub_id="MMInstruction/VL-RewardBench",
        columns=(("id",), ("query",), ("response",), ("human_ranking",), ("image",)),
        read=_vl_rewardbench,
        summarise=official.vl_rewardbench,
        headline=("macro", "overall", "general", "hallucination", "reasoning"),
        counts={"general": 183, "hallucination": 749, "reasoning": 318},
    ),
    Benchmark(
        name="multimodal_rewardbench",
        title="Multimodal RewardBench",
        hub_id="syhuggingface/multimodal_rewardbench",
        columns=(("ID",), ("Text",), ("Image",), ("Output1",), ("Output2",), ("Better",), ("Category",)),
        read=_multimodal_rewardbench,
        summarise=official.multimodal_rewardbench,
        headline=("overall",),
    ),
    Benchmark(
        name="mm_rlhf_rewardbench",
        title="MM-RLHF-RewardBench",
        hub_id="yifanzhang114/MM-RLHF-RewardBench",
        split="train",
        columns=(
            ("id",),
            ("prompt",),
            ("chosen",),
            ("rejected",),
            ("image", "video", "path", "image_path", "video_path"),
        ),
        read=_mm_rlhf_rewardbench,
        summarise=official.mm_rlhf_rewardbench,
        headline=("acc", "acc_plus"),
        counts={"mcq": 42, "long": 37, "short": 34, "safety": 32, "video": 25},
    ),
    Benchmark(
        name="video_rewardbench",
        title="VideoRewardBench",
        hub_id="Dragonriser/VideoRewardBench",
        columns=(_PROMPT, _CHOSEN, _REJECTED, _VIDEO, _DIMENSION),
        read=_video_rewardbench,
        summarise=official.video_rewardbench,
        headline=("overall", "macro"),
    ),
    *(
        Benchmark(
            name=f"mr2bench_{modality}",
            title=f"MR2Bench-{modality.capitalize()}",
            hub_id="yinuoy/MR2Bench",
            columns=(_PROMPT, _RESPONSES, _RANKINGS, (*_IMAGE, *_VIDEO)),
            read=_mr2bench(modality),
            summarise=official.n_way,
            headline=("best_of_n", "pairwise", "tau_b"),
            counts={"all": count},
        )
        for modality, count in (("image", 240), ("video", 497))
    ),
    Benchmark(
        name="rewardbench_2",
        title="RewardBench 2",
        hub_id="allenai/reward-bench-2",
        columns=(("id",), ("prompt",), ("chosen",), ("rejected",), ("subset",)),
        read=_rewardbench_2,
        summarise=official.rewardbench_2,
        headline=("average", "factuality", "precise if", "math", "safety", "focus", "ties"),
    ),
    Benchmark(
        name="groups",
        title="ranked groups",
        summarise=official.n_way,
        headline=("best_of_n", "pairwise", "tau_b"),
    ),
    Benchmark(
        name="rollouts",
        title="held-out rollouts",
        read=_rollouts,
        summarise=official.rollouts,
        headline=("right_above_wrong", "best_of_n", "calibration_error"),
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _BENCHMARKS}
