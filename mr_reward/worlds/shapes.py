"""The shapes world: a coloured shape, questions about it in plain English, and their right answers.

The 5,000 pictures (64 x 64 pixels) and 48,248 questions are those of the package `easy-vqa` (MIT; the extra `shapes`),
which brings them along: nothing is downloaded when it runs. Its test pictures are `test`; of its train pictures every
eighth is `validation`, the others are `train`. The split is a property of the data and does not depend on any seed. A
prompt shows the shape cut out and scaled to one tile, since a shape fills a twentieth of its picture and a reader that
sees the whole of it was at chance after 180 steps; every cut-out is different, too.

An answer is one word: yes or no, one of three shapes, one of eight colours. The answers of a made-up group are drawn
so that neither length nor agreement gives the right one away: different words of the right kind first, each as likely
as the others to be said again, and wording apart from being right. How good a text is as an answer is a pure function
of the right answer and the text (`grade`), for made-up answers and completions of a policy alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from mr_reward.errors import ConfigurationError
from mr_reward.groups import ResponseGroup, dense_ranks
from mr_reward.messages.prompts import Message
from mr_reward.worlds.handwriting import REFUSAL, SENTENCE_LENGTH, SPLITS, TILE_SIZE, WORDING, WRONG, Media

# Kind of question -> its answers. What is said instead of the right one is another of them.
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "yes_no": ("yes", "no"),
}
ANSWERS = tuple(sorted(word for words in QUESTIONS.values() for word in words))
ASKED = ("shape", "color")  # unless others are wanted; half of the yes-or-no questions hold a "not"
MIN_RESPONSES, MAX_RESPONSES = 2, 64

_VALIDATION = 8  # every eighth train picture
_BACKGROUND, _MARGIN = 60, 2  # a pixel this far from the background is the shape's; pixels left around it
_ANSWER_STREAM = 110  # of random numbers, beside those of the other worlds
_WORD = re.compile(r"\b(" + "|".join(ANSWERS) + r")\b", re.IGNORECASE)
_REFUSAL = re.compile(r"\b(cannot|can't|unable|not sure|no idea)\b", re.IGNORECASE)

# How groups are drawn. Chances are per response unless they say otherwise.
_NO_RIGHT_ANSWER = 0.10  # per group
_EMPTY_HANDED = 0.15  # a response that answers nothing
_REPEAT = 0.12  # a word that an earlier response said
_SENTENCE = 0.2
_SENTENCES = ("It is {}.", "I see {}.", "Answer: {}")
_EMPTY = ("", "I cannot tell.", "I am not sure.", "Shapes are a lovely thing to look at.")


@dataclass(frozen=True)
class ShapesTask:
    """One question about one picture."""

    id: str  # such as "shapes-test-00012"
    question: str  # a key of `QUESTIONS`
    text: str  # the question as it is asked
    answer: str  # the right answer, one of `ANSWERS`
    path: str  # of the picture

    media: Media = "image"

    @property
    def messages(self) -> list[Message]:
        """The prompt: one user turn with a block for the picture (which carries none) and the question."""
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.text}]}]

    @property
    def columns(self) -> dict[str, Any]:
        """For reward functions, beside the right answer."""
        return {"question": self.question}

    def image(self) -> Image.Image:
        """The shape and a narrow margin, `TILE_SIZE` pixels wide and high, RGB."""
        return _cut_out(self.path)

    def is_correct(self, response: str) -> bool:
        """Whether a response is the right answer and nothing else."""
        return is_correct(self.answer, response)

    def grade(self, response: str) -> float:
        """The true quality of a response."""
        return grade(self.answer, response)


def make_tasks(split: str, num_tasks: int, *, questions: Sequence[str] = ASKED, seed: int = 0) -> list[ShapesTask]:
    """Draw questions of the given kinds from a split, each kind as often as the others, with replacement.

    Task i depends on the kinds, the seed, the split and i alone, so a longer list begins with the shorter one.
    """
    if isinstance(questions, str) or not questions or any(question not in QUESTIONS for question in questions):
        raise ConfigurationError(f"got questions={questions!r}, expected a non-empty list out of {list(QUESTIONS)}")
    if num_tasks < 0 or seed < 0:
        raise ConfigurationError(f"got {num_tasks} items and seed={seed}, expected numbers that are not negative")
    pool = _questions(split)
    tasks = []
    for i in range(num_tasks):
        rng = _rng(seed, split, i)
        kind = questions[int(rng.integers(len(questions)))]
        tasks.append(ShapesTask(f"shapes-{split}-{i:05d}", kind, *pool[kind][int(rng.integers(len(pool[kind])))]))
    return tasks


def make_groups(
    split: str,
    num_groups: int,
    *,
    num_responses: int = 4,
    questions: Sequence[str] = ASKED,
    seed: int = 0,
) -> list[ResponseGroup]:
    """Draw ranked groups: the tasks that `make_tasks` draws, with N graded answers each (`draw_answers`)."""
    if not MIN_RESPONSES <= num_responses <= MAX_RESPONSES:
        raise ConfigurationError(f"got num_responses={num_responses}, expected {MIN_RESPONSES} to {MAX_RESPONSES}")
    groups = []
    for i, task in enumerate(make_tasks(split, num_groups, questions=questions, seed=seed)):
        responses = draw_answers(task.answer, num_responses, _rng(seed, split, i, 1))
        groups.append(
            ResponseGroup(
                prompt=task.messages,
                responses=responses,
                images=[task.image()],
                rankings=dense_ranks([-task.grade(response) for response in responses]),
                id=task.id,
            )
        )
    return groups


def is_correct(answer: str, response: str) -> bool:
    """Whether a response is the right answer and nothing else (case and white space around it do not matter)."""
    return response.strip().lower() == answer


def shapes_accuracy(completions: Sequence[Any], solution: Sequence[str], **_: Any) -> list[float]:
    """A TRL reward function that is the truth: 1 for a right answer, 0 otherwise."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_correct(*row)) for row in zip(solution, texts, strict=True)]


def shapes_grade(completions: Sequence[Any], solution: Sequence[str], **_: Any) -> list[float]:
    """As `shapes_accuracy`, with the true quality (`grade`): ranks wrong answers too."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [grade(*row) for row in zip(solution, texts, strict=True)]


def grade(answer: str, response: str) -> float:
    """The true quality of any text as an answer, 1 exactly where `is_correct`.

    The claim of a response is the only one of the 13 words in it. In a sentence it counts less (`WORDING`), a wrong
    one `WRONG`. Without a claim, a short text that says that it does not know is worth `REFUSAL`; anything else is
    worth nothing.

    Example:
        >>> [grade("red", text) for text in ("Red", "It is red.", "I cannot tell.", "blue", "red or blue")]
        [1.0, 0.8, 0.1, 0.05, 0.0]
    """
    text = response.strip()
    claims = {claim.lower() for claim in _WORD.findall(_REFUSAL.sub("", text))}
    if not claims and len(text) <= SENTENCE_LENGTH and _REFUSAL.search(text):
        return REFUSAL
    if len(claims) != 1:
        return 0.0
    wording = "bare" if text.lower() in claims else "sentence" if len(text) <= SENTENCE_LENGTH else "rambling"
    return round((1.0 if answer in claims else WRONG) * WORDING[wording], 6)


def draw_answers(answer: str, count: int, rng: np.random.Generator) -> list[str]:
    """N made-up answers in random order, of at least two qualities."""
    others = [word for words in QUESTIONS.values() if answer in words for word in words if word != answer]
    while True:
        right = int(rng.random() >= _NO_RIGHT_ANSWER)
        claims = max(right, int(rng.binomial(count, 1 - _EMPTY_HANDED)))
        repeats = int(rng.binomial(max(claims - 1, 0), _REPEAT))
        words = [answer] * right + list(rng.permutation(others)[: claims - repeats - right])
        # Every word is as likely to be repeated as the others, the right one included.
        words += [words[i] for i in rng.integers(len(words) or 1, size=claims - len(words))]
        said = [rng.choice(_SENTENCES).format(word) if rng.random() < _SENTENCE else str(word) for word in words]
        said += [str(rng.choice(_EMPTY)) for _ in range(count - claims)]
        if len({grade(answer, text) for text in said}) > 1:
            return [said[i] for i in rng.permutation(count)]


@cache
def _cut_out(path: str) -> Image.Image:
    """The shape with a margin, in the middle of a square, scaled to a tile."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    pixels = np.asarray(picture).astype(int)
    background = np.median(pixels, axis=(0, 1))
    rows, columns = np.nonzero(np.abs(pixels - background).max(axis=2) > _BACKGROUND)
    side = int(max(np.ptp(rows), np.ptp(columns))) + 1 + 2 * _MARGIN
    cut = Image.new("RGB", (side, side), tuple(background.astype(int).tolist()))
    # The shape's middle comes to the middle.
    x, y = (side // 2 - (int(place.min()) + int(place.max()) + 1) // 2 for place in (columns, rows))
    cut.paste(picture, (x, y))
    return cut.resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BILINEAR)


def _easy_vqa() -> ModuleType:
    """The package with the data, on first use."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ConfigurationError("the shapes world needs easy-vqa; install mr-reward[shapes]") from error
    return easy_vqa


@cache
def _questions(split: str) -> Mapping[str, Sequence[tuple[str, str, str]]]:
    """Question, right answer and path of the picture, of every question of a split, by kind."""
    if split not in SPLITS:
        raise ConfigurationError(f"got split {split!r}, expected one of {list(SPLITS)}")
    package = _easy_vqa()
    if split == "test":
        questions, paths = package.get_test_questions(), package.get_test_image_paths()
    else:
        questions, paths = package.get_train_questions(), package.get_train_image_paths()
    found: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind in QUESTIONS}
    for text, answer, picture in zip(*questions, strict=True):
        kind = next((kind for kind, words in QUESTIONS.items() if answer in words), None)
        if kind is None:
            raise ConfigurationError(
                f"easy-vqa has the answer {answer!r}, expected one of {list(ANSWERS)}; install easy-vqa 1.0"
            )
        if split == "test" or (picture % _VALIDATION == 0) == (split == "validation"):
            found[kind].append((text, answer, str(Path(paths[picture]))))
    return found


def _rng(seed: int, split: str, index: int, purpose: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, list(SPLITS).index(split), index, _ANSWER_STREAM + purpose])
