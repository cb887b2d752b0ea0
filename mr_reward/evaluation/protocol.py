"""Score a benchmark: every item in K orders, one line of a file for each item, interrupted runs go on."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice, permutations
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from mr_reward.errors import ConfigurationError
from mr_reward.evaluation.items import EvaluationItem, ItemRecord
from mr_reward.groups import GroupScores, ResponseGroup

__all__ = ["ALL_ORDERS", "BenchmarkScorer", "draw_orders", "read_records", "score_benchmark"]

ALL_ORDERS = 0
_MOST_ORDERS = 720  # 6!
_CHUNK = 32  # items in memory at a time


class BenchmarkScorer(Protocol):
    """What is evaluated: a reward model, a baseline, a file of scores."""

    @property
    def name(self) -> str:
        """What it is and with which options it scores; two runs with the same name give the same scores."""

    @property
    def order_free(self) -> bool:
        """Whether the order of the responses cannot move the scores."""

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As `GroupScorer.score_detailed`."""


def draw_orders(uid: str, num_responses: int, num_orders: int, seed: int) -> list[tuple[int, ...]]:
    """The orders in which an item's responses are shown, different ones, drawn at random.

    Data sets tend to store the better response first, so the stored order is not used as it is.

    Args:
        uid: of the item; part of the seed, so that an item has its orders whatever else is evaluated.
        num_responses: N.
        num_orders: K, or `ALL_ORDERS`; fewer where there are only N! of them.
        seed: of the draws.

    Returns:
        Permutations of the positions.

    Raises:
        ConfigurationError: all orders of so many responses are too many.

    Example:
        >>> sorted(draw_orders("a", 2, ALL_ORDERS, 0))
        [(0, 1), (1, 0)]
    """
    possible = math.factorial(num_responses)
    generator = random.Random(f"{seed} {uid}")
    if num_orders == ALL_ORDERS or num_orders >= possible:
        if possible > _MOST_ORDERS:
            raise ConfigurationError(
                f"item {uid}: {num_responses} responses have {possible} orders, expected at most {_MOST_ORDERS} for "
                "all of them; give a number of orders"
            )
        found = list(permutations(range(num_responses)))
        generator.shuffle(found)
        return found
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < num_orders:
        drawn[tuple(generator.sample(range(num_responses), num_responses))] = None
    return list(drawn)


def score_benchmark(
    scorer: BenchmarkScorer,
    items: Iterable[EvaluationItem],
    path: str | Path,
    *,
    settings: dict[str, Any],
    num_orders: int | None = None,
    seed: int = 0,
    total: int | None = None,
) -> list[ItemRecord]:
    """Score items and write a line for each as soon as it is known.

    If the file holds lines already, from the same scorer and settings, their items are not scored again.

    Args:
        scorer: the scorer.
        items: read as they are needed.
        path: JSON Lines file; its first line says what the run is.
        settings: what else the run depends on (benchmark, source).
        num_orders: K, or `ALL_ORDERS`. None: 1 where the order cannot matter, else 8. One order where it cannot matter
            is the stored one, otherwise orders are drawn.
        seed: of the orders.
        total: number of items, for the progress bar.

    Returns:
        The records of all items, in their order.

    Raises:
        ConfigurationError: the file belongs to another run; two items share a uid.

    Example:
        >>> score_benchmark(scorer, items, "items.jsonl", settings={})  # doctest: +SKIP
    """
    path = Path(path)
    header = {"scorer": scorer.name, "num_orders": num_orders, "seed": seed, **settings}
    known = _continued(path, header)
    records: dict[str, ItemRecord] = {}
    seen: set[str] = set()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="ascii") as file:
        if not path.stat().st_size:
            file.write(json.dumps(header) + "\n")
        waiting: list[EvaluationItem] = []
        with tqdm(total=total, desc=path.stem, unit="item") as bar:
            for item in items:
                if item.uid in seen:
                    raise ConfigurationError(f"two items are called {item.uid!r}, expected one; name them apart")
                seen.add(item.uid)
                if item.uid in known:
                    records[item.uid] = known[item.uid]
                    bar.update()
                    continue
                waiting.append(item)
                if len(waiting) == _CHUNK:
                    _score(scorer, waiting, num_orders, seed, file, records)
                    bar.update(len(waiting))
                    waiting = []
            _score(scorer, waiting, num_orders, seed, file, records)
            bar.update(len(waiting))
    return list(records.values())


def read_records(path: str | Path) -> tuple[dict[str, Any], list[ItemRecord]]:
    """Read what `score_benchmark` wrote.

    Args:
        path: the file. A last line that is cut off (an interrupted run) is left out.

    Returns:
        The first line, and the records.

    Raises:
        ConfigurationError: no such file, or no file of this kind.
    """
    try:
        lines = Path(path).read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}), expected a file of mr-reward evaluate") from error
    complete = lines[:-1]  # what follows the last line feed
    try:
        header, *rows = [json.loads(line) for line in complete]
        return header, [ItemRecord(**row) for row in rows]
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} is no file of mr-reward evaluate ({error}); remove it") from error


def _continued(path: Path, header: dict[str, Any]) -> dict[str, ItemRecord]:
    """What an earlier, interrupted run left; cuts off its last line if that is not whole."""
    if not path.exists() or not path.stat().st_size:
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    if not whole:
        return {}
    found, records = read_records(path)
    if found != header:
        differing = sorted(key for key in found.keys() | header.keys() if found.get(key) != header.get(key))
        there = ", ".join(f"{key}: {found.get(key)!r:.100}" for key in differing)
        here = ", ".join(f"{key}: {header.get(key)!r:.100}" for key in differing)
        raise ConfigurationError(
            f"{path} holds another run ({there}), expected {here}; give another folder, or remove it"
        )
    return {record.uid: record for record in records}


def _score(
    scorer: BenchmarkScorer,
    items: Sequence[EvaluationItem],
    num_orders: int | None,
    seed: int,
    file: Any,
    records: dict[str, ItemRecord],
) -> None:
    """Score items, all their orders in one call, write and keep their records."""
    orders = [_orders(scorer, item, num_orders, seed) for item in items]
    shown = [item.group.select(order) for item, own in zip(items, orders, strict=True) for order in own]
    results = iter(scorer.score_detailed(shown)) if shown else iter(())
    for item, own in zip(items, orders, strict=True):
        record = _record(item, own, list(islice(results, len(own))))
        file.write(json.dumps(asdict(record)) + "\n")
        records[item.uid] = record
    file.flush()


def _orders(scorer: BenchmarkScorer, item: EvaluationItem, num_orders: int | None, seed: int) -> list[tuple[int, ...]]:
    n = item.group.num_responses
    if scorer.order_free and num_orders in (None, 1):
        return [tuple(range(n))]
    return draw_orders(item.uid, n, 8 if num_orders is None else num_orders, seed)


def _record(item: EvaluationItem, orders: Sequence[Sequence[int]], results: Sequence[GroupScores]) -> ItemRecord:
    drop_reason = next((result.drop_reason for result in results if result.scores is None), None)
    restored = []
    for order, result in zip(orders, results, strict=True):
        scores = [0.0] * len(order)
        for response, score in zip(order, result.scores or (), strict=drop_reason is None):
            scores[response] = score
        restored.append(scores)
    return ItemRecord(
        uid=item.uid,
        category=item.category,
        rankings=list(item.group.rankings or ()),
        lengths=[len(response) for response in item.group.responses],
        orders=[list(order) for order in orders],
        scores=restored if drop_reason is None else None,
        drop_reason=drop_reason,
        truncated=max(sum(result.truncated) for result in results),
        facts=dict(item.facts),
    )
