"""A reward function that knows what is right, held against the scores of the reward model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mr_reward.errors import ConfigurationError
from mr_reward.grpo.reward import MultiResponseReward


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Whether TRL would call a reward function beside the others."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class Truth:
    """The rewards of another function; beside them it logs how often the reward model's scores agree with them.

    The metric is `mr_reward/right_above_wrong`, on the current rollouts: in a group whose truths differ, the share of
    its pairs of a right and a wrong response whose right one scores higher, ties half; the mean over such groups.
    Right is what has the highest truth of its group. The values of all ranks are gathered, so it is the number of a
    single process, and a function that fails on one rank stops all.

    Args:
        function: a reward function as TRL takes it, that is not asynchronous. It gives M truths, higher is better,
            None where it knows none.
        reward: the reward model's function of the same trainer, before this one in `reward_funcs`: TRL calls them one
            after the other, with the same rollouts. `reward_weights` 0 only looks at the truth.

    Raises:
        ConfigurationError: the function is asynchronous; or, when it is called, the reward model's was not before it.

    Example:
        ```python
        reward = MultiResponseReward("path/to/reward-model", num_generations=8)
        trainer = GRPOTrainer(model, reward_funcs=[reward, Truth(accuracy, reward)], args=args, train_dataset=data)
        ```
    """

    def __init__(self, function: Callable[..., Any], reward: MultiResponseReward) -> None:
        if is_asynchronous(function):
            raise ConfigurationError(
                f"{function!r} is asynchronous: TRL calls it beside the others, where ranks cannot wait for each "
                "other; give a plain function, or use it as a reward without a Truth around it"
            )
        self.function = function
        self.reward = reward
        self.__name__ = getattr(function, "__name__", type(function).__name__)  # TRL names metrics after it

    def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        """As the function itself; every rank has to call it."""
        with self.reward.exchange.fail_together(f"asking {self.__name__}") as phase:
            values = list(self.function(*args, **kwargs))
            phase.payload = [None if value is None else float(value) for value in values]
        log_metric = kwargs.get("log_metric")
        if log_metric is not None:
            truths = [value for own in phase.gathered for value in own]
            for key, value in self.reward.agreement(truths).items():
                log_metric(key, value)
        return values
