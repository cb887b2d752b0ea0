"""Judgments -> a folder with the benchmark: N-way variants, full rankings, a card that tells how noisy they are.

A variant is a few responses out of many: spread over the ranking, one clear best, shuffled, without the models' names.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mr_reward.data.groups_file import save_preferences
from mr_reward.data.media_files import resolve_media
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import ResponseGroup, dense_ranks
from mr_reward.mr2bench.judgments import FullRanking, Question, Vote
from mr_reward.mr2bench.rankings import Denoised, agreement, rank_rankings, rank_votes

_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class Variant:
    """A group of a few responses of a question."""

    question: int  # position of the question
    positions: tuple[int, ...]  # of the models, in the order shown
    gap: float  # logits between the two strongest of them


@dataclass(frozen=True, kw_only=True)
class Built:
    """A benchmark."""

    ranking: Denoised  # of all questions
    variants: Sequence[Variant]  # what was drawn
    items: Sequence[ResponseGroup]  # their groups
    full: Sequence[ResponseGroup]  # a group of all responses for each question
    dropped: Sequence[str]  # questions without a clear variant
    facts: Mapping[str, str]  # what the card and the table show, by name


def build_benchmark(
    questions: Mapping[str, Question],
    *,
    votes: Sequence[Vote] = (),
    rankings: Sequence[FullRanking] = (),
    method: str = "bt_map",
    num_responses: int = 4,
    min_gap: float = 0.0,
    seed: int = 0,
    source: str = "mr2bench",
    show_progress: bool = False,
) -> Built:
    """Rank every question and draw a variant of it.

    Args:
        questions: texts and media, by id, as `judgments.read_questions` gives them.
        votes: pairwise votes (`judgments.read_votes`); or
        rankings: full rankings (`judgments.read_rankings`).
        method: for votes, see `rankings.rank_votes`.
        num_responses: N of a variant.
        min_gap: logits that a variant's best response has to be ahead of the next.
        seed: of the draws.
        source: of the groups.
        show_progress: draw a progress bar.

    Returns:
        The benchmark.

    Raises:
        ConfigurationError: an option has a value that does not exist.
        GroupError: votes and rankings, or neither; a question or response without a text.

    Example:
        >>> build_benchmark(read_questions("questions.jsonl"), votes=votes).facts["items"]  # doctest: +SKIP
    """
    if bool(votes) == bool(rankings):
        raise GroupError(f"got {len(votes)} votes and {len(rankings)} rankings, expected one of both; give one file")
    ranking = rank_votes(votes, method=method, show_progress=show_progress) if votes else rank_rankings(rankings)
    full = [_make_group(ranking, q, judged, questions, source) for q, judged in enumerate(ranking.judged)]
    variants, dropped = sample_variants(
        ranking, num_responses=num_responses, min_gap=min_gap, seed=seed, questions=questions
    )
    items = [_make_group(ranking, v.question, v.positions, questions, source) for v in variants]
    annotators = {vote.annotator for vote in votes} | {given.annotator for given in rankings}
    facts = {
        "questions": str(len(ranking.questions)),
        "questions without judgments, left out": str(len(set(questions) - set(ranking.questions))),
        "models": str(len(ranking.models)),
        "judgments": f"{len(votes)} votes" if votes else f"{len(rankings)} full rankings",
        "annotators": str(len(annotators - {None}) or "unknown"),
        "ranked by": ranking.method,
        "items": f"{len(items)}, {num_responses} responses each",
        "questions dropped": f"{len(dropped)}, no draw with the best {min_gap:g} logits ahead",
        "questions with cyclic votes": f"{ranking.cyclic:.1%}",
        "votes against the ranking": f"{ranking.contradicted:.1%}",
    }
    if rankings:
        found = agreement(rankings)
        facts["agreement of two annotators, tau-b"] = f"{found['tau_b']:.3f}"
        facts["agreement of all, Kendall's W"] = f"{found['kendall_w']:.3f}"
    right = "estimated share of right labels"
    if rankings and len({given.question for given in rankings}) == len(rankings):
        facts[right] = "unknown, no question has two rankings"
    elif variants:
        facts[right] = f"{_right_labels(ranking, variants):.1%} (if the model of noise holds)"
    return Built(ranking=ranking, variants=variants, items=items, full=full, dropped=dropped, facts=facts)


def _right_labels(ranking: Denoised, variants: Sequence[Variant]) -> float:
    """How often the best of an item should be its strongest; ahead of the runner-up alone would be too easy."""
    chances = []
    for variant in variants:
        best, *others = sorted(variant.positions, key=ranking.ranks[variant.question].__getitem__)
        chances.append(ranking.strengths.best_probability(variant.question, best, others))
    return statistics.fmean(chances)


def write_benchmark(built: Built, folder: str | Path, media: str | Path = ".") -> None:
    """Write `benchmark.jsonl`, `full_rankings.jsonl`, images and `README.md`.

    Args:
        built: the benchmark.
        folder: where to; made if needed.
        media: folder that the questions' media paths count from.

    Raises:
        MediaError: a medium does not exist.

    Example:
        >>> write_benchmark(built, "benchmark")  # doctest: +SKIP
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, groups in (("benchmark", built.items), ("full_rankings", built.full)):
        save_preferences((resolve_media(group, Path(media)) for group in groups), folder / f"{name}.jsonl")
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    strengths = zip(built.ranking.models, built.ranking.strengths.overall, strict=True)
    card = environment.get_template("card.md.j2").render(
        facts=built.facts, strengths=sorted(strengths, key=lambda pair: -pair[1]), date=date.today().isoformat()
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _draw_variant(
    ranking: Denoised, question: int, generator: random.Random, size: int, min_gap: float, texts: Sequence[str] | None
) -> Variant | None:
    """Draw responses from equal parts of the ranking, until one draw has a clear best; None if none has.

    Two equal texts are never drawn together, for one of them would be called worse.
    """
    ranks, strengths = ranking.ranks[question], ranking.strengths.mean[question]
    order = sorted(ranking.judged[question], key=lambda i: (ranks[i], -strengths[i]))
    if len(order) < size:
        return None
    parts = [order[i * len(order) // size : (i + 1) * len(order) // size] for i in range(size)]
    for _ in range(_ATTEMPTS):
        drawn = [generator.choice(part) for part in parts]
        if texts is not None and len({texts[i] for i in drawn}) < size:
            continue
        best = min(drawn, key=lambda i: ranks[i])
        others = [i for i in drawn if i != best]
        gap = float(strengths[best] - max(strengths[i] for i in others))
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
        variant = _draw_variant(ranking, i, generator, num_responses, min_gap, texts)
        if variant is None:
            dropped.append(name)
        else:
            found.append(variant)
    return found, dropped


def _make_group(
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
