"""What the figures of an evaluation show, by the numbers that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mr_reward.evaluation import plots
from mr_reward.evaluation.official import Interval, ItemRecord


def record(rankings: tuple[int, ...], *scores: tuple[float, ...], orders: list[tuple[int, ...]]) -> ItemRecord:
    lengths = tuple(10 * (i + 1) for i in range(len(rankings)))
    return ItemRecord(uid="", category="", rankings=rankings, lengths=lengths, orders=orders, scores=scores)


RECORDS = [
    record((1, 2, 3), (3.0, 2.0, 1.0), (1.0, 1.0, 0.0), orders=[(0, 1, 2), (2, 1, 0)]),
    record((2, 1), (0.0, 4.0), orders=[(1, 0)]),
    record((1, 1, 2), (1.0, 2.0, 6.0), orders=[(1, 2, 0)]),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that would be saved."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def series(axis: Any) -> dict[str, Any]:
    """Label -> what was drawn."""
    bars = {one.get_label(): [round(bar.get_height(), 6) for bar in one] for one in axis.containers}
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines}
    clouds = {one.get_label(): [tuple(point) for point in one.get_offsets().tolist()] for one in axis.collections}
    return {**bars, **lines, **clouds}


def test_where_the_winner_stood(drawn: list[Any]) -> None:
    plots.plot_position_bias(RECORDS, Path("x"))
    # Four orders were shown, three of them with a third slot; who shares a place shares the count.
    winner = [(1 + 0 + 1 + 0) / 4, (0 + 0.5 + 0 + 1) / 4, (0 + 0.5 + 0) / 3]
    best = [(1 + 0 + 1 + 0.5) / 4, 0.0, (0 + 1 + 0.5) / 3]
    found = series(drawn[0].axes[0])
    assert found["winner"] == pytest.approx(winner, abs=1e-6)
    assert found["best response"] == pytest.approx(best, abs=1e-6)


def test_sizes_beside_chance(drawn: list[Any]) -> None:
    plots.plot_sizes(RECORDS, Path("x"))
    found = series(drawn[0].axes[0])
    assert found["model"] == [(2, 1.0), (3, pytest.approx(((1 + 0.5) / 2 + 0.0) / 2))]
    assert found["chance"] == [(2, 0.5), (3, pytest.approx((1 / 3 + 2 / 3) / 2))]


def test_scores_beside_lengths(drawn: list[Any]) -> None:
    plots.plot_items(RECORDS, Path("x"))
    found = series(drawn[0].axes[0])
    assert found["best"] == [(-10.0, 1.0), (5.0, 2.0), (-10.0, -2.0), (0.0, -1.0)]
    assert found["others"] == [(0.0, 0.0), (10.0, -1.0), (-5.0, -2.0), (10.0, 3.0)]


def test_metrics_and_their_intervals(drawn: list[Any]) -> None:
    plots.plot_metrics({"a": Interval(0.5, 0.4, 0.7), "tau": Interval(-0.2, -0.3, 0.0)}, Path("x"))
    axis = drawn[0].axes[0]
    assert [bar.get_width() for bar in axis.patches] == [0.5, -0.2]
    (errors,) = [one for one in axis.collections if one.get_segments()]
    assert [sorted(end[0] for end in segment) for segment in errors.get_segments()] == [
        pytest.approx([0.4, 0.7]),
        pytest.approx([-0.3, 0.0]),
    ]
    assert axis.get_xlim() == (-0.3, 1.0) and [text.get_text() for text in axis.get_yticklabels()] == ["a", "tau"]


def test_curves_are_smoothed_over_a_tenth_and_keep_their_length() -> None:
    assert plots._smooth([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    values = [float(i % 4) for i in range(40)]
    found = plots._smooth(values)
    assert len(found) == 40
    for i, value in enumerate(found):
        window = values[max(0, i - 2) : i + 3]
        assert value == pytest.approx(sum(window) / len(window))


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a  b\nc", "a b c"), ("", "(nothin…"), ("12345678", "12345678"), ("123456789", "1234567…"), ("5$", r"5\$")],
)
def test_one_line(text: str, shown: str) -> None:
    assert plots.one_line(text, 8) == shown
