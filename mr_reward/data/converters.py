"""Public preference data sets -> ranked groups: those of the paper's training mixture.

Written against the published schemas. A row that does not fit its schema is an error that names the field, a row
without a preference raises `SkippedRow` with a reason.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mr_reward.data.media_files import resolve_media
from mr_reward.data.sources import (
    Row,
    RowSource,
    field,
    image_field,
    messages_field,
    numbers_field,
    row_id,
    strip_placeholders,
    texts_field,
    turns_field,
    wrong_field,
)
from mr_reward.errors import ConfigurationError, GroupError, MRRewardError
from mr_reward.groups import ResponseGroup, dense_ranks

logger = logging.getLogger(__name__)

AXES = ("agree", "better", "safer")  # of PKU-SafeRLHF


class SkippedRow(Exception):
    """A valid row that holds no preference; the reason is counted, it is no error."""


@dataclasses.dataclass(frozen=True, slots=True)
class Converter:
    """How one public data set becomes groups."""

    name: str  # on the command line; also the groups' `source`
    hub_id: str  # the data set this was written against
    licence: str  # of the data, as its page states it; read it before you train on it
    convert: Callable[..., ResponseGroup]  # a row -> a group
    config: str | None = None  # of the hub data set, if it has several
    split: str = "train"
    # A first look at all rows gives what else `convert` has to know. Most data sets need none.
    look: Callable[[Iterable[Row]], dict[str, Any]] | None = None

    def make(self, rows: Iterable[Row]) -> Callable[[Row], ResponseGroup]:
        """The function from a row to a group, for a data set with these rows."""
        known = {} if self.look is None else self.look(rows)
        return lambda row: dataclasses.replace(self.convert(row, **known), source=self.name)


def graded_group(
    prompt: str | Sequence[Mapping[str, Any]],
    responses: Sequence[str],
    badness: Sequence[float],
    *,
    id: str | None,
    images: Sequence[Any] = (),
    videos: Sequence[Sequence[Any]] = (),
) -> ResponseGroup:
    """A ranked group of responses with grades, smaller is better, equal grades tie.

    Empty responses are left out. Of texts that are equal but for white space around them the first stays if their
    grades agree; if they differ, the judges have contradicted themselves and all of them go. `<image>` and `<video>`
    placeholders are taken out of a text prompt that comes with media, and are words like others in one without.
    """
    if len(responses) != len(badness):
        raise GroupError(f"{len(responses)} responses with {len(badness)} grades, expected one each")
    grades: dict[str, set[float]] = {}
    first: dict[str, str] = {}
    for text, grade in zip(responses, badness, strict=True):
        grades.setdefault(text.strip(), set()).add(grade)
        first.setdefault(text.strip(), text)
    kept = [(first[text], min(values)) for text, values in grades.items() if text and len(values) == 1]
    if len(kept) < 2:
        raise SkippedRow("fewer than two different responses")
    if len({grade for _, grade in kept}) == 1:
        raise SkippedRow("all responses tie")
    if isinstance(prompt, str):
        prompt = strip_placeholders(prompt) if images or videos else prompt
        if not prompt.strip():
            raise GroupError("the prompt is empty, expected a question; check data set and version")
    return ResponseGroup(
        prompt=prompt,
        responses=[text for text, _ in kept],
        rankings=dense_ranks([grade for _, grade in kept]),
        images=images,
        videos=videos,
        id=id,
    )


@dataclasses.dataclass
class Conversion:
    """The groups of a data set, made while they are iterated over; the counts are complete at the end.

    Public pairs store the chosen response first, which a model that sees all responses would learn. So the order of
    the responses is shuffled, for each group in the same way at every run.
    """

    converter: Converter
    rows: RowSource
    _: dataclasses.KW_ONLY
    media_root: Path | None = None  # relative paths in the rows count from here; the folder of the source if None
    limit: int | None = None  # stop after so many rows
    skip_bad: bool = False  # leave a bad row out and continue; otherwise it is an error with file, line and field
    keep_order: bool = False  # do not shuffle the responses
    num_rows: int = dataclasses.field(default=0, init=False)  # rows that were read
    # Rows without a preference, by reason.
    skipped: Counter[str] = dataclasses.field(default_factory=Counter, init=False)
    # Rows that contradict the schema or whose media are missing: file and line, field, what was found and expected.
    bad_rows: list[str] = dataclasses.field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[ResponseGroup]:
        convert = self.converter.make(row for _, row in self.rows)
        self.num_rows = 0
        self.skipped.clear()
        self.bad_rows.clear()
        for place, row in itertools.islice(self.rows, self.limit):
            self.num_rows += 1
            try:
                if isinstance(row, GroupError):
                    raise row
                group = self._finish(convert(row))
            except SkippedRow as reason:
                self.skipped[str(reason)] += 1
            except MRRewardError as error:
                if not self.skip_bad:
                    raise GroupError(
                        f"{place}: {error} (converter {self.converter.name}; --skip-bad leaves such rows out)"
                    ) from error
                self.bad_rows.append(f"{place}: {error}")
            else:
                yield group
        if self.bad_rows:
            logger.warning("%s: skipped %d of %d rows as bad", self.rows.name, len(self.bad_rows), self.num_rows)

    def _finish(self, group: ResponseGroup) -> ResponseGroup:
        """Find the media, name the group, shuffle the responses."""
        name = group.id if group.id is not None else f"{self.converter.name}-{self.num_rows}"
        group = dataclasses.replace(resolve_media(group, self.media_root or self.rows.folder), id=name)
        if self.keep_order:
            return group
        # By the row's number too: ids need not be unique.
        order = random.Random(f"{name} {self.num_rows}").sample(range(group.num_responses), group.num_responses)
        return group.select(order)


# --- images and videos ---


def _rlaif_v(row: Row) -> ResponseGroup:
    return graded_group(
        field(row, "question", str),
        [field(row, "chosen", str), field(row, "rejected", str)],
        [1, 2],
        images=[image_field(row, "image")],
        # As VL-RewardBench calls the rows of this data set that it holds.
        id=f"RLAIF-V-{row['idx']}" if row_id(row, "idx") else None,
    )


_ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def _vlfeedback(row: Row) -> ResponseGroup:
    """Four answers, each with GPT-4V's ratings of three aspects, whose mean counts (official reduction)."""
    responses, badness = [], []
    for i, completion in enumerate(_completions(row)):
        at = f"completions[{i}]"
        response = field(completion, "response", str, at=at)
        rating = _mean_rating(field(completion, "annotations", Mapping, at=at), f"{at}.annotations")
        if rating is not None:
            responses.append(response)
            badness.append(-rating)
    return graded_group(
        field(row, "prompt", str),
        responses,
        badness,
        images=[image_field(row, "img_path" if row.get("image") is None else "image")],
        id=row_id(row),
    )


def _completions(row: Row) -> list[Any]:
    """A list of structs, or columns, as `datasets` gives a sequence of structs."""
    completions = field(row, "completions", (list, Mapping))
    if isinstance(completions, list):
        return completions
    columns = {name: field(completions, name, list, at="completions") for name in ("response", "annotations")}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise GroupError(
            f"field 'completions' has columns of lengths {lengths}, expected equal ones; check the data set"
        )
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _mean_rating(annotations: Mapping[str, Any], at: str) -> float | None:
    """None, which leaves the answer out, where a rating is no number."""
    ratings = [
        field(field(annotations, aspect, Mapping, at=at), "Rating", str, at=f"{at}.{aspect}") for aspect in _ASPECTS
    ]
    try:
        mean = statistics.fmean(map(float, ratings))
    except ValueError:  # "N/A"
        return None
    return mean if math.isfinite(mean) else None  # float("nan") is a float


def _povid(row: Row) -> ResponseGroup:
    """An answer, and the same with hallucinations put in."""
    question, chosen = turns_field(row, "conversations")
    other, rejected = turns_field(row, "rejected_conversations")
    if strip_placeholders(other) != strip_placeholders(question):
        raise GroupError("fields 'conversations' and 'rejected_conversations' ask different things, expected the same")
    images = [image_field(row, "image")]
    return graded_group(question, [chosen, rejected], [1, 2], images=images, id=row_id(row))


def _wildvision(row: Row) -> ResponseGroup:
    """Two models' chats about an image and the user's vote; the prompt is everything before the last answers."""
    winner = field(row, "winner", str)
    if winner in ("tie", "tie (bothbad)"):
        raise SkippedRow(winner)
    if winner not in ("model_a", "model_b"):
        raise wrong_field("winner", winner, "model_a, model_b, tie or tie (bothbad)")
    first, second = messages_field(row, "conversation_a"), messages_field(row, "conversation_b")
    if [turn for turn in first if turn["role"] == "user"] != [turn for turn in second if turn["role"] == "user"]:
        raise GroupError("fields 'conversation_a' and 'conversation_b' ask different questions, expected the same")
    if first[:-1] != second[:-1]:
        raise SkippedRow("the chats part before their last turn")
    return graded_group(
        [{**turn, "content": strip_placeholders(turn["content"])} for turn in first[:-1]],
        [first[-1]["content"], second[-1]["content"]],
        [int(winner != "model_a"), int(winner != "model_b")],
        images=[image_field(row, "image")],
        id=row_id(row, "question_id"),
    )


_LEAST_AGREEMENT = 0.3


def _mm_rlhf(row: Row, *, best_is_one: bool) -> ResponseGroup:
    """Three to five answers with human scores and a final ranking."""
    ranking = _final_ranking(row)
    in_video = bool(row.get("video"))
    return graded_group(
        field(row, "question", str),
        texts_field(row, "models_output"),
        ranking if best_is_one else [-rank for rank in ranking],
        images=[] if in_video else [image_field(row, "image")],
        videos=[[field(row, "video", str)]] if in_video else [],
        id=row_id(row),
    )


def _look_at_mm_rlhf(rows: Iterable[Row]) -> dict[str, bool]:
    """Whether 1 is the best or the worst in `final_ranking`, which is not documented: what the humans' scores say."""
    from scipy.stats import spearmanr

    correlations = []
    for row in rows:
        try:
            ranking = _final_ranking(row)
            aspects = [numbers_field(row, name, len(ranking)) for name in ("faithfulness", "helpfulness", "ethical")]
        except GroupError:  # left to the conversion
            continue
        means = [statistics.fmean(values) for values in zip(*aspects, strict=True)]
        if len(set(ranking)) > 1 and len(set(means)) > 1:
            correlations.append(float(spearmanr(ranking, means).statistic))
    agreement = statistics.fmean(correlations) if correlations else 0.0
    if abs(agreement) < _LEAST_AGREEMENT:
        raise GroupError(
            f"field 'final_ranking' and the mean scores correlate by {agreement:.2f} over {len(correlations)} rows, "
            f"expected at least {_LEAST_AGREEMENT} in one direction; check data set and version"
        )
    logger.info("final_ranking and the mean scores correlate by %.2f over %d rows", agreement, len(correlations))
    return {"best_is_one": agreement < 0}  # scores grow with quality


def _final_ranking(row: Row) -> list[float]:
    return numbers_field(row, "final_ranking", len(texts_field(row, "models_output")))


_HEADINGS = tuple(
    re.compile(rf"^[ \t]*(?:{heading}):", re.MULTILINE)
    for heading in ("Question", r"Response [1A]|The first response", r"Response [2B]|The second response")
)
_END = re.compile(r"\n\s*ASSISTANT:\s*\Z")
# A letter as a capital only: "The better response: a short one" names none.
_VERDICT = re.compile(r"(?i:The better response):\s*\**\s*\[?\s*((?i:first|second)|[12AB])\b")
_TIE = re.compile(r"equally good|both responses are equal|\btie\b", re.IGNORECASE)


def _llava_critic(row: Row) -> ResponseGroup:
    """A question with two answers and GPT-4o's verdict, all three inside the text of one exchange."""
    request, judgment = turns_field(row, "conversations")
    name = field(row, "id", str)
    images = [image_field(row, "image")]
    parts = _critic_parts(request)
    if parts is None:  # pointwise rows among them
        raise SkippedRow("no question with two answers in the text")
    winners = {word.lower() in ("first", "1", "a") for word in _VERDICT.findall(judgment)}
    if len(winners) != 1:
        raise SkippedRow("tie" if not winners and _TIE.search(judgment) else "no verdict in the text")
    badness = [1, 2] if winners.pop() else [2, 1]
    return graded_group(parts[0], parts[1:], badness, images=images, id=name)


def _critic_parts(request: str) -> list[str] | None:
    """What stands below each heading, without the brackets around it.

    Each heading must start one line only: a response that holds such a heading cannot be told from the next one.
    """
    found = [list(heading.finditer(request)) for heading in _HEADINGS]
    if any(len(matches) != 1 for matches in found):
        return None
    starts = [matches[0].end() for matches in found]
    ends = [found[1][0].start(), found[2][0].start(), len(request)]
    if not starts[0] <= ends[0] < starts[1] <= ends[1]:
        return None
    texts = [_END.sub("", request[start:end]).strip() for start, end in zip(starts, ends, strict=True)]
    return [text[1:-1].strip() if text.startswith("[") and text.endswith("]") else text for text in texts]


# --- text ---


def _chat_pair(row: Row) -> ResponseGroup:
    """`chosen` and `rejected` chats that differ in their last turn (Tulu, Skywork)."""
    chosen, rejected = messages_field(row, "chosen"), messages_field(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise GroupError("fields 'chosen' and 'rejected' differ before their last turn, expected one prompt")
    if not chosen[:-1]:
        raise GroupError("field 'chosen' has a single turn, expected a prompt before the answer")
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    return graded_group(chosen[:-1], answers, [1, 2], id=row_id(row))


def _nectar(row: Row) -> ResponseGroup:
    """Seven answers with GPT-4's ranks, 1 is best."""
    turns = _dialogue(field(row, "prompt", str))
    responses, ranks = [], []
    for i, answer in enumerate(field(row, "answers", list)):
        rank = float(field(answer, "rank", (int, float), at=f"answers[{i}]"))
        if not math.isfinite(rank):
            raise wrong_field(f"answers[{i}].rank", rank, "a finite number")
        text = field(answer, "answer", str, at=f"answers[{i}]")
        if "Human:" not in text and "Assistant:" not in text:  # such an answer continues the dialogue by itself
            responses.append(text)
            ranks.append(rank)
    return graded_group(turns, responses, ranks, id=row_id(row))


_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")


def _dialogue(text: str) -> list[dict[str, Any]]:
    """`Human: ... Assistant: ... Human: ... Assistant:` -> messages."""
    # Only at the start of a paragraph: a question may speak of "Human:" itself.
    opening, *parts = _SPEAKER.split(text)
    speakers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    in_turns = bool(speakers) and speakers == ["Human", "Assistant"] * (len(speakers) // 2)
    if opening.strip() or not in_turns or texts[-1] or not all(texts[:-1]):
        raise wrong_field("prompt", text, "'Human: ... Assistant:', in turns, the last one empty")
    pairs = zip(speakers[:-1], texts[:-1], strict=True)
    return [{"role": "user" if speaker == "Human" else "assistant", "content": said} for speaker, said in pairs]


def _pku_saferlhf(row: Row, *, axis: str = "agree") -> ResponseGroup:
    """Two answers, judged for helpfulness and for harmlessness; `agree` takes rows on which both say the same."""
    ids = {name: field(row, f"{name}_response_id", int) for name in ("better", "safer")}
    for name, value in ids.items():
        if value not in (0, 1):
            raise wrong_field(f"{name}_response_id", value, "0 or 1")
    if axis == "agree" and ids["better"] != ids["safer"]:
        raise SkippedRow("the more helpful answer is not the safer one")
    winner = ids["better" if axis == "agree" else axis]
    answers = [field(row, "response_0", str), field(row, "response_1", str)]
    badness = [int(winner != 0), int(winner != 1)]
    return graded_group(field(row, "prompt", str), answers, badness, id=row_id(row))


_ALL = (
    Converter("mm_rlhf", "yifanzhang114/MM-RLHF", "see its page", _mm_rlhf, look=_look_at_mm_rlhf),
    Converter("llava_critic", "lmms-lab/llava-critic-113k", "apache-2.0", _llava_critic, config="pairwise"),
    Converter("rlaif_v", "openbmb/RLAIF-V-Dataset", "cc-by-nc-4.0", _rlaif_v),
    Converter("vlfeedback", "MMInstruction/VLFeedback", "see its page", _vlfeedback),
    Converter("povid", "YiyangAiLab/POVID_preference_data_for_VLLMs", "see its page", _povid),
    Converter("wildvision", "WildVision/wildvision-battle", "odc-by", _wildvision, split="test"),
    Converter("tulu", "allenai/llama-3.1-tulu-3-8b-preference-mixture", "odc-by, with terms of its parts", _chat_pair),
    Converter("skywork", "Skywork/Skywork-Reward-Preference-80K-v0.2", "see its page", _chat_pair),
    Converter("nectar", "berkeley-nest/Nectar", "apache-2.0, not to compete with OpenAI", _nectar),
    Converter("pku_saferlhf", "PKU-Alignment/PKU-SafeRLHF", "cc-by-nc-4.0", _pku_saferlhf),
)
CONVERTERS: Mapping[str, Converter] = MappingProxyType({converter.name: converter for converter in _ALL})
"""By name."""


def get_converter(name: str, *, axis: str | None = None) -> Converter:
    """The converter of a public data set; `axis` is for `pku_saferlhf`, one of `AXES`."""
    if name not in CONVERTERS:
        raise ConfigurationError(f"unknown data set {name!r}, expected one of {', '.join(CONVERTERS)}")
    converter = CONVERTERS[name]
    if axis is None:
        return converter
    if name != "pku_saferlhf" or axis not in AXES:
        raise ConfigurationError(
            f"got axis {axis!r} with {name!r}; only pku_saferlhf has axes, one of {', '.join(AXES)}"
        )
    return dataclasses.replace(converter, convert=functools.partial(converter.convert, axis=axis))
