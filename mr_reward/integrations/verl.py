"""Reward functions for verl.

`compute_score` is for the batch reward manager, which hands over whole batches (verl 0.9.1,
`verl/workers/reward_manager/batch.py`). `compute_score_single` is for the reward loop, which calls for each rollout by
itself from several processes (`verl/experimental/reward_loop/reward_manager/naive.py`): it asks a server that collects
the groups (`mr-reward serve --collect`).

verl passes neither prompt nor images to a reward function, so they have to stand in the data set's `extra_info`:
`index` (different for each prompt, as in verl's own examples), `prompt` (text or messages), and `images` (paths) if
there are any.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mr_reward.errors import GroupAssemblyError, GroupError, ScoringServerError
from mr_reward.groups import ResponseGroup, Scorer
from mr_reward.grpo.reward import REWARD_TRANSFORMS
from mr_reward.scorers.opening import open_scorer

__all__ = ["compute_score", "compute_score_single"]


def compute_score(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any]],
    *,
    num_generations: int,
    model: str | None = None,
    server: str | None = None,
    reward: str = "centred",
    **unused: Any,
) -> list[dict[str, float]]:
    """Rewards of a batch of whole groups.

    Args:
        data_sources: M names; not looked at.
        solution_strs: M responses.
        ground_truths: M; not looked at.
        extra_infos: M objects with `index`, `prompt` and perhaps `images`.
        num_generations: rollouts of a prompt, `actor_rollout_ref.rollout.n`.
        model: folder or hub id of a reward model; it is loaded once in the process.
        server: URL of `mr-reward serve`, in place of `model`.
        reward: see `MultiResponseReward`.
        **unused: what else verl passes.

    Returns:
        M objects with `score` (the reward) and `mr_reward_score` (before the transform), which verl logs.

    Raises:
        GroupAssemblyError: the rollouts of a prompt are no multiple of `num_generations`: the batch was split.
        GroupError: `extra_info` lacks `index` or `prompt`, or a group was dropped.

    Example:
        ```yaml
        custom_reward_function:
          path: my_reward.py          # from mr_reward.integrations.verl import compute_score
          name: compute_score
          reward_kwargs: {model: rm, num_generations: 8}
        reward_model: {reward_manager: batch}
        ```
    """
    if reward not in REWARD_TRANSFORMS:
        raise GroupError(f"reward is {reward!r}, expected one of {', '.join(REWARD_TRANSFORMS)}")
    rows_by_prompt: dict[str, list[int]] = defaultdict(list)
    for row, info in enumerate(extra_infos):
        rows_by_prompt[_key(info)].append(row)
    chunks: list[list[int]] = []
    for key, rows in rows_by_prompt.items():
        if len(rows) % num_generations:
            raise GroupAssemblyError(
                f"prompt {key} has {len(rows)} rollouts in this call, expected a multiple of num_generations="
                f"{num_generations}: the batch was split before the reward. Use the batch reward manager, or "
                "compute_score_single with `mr-reward serve --collect`"
            )
        chunks += [rows[i : i + num_generations] for i in range(0, len(rows), num_generations)]
    groups = [
        ResponseGroup(
            prompt=extra_infos[rows[0]]["prompt"],
            images=extra_infos[rows[0]].get("images") or (),
            responses=[solution_strs[row] for row in rows],
            id=_key(extra_infos[rows[0]]),
        )
        for rows in chunks
    ]
    results = _scorer(model, server).score_detailed(groups)
    rewards: list[dict[str, float]] = [{} for _ in solution_strs]
    for rows, group, result in zip(chunks, groups, results, strict=True):
        if result.scores is None:
            raise GroupError(f"{group.name} was dropped ({result.drop_reason}), and verl takes no missing reward")
        for row, score, value in zip(rows, result.scores, REWARD_TRANSFORMS[reward](result.scores), strict=True):
            rewards[row] = {"score": value, "mr_reward_score": score}
    return rewards


async def compute_score_single(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    *,
    server: str,
    timeout: float = 180.0,
    **unused: Any,
) -> float:
    """The reward of one rollout, from a server that collects groups.

    Args:
        data_source: not looked at.
        solution_str: the response.
        ground_truth: not looked at.
        extra_info: with `index`, `prompt` and perhaps `images`.
        server: URL of `mr-reward serve --collect`.
        timeout: seconds to wait; more than the server's deadline.
        **unused: what else verl passes.

    Returns:
        The reward.

    Raises:
        GroupError: `extra_info` lacks `index` or `prompt`.
        ScoringServerError: the server cannot be reached, or refuses; its message says why.
    """
    import httpx2  # of the extra `serve`

    label = {"id": _key(extra_info), "prompt": extra_info["prompt"], "images": list(extra_info.get("images") or ())}
    body = {"query": [solution_str], "prompts": [""], "labels": [label]}
    try:
        async with httpx2.AsyncClient(timeout=timeout) as client:
            answer = await client.post(
                f"{server.rstrip('/')}/get_reward",
                content=json.dumps(body),
                headers={"Content-Type": "application/json"},
            )
    except (TimeoutError, httpx2.HTTPError) as error:
        raise ScoringServerError(f"{server}: {type(error).__name__} {error}; is `mr-reward serve` running?") from error
    if answer.status_code != 200:
        raise ScoringServerError(f"{server} refused: {answer.json().get('error', answer.status_code)}")
    return float(answer.json()["rewards"][0])


def _key(info: Mapping[str, Any]) -> str:
    missing = [name for name in ("index", "prompt") if info.get(name) is None]
    if missing:
        raise GroupError(
            f"extra_info lacks {', '.join(missing)}, found {sorted(info)}; verl passes no prompt to a reward, "
            "so put index and prompt (and images) there when the data set is made"
        )
    return str(info["index"])


@functools.lru_cache(maxsize=4)
def _scorer(model: str | None, server: str | None) -> Scorer:
    """Loaded once in a process, as verl calls the function anew for each batch."""
    if (model is None) == (server is None):
        raise GroupError("give either model or server in reward_kwargs")
    return open_scorer(server) if server is not None else open_scorer(str(model), over_length="truncate_responses")
