"""Raw human judgments: pairwise votes and full rankings, read from JSON Lines, and the questions they are about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mr_reward.data.jsonl import read_json_lines
from mr_reward.errors import GroupError

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
    videos: Sequence[str] = ()  # folders of frames


def read_votes(path: str | Path) -> list[Vote]:
    """Read `{"question_id", "model_a", "model_b", "winner": "model_a" | "model_b" | "tie", "annotator"?}`."""
    keys = ("question_id", "model_a", "model_b", "winner")

    def fits(row: dict[str, Any]) -> bool:
        return all(isinstance(row.get(key), str) for key in keys) and row["winner"] in _WINNERS

    found = []
    for where, row in _rows(path, fits, f"question_id, model_a, model_b and a winner out of {', '.join(_WINNERS)}"):
        question, a, b, winner = (row[key] for key in keys)
        if a == b:
            raise GroupError(f"{where}: {a!r} against itself, expected two models; remove it")
        found.append(Vote(question, a, b, _WINNERS[winner], _annotator(row, where)))
    return found


def read_rankings(path: str | Path) -> list[FullRanking]:
    """Read `{"question_id", "ranking": {model: rank}, "annotator"?}`, 1 = best, ties share a rank."""

    def fits(row: dict[str, Any]) -> bool:
        ranks = row.get("ranking")
        whole = isinstance(ranks, dict) and all(type(rank) is int and rank >= 1 for rank in ranks.values())
        return whole and len(row["ranking"]) > 1 and isinstance(row.get("question_id"), str)

    rows = _rows(path, fits, "question_id and a ranking of two models or more with whole numbers from 1 on")
    return [FullRanking(row["question_id"], row["ranking"], _annotator(row, where)) for where, row in rows]


def read_questions(path: str | Path) -> dict[str, Question]:
    """Read `{"id", "prompt", "responses": {model: text}, "images"?, "videos"?}`; media: from the file's folder."""

    def fits(row: dict[str, Any]) -> bool:
        responses = row.get("responses")
        texts = isinstance(responses, dict) and all(isinstance(text, str) for text in responses.values())
        return texts and isinstance(row.get("id"), str) and isinstance(row.get("prompt"), (str, list))

    found: dict[str, Question] = {}
    for where, row in _rows(path, fits, "id, prompt and responses (model -> text)"):
        media = {key: row.get(key) or () for key in ("images", "videos")}
        for key, paths in media.items():
            # A text would be taken apart into letters.
            if not isinstance(paths, (list, tuple)) or not all(isinstance(one, str) for one in paths):
                raise GroupError(f"{where}: {key} is {paths!r:.80}, expected a list of paths; correct it")
        if row["id"] in found:
            raise GroupError(f"{where}: a second question {row['id']!r}, expected one; rename it")
        found[row["id"]] = Question(id=row["id"], prompt=row["prompt"], responses=row["responses"], **media)
    return found


def _rows(
    path: str | Path, fits: Callable[[dict[str, Any]], bool], expected: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with its place for messages; one that does not fit is an error."""
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict) or not fits(row):
            shown = str(row) if isinstance(row, GroupError) else f"{row!r:.120}"
            raise GroupError(f"{where}: {shown}, expected {expected}; correct or remove it")
        yield where, row


def _annotator(row: Mapping[str, Any], where: str) -> str | None:
    """Who judged; a number is a name too."""
    given = row.get("annotator")
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
        raise GroupError(f"{where}: annotator is {given!r:.60}, expected a text or a whole number; correct it")
    return None if given is None else str(given)


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
