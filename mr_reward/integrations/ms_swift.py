"""A reward function for ms-swift's GRPO.

ms-swift 4.6.0 calls it as TRL does, on each rank with that rank's rollouts (`swift/rl_core/grpo_algorithm.py`):
`reward_func(completions, **columns)` with `messages` (the completion is the last one) and `images` among the columns.
So `MultiResponseReward` itself does the work, groups over several ranks included.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mr_reward.errors import GroupError
from mr_reward.grpo.reward import MultiResponseReward


def register(
    model: str | os.PathLike[str] | None = None, *, name: str = "multi_response_reward", **options: Any
) -> type[Any]:
    """Make the reward known to ms-swift. Call it in a file that is given to `--external_plugins`.

    Args:
        model: folder or hub id of a reward model; None with `server`.
        name: for `--reward_funcs`.
        **options: of `MultiResponseReward`; the number of generations is ms-swift's.

    Returns:
        The class that was registered.

    Example:
        ```python
        # plugin.py, for: swift rlhf --rlhf_type grpo --external_plugins plugin.py --reward_funcs multi_response_reward
        from mr_reward.integrations.ms_swift import register

        register("outputs/rm")
        ```
    """
    from swift.rewards.orm import ORM, orms

    class MultiResponseORM(ORM):
        """Rewards of whole groups."""

        def __init__(self, args: Any = None, **kwargs: Any) -> None:
            super().__init__(args, **kwargs)
            sizes = [getattr(args, key, None) for key in ("num_generations", "num_generations_eval")]
            self.reward = MultiResponseReward(model, sizes[0] or 0, num_generations_eval=sizes[1], **options)

        def __call__(self, completions: Sequence[str], **kwargs: Any) -> list[float | None]:
            messages = kwargs.get("messages")
            if messages is None:
                raise GroupError(f"ms-swift passed no messages, found {sorted(kwargs)}; another version than 4.6?")
            images = [list(row or ()) for row in kwargs.get("images") or [()] * len(messages)]
            prompts = [turns[:-1] for turns in messages]
            columns = {"images": images, "tools": kwargs.get("tools")}
            return self.reward(prompts, completions, **columns, trainer_state=kwargs.get("trainer_state"))

    orms[name] = MultiResponseORM
    return MultiResponseORM
