"""What watches a GRPO run: held-out prompts, early signs of reward hacking, and a figure at the end.

The rollouts are the trainer's own (`eval_strategy`, `eval_dataset`), so validation works wherever training does: with
vLLM, with ZeRO-3, on many ranks.
"""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerState

from mr_reward.data.jsonl import read_json_lines, write_json_lines
from mr_reward.errors import ConfigurationError, whole_number
from mr_reward.evaluation.plots import plot_curves
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.reward import MultiResponseReward
from mr_reward.grpo.telemetry import RIGHT_ABOVE_WRONG

logger = logging.getLogger(__name__)

# Panel of a figure -> the metrics it shows. One that was never logged leaves no trace.
_TRAINING_PANELS = {
    "score of the reward model": ("mr_reward/score_mean",),
    "share above the reference": ("mr_reward/win_rate",),
    "right scored above wrong": (RIGHT_ABOVE_WRONG,),
    "spread within groups": ("mr_reward/score_spread", "mr_reward/zero_spread_groups"),
    "order": ("mr_reward/order_flip_rate",),
    "length": ("mr_reward/score_length_correlation",),
}
_VALIDATION_PANELS = {
    "score of the reward model": ("eval_mr_reward/score_mean", "eval_ema_mr_reward/score_mean"),
    "share above the reference": ("eval_mr_reward/win_rate", "eval_ema_mr_reward/win_rate"),
    "right scored above wrong": (f"eval_{RIGHT_ABOVE_WRONG}", f"eval_ema_{RIGHT_ABOVE_WRONG}"),
    "within groups": ("eval_mr_reward/score_spread", "eval_mr_reward/score_length_correlation"),
    "responses": ("eval_mr_reward/duplicate_responses", "eval_mr_reward/repeated_text"),
}
_NOT_IN_A_LEGEND = re.compile(r"^eval_|mr_reward/|rewards/|/mean$")  # of a metric's name


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
        right_above_wrong: share of the pairs of a right and a wrong rollout whose right one has to score higher.

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
    right_above_wrong: float = 0.0
    _values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list), init=False, repr=False)
    _last_seen: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)

    def update(self, logs: Mapping[str, object]) -> list[str]:
        """Take in one log of the trainer; the signs that are new, each a sentence that says what to look at."""
        for key, value in logs.items():
            if _is_number(value):
                self._values[key].append(float(value))
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
        if correlation > self.length_correlation:
            signs["length_correlation"] = (
                f"scores follow length: within groups they correlate at {correlation:.2f} (limit "
                f"{self.length_correlation}); check that longer is better here, and not only longer"
            )
        start, now = self._start_and_now("completions/mean_length")
        if now > self.length_growth * start:
            signs["length_growth"] = (
                f"completions have grown from {start:.0f} to {now:.0f} tokens in the mean; check that the reward "
                "model does not pay for length"
            )
        start, now = self._start_and_now("mr_reward/score_spread")
        if now < self.spread_collapse * start:
            signs["spread_collapse"] = (
                f"the spread of the scores within groups has fallen from {start:.3g} to {now:.3g}; GRPO divides by "
                "it, so what is left may be noise. Either the policy is sure, or the reward model sees no difference"
            )
        zero = self._now("mr_reward/zero_spread_groups")
        if zero > self.zero_spread:
            signs["zero_spread"] = (
                f"{zero:.0%} of the groups have equal scores throughout and teach nothing; raise the temperature, or "
                "take harder prompts"
            )
        repeated = self._now("mr_reward/repeated_text")
        if repeated > self.repeated_text:
            signs["repeated_text"] = f"{repeated:.0%} of the responses' text repeats itself; read the samples"
        agreement = self._now(RIGHT_ABOVE_WRONG)
        if agreement < self.right_above_wrong:
            signs["right_above_wrong"] = (
                f"right rollouts score above wrong ones in only {agreement:.0%} of the pairs (limit "
                f"{self.right_above_wrong:.0%}); train the reward model on rollouts of this policy"
            )
        start, now = self._start_and_now("mr_reward/score_mean")
        for key in self.truths if now > start else ():
            before, after = self._start_and_now(key)
            if after < before - self.fall:
                signs[key] = (
                    f"the mean score has risen from {start:.3g} to {now:.3g} while {key} has fallen from {before:.3g} "
                    f"to {after:.3g}: the policy is winning against the reward model, not at the task"
                )
        return signs

    def _start_and_now(self, key: str) -> tuple[float, float]:
        """Means of the first and of the last window; NaN, with which no comparison holds, unless two are full."""
        values = self._values[key]
        return statistics.fmean(values[: self.window]) if len(values) >= 2 * self.window else math.nan, self._now(key)

    def _now(self, key: str) -> float:
        values = self._values[key]
        return statistics.fmean(values[-self.window :]) if len(values) >= self.window else math.nan


class PolicyValidation(TrainerCallback):
    """Writes `validation.jsonl`, `validation.png` and `samples.md` to a folder, and warns of reward hacking.

    At each evaluation: the trainer's `eval_` metrics (a line of `validation.jsonl`, a curve each in the figure, those
    of other reward functions in a panel of their own; with `EMACallback` those of the average too), and a few groups
    of the last evaluation batch with their responses from best to worst (`samples.md`, and a table in the terminal).
    At each log of the training: `WarningSigns`, as warnings and in `warning_signs` of the next line. Only the main
    process writes. A resumed run keeps its files; what was written after the checkpoint is written again.

    Args:
        reward: the reward function of the trainer; its last call is where the samples come from.
        folder: where to write.
        num_samples: groups to show at each evaluation.
        signs: what to warn of; None for the defaults.
        console: where the table goes; None for the terminal.

    Raises:
        ConfigurationError: matplotlib is missing.

    Example:
        ```python
        validation = PolicyValidation(reward, "out")
        trainer = GRPOTrainer(..., eval_dataset=held_out, callbacks=[validation])
        ```
    """

    def __init__(
        self,
        reward: MultiResponseReward,
        folder: str | Path,
        *,
        num_samples: int = 3,
        signs: WarningSigns | None = None,
        console: Console | None = None,
    ) -> None:
        if find_spec("matplotlib") is None:
            raise ConfigurationError("the validation figure needs matplotlib; install mr-reward[eval]")
        self.reward = reward
        self.folder = Path(folder)
        self._file = self.folder / "validation.jsonl"
        self.num_samples = num_samples
        self.signs = signs if signs is not None else WarningSigns()
        self.console = console if console is not None else Console()
        self._pending: list[str] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep what an interrupted run had written up to the checkpoint, or begin with nothing."""
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = [record for record in self._read() if record["step"] <= state.global_step]
            # A new run replaces what an older one left here.
            write_json_lines(self._file, kept if state.global_step else [])
            for logs in state.log_history:  # of the run that is resumed
                if "eval_mr_reward/score_mean" in logs:
                    self._pending = []  # they stand in its line
                self._new_signs(logs)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Look for warning signs in the metrics of the training."""
        if state.is_world_process_zero and logs:
            for sign in self._new_signs(logs):
                logger.warning("step %d, sign of reward hacking: %s", state.global_step, sign)
            if any(key.startswith("eval_ema_") for key in logs):
                self._write(state)  # the average is evaluated behind the weights

    def _new_signs(self, logs: Mapping[str, Any]) -> list[str]:
        """Those of a log of the training, for the next line too; those of an evaluation are not looked for."""
        new = [] if any(key.startswith("eval_") for key in logs) else self.signs.update(logs)
        self._pending += new
        return new

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write down this evaluation."""
        if not state.is_world_process_zero:
            return
        logs = next((entry for entry in reversed(state.log_history) if "eval_mr_reward/score_mean" in entry), None)
        if logs is not None and logs["step"] == state.global_step:
            self._write(state)
            self._show_samples(state.global_step)

    def _write(self, state: TrainerState) -> None:
        """The line of this step, and the figure."""
        logs = [entry for entry in state.log_history if entry["step"] == state.global_step]
        metrics = {key: value for entry in logs for key, value in entry.items() if key.startswith("eval_")}
        # The evaluation that ends an epoch may fall on a step that was evaluated already.
        earlier = self._read()
        same = [record for record in earlier if record["step"] == state.global_step]
        signs = [*(sign for record in same for sign in record["warning_signs"]), *self._pending]
        self._pending = []
        records = [record for record in earlier if record["step"] != state.global_step]
        records.append({"step": state.global_step, **metrics, "warning_signs": signs})
        write_json_lines(self._file, records)
        others = [*_mean_rewards(records, "eval_rewards/"), *_mean_rewards(records, "eval_ema_rewards/")]
        others = [key for key in others if self.reward.__name__ not in key]
        panels = _panels(records, {**_VALIDATION_PANELS, "other rewards": others})
        if panels:
            plot_curves(panels, self.folder / "validation.png", title="held-out prompts")

    def _read(self) -> list[dict[str, Any]]:
        return [record for _, record in read_json_lines(self._file)] if self._file.is_file() else []

    def _show_samples(self, step: int) -> None:
        samples = _ranked(self.reward, self.num_samples)
        title = f"step {step}: rollouts for held-out prompts, best first"
        lines = [f"# {title.capitalize()}", ""]
        for group, ranked in samples:
            lines += ["```text", json.dumps(_prompt_text(group), ensure_ascii=False)]
            lines += [f"{score:+9.3f}  {json.dumps(response, ensure_ascii=False)}" for score, response in ranked]
            lines += ["```", ""]
        # Lone surrogates, which a policy can write, have no UTF-8.
        (self.folder / "samples.md").write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
        self.console.print(_samples_table(samples, title))


_Samples = list[tuple[ResponseGroup, list[tuple[float, str]]]]


def _ranked(reward: MultiResponseReward, count: int) -> _Samples:
    """The first scored groups of the last call: scores and responses from best to worst."""
    scored = [(found.group, found.scores) for found in reward.last_scored if found.scores is not None]
    return [
        (group, sorted(zip(scores, group.responses, strict=True), key=lambda pair: -pair[0]))
        for group, scores in scored[:count]
    ]


def _samples_table(samples: _Samples, title: str) -> Table:
    table = Table("prompt", "score", "response", title=title)
    for group, ranked in samples:
        for position, (score, response) in enumerate(ranked):
            name = _prompt_text(group) if position == 0 else ""
            table.add_row(_plain(name, 60), f"{score:+.3f}", _plain(response, 100))
        table.add_section()
    return table


class ShownGroups(TrainerCallback):
    """Shows in the terminal some groups of the step that was logged, their responses from best to worst.

    Only the main process shows, of the groups that it has scored itself. The table of TRL's `log_completions` has a
    column for each reward and for each of `mr_reward.grpo.telemetry.COLUMN_KEYS`, too many for 80 characters a line.

    Args:
        reward: the reward function of the trainer; its last call is where the groups come from.
        every: show at each log of a step that is a multiple of it.
        num_groups: how many to show.
        console: where the table goes; None for the terminal.

    Example:
        ```python
        trainer = GRPOTrainer(..., callbacks=[ShownGroups(reward, every=20)])
        ```
    """

    def __init__(
        self, reward: MultiResponseReward, *, every: int = 1, num_groups: int = 2, console: Console | None = None
    ) -> None:
        self.reward = reward
        self.every = whole_number(every, "every", "show each so many steps")
        self.num_groups = num_groups
        self.console = console if console is not None else Console()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show what the last step before this log was trained on."""
        of_training = not any(key.startswith("eval_") or key == "train_runtime" for key in logs or ())
        if state.is_world_process_zero and of_training and state.global_step % self.every == 0:
            samples = _ranked(self.reward, self.num_groups)
            if samples:
                self.console.print(_samples_table(samples, f"step {state.global_step}: rollouts, best first"))


class RunFigure(TrainerCallback):
    """Writes `training.png` to a folder when training ends: scores, spread, flips, correlation of score and length.

    The mean of `multi_response_reward` itself is left out: its rewards compare, so it is the same at every step. Other
    reward functions have a panel of their own.

    Only the main process writes. A resumed run shows the steps before the interruption too, from the checkpoint. The
    figure needs matplotlib (the extra `eval`); without it a warning says so when training begins.

    Args:
        folder: where to write.

    Example:
        ```python
        trainer = GRPOTrainer(..., callbacks=[RunFigure("out")])
        ```
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.can_draw = find_spec("matplotlib") is not None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell what will be missing while there is time."""
        if state.is_world_process_zero and not self.can_draw:
            logger.warning("no matplotlib, so there will be no figure of the run; install mr-reward[eval]")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw what was logged."""
        if state.is_world_process_zero and self.can_draw:
            plot_run(state.log_history, self.folder / "training.png")


def plot_run(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> bool:
    """Draw what a run has logged (`trainer.state.log_history`) as a PNG file; False if there was nothing to draw."""
    rewards = _mean_rewards(log_history, "rewards/")
    if any("mr_reward/score_mean" in entry for entry in log_history):
        # A mean of its rewards is a constant by construction: 0 where they are centred, 0.5 for ranks and win rates.
        rewards = [key for key in rewards if key != "rewards/multi_response_reward/mean"]
    panels = _panels(log_history, {**_TRAINING_PANELS, "other rewards": rewards})
    if not panels:
        logger.warning("nothing was logged, so there is no figure %s; set logging_steps", path)
        return False
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_curves(panels, path, title="training", columns=3)
    return True


def _mean_rewards(logs: Sequence[Mapping[str, Any]], prefix: str) -> list[str]:
    return sorted({key for entry in logs for key in entry if key.startswith(prefix) and key.endswith("/mean")})


def _panels(
    logs: Sequence[Mapping[str, Any]], shown: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]]:
    """Title -> name of a curve -> its steps and values; what has no value is left out."""
    panels = {}
    for title, keys in shown.items():
        curves = {}
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in logs if _is_number(entry.get(key))]
            if points:
                steps, values = zip(*points, strict=True)
                curves[_NOT_IN_A_LEGEND.sub("", key)] = (steps, values)
        if curves:
            panels[title] = curves
    return panels


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _prompt_text(group: ResponseGroup) -> str:
    """The text of the last turn; media as a word."""
    content = group.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(block["text"] if block["type"] == "text" else f"({block['type']})" for block in content)


def _plain(text: str, width: int) -> Text:
    """Text that the terminal shows as it is, cut to a width: no markup, no control characters."""
    shown = Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))
    shown.truncate(width, overflow="ellipsis")
    return shown
