"""The data sets of the paper's training mixture (arXiv 2604.10966), written against their published schemas."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from mr_reward.data.conversion import Converter, SkippedRow, alternatives, graded_group, leave_out
from mr_reward.data.fields import (
    answer_text,
    chat_field,
    context_fields,
    field,
    image_field,
    numbers_field,
    row_id,
    strip_placeholders,
    texts_field,
    turns_field,
    wrong_field,
)
from mr_reward.data.sources import Row
from mr_reward.data.trainer_formats import preference
from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.messages.prompts import Message

logger = logging.getLogger(__name__)


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
        if rating is None:
            leave_out(row, "without a rating of every aspect")
        else:
            responses.append(response)
            badness.append(-rating)
    return graded_group(
        field(row, "prompt", str),
        responses,
        badness,
        images=[image_field(row, "img_path" if row.get("image") is None else "image")],
        id=row_id(row),
        rated=True,
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
    """None, which leaves the answer out, where an aspect is missing or its rating is no number."""
    if annotations and not set(annotations) & set(_ASPECTS):
        raise GroupError(f"field {at!r} has {sorted(annotations)}, expected {', '.join(_ASPECTS)}")
    ratings = []
    for aspect in _ASPECTS:
        if annotations.get(aspect) is None:
            return None
        rating = field(annotations, aspect, Mapping, at=at).get("Rating")
        if rating is not None and (not isinstance(rating, str | int | float) or isinstance(rating, bool)):
            raise wrong_field(f"{at}.{aspect}.Rating", rating, "a text with a number")
        ratings.append(rating)
    try:
        mean = statistics.fmean(float(rating) for rating in ratings if rating is not None)
    except ValueError:  # "N/A"
        return None
    return mean if math.isfinite(mean) and None not in ratings else None  # float("nan") is a float


def _povid(row: Row) -> ResponseGroup:
    """An answer, and the same with hallucinations put in."""
    question, chosen = turns_field(row, "conversations")
    other, rejected = turns_field(row, "rejected_conversations")
    if strip_placeholders(other) != strip_placeholders(question):
        raise GroupError("fields 'conversations' and 'rejected_conversations' ask different things, expected the same")
    images = [image_field(row, "image")]
    return graded_group(question, [chosen, rejected], [1, 2], images=images, id=row_id(row))


def arena_battle(row: Row) -> ResponseGroup:
    """Two models' chats and the user's vote; the prompt is everything before the last answers."""
    winner = field(row, "winner", str)
    if winner.startswith("tie") or winner in ("both_bad", "bothbad"):
        raise SkippedRow(winner)
    if winner not in ("model_a", "model_b"):
        raise wrong_field("winner", winner, "model_a, model_b, tie or tie (bothbad)")
    first, second = _battle_chat(row, "conversation_a"), _battle_chat(row, "conversation_b")
    if [turn for turn in first if turn["role"] == "user"] != [turn for turn in second if turn["role"] == "user"]:
        raise GroupError("fields 'conversation_a' and 'conversation_b' ask different questions, expected the same")
    if first[:-1] != second[:-1]:
        raise SkippedRow("the chats part before their last turn")
    return graded_group(
        first[:-1],
        [answer_text(chat[-1:], name) for chat, name in ((first, "conversation_a"), (second, "conversation_b"))],
        [int(winner != "model_a"), int(winner != "model_b")],
        id=row_id(row, "question_id"),
        **context_fields(row),
    )


def _battle_chat(row: Row, name: str) -> list[Message]:
    """VisionArena has a list around each turn."""
    turns = field(row, name, list)
    if turns and all(isinstance(turn, list) for turn in turns):
        return chat_field({name: [message for turn in turns for message in turn]}, name)
    return chat_field(row, name)


def _wildvision(row: Row) -> ResponseGroup:
    group = arena_battle(row)
    image_field(row, "image")  # always there
    return group


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


# Of the pairwise part, of Arena-Hard's form and of LLaVA-Bench's; brackets around a heading belong to it.
_HEADINGS = tuple(
    re.compile(rf"^[ \t]*(?:(?:{words}):|\[(?:{bracketed})\])", re.MULTILINE)
    for words, bracketed in (
        ("Question", "Question|User Prompt"),
        ("Response [1A]|The first response", r"(?:The Start of )?Assistant [1A](?:'s Answer)?"),
        ("Response [2B]|The second response", r"(?:The Start of )?Assistant [2B](?:'s Answer)?"),
    )
)
# What ends a response: its closing mark, the instruction behind the last one, the turn of the judge.
_END = re.compile(r"\n[ \t]*\[(?:The )?End of Assistant [12AB](?:'s Answer)?\].*\Z|\n\s*ASSISTANT:\s*\Z", re.DOTALL)
_SYSTEM = re.compile(r"\n[ \t]*\[System\].*\Z", re.DOTALL)
# A letter as a capital only: "The better response: a short one" names none.
_VERDICT = re.compile(r"(?i:The better response):\s*\**\s*\[?\s*((?i:first|second)|[12AB])\b")
_ARENA = re.compile(r"\[\[\s*([AB])\s*([<>=»«])+\s*([AB])\s*\]\]")
_SCORE_LINE = re.compile(r"\A\s*(\d+(?:\.\d+)?)[ \t,;]+(\d+(?:\.\d+)?)[ \t]*(?:\n|\Z)")
_TIE = re.compile(r"equally good|both responses are equal|\btie\b", re.IGNORECASE)


def _llava_critic(row: Row) -> ResponseGroup:
    """A question with two answers and GPT-4o's verdict, all three inside the text of one exchange."""
    request, judgment = turns_field(row, "conversations")
    name = field(row, "id", str)
    images = [image_field(row, "image")]
    parts = _critic_parts(request)
    if parts is None:  # pointwise rows among them
        raise SkippedRow("no question with two answers in the text")
    return graded_group(parts[0], parts[1:], _critic_badness(judgment), images=images, id=name)


def _critic_badness(judgment: str) -> list[float]:
    """Of the two answers: by a named winner, by `[[B>A]]`, or by a first line of two scores."""
    first, second = (1.0, 2.0), (2.0, 1.0)
    verdicts = {first if word.lower() in ("first", "1", "a") else second for word in _VERDICT.findall(judgment)}
    for left, sign, right in _ARENA.findall(judgment):
        if left != right:
            better = left if sign in ">»" else right
            verdicts.add((1.0, 1.0) if sign == "=" else first if better == "A" else second)
    if not verdicts and (line := _SCORE_LINE.match(judgment)):
        verdicts.add((-float(line[1]), -float(line[2])))
    if len(verdicts) != 1:
        raise SkippedRow("tie" if not verdicts and _TIE.search(judgment) else "no verdict in the text")
    badness = list(verdicts.pop())
    if badness[0] == badness[1]:
        raise SkippedRow("tie")
    return badness


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
    texts = [request[start:end] for start, end in zip(starts, ends, strict=True)]
    texts = [_END.sub("", _SYSTEM.sub("", text)).strip() for text in texts]
    return [text[1:-1].strip() if text.startswith("[") and text.endswith("]") else text for text in texts]


# --- text ---


def _nectar(row: Row) -> ResponseGroup:
    """Seven answers with GPT-4's ranks, 1 is best."""
    *turns, last = dialogue(row, "prompt")
    if last["role"] != "assistant" or last["content"]:
        raise wrong_field("prompt", row["prompt"], _DIALOGUE)
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


_DIALOGUE = "'Human: ... Assistant: ...', in turns, with an empty last one in a prompt"


def dialogue(row: Row, name: str) -> list[Message]:
    """`Human: ... Assistant: ... Human: ... Assistant: ...` -> messages; the last one, an answer, may be empty."""
    text = field(row, name, str)
    # Only at the start of a paragraph: a question may speak of "Human:" itself.
    opening, *parts = _SPEAKER.split(text)
    speakers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    in_turns = bool(speakers) and speakers == ["Human", "Assistant"] * (len(speakers) // 2)
    if opening.strip() or not in_turns or not all(texts[:-1]):
        raise wrong_field(name, text, _DIALOGUE)
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": said}
        for speaker, said in zip(speakers, texts, strict=True)
    ]


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


PAPER_MIXTURE = (
    Converter(
        "mm_rlhf",
        _mm_rlhf,
        hub_id="yifanzhang114/MM-RLHF",
        look=_look_at_mm_rlhf,
        columns=alternatives("question models_output final_ranking"),
    ),
    Converter(
        "llava_critic",
        _llava_critic,
        hub_id="lmms-lab/llava-critic-113k",
        licence="apache-2.0",
        config="pairwise",
        columns=alternatives("id image conversations"),
        fits=lambda row: _critic_parts(turns_field(row, "conversations")[0]) is not None,
    ),
    Converter(
        "rlaif_v",
        _rlaif_v,
        hub_id="openbmb/RLAIF-V-Dataset",
        licence="cc-by-nc-4.0",
        columns=alternatives("question chosen rejected image"),
    ),
    Converter(
        "vlfeedback",
        _vlfeedback,
        hub_id="MMInstruction/VLFeedback",
        columns=alternatives("prompt completions"),
    ),
    Converter(
        "povid",
        _povid,
        hub_id="YiyangAiLab/POVID_preference_data_for_VLLMs",
        columns=alternatives("image conversations rejected_conversations"),
    ),
    Converter(
        "wildvision",
        _wildvision,
        hub_id="WildVision/wildvision-battle",
        licence="odc-by",
        split="test",
        columns=alternatives("conversation_a conversation_b image winner"),
    ),
    Converter(
        "tulu",
        preference,
        hub_id="allenai/llama-3.1-tulu-3-8b-preference-mixture",
        licence="odc-by, with terms of its parts",
    ),
    Converter("skywork", preference, hub_id="Skywork/Skywork-Reward-Preference-80K-v0.2"),
    Converter(
        "nectar",
        _nectar,
        hub_id="berkeley-nest/Nectar",
        licence="apache-2.0, not to compete with OpenAI",
        columns=alternatives("prompt answers num_responses"),
    ),
    Converter(
        "pku_saferlhf",
        _pku_saferlhf,
        hub_id="PKU-Alignment/PKU-SafeRLHF",
        licence="cc-by-nc-4.0",
        columns=alternatives("prompt response_0 response_1 better_response_id safer_response_id"),
    ),
)
