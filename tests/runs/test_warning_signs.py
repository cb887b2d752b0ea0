"""Warning signs of reward hacking: each from the metrics that show it, told once, and silent on a healthy run."""

import random
import re

import pytest

from mr_reward.grpo.telemetry import repeated_share
from mr_reward.runs.callbacks import WarningSigns

HEALTHY = {
    "mr_reward/score_mean": 0.1,
    "mr_reward/score_spread": 1.0,
    "mr_reward/score_length_correlation": 0.2,
    "mr_reward/zero_spread_groups": 0.1,
    "mr_reward/repeated_text": 0.05,
    "completions/mean_length": 100.0,
    "rewards/truth/mean": 0.5,
}
# what changes, the words that the sign has to say
SIGNS = [
    ({"mr_reward/score_length_correlation": 0.9}, "scores follow length.*0.90"),
    ({"completions/mean_length": 250.0}, "grown from 100 to 250 tokens"),
    ({"mr_reward/score_spread": 0.01}, "spread of the scores within groups has fallen from 1 to 0.01"),
    ({"mr_reward/zero_spread_groups": 0.95}, "95% of the groups have equal scores"),
    ({"mr_reward/repeated_text": 0.8}, "80% of the responses' text repeats itself"),
    ({"mr_reward/score_mean": 3.0, "rewards/truth/mean": 0.2}, "rewards/truth/mean has fallen from 0.5 to 0.2"),
]


def run(signs: WarningSigns, *phases: tuple[dict[str, float], int]) -> list[str]:
    """The signs that a run shows; each phase is a change to the healthy logs, and how many logs it lasts."""
    rng = random.Random(0)
    told = []
    for change, count in phases:
        for _ in range(count):
            logs = {key: value * rng.uniform(0.95, 1.05) for key, value in {**HEALTHY, **change}.items()}
            told += signs.update(logs)
    return told


def test_a_healthy_run_is_silent() -> None:
    assert run(WarningSigns(truths=["rewards/truth/mean"]), ({}, 200)) == []


@pytest.mark.parametrize(("change", "words"), SIGNS, ids=[next(reversed(change)) for change, _ in SIGNS])
def test_each_sign_is_told_with_its_numbers_once_and_again_when_it_comes_back(
    change: dict[str, float], words: str
) -> None:
    signs = WarningSigns(window=2, truths=["rewards/truth/mean"])
    healthy, sick = [HEALTHY] * 4, [{**HEALTHY, **change}] * 4
    told = [[text for logs in phase for text in signs.update(logs)] for phase in (healthy, sick, healthy, sick)]
    assert told[0] == told[2] == []
    for phase in (told[1], told[3]):
        assert len(phase) == 1
    # A window of two mixes the first sick log with a healthy one; in a window of one the numbers are the change's own.
    signs = WarningSigns(window=1, truths=["rewards/truth/mean"])
    signs.update(HEALTHY)
    (text,) = signs.update({**HEALTHY, **change})
    assert re.search(words, text), text


def test_a_sign_that_comes_and_goes_is_told_once() -> None:
    signs = WarningSigns(window=10)
    told = []
    for step in range(100):  # the mean of a window goes over the limit and back all the time
        correlation = 0.6 + (0.05 if step % 4 < 2 else -0.04)
        told += signs.update({"mr_reward/score_length_correlation": correlation})
    assert len(told) == 1


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("gone", [0, 1, 2, 3, 4])
def test_a_sign_is_told_again_after_a_window_without_it(
    window: int, gone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs = WarningSigns(window=window)
    shown = [True, *[False] * gone, True]
    monkeypatch.setattr(signs, "_signs", lambda: {"x": "told"} if shown.pop(0) else {})
    told = [signs.update({}) for _ in range(2 + gone)]
    assert told[0] == ["told"] and told[-1] == (["told"] if gone >= window else [])


def test_a_sign_is_told_at_the_first_log_that_can_tell_it() -> None:
    """With the second full window, or the first where nothing is compared; by the mean of it, not by its last log."""
    for change, _ in SIGNS:
        compared = "completions/mean_length" in change or "mr_reward/score_spread" in change or len(change) > 1
        signs = WarningSigns(window=2, truths=["rewards/truth/mean"])
        logs = [*([HEALTHY] * 2 if compared else []), *[{**HEALTHY, **change}] * 2]
        assert [len(signs.update(one)) for one in logs[:-1]] == [0] * (len(logs) - 1)
        assert len(signs.update(logs[-1])) == 1, change
    key = "mr_reward/score_length_correlation"
    signs = WarningSigns(window=2)  # the limit is 0.6
    assert [len(signs.update({key: value})) for value in (0.5, 0.65, 0.5, 0.75)] == [0, 0, 0, 1]
    signs = WarningSigns(window=2)  # half as long again at the end, of a start whose first log was short
    lengths = (10.0, 110.0, 100.0, 130.0, 120.0, 130.0)
    assert [len(signs.update({"completions/mean_length": value})) for value in lengths] == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(("truth", "told"), [(0.46, 0), (0.44, 1)])
def test_a_truth_may_fall_a_little(truth: float, told: int) -> None:
    signs = WarningSigns(window=1, truths=["rewards/truth/mean"])
    signs.update(HEALTHY)
    assert len(signs.update({**HEALTHY, "mr_reward/score_mean": 1.0, "rewards/truth/mean": truth})) == told


def test_truth_may_fall_when_the_score_does_too() -> None:
    signs = WarningSigns(window=1, truths=["rewards/truth/mean"])
    signs.update(HEALTHY)
    assert signs.update({**HEALTHY, "mr_reward/score_mean": -1.0, "rewards/truth/mean": 0.1}) == []


def test_missing_and_undefined_metrics_are_passed_over() -> None:
    signs = WarningSigns(window=1)
    for logs in ({}, {"mr_reward/score_spread": None, "epoch": "x"}, {"mr_reward/score_spread": float("nan")}):
        assert signs.update(logs) == []


def test_repeated_share_against_a_slow_count() -> None:
    rng = random.Random(1)
    for _ in range(50):
        text = "".join(rng.choice("ab ") for _ in range(rng.randint(16, 60)))
        runs = [text[i : i + 8] for i in range(len(text) - 7)]
        repeats = sum(run in runs[:i] for i, run in enumerate(runs))
        assert repeated_share(text) == pytest.approx(repeats / len(runs))
    assert repeated_share("short") == repeated_share("") == 0.0
    # Two runs of 8 at least: one character less says nothing.
    assert repeated_share("x" * 15) == 0.0 and repeated_share("x" * 16) == pytest.approx(8 / 9)
    assert repeated_share("1" * 1000) > 0.99
