"""Raw human judgments: pairwise votes and full rankings, read from JSON Lines, and the questions they are about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mr_reward.data.jsonl import read_json_lines
from mr_reward.errors import GroupError

__all__ = [
    "FullRanking",
    "Question",
    "Vote",
    "read_questions",
    "read_rankings",
    "read_votes",
    "votes_of",
    "win_counts",
]

Floats = NDArray[np.float64]
_WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}


@dataclass(frozen=True, slots=True)
class Vote:
    """One comparison of two models' responses to a question."""

    question: str  # its id
    model_a: str  # the model shown first
    model_b: str  # the other
    share: float  # 1 if A won, 0 if B, 0.5 for a tie
    annotator: str | None = None  # who voted, if known


@dataclass(frozen=True, slots=True)
class FullRanking:
    """One annotator's ranking of all responses to a question."""

    question: str  # its id
    ranks: Mapping[str, int]  # model -> rank, 1 = best, ties share a rank
    annotator: str | None = None  # who ranked, if known


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with the models' responses."""

    id: str  # its name
    prompt: Any  # text or chat messages, as `ResponseGroup`
    responses: Mapping[str, str]  # model -> text
    images: Sequence[str] = ()  # paths
    videos: Sequence[str] = field(default=())  # folders of frames


def read_votes(path: str | Path) -> list[Vote]:
    """Read `{"question_id", "model_a", "model_b", "winner": "model_a" | "model_b" | "tie", "annotator"?}`."""
    found = []
    for number, row in read_json_lines(path):
        keys = ("question_id", "model_a", "model_b", "winner")
        texts = [row.get(key) for key in keys] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or row["winner"] not in _WINNERS:
            raise GroupError(
                f"{path}, line {number}: {_shown(row)}, expected question_id, model_a, model_b and a winner out of "
                f"{', '.join(_WINNERS)}; correct or remove it"
            )
        question, a, b, winner = map(str, texts)
        if a == b:
            raise GroupError(f"{path}, line {number}: {a!r} against itself, expected two models; remove it")
        found.append(Vote(question, a, b, _WINNERS[winner], _annotator(row, f"{path}, line {number}")))
    return found


def read_rankings(path: str | Path) -> list[FullRanking]:
    """Read `{"question_id", "ranking": {model: rank}, "annotator"?}`, 1 = best, ties share a rank."""
    found = []
    for number, row in read_json_lines(path):
        ranks: Any = row.get("ranking") if isinstance(row, dict) else None
        whole = isinstance(ranks, dict) and all(type(rank) is int and rank >= 1 for rank in ranks.values())
        if not whole or len(ranks) < 2 or not isinstance(row.get("question_id"), str):
            raise GroupError(
                f"{path}, line {number}: {_shown(row)}, expected question_id and a ranking of two models or more with "
                "whole numbers from 1 on; correct or remove it"
            )
        found.append(FullRanking(row["question_id"], ranks, _annotator(row, f"{path}, line {number}")))
    return found


def read_questions(path: str | Path) -> dict[str, Question]:
    """Read `{"id", "prompt", "responses": {model: text}, "images"?, "videos"?}`; media: from the file's folder."""
    found: dict[str, Question] = {}
    for number, row in read_json_lines(path):
        responses: Any = row.get("responses") if isinstance(row, dict) else None
        texts = isinstance(responses, dict) and all(isinstance(text, str) for text in responses.values())
        if not texts or not isinstance(row.get("id"), str) or not isinstance(row.get("prompt"), (str, list)):
            raise GroupError(
                f"{path}, line {number}: {_shown(row)}, expected id, prompt and responses (model -> text); correct it"
            )
        for key in ("images", "videos"):
            paths = row.get(key) or []
            # A text would be taken apart into letters.
            if not isinstance(paths, list) or not all(isinstance(one, str) for one in paths):
                raise GroupError(
                    f"{path}, line {number}: {key} is {paths!r:.80}, expected a list of paths; correct it"
                )
        if row["id"] in found:
            raise GroupError(f"{path}, line {number}: a second question {row['id']!r}, expected one; rename it")
        found[row["id"]] = Question(
            id=row["id"],
            prompt=row["prompt"],
            responses=responses,
            images=row.get("images") or (),
            videos=row.get("videos") or (),
        )
    return found


def _annotator(row: Mapping[str, Any], where: str) -> str | None:
    """Who judged; a number is a name too."""
    given = row.get("annotator")
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
        raise GroupError(f"{where}: annotator is {given!r:.60}, expected a text or a whole number; correct it")
    return None if given is None else str(given)


def _shown(row: Any) -> str:
    """What stands in the line, for a message: why it is no JSON, or its start."""
    return str(row) if isinstance(row, GroupError) else f"{row!r:.120}"


def votes_of(rankings: Iterable[FullRanking]) -> list[Vote]:
    """The pairwise votes that full rankings imply."""
    found = []
    for ranking in rankings:
        models = list(ranking.ranks.items())
        for i, (a, rank_a) in enumerate(models):
            for b, rank_b in models[i + 1 :]:
                share = 0.5 if rank_a == rank_b else float(rank_a < rank_b)
                found.append(Vote(ranking.question, a, b, share, ranking.annotator))
    return found


def win_counts(votes: Iterable[Vote], models: Sequence[str]) -> dict[str, Floats]:
    """By question (M, M): how often i was preferred to j, a tie counts half for both."""
    index = {model: i for i, model in enumerate(models)}
    found: defaultdict[str, Floats] = defaultdict(lambda: np.zeros((len(models), len(models))))
    for vote in votes:
        wins, a, b = found[vote.question], index[vote.model_a], index[vote.model_b]
        wins[a, b] += vote.share
        wins[b, a] += 1.0 - vote.share
    return dict(found)
