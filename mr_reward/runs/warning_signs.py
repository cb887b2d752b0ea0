"""Early warning signs of reward hacking, read from the metrics that a run logs anyway. Pure: numbers in, texts out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["WarningSigns"]


@dataclass
class WarningSigns:
    """Watches the logs of a GRPO run for what policies do when they play the reward model instead of the task.

    Means over the last `window` logs are compared with fixed limits, or with the means of the first `window` logs. A
    sign is told once, when it appears, and again only after it had been gone for `window` logs. None of them is a
    proof: a policy that has become sure of itself repeats itself too. Look at the samples.

    Args:
        window: logs that a mean is taken over, and that have to have passed before anything is told.
        length_correlation: limit of the within-group correlation of score and length.
        length_growth: completions this many times as long as at the start.
        spread_collapse: within-group spread of the scores below this share of the spread at the start.
        zero_spread: share of groups whose scores are all equal.
        repeated_text: share of a response that it has said before.
        truths: further metrics, such as `rewards/handwriting_accuracy/mean`, that must not fall while the score rises.
        fall: how far below its start such a metric may be, in its own units.

    Example:
        >>> signs = WarningSigns(window=1)
        >>> signs.update({"mr_reward/score_spread": 1.0})
        []
        >>> signs.update({"mr_reward/score_spread": 0.01})[0][:32]
        'the spread of the scores within '
    """

    window: int = 10
    length_correlation: float = 0.6
    length_growth: float = 2.0
    spread_collapse: float = 0.2
    zero_spread: float = 0.8
    repeated_text: float = 0.5
    truths: Sequence[str] = ()
    fall: float = 0.05
    _values: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False)
    _last_seen: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)

    def update(self, logs: Mapping[str, object]) -> list[str]:
        """Take in one log of the trainer.

        Args:
            logs: metric -> value; what is not a finite number is passed over.

        Returns:
            The signs that are new, each a sentence that says what was seen and what to look at.
        """
        for key, value in logs.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._values.setdefault(key, []).append(float(value))
        self._count += 1
        new = []
        for name, text in self._signs().items():
            if name not in self._last_seen or self._count - self._last_seen[name] > self.window:
                new.append(text)
            self._last_seen[name] = self._count
        return new

    def _signs(self) -> dict[str, str]:
        signs: dict[str, str] = {}
        correlation = self._now("mr_reward/score_length_correlation")
        if correlation is not None and correlation > self.length_correlation:
            signs["length_correlation"] = (
                f"scores follow length: within groups they correlate at {correlation:.2f} (limit "
                f"{self.length_correlation}); check that longer is better here, and not only longer"
            )
        start, now = self._start("completions/mean_length"), self._now("completions/mean_length")
        if start is not None and now is not None and now > self.length_growth * start:
            signs["length_growth"] = (
                f"completions have grown from {start:.0f} to {now:.0f} tokens in the mean; check that the reward "
                "model does not pay for length"
            )
        start, now = self._start("mr_reward/score_spread"), self._now("mr_reward/score_spread")
        if start is not None and now is not None and now < self.spread_collapse * start:
            signs["spread_collapse"] = (
                f"the spread of the scores within groups has fallen from {start:.3g} to {now:.3g}; GRPO divides by "
                "it, so what is left may be noise. Either the policy is sure, or the reward model sees no difference"
            )
        zero = self._now("mr_reward/zero_spread_groups")
        if zero is not None and zero > self.zero_spread:
            signs["zero_spread"] = (
                f"{zero:.0%} of the groups have equal scores throughout and teach nothing; raise the temperature, or "
                "take harder prompts"
            )
        repeated = self._now("mr_reward/repeated_text")
        if repeated is not None and repeated > self.repeated_text:
            signs["repeated_text"] = f"{repeated:.0%} of the responses' text repeats itself; read the samples"
        signs.update(self._falling_truths())
        return signs

    def _falling_truths(self) -> dict[str, str]:
        start, now = self._start("mr_reward/score_mean"), self._now("mr_reward/score_mean")
        if start is None or now is None or now <= start:
            return {}
        signs = {}
        for key in self.truths:
            before, after = self._start(key), self._now(key)
            if before is not None and after is not None and after < before - self.fall:
                signs[key] = (
                    f"the mean score has risen from {start:.3g} to {now:.3g} while {key} has fallen from {before:.3g} "
                    f"to {after:.3g}: the policy is winning against the reward model, not at the task"
                )
        return signs

    def _start(self, key: str) -> float | None:
        """Mean of the first window; None before a second one is full, or nothing could be compared with it."""
        values = self._values.get(key, [])
        return statistics.fmean(values[: self.window]) if len(values) >= 2 * self.window else None

    def _now(self, key: str) -> float | None:
        values = self._values.get(key, [])
        return statistics.fmean(values[-self.window :]) if len(values) >= self.window else None
