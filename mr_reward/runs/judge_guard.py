"""Whether the judge is still right about the policy: its score against a held-out truth, evaluation by evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from mr_reward.errors import ConfigurationError

logger = logging.getLogger(__name__)

_WIN_RATE = "mr_reward/win_rate"


@dataclass(frozen=True, slots=True)
class GuardReport:
    """What the evaluations of a run say, up to the last one."""

    steps: tuple[int, ...]  # of the evaluations that have both numbers, in their order; there may be none
    truths: tuple[float, ...]  # the watched metric at each
    best: int  # number of the evaluation with the best truth, the first of several
    fooled: int  # in how many evaluations up to the last one, without a break, the judge has been fooled
    alarms: tuple[int, ...]  # the steps at which that number reached the guard's patience


def replay_guard(
    logs: Iterable[Mapping[str, Any]], *, truth: str, judge: str, fall: float = 0.05, patience: int = 2
) -> GuardReport:
    """What `JudgeGuard` makes of a run's `log_history`, or of the lines of its `validation.jsonl`.

    The judge is fooled at an evaluation where the truth is more than `fall` below its best so far, while the judge's
    score is above the one it gave to that best. Of a step that was evaluated twice the last evaluation counts.
    """
    both = [log for log in logs if truth in log and judge in log]
    if not both:
        raise ConfigurationError(f"no log has {truth} and {judge}, expected evaluations with both")
    found = {
        int(log["step"]): (float(log[truth]), float(log[judge]))
        for log in both  # where all groups were dropped there is no number
        if all(isinstance(log[key], int | float) and math.isfinite(log[key]) for key in (truth, judge))
    }
    steps = sorted(found)
    best, fooled, alarms = 0, 0, []
    for number, step in enumerate(steps):
        best_truth, best_score = found[steps[best]]
        right, score = found[step]
        fooled = fooled + 1 if right < best_truth - fall and score > best_score else 0
        if fooled == patience:
            alarms.append(step)
        if right > best_truth:
            best = number
    return GuardReport(tuple(steps), tuple(found[step][0] for step in steps), best, fooled, tuple(alarms))


class JudgeGuard(TrainerCallback):
    """Watches the trainer's evaluations for over-optimisation: the judge's score rises, what is right falls.

    What is right is the trainer's `metric_for_best_model`: a reward function that knows it
    (`rewards/handwriting_accuracy/mean`, with weight 0 the policy does not learn from it), or, without one, the share
    of the rollouts above a reference (`mr_reward/win_rate`), which is the judge's word too and so says less. Thus
    transformers keeps the best checkpoint by the same number: `save_strategy: best`, or `save_steps` equal to
    `eval_steps`, and `load_best_model_at_end: true` to end with it. At an alarm a warning says since when; at the end
    the log has the best step beside the last, and a warning if no checkpoint has the best one, as where the policy was
    best before training.

    `WarningSigns` compares the training's own logs with their beginning; this compares held-out evaluations with the
    best one. The state is the trainer's history, so a run that is resumed goes on where it was.

    Args:
        judge: the metric that the policy could win without being right.
        fall: how far below its best the truth may be, in its own units.
        patience: evaluations in a row before the alarm.
        stop: end the training at the alarm.

    Raises:
        ConfigurationError: a setting that makes no sense; when training begins, a `metric_for_best_model` that is no
            truth, or no evaluation.

    Example:
        ```python
        args = GRPOConfig(..., metric_for_best_model="rewards/accuracy/mean", load_best_model_at_end=True)
        trainer = GRPOTrainer(..., args=args, callbacks=[JudgeGuard()])
        ```
    """

    def __init__(
        self,
        *,
        judge: str = "eval_mr_reward/score_mean",
        fall: float = 0.05,
        patience: int = 2,
        stop: bool = False,
    ) -> None:
        if fall < 0 or patience < 1:
            raise ConfigurationError(f"fall is {fall}, patience {patience}, expected fall >= 0 and patience >= 1")
        self.judge = judge
        self.fall = fall
        self.patience = patience
        self.stop = stop

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Refuse what could not be guarded, before anything is computed."""
        metric = args.metric_for_best_model
        if metric is None or metric.endswith("loss") or _of_evaluation(metric) == self.judge:
            raise ConfigurationError(
                f"metric_for_best_model is {metric!r}, which does not tell whether the judge is right; give "
                f"rewards/NAME/mean of a reward function that knows the truth, or {_WIN_RATE}"
            )
        if not args.greater_is_better:
            raise ConfigurationError("greater_is_better is false, expected a truth of which more is better")
        if args.eval_strategy == "no":
            raise ConfigurationError("eval_strategy is 'no', expected evaluations; set eval_strategy: steps")
        if args.save_strategy == args.eval_strategy == "steps" and state.eval_steps % state.save_steps:
            logger.warning(
                "eval_steps is %s, expected a multiple of save_steps=%s: the best evaluation may be one without a "
                "checkpoint, which transformers then passes over; or set save_strategy: best",
                state.eval_steps,
                state.save_steps,
            )

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Look at the history with this evaluation."""
        truth = _of_evaluation(args.metric_for_best_model)
        report = self._report(args, state)
        if report is None:
            return
        if state.global_step in report.alarms and state.is_world_process_zero:
            best, last = report.truths[report.best], report.truths[-1]
            logger.warning(
                "step %d: the judge is fooled: %s has risen since step %d while %s has fallen from %.3f to %.3f%s",
                state.global_step,
                self.judge,
                report.steps[report.best],
                truth,
                best,
                last,
                "; training stops" if self.stop else "",
            )
        if self.stop and report.fooled >= self.patience:  # a run that is resumed behind the alarm stops too
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell what was kept."""
        truth = _of_evaluation(args.metric_for_best_model)
        report = self._report(args, state)
        if report is not None and state.is_world_process_zero:
            best = report.steps[report.best]
            logger.info(
                "%s: best %.3f at step %d, last %.3f at step %d; best checkpoint: %s",
                truth,
                report.truths[report.best],
                best,
                report.truths[-1],
                report.steps[-1],
                state.best_model_checkpoint or "none was saved",
            )
            if args.load_best_model_at_end and Path(state.best_model_checkpoint or "").name != f"checkpoint-{best}":
                logger.warning(
                    "the best evaluation is that of step %d, of which there is no checkpoint; the run ends with %s",
                    best,
                    state.best_model_checkpoint or "the last weights",
                )

    def _report(self, args: Any, state: TrainerState) -> GuardReport | None:
        """None where there is nothing to look at."""
        truth = _of_evaluation(args.metric_for_best_model)
        if not any(truth in log for log in state.log_history):
            return None  # the trainer's own error names the metrics that there are
        report = replay_guard(state.log_history, truth=truth, judge=self.judge, fall=self.fall, patience=self.patience)
        return report if report.steps else None


def truth_metrics(rewards: Sequence[Any], columns: Sequence[str]) -> list[str]:
    """What `metric_for_best_model` can be: the rewards beside the judge, and the win rate if there are references."""
    names = [getattr(reward, "__name__", type(reward).__name__) for reward in rewards]  # as TRL's log has them
    return [*(f"rewards/{name}/mean" for name in names), *([_WIN_RATE] if "reference_response" in columns else [])]


def _of_evaluation(metric: str) -> str:
    """A metric's name in the log of an evaluation, as transformers completes it."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"
