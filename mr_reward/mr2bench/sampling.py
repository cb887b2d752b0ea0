"""Four responses out of many: spread over the ranking, with one clear best, shuffled, without the models' names."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import ResponseGroup, dense_ranks
from mr_reward.mr2bench.judgments import Question
from mr_reward.mr2bench.rankings import Denoised

__all__ = ["Variant", "draw_positions", "make_group", "sample_variants"]

_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class Variant:
    """A group of a few responses of a question."""

    question: int  # position of the question
    positions: tuple[int, ...]  # of the models, in the order shown
    gap: float  # logits between the two strongest of them


def draw_positions(
    ranking: Denoised,
    question: int,
    generator: random.Random,
    *,
    num_responses: int,
    min_gap: float,
    texts: Sequence[str] | None = None,
) -> Variant | None:
    """Draw responses from equal parts of the ranking, until one draw has a clear best; None if none has.

    Two equal texts are never drawn together, for one of them would be called worse.
    """
    ranks, strengths = ranking.ranks[question], ranking.strengths.mean[question]
    order = sorted(ranking.judged[question], key=lambda i: (ranks[i], -strengths[i]))
    if len(order) < num_responses:
        return None
    parts = [
        order[i * len(order) // num_responses : (i + 1) * len(order) // num_responses] for i in range(num_responses)
    ]
    for _ in range(_ATTEMPTS):
        drawn = [generator.choice(part) for part in parts]
        if texts is not None and len({texts[i] for i in drawn}) < num_responses:
            continue
        best = min(drawn, key=lambda i: ranks[i])
        others = [i for i in drawn if i != best]
        runner_up = max(others, key=lambda i: strengths[i])
        gap = float(strengths[best] - strengths[runner_up])
        if all(ranks[i] > ranks[best] for i in others) and gap >= min_gap:
            generator.shuffle(drawn)
            return Variant(question, tuple(drawn), gap)
    return None


def sample_variants(
    ranking: Denoised,
    *,
    num_responses: int = 4,
    min_gap: float = 0.0,
    seed: int = 0,
    questions: Mapping[str, Question] | None = None,
) -> tuple[list[Variant], list[str]]:
    """One variant of each question and the ids of those without a clear one; a draw depends on seed and id alone."""
    if not 2 <= num_responses <= len(ranking.models):
        raise ConfigurationError(
            f"num_responses is {num_responses}, expected 2 to {len(ranking.models)}, the number of models"
        )
    if min_gap < 0:
        raise ConfigurationError(f"min_gap is {min_gap}, expected 0 or more logits")
    found, dropped = [], []
    for i, name in enumerate(ranking.questions):
        generator = random.Random(f"{seed} {name}")
        texts = None
        if questions is not None:
            texts = [questions[name].responses.get(model, "").strip() for model in ranking.models]
        variant = draw_positions(ranking, i, generator, num_responses=num_responses, min_gap=min_gap, texts=texts)
        if variant is None:
            dropped.append(name)
        else:
            found.append(variant)
    return found, dropped


def make_group(
    ranking: Denoised, question: int, positions: Sequence[int], questions: Mapping[str, Question], source: str
) -> ResponseGroup:
    """The group of a question's responses; nothing in it tells which model wrote what."""
    name = ranking.questions[question]
    if name not in questions:
        raise GroupError(f"question {name!r} has judgments but no text, expected it in the questions; add it")
    given = questions[name]
    models = [ranking.models[i] for i in positions]
    if missing := [model for model in models if model not in given.responses]:
        raise GroupError(f"question {name!r} has no response of {missing[0]!r}, expected one; add it to the questions")
    return ResponseGroup(
        prompt=given.prompt,
        responses=[given.responses[model] for model in models],
        rankings=dense_ranks([ranking.ranks[question][i] for i in positions]),
        images=list(given.images),
        videos=[[video] for video in given.videos],
        id=name,
        source=source,
    )
