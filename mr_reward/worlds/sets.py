"""Set worlds: how good a response is depends on the others, and the best that any judge can reach is known exactly.

A prompt shows one picture. A response is a digit and a mark, such as "7kQ"; the digits of a group are drawn apart from
each other by a policy whose chances are known (`answer_law`), and groups without a better and a worse response are
drawn again. Four worlds:

| world | picture | the policy says | best |
|---|---|---|---|
| `consensus` | too blurred to read | the digit, 60 %; else any other | the digit |
| `novelty` | three digits | one of the three, 60 %; else any other | a digit shown that no other response says |
| `closest` | too blurred to read | a number at most two away from it | who is nearest; nobody need be right |
| `control` | one digit | any digit | the digit |

In the first three a judge that sees all responses at once (joint) can do better than one that scores each alone
(separate): what the others say tells what cannot be read, or decides by itself. In `control` they tell nothing.

Marks are two letters drawn without regard to anything. They keep equal answers different texts (equal texts would be
scored once, and agreement could not be seen), and a separate judge can draw lots with them. There are 2,704, because
that no two of a group are alike tells a separate judge something: who scores a digit up when its mark goes with it is
right on .624 of the groups of 16 in `consensus` if there are 26 marks (bound: .600); with 2,704 the gain is lost in
the third decimal.

A blurred picture is grain that is drawn apart from the digit, so that *nothing* can be read; of a readable one the
bounds take for granted that it is read without a mistake. Train, validation and test share no picture. Without
pictures the same worlds are text: what can be read stands in the prompt, and what cannot is left out, as it tells
nothing.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from math import factorial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import special

from mr_reward.errors import ConfigurationError
from mr_reward.groups import ResponseGroup, dense_ranks
from mr_reward.messages.prompts import Message
from mr_reward.worlds.handwriting import SPLITS, TILE_SIZE, HandwritingTask, make_tasks

Array = NDArray[np.float64]

# World -> its question; short, because the tiny models read few words as one token.
SET_WORLDS = {"consensus": "Number?", "novelty": "Some number?", "closest": "About?", "control": "Number?"}

DIGITS = 10
RIGHT = 0.6  # how often the policy is right in `consensus` and `novelty`
SHOWN = 3  # digits in a picture of `novelty`
NEAR = (2.0, 2.0, 1.0)  # `closest`: how often a number is said, by its distance from the right one; else never
MAX_RESPONSES = 24  # the bounds count up all groups that there are
_MARKS = tuple(map("".join, product(string.ascii_letters, repeat=2)))

# Streams of random numbers of their own, beside those of the handwriting world.
_PICTURE, _ANSWERS = 100, 101


@dataclass(frozen=True)
class Bounds:
    """The best that a judge can reach on the groups of a world."""

    best_of_n: float  # share of groups where its first choice is a best response, lots drawn among equal scores
    pairwise: float  # share of all ordered pairs that it orders rightly, an equal score counting half


@dataclass(frozen=True)
class SetTask:
    """A prompt of a set world."""

    id: str
    world: str
    digits: tuple[int, ...]  # what is right: one digit, in `novelty` three
    scans: tuple[int, ...]  # the scans shown, one a digit; none where nothing can be read
    grain: tuple[int, ...]  # seed of a picture without scans

    @property
    def messages(self) -> list[Message]:
        """The prompt: one user turn with a block for the picture (which carries none) and the question."""
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SET_WORLDS[self.world]}]}]

    @property
    def text(self) -> str:
        """The prompt without a picture: the question, and the digits that could be read."""
        return " ".join([SET_WORLDS[self.world], *map(str, self.digits if self.scans else ())])

    def image(self) -> Image.Image:
        """The picture, `TILE_SIZE` pixels high and as wide for each digit, RGB."""
        if self.scans:
            return HandwritingTask(self.id, "read", self.digits, self.scans).image()
        grain = np.random.default_rng(self.grain).integers(64, 192, (8, 8), dtype=np.uint8)
        return Image.fromarray(grain).resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BILINEAR).convert("RGB")


def make_set_tasks(world: str, split: str, num_tasks: int, *, seed: int = 0) -> list[SetTask]:
    """Draw prompts; prompt i depends on world, split, seed and i alone."""
    _check_world(world)
    # Enough scans that three of them show different digits.
    scanned = make_tasks(split, num_tasks, num_digits=16 if world == "novelty" else 1, seed=seed)
    tasks = []
    for i, task in enumerate(scanned):
        key = _key(world, split, seed, i, _PICTURE)
        if world == "novelty":
            places = {digit: place for place, digit in reversed(list(enumerate(task.digits)))}
            chosen = sorted(places.values())[:SHOWN]
        else:
            chosen = [0]
        digits, scans = (tuple(found[place] for place in chosen) for found in (task.digits, task.scans))
        if world in ("consensus", "closest"):  # every digit as often as any other, which scans are not
            digits, scans = (int(np.random.default_rng((*key, 1)).integers(DIGITS)),), ()
        tasks.append(SetTask(f"{world}-{split}-{i:05d}", world, digits, scans, key))
    return tasks


def make_set_groups(
    world: str, split: str, num_groups: int, *, num_responses: int = 4, seed: int = 0, pictures: bool = True
) -> list[ResponseGroup]:
    """Draw ranked groups of N responses; a longer list begins with the shorter one.

    Without `pictures` what they show stands in the prompt.
    """
    _check_size(num_responses)
    groups = []
    for i, task in enumerate(make_set_tasks(world, split, num_groups, seed=seed)):
        rng = np.random.default_rng(_key(world, split, seed, i, _ANSWERS))
        law, levels = answer_law(world, task.digits), [0]
        while len(set(levels)) == 1 or min(levels) > 0 and world != "closest":
            answers = rng.choice(DIGITS, num_responses, p=law)
            levels = answer_levels(world, task.digits, answers.tolist())
        marks = rng.choice(_MARKS, num_responses, replace=False)
        groups.append(
            ResponseGroup(
                prompt=task.messages if pictures else task.text,
                responses=[f"{answer}{mark}" for answer, mark in zip(answers, marks, strict=True)],
                images=[task.image()] if pictures else (),
                rankings=dense_ranks(levels),
                id=task.id,
            )
        )
    return groups


def answer_law(world: str, digits: Sequence[int]) -> Array:
    """How often the policy says each of the ten digits, [10], given what is right."""
    if world == "closest":
        away = np.abs(np.arange(DIGITS) - digits[0])
        weights = np.where(away < len(NEAR), np.array(NEAR)[np.minimum(away, len(NEAR) - 1)], 0.0)
    elif world == "control":
        weights = np.ones(DIGITS)
    else:
        weights = np.full(DIGITS, (1 - RIGHT) / (DIGITS - len(digits)))
        weights[list(digits)] = RIGHT / len(digits)
    return weights / weights.sum()


def answer_levels(world: str, digits: Sequence[int], answers: Sequence[int]) -> list[int]:
    """How far each answer of a group is from the best that there can be, 0 = that."""
    if world == "closest":
        return [abs(answer - digits[0]) for answer in answers]
    if world == "novelty":
        return [min(answers.count(answer), 2) - 1 if answer in digits else 2 for answer in answers]
    return [int(answer not in digits) for answer in answers]


@cache
def bounds(world: str, num_responses: int) -> Mapping[str, Bounds]:
    """The best accuracy of a `joint` and of a `separate` judge on groups of N responses of a world, by these names.

    A joint judge sees the whole group; it is the Bayes judge, all groups being counted up. A separate judge gives each
    answer a score by the picture and the answer alone, and fair lots are drawn among equal ones; the best order of the
    answers is found by dynamic programming over the sets of answers that stand above. Its pairwise accuracy no lots
    can raise (it is linear in the score of each answer), nor its best of N in `consensus` (by convexity). In `closest`
    lots that are not fair add .002 at N = 4 and less above, as gradient ascent over all lots finds; in `novelty` it
    finds nothing.
    """
    _check_world(world)
    _check_size(num_responses)
    perfect = Bounds(1.0, 1.0)
    if world == "control":
        return {"joint": perfect, "separate": perfect}
    if world == "novelty":
        return {"joint": perfect, "separate": _separate_novelty(num_responses)}
    law = np.array([answer_law(world, [truth]) for truth in range(DIGITS)])
    levels = np.array([answer_levels(world, [truth], range(DIGITS)) for truth in range(DIGITS)])
    if world == "consensus":
        counts, copies = _sorted_counts(num_responses)
    else:  # all answers lie within two of the right one
        counts, copies = _counts_in_windows(num_responses, 2 * len(NEAR) - 1), np.ones(1)
    return {
        "joint": joint_bounds(law, levels, counts, copies),
        "separate": separate_bounds(law, levels, num_responses),
    }


def joint_bounds(law: Array, levels: NDArray[np.int64], counts: NDArray[np.int64], copies: Array) -> Bounds:
    """Of the judge that knows everything but the truth, of which each is as likely as any other.

    `law`, `levels` [truths, answers]: chance and level of each answer. `counts` [V, answers]: how often a group says
    what, for every group that there is; each stands for `copies` [V] that are judged alike.

    By chance a pair of answers may not be ordered by one order of all of them, but here it can: by count in
    `consensus`, and in `closest` by the distance from the median of what the number may be.
    """
    size, truths = int(counts[0].sum()), len(law)
    ways = copies * factorial(size) / special.factorial(counts).prod(axis=1)
    best, wins = np.zeros(counts.shape), np.zeros((*counts.shape, counts.shape[1]))
    for chances, own, ranked in zip(law, levels, _ranked_chance(law, levels, size), strict=True):
        said = np.where(counts > 0, own, own.max() + 1)
        lowest = said.min(axis=1, keepdims=True)
        differ = np.where(counts > 0, own, -1).max(axis=1) > lowest[:, 0]
        chance = ways * (chances**counts).prod(axis=1) * differ / ranked / truths
        best += chance[:, None] * (said == lowest)
        wins += chance[:, None, None] * (own[:, None] < own)
    wins *= counts[:, :, None] * counts[:, None, :]
    right = np.maximum(wins, wins.transpose(0, 2, 1)).sum() / 2
    return Bounds(float(best.max(axis=1).sum()), float(right / wins.sum()))


def separate_bounds(law: Array, levels: NDArray[np.int64], size: int) -> Bounds:
    """Of the judge that orders the answers once and for all, blocks of them sharing a place; see `joint_bounds`."""
    ranked, answers = _ranked_chance(law, levels, size) * len(law), law.shape[1]
    # Every way to say: these stand above, those share the next place, the rest stands below.
    role = np.arange(3**answers)[:, None] // 3 ** np.arange(answers) % 3
    above, block = ((role == kind) @ (1 << np.arange(answers)) for kind in (1, 2))
    gain, wins = np.zeros(len(role)), np.zeros((answers, answers))
    for chances, own, each in zip(law, levels, ranked, strict=True):
        wins += np.outer(chances, chances) * (own[:, None] < own) / each
        for level in np.unique(own[chances > 0]):
            at, beyond = chances * (own == level), chances * (own > level)
            best, worse = (role == 2) @ at, (role == 2) @ beyond
            below, tied = (role == 0) @ (at + beyond), (role == 0) @ at
            # Nobody is nearer or stands above, somebody is in the block; the winner is drawn among those in it.
            share = np.divide(best, best + worse, out=np.zeros_like(best), where=best > 0)
            gain += share * ((best + worse + below) ** size - below**size) / each
            gain -= ((best + tied) ** size - tied**size) / each  # all tied: no such groups
    found = np.zeros(1 << answers)
    rows = np.argsort(above, kind="stable")
    starts = np.searchsorted(above[rows], np.arange((1 << answers) + 1))
    for before in reversed(range((1 << answers) - 1)):
        some = rows[starts[before] : starts[before + 1]]
        some = some[block[some] > 0]
        found[before] = (gain[some] + found[before | block[some]]).max()
    return Bounds(float(found[0]), _best_order(wins) / float(wins.sum()))


def _best_order(wins: Array) -> float:
    """The most that `wins[above, below]`, summed over an order, can be: the linear ordering problem."""
    answers = len(wins)
    found = np.zeros(1 << answers)
    for before in reversed(range((1 << answers) - 1)):
        free = [answer for answer in range(answers) if not before >> answer & 1]
        found[before] = max(found[before | 1 << answer] + wins[answer, free].sum() for answer in free)
    return float(found[0])


def _separate_novelty(size: int) -> Bounds:
    """An order of the three digits shown, then the others.

    Sharing a place does not pay: of two digits the one that stands above wins oftener the rarer it is that anybody
    else says it, and lots favour what is said often. Of a new and a repeated digit either may be the one that stands
    above.
    """
    counts = _counts(SHOWN + 1, size)  # last: wrong
    shown, wrong = counts[:, :SHOWN], counts[:, SHOWN]
    chance = factorial(size) / special.factorial(counts).prod(axis=1)
    chance *= (RIGHT / SHOWN) ** shown.sum(axis=1) * (1 - RIGHT) ** wrong
    new = (shown == 1).sum(axis=1)
    repeated = shown.sum(axis=1) - new
    chance *= (new > 0) & (new < size)
    first = np.take_along_axis(shown, (shown > 0).argmax(axis=1)[:, None], axis=1)[:, 0]
    undecided, told = new * repeated, (new + repeated) * wrong
    return Bounds(
        float((chance * (first == 1)).sum() / chance.sum()),
        float((chance * (told + undecided / 2)).sum() / (chance * (told + undecided)).sum()),
    )


def _ranked_chance(law: Array, levels: NDArray[np.int64], size: int) -> Array:
    """The chance that the answers of a group are not all equally good, for each truth."""
    shares = np.array(
        [
            [chances[own == level].sum() for level in range(levels.max() + 1)]
            for chances, own in zip(law, levels, strict=True)
        ]
    )
    return 1 - (shares**size).sum(axis=1)


def _counts(kinds: int, total: int) -> NDArray[np.int64]:
    """Every way to share `total` responses out among `kinds` answers, [ways, kinds]."""
    bars = np.array(list(combinations(range(total + kinds - 1), kinds - 1)))
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, total + kinds - 1)))
    return np.diff(edges, axis=1) - 1


def _counts_in_windows(total: int, width: int) -> NDArray[np.int64]:
    """Those whose answers lie within `width` neighbouring digits."""
    inside = _counts(width, total)
    windows = [np.pad(inside, ((0, 0), (start, DIGITS - width - start))) for start in range(DIGITS - width + 1)]
    return np.unique(np.concatenate(windows), axis=0)


def _sorted_counts(total: int) -> tuple[NDArray[np.int64], Array]:
    """Those that do not increase, and how many arrangements each has."""

    def descending(left: int, places: int, largest: int) -> Iterator[tuple[int, ...]]:
        if not places:
            yield ()
            return
        for first in range(-(-left // places), min(left, largest) + 1):
            yield from ((first, *rest) for rest in descending(left - first, places - 1, first))

    counts = np.array(list(descending(total, DIGITS, total)))
    same = np.array([[(row == count).sum() for count in range(total + 1)] for row in counts])
    return counts, factorial(DIGITS) / special.factorial(same).prod(axis=1)


def _key(world: str, split: str, seed: int, index: int, purpose: int) -> tuple[int, ...]:
    """The seed of a stream for one item of one world."""
    return seed, list(SPLITS).index(split), index, purpose, list(SET_WORLDS).index(world)


def _check_world(world: str) -> None:
    if world not in SET_WORLDS:
        raise ConfigurationError(f"got world {world!r}, expected one of {list(SET_WORLDS)}")


def _check_size(num_responses: int) -> None:
    if not 2 <= num_responses <= MAX_RESPONSES:
        raise ConfigurationError(
            f"got num_responses={num_responses}, expected 2 to {MAX_RESPONSES}: the bounds count up all groups"
        )
