"""Judgments -> a folder with the benchmark: N-way variants, full rankings, a card that tells how noisy they are."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from mr_reward.data.media_files import resolve_media
from mr_reward.data.preferences import save_preferences
from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.mr2bench.annotator_noise import ranking_strengths
from mr_reward.mr2bench.bradley_terry import bradley_terry_map
from mr_reward.mr2bench.judgments import FullRanking, Question, Vote, votes_of, win_counts
from mr_reward.mr2bench.rankings import Denoised, agreement, consensus_ranks, describe, rank_votes
from mr_reward.mr2bench.sampling import Variant, make_group, sample_variants

__all__ = ["Built", "build_benchmark", "rank_rankings", "write_benchmark"]


@dataclass(frozen=True, kw_only=True)
class Built:
    """A benchmark."""

    ranking: Denoised  # of all questions
    variants: Sequence[Variant]  # what was drawn
    items: Sequence[ResponseGroup]  # their groups
    full: Sequence[ResponseGroup]  # a group of all responses for each question
    dropped: Sequence[str]  # questions without a clear variant
    facts: Mapping[str, str]  # what the card and the table show, by name


def rank_rankings(rankings: Sequence[FullRanking]) -> Denoised:
    """Consensus of several full rankings per question, with strengths that say how sure it is.

    Where no question has two rankings, noise cannot be told from quality: the strengths are then Bradley-Terry on the
    pairs of each ranking, good for comparing gaps, and surer than they should be.
    """
    if not rankings:
        raise GroupError("got no rankings, expected at least one; check the file")
    by_question: defaultdict[str, list[FullRanking]] = defaultdict(list)
    for ranking in rankings:
        by_question[ranking.question].append(ranking)
    models = sorted({model for ranking in rankings for model in ranking.ranks})
    questions = sorted(by_question)
    ranks = [consensus_ranks(by_question[question], models) for question in questions]
    counts = win_counts(votes_of(rankings), models)
    wins = [counts[question] for question in questions]
    repeated = any(len(members) > 1 for members in by_question.values())
    strengths = ranking_strengths(by_question, models) if repeated else bradley_terry_map(wins)
    return describe("consensus", models, questions, wins, ranks, strengths)


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
        questions: texts and media, by id.
        votes: pairwise votes; or
        rankings: full rankings.
        method: for votes, see `rank_votes`.
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
    full = [make_group(ranking, q, judged, questions, source) for q, judged in enumerate(ranking.judged)]
    variants, dropped = sample_variants(
        ranking, num_responses=num_responses, min_gap=min_gap, seed=seed, questions=questions
    )
    items = [make_group(ranking, v.question, v.positions, questions, source) for v in variants]
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
    if rankings and len({given.question for given in rankings}) == len(rankings):
        facts["estimated share of right labels"] = "unknown, no question has two rankings"
    elif variants:
        facts["estimated share of right labels"] = (
            f"{_right_labels(ranking, variants):.1%} (if the model of noise holds)"
        )
    return Built(ranking=ranking, variants=variants, items=items, full=full, dropped=dropped, facts=facts)


def _right_labels(ranking: Denoised, variants: Sequence[Variant]) -> float:
    """How often the best of an item should be its strongest; ahead of the runner-up alone would be too easy."""
    chances = []
    for variant in variants:
        ranks = ranking.ranks[variant.question]
        best, *others = sorted(variant.positions, key=lambda i, own=ranks: own[i])  # type: ignore[misc]
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
    (folder / "README.md").write_text(_card(built), encoding="utf-8")


def _card(built: Built) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in built.facts.items())
    strengths = sorted(
        zip(built.ranking.models, built.ranking.strengths.overall, strict=True), key=lambda pair: -pair[1]
    )
    models = "\n".join(f"| {name} | {strength:+.2f} |" for name, strength in strengths)
    return f"""---
tags: [reward-modeling, preference-learning, N-way-ranking]
---

# An N-way reward-model benchmark

Built from human judgments by `mr-reward mr2bench build`, {date.today().isoformat()}.

| | |
|---|---|
{rows}

`benchmark.jsonl` has one item a line: `prompt`, `responses` in random order, `rankings` (1 = best, ties share a rank)
and media. Responses are drawn from equal parts of the question's ranking; the best one is always single.
`full_rankings.jsonl` has all responses to each question. No line says which model wrote what.

    mr-reward evaluate groups MODEL --source benchmark.jsonl --out results

Overall strength of the models, in logits (over all questions):

| model | strength |
|---|---|
{models}
"""
