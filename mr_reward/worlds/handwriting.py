"""The handwriting world: real scanned digits, questions about them, and responses whose quality is known exactly.

The 1,797 scans (8 x 8 pixels, 17 grey levels) come with scikit-learn, so nothing is downloaded. A prompt shows k
digits side by side in one image, or one at a time as the frames of a video, and asks one of `QUESTIONS`. Train,
validation and test never share a scan; the split is a property of the data and does not depend on any seed.

The candidate answers of a group are drawn so that they do not give the truth away. Their numbers are a random subset
of a set in which no member stands out (a grid of digit choices, or a window of whole numbers), so the truth is not the
one in the middle; wording is drawn independently of being right, so neither is it the longest or the shortest. Only
the picture tells. What stays is what anybody knows without looking: that a response without a number is seldom the
best, and that the largest of three digits is often 9.

How good a text is as an answer is a pure function of question, digits and text (`grade`): candidates that were made up
and completions of a policy are graded alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mr_reward.data.jsonl import write_json_lines
from mr_reward.data.media_files import write_image
from mr_reward.errors import ConfigurationError
from mr_reward.groups import ResponseGroup, dense_ranks
from mr_reward.messages.prompts import Message

if TYPE_CHECKING:
    from mr_reward.worlds.named import Task

Media = Literal["image", "video"]

# Short, because the tiny models read one token per byte.
QUESTIONS = {"read": "Number?", "sum": "Sum?", "largest": "Largest?", "even": "How many even?"}

# How quality is measured, see `grade`.
PARTIAL = 0.45  # the most that a partly right answer can reach: below a right one, however it is worded
REFUSAL = 0.10
WRONG = 0.05
WORDING = {"bare": 1.0, "sentence": 0.8, "rambling": 0.5}
SENTENCE_LENGTH = 30  # characters; a longer text is rambling
TOLERANCE = {"sum": 5, "largest": 4, "even": 2}  # an answer this far off is plainly wrong

_NUMBER = re.compile(r"[0-9]+")
_REFUSAL = re.compile(r"\b(cannot|can't|unable|not sure|no idea)\b", re.IGNORECASE)
_MAX_NUMBER_LENGTH = 18  # digits; int() of a policy's endless digits would be slow, and no answer is as long

HANDWRITING_BENCHMARKS: Mapping[str, str] = {  # folder -> the benchmark as which it is read
    "pairs": "vl_rewardbench",
    "best_of_4": "mr2bench_image",
    "n_way": "mr2bench_image",
    "video": "mr2bench_video",
}

SPLITS = {"train": 0.75, "validation": 0.10, "test": 0.15}  # shares of each digit's scans
TILE_SIZE = 32  # pixels; one image token of the tiny VLMs shows one digit
MIN_RESPONSES, MAX_RESPONSES = 2, 64

# How groups are drawn. Chances are per response unless they say otherwise.
_NO_RIGHT_ANSWER = 0.10  # per group: nobody is right, the best is the nearest
_NO_NUMBER = 0.15  # a response without a single number: one of _EMPTY_HANDED
_REPEAT = 0.12  # a number that an earlier response of the group gave already
_SLIP = 0.3  # for "read": a wrong number that is a slip of another one, see `_slip`
_SENTENCES = ("It is {}.", "I see {}.", "Answer: {}")
_RAMBLINGS = ("Well, let me think about it again, it is {}.", "So many lines here, but I would say {} I guess.")
_WORDINGS = (("{}",), _SENTENCES, _RAMBLINGS)
_WORDING_CHANCES = (0.8, 0.15, 0.05)
_REFUSALS = ("I cannot tell.", "Not sure.", "I can't read it.", "No idea.")
_WAFFLE = ("Digits are a lovely thing to look at, are they not?", "Some lines are curved and some are not so curved.")
_EMPTY_HANDED = ("refusal", "waffle", "hedge", "silence")
_EMPTY_HANDED_CHANCES = (0.35, 0.25, 0.15, 0.25)


@dataclass(frozen=True)
class HandwritingTask:
    """One question about k handwritten digits."""

    id: str  # such as "handwriting-test-00012"
    question: str  # a key of `QUESTIONS`
    digits: tuple[int, ...]  # the k digits shown
    scans: tuple[int, ...]  # k indices into scikit-learn's `load_digits`
    media: Media = "image"  # "image" (side by side) or "video" (one a frame)

    @property
    def text(self) -> str:
        """The question as it is asked."""
        return QUESTIONS[self.question]

    @property
    def answer(self) -> str:
        """The right answer."""
        return correct_answer(self.question, self.digits)

    @property
    def messages(self) -> list[Message]:
        """The prompt: one user turn with a block for the medium (which carries none) and the question."""
        return [{"role": "user", "content": [{"type": self.media}, {"type": "text", "text": self.text}]}]

    @property
    def columns(self) -> dict[str, Any]:
        """For reward functions, beside the right answer."""
        return {"question": self.question, "digits": list(self.digits)}

    def is_correct(self, response: str) -> bool:
        """Whether a response is the right answer and nothing else."""
        return is_correct(self.question, self.digits, response)

    def grade(self, response: str) -> float:
        """The true quality of a response."""
        return grade(self.question, self.digits, response)

    def image(self) -> Image.Image:
        """The digits side by side, `(k * TILE_SIZE) x TILE_SIZE` pixels, RGB."""
        return Image.fromarray(np.concatenate([_tile(scan) for scan in self.scans], axis=1))

    def frames(self) -> list[Image.Image]:
        """The digits one at a time: k frames of `TILE_SIZE x TILE_SIZE` pixels, RGB, one frame a second."""
        return [Image.fromarray(_tile(scan)) for scan in self.scans]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Scans uint8 [1797, 8, 8], 0 = paper, 255 = ink; labels int64 [1797]."""
    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target


@cache
def _tile(scan: int) -> np.ndarray:
    """One digit, white on black, uint8 [TILE_SIZE, TILE_SIZE, 3]. Cached: 3 kB each."""
    image = Image.fromarray(_digits()[0][scan]).resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BILINEAR)
    return np.repeat(np.asarray(image)[:, :, None], 3, axis=2)


@cache
def split_scans(split: str) -> np.ndarray:
    """The scans of a split, sorted indices into `load_digits`, int64 [about 1348, 180 or 269].

    Disjoint from those of the other splits, the same for every user seed; every digit has the same share of its scans.
    """
    if split not in SPLITS:
        raise ConfigurationError(f"got split {split!r}, expected one of {list(SPLITS)}")
    labels = _digits()[1]
    rng = np.random.default_rng(20_260_410)  # part of the data: changing it changes every reported number
    chosen = []
    for digit in range(10):
        scans = rng.permutation(np.flatnonzero(labels == digit))
        ends = np.rint(np.cumsum([0.0, *SPLITS.values()]) * len(scans)).astype(int)
        index = list(SPLITS).index(split)
        chosen.append(scans[ends[index] : ends[index + 1]])
    result = np.sort(np.concatenate(chosen))
    result.flags.writeable = False  # the cache hands out the same array
    return result


def correct_answer(question: str, digits: Sequence[int]) -> str:
    """The right answer, a string of digits; for "read" it has one for each digit shown, leading zeros included."""
    if question == "read":
        return "".join(map(str, digits))
    if question == "sum":
        return str(sum(digits))
    if question == "largest":
        return str(max(digits))
    if question == "even":
        return str(sum(digit % 2 == 0 for digit in digits))
    raise ConfigurationError(f"got question {question!r}, expected one of {list(QUESTIONS)}")


def is_correct(question: str, digits: Sequence[int], response: str) -> bool:
    """Whether a response is the right answer and nothing else (white space around it is allowed)."""
    return response.strip() == correct_answer(question, digits)


def grade(question: str, digits: Sequence[int], response: str) -> float:
    """The true quality of any text as an answer. A pure function: candidates and policies are graded alike.

    The claim of a response is the only number in it (repeating it is fine).

    | response | quality |
    |---|---|
    | claim is right | 1 |
    | claim is partly right | `PARTIAL` * similarity |
    | claim is wrong | `WRONG` |
    | no number, at most `SENTENCE_LENGTH` characters, says that it does not know | `REFUSAL` |
    | anything else: two different numbers, waffle, silence | 0 |

    A claim counts in full when it stands alone, less in a sentence, half in a text longer than `SENTENCE_LENGTH`
    characters (`WORDING`). Similarity is, for "read", the share of digits in place (over the longer of the two
    numbers); else `1 - |claim - answer| / TOLERANCE`, 0 at least. The quality is 1 exactly where `is_correct`, and
    texts that are equally wrong have equal ones.

    Example:
        >>> [grade("read", (4, 7, 2), text) for text in ("472", "It is 472.", "475", "I cannot tell.", "865", "")]
        [1.0, 0.8, 0.3, 0.1, 0.05, 0.0]
    """
    answer = correct_answer(question, digits)
    text = response.strip()
    claims = set(_NUMBER.findall(text))
    if not claims and len(text) <= SENTENCE_LENGTH and _REFUSAL.search(text):
        return REFUSAL
    if len(claims) != 1:
        return 0.0
    claim = claims.pop()
    similarity = _similarity(question, claim, answer)
    # "013" says 13, but only the answer itself gets the full mark.
    if text == claim and (claim == answer or similarity < 1.0):
        wording = WORDING["bare"]
    else:
        wording = WORDING["sentence" if len(text) <= SENTENCE_LENGTH else "rambling"]
    content = 1.0 if similarity == 1.0 else max(WRONG, PARTIAL * similarity)
    # Rounded so that equal qualities compare equal, whatever their way through floating point.
    return round(content * wording, 6)


def make_tasks(
    split: str,
    num_tasks: int,
    *,
    num_digits: int = 3,
    questions: Sequence[str] = ("read",),
    media: Media = "image",
    seed: int = 0,
) -> list[HandwritingTask]:
    """Draw questions about k = `num_digits` random digits of a split; each task asks one of the questions.

    Task i depends on the seed, the split and i alone, so a longer list begins with the shorter one.
    """
    scans = split_scans(split)
    if isinstance(questions, str) or not questions or any(question not in QUESTIONS for question in questions):
        raise ConfigurationError(f"got questions={questions!r}, expected a non-empty list out of {list(QUESTIONS)}")
    if media not in get_args(Media):
        raise ConfigurationError(f"got media={media!r}, expected one of {list(get_args(Media))}")
    least = 2 if media == "video" else 1  # two frames make one temporal patch
    if not least <= num_digits <= 16:
        raise ConfigurationError(f"got num_digits={num_digits}, expected {least} to 16 for media={media!r}")
    if num_tasks < 0 or seed < 0:
        raise ConfigurationError(f"got {num_tasks} items and seed={seed}, expected numbers that are not negative")
    labels = _digits()[1]
    tasks = []
    for i in range(num_tasks):
        rng = _rng(seed, split, i, 0)
        chosen = rng.choice(scans, size=num_digits, replace=len(scans) < num_digits)
        tasks.append(
            HandwritingTask(
                id=f"handwriting-{split}-{i:05d}",
                question=questions[int(rng.integers(len(questions)))],
                digits=tuple(int(labels[scan]) for scan in chosen),
                scans=tuple(int(scan) for scan in chosen),
                media=media,
            )
        )
    return tasks


def make_groups(
    split: str,
    num_groups: int,
    *,
    num_responses: int = 4,
    num_digits: int = 3,
    questions: Sequence[str] = ("read",),
    media: Media = "image",
    seed: int = 0,
) -> list[ResponseGroup]:
    """Draw ranked groups: the tasks that `make_tasks` draws from the same seed, with N graded responses each.

    One response in nine groups of ten is right (seldom more), the others are near misses, worded answers, refusals,
    hedges, waffle or empty, in random order. Rankings follow `grade`; at least two differ within a group.
    """
    tasks = make_tasks(split, num_groups, num_digits=num_digits, questions=questions, media=media, seed=seed)
    groups = []
    for task, responses in zip(tasks, draw_responses(tasks, num_responses, split=split, seed=seed), strict=True):
        qualities = [grade(task.question, task.digits, response) for response in responses]
        groups.append(
            ResponseGroup(
                prompt=task.messages,
                responses=responses,
                images=[task.image()] if media == "image" else (),
                videos=[task.frames()] if media == "video" else (),
                rankings=dense_ranks([-quality for quality in qualities]),
                id=task.id,
            )
        )
    return groups


def draw_responses(tasks: Sequence[HandwritingTask], count: int, *, split: str, seed: int) -> list[list[str]]:
    """The N responses that `make_groups` gives each of the tasks of `make_tasks` from the same split and seed."""
    if not MIN_RESPONSES <= count <= MAX_RESPONSES:
        raise ConfigurationError(
            f"got num_responses={count}, expected {MIN_RESPONSES} to {MAX_RESPONSES}; merge groups for more candidates"
        )
    return [_draw_responses(task, count, _rng(seed, split, i, 1)) for i, task in enumerate(tasks)]


def make_policy_rows(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Rows of a dataset for TRL's GRPOTrainer or RLOOTrainer, of image tasks: TRL 1.16 passes no videos to them.

    `prompt` is one user turn with the question as a string, and TRL itself puts `image` in front; `solution` and the
    task's columns (`question` and, of handwriting, `digits`) are for reward functions.
    """
    for task in tasks:
        if task.media != "image":
            raise ConfigurationError(
                f"task {task.id!r} is a {task.media}, expected an image: TRL's trainers take no videos; "
                "make the tasks with media='image'"
            )
    return [
        {
            "prompt": [{"role": "user", "content": task.text}],
            "image": task.image(),
            "solution": task.answer,
            **task.columns,
        }
        for task in tasks
    ]


def make_sft_rows(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Rows for TRL's SFTTrainer, of image tasks; the completion is the right answer alone."""
    return [
        {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": row["solution"]}],
            "image": row["image"],
        }
        for row in make_policy_rows(tasks)
    ]


def write_handwriting_benchmarks(
    folder: str | Path, num_items: int = 256, *, num_digits: int = 2, seed: int = 0
) -> dict[str, int]:
    """Write four benchmarks of unseen scans in published schemas.

    `pairs`: a right and a wrong answer, as VL-RewardBench; `best_of_4`: one best of four, as MR2Bench-Image; `n_way`:
    eight answers with ties, the same; `video`: four answers to a video of one digit a second, as MR2Bench-Video. At
    least two digits are shown. Returns the number of items by folder.
    """
    folder = Path(folder)
    # More groups than needed: not every one has a single best answer.
    four = make_groups("test", 4 * num_items, num_responses=4, num_digits=num_digits, seed=seed)
    single_best = [group for group in four if list(group.rankings or ()).count(1) == 1][:num_items]
    eight = make_groups("test", num_items, num_responses=8, num_digits=num_digits, seed=seed)
    videos = make_groups("test", num_items, num_responses=4, num_digits=num_digits, media="video", seed=seed)
    rows = {
        "pairs": [_pair(group, folder / "pairs", i) for i, group in enumerate(single_best)],
        "best_of_4": [_ranked(group, folder / "best_of_4") for group in single_best],
        "n_way": [_ranked(group, folder / "n_way") for group in eight],
        "video": [_ranked(group, folder / "video") for group in videos],
    }
    for name, content in rows.items():
        write_json_lines(folder / name / "test.jsonl", content)
    return {name: len(content) for name, content in rows.items()}


def _rng(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    """A stream of its own for every item, so that no item depends on how many there are."""
    return np.random.default_rng([seed, list(SPLITS).index(split), index, purpose])


def _similarity(question: str, claim: str, answer: str) -> float:
    """How much of `claim` is right, 1 = all of it."""
    if len(claim) > _MAX_NUMBER_LENGTH:
        return 0.0
    if question == "read":
        return sum(a == b for a, b in zip(claim, answer, strict=False)) / max(len(claim), len(answer))
    return max(0.0, 1.0 - abs(int(claim) - int(answer)) / TOLERANCE[question])


def _draw_responses(task: HandwritingTask, count: int, rng: np.random.Generator) -> list[str]:
    """N responses in random order, of at least two different qualities."""
    while True:
        right = int(rng.random() >= _NO_RIGHT_ANSWER)
        num_claims = max(right, int(rng.binomial(count - right, 1 - _NO_NUMBER)) + right)
        repeats = int(rng.binomial(max(num_claims - 1, 0), _REPEAT))
        numbers = [task.answer] * right + _wrong_numbers(task, num_claims - repeats - right, rng)
        # Every number is as likely to be repeated as the others, the right one included.
        claims = numbers + [numbers[i] for i in rng.integers(len(numbers) or 1, size=num_claims - len(numbers))]
        responses = [_worded(claim, rng) for claim in claims]
        responses += [_empty_handed(numbers, rng) for _ in range(count - num_claims)]
        if len({grade(task.question, task.digits, response) for response in responses}) > 1:
            return [responses[i] for i in rng.permutation(count)]


def _wrong_numbers(task: HandwritingTask, count: int, rng: np.random.Generator) -> list[str]:
    """At most `count` distinct wrong answers; together with the right one no member of the set stands out."""
    if task.question == "read":
        # At most three places change, each between a few digits: a grid, and the right answer is any of its nodes.
        places = rng.permutation(len(task.digits))[:3]
        choices = next((m for m in range(2, 10) if m ** len(places) > count), 10)
        shifts = [np.concatenate([[0], 1 + rng.permutation(9)[: choices - 1]]) for _ in places]
        pool = []
        for shift in list(product(*shifts))[1:]:
            digits = np.array(task.digits)
            digits[places] = (digits[places] + shift) % 10
            pool.append("".join(map(str, digits)))
        chosen = [pool[i] for i in rng.permutation(len(pool))[:count]]
        for i in np.flatnonzero(rng.random(len(chosen)) < _SLIP):
            # Of any number of the group, so that being slipped from does not give the right one away.
            slip = _slip([task.answer, *chosen][rng.integers(len(chosen) + 1)], rng)
            if slip not in (task.answer, *chosen):
                chosen[i] = slip
        return chosen
    # A window of whole numbers with the right one anywhere in it, within what the question allows.
    k = len(task.digits)
    highest = {"sum": 9 * k, "largest": 9, "even": k}[task.question]
    width = min(max(count + 1, 6), highest + 1)
    start = int(np.clip(int(task.answer) - rng.integers(width), 0, highest + 1 - width))
    pool = [str(value) for value in range(start, start + width) if str(value) != task.answer]
    return [pool[i] for i in rng.permutation(len(pool))[:count]]


def _slip(number: str, rng: np.random.Generator) -> str:
    """A digit moved one place on, left out, or repeated.

    Policies write such numbers, and a model that only checks which digits occur does not see them.
    """
    place = int(rng.integers(len(number)))
    kind = rng.choice(["move", "drop", "repeat"], p=[0.6, 0.2, 0.2]) if len(number) > 1 else "repeat"
    digits = list(number)
    digit = digits.pop(place)
    if kind == "move":
        digits.insert((place + 1) % len(number), digit)
    elif kind == "repeat":
        digits.insert(place, digit * int(rng.integers(2, 8)))
    return "".join(digits)


def _worded(claim: str, rng: np.random.Generator) -> str:
    """A number alone, in a sentence, or in a rambling one; independent of the number."""
    templates = _WORDINGS[rng.choice(len(_WORDINGS), p=_WORDING_CHANCES)]
    return templates[rng.integers(len(templates))].format(claim)


def _empty_handed(numbers: Sequence[str], rng: np.random.Generator) -> str:
    """A response that makes no single claim: a refusal, waffle, two numbers, or nothing."""
    kind = rng.choice(_EMPTY_HANDED, p=_EMPTY_HANDED_CHANCES)
    if kind == "silence":
        return ""
    if kind == "hedge" and len(numbers) > 1:
        return " or ".join(numbers[i] for i in rng.permutation(len(numbers))[:2])
    texts = _REFUSALS if kind == "refusal" else _WAFFLE
    return texts[rng.integers(len(texts))]


def _pair(group: ResponseGroup, folder: Path, number: int) -> dict[str, Any]:
    """The best answer and the worst; the best comes first in every second pair."""
    ranks = list(group.rankings or ())
    pair = group.select([ranks.index(1), ranks.index(max(ranks))][:: 1 if number % 2 else -1])
    return {
        "id": f"wildvision-{group.id}",
        "query": _text(group),
        "response": list(pair.responses),
        "human_ranking": [rank - 1 for rank in pair.rankings or ()],
        **_media(group, folder),
    }


def _ranked(group: ResponseGroup, folder: Path) -> dict[str, Any]:
    row = {"id": group.id, "prompt": _text(group), "responses": list(group.responses), "rankings": group.rankings}
    return row | _media(group, folder)


def _text(group: ResponseGroup) -> str:
    return "".join(block.get("text", "") for turn in group.messages for block in turn["content"])


def _media(group: ResponseGroup, folder: Path) -> dict[str, str]:
    if group.videos:
        frames = folder / "frames" / str(group.id)
        frames.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(group.videos[0]):
            frame.save(frames / f"{number}.png")
        return {"video": str(frames.relative_to(folder))}
    return {"image": str(write_image(group.images[0], folder / "images").relative_to(folder))}
