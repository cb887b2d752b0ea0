"""Reward functions for verl.

`compute_score` is for the batch reward manager, which hands over whole batches (verl 0.9.1,
`verl/workers/reward_manager/batch.py`). `compute_score_single` is for the reward loop, which calls for each rollout by
itself from several processes (`verl/experimental/reward_loop/reward_manager/naive.py`): it asks a server that collects
the groups (`mr-reward serve --collect`).

verl passes neither prompt nor images to a reward function, so they have to stand in the data set's `extra_info`:
`index` (the number of the row, as in verl's own examples; several files may each begin at 0), `prompt` (text or
messages), and `images` (paths) if there are any.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mr_reward.errors import GroupError, ScoringServerError
from mr_reward.groups import ResponseGroup, Scorer
from mr_reward.grpo.reward import reward_transform
from mr_reward.integrations.collector import cut_into_groups, join_rollouts
from mr_reward.scorers.opening import open_scorer


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
    """Rewards of a batch of whole groups, in any order; a group has one `index` and one prompt, images included.

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
        ConfigurationError: `reward` has a value that does not exist, or `num_generations` is no whole number.
        GroupAssemblyError: the rollouts of an index and prompt are no multiple of `num_generations`: the batch was
            split, or the prompt changes from rollout to rollout. The message names the rows.
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
    transform = reward_transform(reward)
    rollouts = [_rollout(info, text) for info, text in zip(extra_infos, solution_strs, strict=True)]
    chunks = cut_into_groups(rollouts, num_generations)
    groups = [join_rollouts([rollouts[row] for row in rows]) for rows in chunks]
    rewards: list[dict[str, float]] = [{} for _ in rollouts]
    for rows, group, result in zip(chunks, groups, _scorer(model, server).score_detailed(groups), strict=True):
        if result.scores is None:
            raise GroupError(f"{group.name} was dropped ({result.drop_reason}), and verl takes no missing reward")
        for row, score, value in zip(rows, result.scores, transform(result.scores), strict=True):
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

    Example:
        ```yaml
        custom_reward_function:
          path: my_reward.py          # from mr_reward.integrations.verl import compute_score_single
          name: compute_score_single
          reward_kwargs: {server: "http://127.0.0.1:5000"}
        ```
    """
    import httpx2  # of the extra `serve`

    rollout = _rollout(extra_info, solution_str)
    label = {"id": rollout.id, "prompt": rollout.messages, "images": list(rollout.images)}
    body = {"query": [solution_str], "prompts": [""], "labels": [label]}
    try:
        async with httpx2.AsyncClient(timeout=timeout) as client:
            # Not httpx's own JSON, which is no ASCII: a policy can write lone surrogates.
            answer = await client.post(
                f"{server.rstrip('/')}/get_reward",
                content=json.dumps(body),
                headers={"Content-Type": "application/json"},
            )
    except (TimeoutError, httpx2.HTTPError) as error:
        raise ScoringServerError(f"{server}: {type(error).__name__} {error}; is `mr-reward serve` running?") from error
    if answer.status_code != 200:
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        reason = answer.json().get("error") if is_json else answer.text[:200]
        raise ScoringServerError(f"{server} refused (status {answer.status_code}): {reason}")
    return float(answer.json()["rewards"][0])


def _rollout(info: Mapping[str, Any], response: str) -> ResponseGroup:
    missing = [name for name in ("index", "prompt") if info.get(name) is None]
    if missing:
        raise GroupError(
            f"extra_info lacks {', '.join(missing)}, found {sorted(info)}; verl passes no prompt to a reward, "
            "so put index and prompt (and images) there when the data set is made"
        )
    images = [] if info.get("images") is None else list(info["images"])
    return ResponseGroup(prompt=info["prompt"], responses=[response], images=images, id=str(info["index"]))


@functools.lru_cache(maxsize=4)
def _scorer(model: str | None, server: str | None) -> Scorer:
    """Opened once in a process, as verl calls the function for each batch."""
    if server is not None and model is None:
        return open_scorer(server)
    if model is not None and server is None:
        return open_scorer(model, over_length="truncate_responses")
    raise GroupError("give either model or server in reward_kwargs")
