"""`MultiResponseReward`: a reward function for TRL's `GRPOTrainer` and `RLOOTrainer` that scores whole groups."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mr_reward.checkpoint.verify import weights_digest
from mr_reward.data.groups_file import ScoredGroup
from mr_reward.errors import CheckpointError, ConfigurationError, whole_number
from mr_reward.groups import GroupScores, ResponseGroup, score_each
from mr_reward.grpo.exchange import Exchange
from mr_reward.grpo.groups import (
    Completion,
    PlannedGroup,
    Prompt,
    group_size,
    is_evaluating,
    plan_groups,
    read_references,
    read_rollouts,
    updates_per_generation,
    with_opening,
)
from mr_reward.grpo.telemetry import GroupLog, agreement, describe_rows, measure, win_rate
from mr_reward.model.rows import check_over_length
from mr_reward.scorers.opening import is_url, open_scorer
from mr_reward.templates.chat import is_prefilled

if TYPE_CHECKING:
    import torch

    from mr_reward.groups import Scorer
    from mr_reward.model.model import MultiResponseRewardModel

logger = logging.getLogger(__name__)

_SCORER_OPTIONS = (
    "device",
    "dtype",
    "max_tokens_per_batch",
    "over_length",
    "num_orders",
    "attn_implementation",
    "placement",
)


def _centred(scores: Sequence[float]) -> list[float]:
    mean = statistics.fmean(scores)
    return [score - mean for score in scores]


def _beating(chance: Callable[[float], float]) -> Callable[[Sequence[float]], list[float]]:
    """Mean chance to beat each of the others, by the lead of the own score; minus 0.5 takes out the own comparison."""

    def transform(scores: Sequence[float]) -> list[float]:
        if len(scores) == 1:
            return [0.5]
        return [(sum(chance(score - other) for other in scores) - 0.5) / (len(scores) - 1) for score in scores]

    return transform


REWARD_TRANSFORMS: Mapping[str, Callable[[Sequence[float]], list[float]]] = {
    "centred": _centred,
    "raw": list,
    "rank": _beating(lambda lead: (lead > 0) + 0.5 * (lead == 0)),  # the share that is beaten, ties half
    # Bradley-Terry: sigmoid(x) = (1 + tanh(x / 2)) / 2 does not overflow
    "win_rate": _beating(lambda lead: 0.5 + 0.5 * math.tanh(lead / 2)),
}


def reward_transform(name: str) -> Callable[[Sequence[float]], list[float]]:
    """Scores -> rewards, by the name that `MultiResponseReward` takes."""
    if name not in REWARD_TRANSFORMS:
        raise ConfigurationError(f"reward is {name!r}, expected one of {', '.join(REWARD_TRANSFORMS)}")
    return REWARD_TRANSFORMS[name]


class MultiResponseReward:
    """Rewards from a multi-response reward model: all rollouts of a prompt are compared in one forward pass.

    A group may be spread over ranks. The texts are gathered, each group is scored once, by a rank that holds its
    prompt and images, and each rank gets its own rows' rewards back: the same as a single process would give, for any
    number of processes and any per-device batch. Every rank has to call it at the same time, as `GRPOTrainer` does. If
    one rank fails, all raise, naming rank and group.

    GRPO subtracts the group's mean, and with `scale_rewards="group"` divides by the group's standard deviation. So, as
    the only reward, `"centred"` and `"raw"` give the same advantages; `"rank"` and `"win_rate"` bend the scores. Where
    nothing is centred per group (logs, `scale_rewards="batch"`, RLOO's batch normalisation) the arbitrary offset of a
    group's raw scores is noise, which is why `"centred"` is the default. The scale of the scores matters beside other
    rewards and with `scale_rewards="none"` or `"batch"`.

    Metrics (`METRIC_KEYS`) and columns of the completions table (`COLUMN_KEYS`), both in `mr_reward.grpo.telemetry`,
    are logged at every call. TRL tells reward functions apart by name only, so use one `MultiResponseReward` per
    trainer.

    A column `reference_response` of the data set (a text or a completion, None for a prompt without one) gives one
    metric more, `mr_reward/win_rate`: the share of a group's responses that the reward model places above it, ties
    half. The responses and the reference are scored once more for it, together; the rewards do not know of it.

    In evaluation groups may have another size (`num_generations_eval`), and the last batch may be shorter; on several
    processes accelerate fills it up with the first prompts of the set, as whole groups, which then count twice. In the
    first call the ranks compare checksums of their reward models, as ZeRO-3 can make them differ without an error.

    What is judged: the content of the assistant turns; reasoning that was parsed into a key of its own stands before
    it again and counts as the model's `thoughts` say. A completion with tool calls and results is judged with them, as
    the reward model's chat template writes them behind the prompt; one that leaves out a part of them is an error. The
    prompt is rendered with the trainer's tools. A plain-text prompt counts as one user turn. Where the first
    observations of TRL's environments differ within a group, the prompt is what they have in common, and each response
    begins with the rest of its own; a warning says so once.

    Args:
        model: folder or hub id of a checkpoint, or a loaded `MultiResponseRewardModel`. A checkpoint is loaded now.
            None with `server`.
        num_generations: rollouts per prompt; the trainer's `num_generations`.
        num_generations_eval: rollouts per prompt in evaluation, the trainer's `num_generations_eval`; None for as many
            as in training. The first call checks both against the trainer.
        reward: `"centred"` (score minus group mean), `"raw"` (score), `"rank"` (0 = worst to 1 = best, ties averaged)
            or `"win_rate"` (mean probability to beat each of the others).
        device: where the model runs. Default: `cuda:LOCAL_RANK` if CUDA is available, else the CPU.
        dtype: dtype of the backbone; the head always computes in float32.
        max_tokens_per_batch: token budget of one forward pass.
        over_length: what to do with a group that does not fit: `"drop_group"` gives its rollouts the reward None,
            hence no advantage from this reward; `"truncate_responses"` cuts them; `"error"` ends the training.
        num_orders: response orders that the scores are averaged over; see `GroupScorer`.
        attn_implementation: attention backend of the model, for `causal` also `"flash_attention_2"`; None for the
            fastest that fits, see docs/speed.md.
        placement: `"resident"` keeps the weights on the device; `"offload"` keeps them in CPU memory and copies them
            to the device for each call, so that they leave it to the policy, or to vLLM, in between.
        server: URL of a server that `mr-reward serve` runs, in place of `model`; the options from `device` to
            `placement` are then the server's. The rewards are the same.
        server_token: the server's token; None for the environment variable MR_REWARD_TOKEN. It is not pickled.
        server_hash: checksum of the model that has to score, as the server logs it; None for any, but one only.
        group_log: writes the groups that each rank scores, with their images; None writes nothing.
        timeout: seconds that a rank waits for the others, the slowest one's scoring included; who has not come by then
            is named, and all stop. As the trainer's `ddp_timeout`.

    Attributes:
        last_scored: the groups that this rank scored, or dropped, in the last call.

    Raises:
        ConfigurationError: an option has a value that does not exist.
        CheckpointError: the checkpoint cannot be loaded, or the server has another model.
        ScoringServerError: the server cannot be reached, or refuses the token.

    Example:
        ```python
        reward = MultiResponseReward("path/to/reward-model", num_generations=8)
        trainer = GRPOTrainer(model, reward_funcs=[reward], args=GRPOConfig(num_generations=8), train_dataset=data)
        ```
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | MultiResponseRewardModel | None = None,
        num_generations: int = 0,  # has to be given; it stands behind one that need not
        *,
        num_generations_eval: int | None = None,
        reward: str = "centred",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_tokens_per_batch: int = 16384,
        over_length: str = "drop_group",
        num_orders: int = 1,
        attn_implementation: str | None = None,
        placement: str = "resident",
        server: str | None = None,
        server_token: str | None = None,
        server_hash: str | None = None,
        group_log: GroupLog | None = None,
        timeout: float = 1800.0,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "server_token")}
        self._arguments = given  # what a copy is made of; the token is not pickled
        if num_generations_eval is None:
            num_generations_eval = num_generations
        given_sizes = {"num_generations": num_generations, "num_generations_eval": num_generations_eval}
        sizes = [whole_number(size, name, f"pass the trainer's {name}") for name, size in given_sizes.items()]
        self._transform = reward_transform(reward)
        check_over_length(over_length)  # known before the checkpoint is loaded, which takes a while
        if timeout <= 0:
            raise ConfigurationError(f"timeout is {timeout} s, expected more than 0; pass the trainer's ddp_timeout")
        self.__name__ = "multi_response_reward"  # TRL names metrics after it
        self.num_generations = sizes[0]
        self.num_generations_eval = sizes[1]
        self.reward = reward
        self.last_scored: list[ScoredGroup] = []
        self._last_results: list[GroupScores] = []  # of all ranks
        self._group_log = group_log
        self._scorer: Scorer
        if server is None:
            if model is None or is_url(model):
                got = "neither a model nor a server" if model is None else f"the URL {model} as the model"
                raise ConfigurationError(f"got {got}; give the folder of a reward model, or a URL as server")
            self._scorer = open_scorer(model, **{name: given[name] for name in _SCORER_OPTIONS})
        else:
            # What a scoring server has decided when it was started cannot be asked of it.
            defaults = inspect.signature(MultiResponseReward).parameters
            local = [name for name in ("model", *_SCORER_OPTIONS) if given[name] != defaults[name].default]
            if local:
                raise ConfigurationError(
                    f"{', '.join(local)} cannot be given together with server, where `mr-reward serve` decides about "
                    "it; leave it out, and start the server with it"
                )
            if not is_url(server):
                raise ConfigurationError(f"server is {server!r}, expected http://host:port")
            self._scorer = open_scorer(server, token=server_token, expected_hash=server_hash)
        self.exchange = Exchange(timeout=timedelta(seconds=timeout))
        self._ranks_agree = False
        self._told_of_openings = self._told_of_prefill = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle the arguments: a copy loads the checkpoint again, and has its own device and process group."""
        return functools.partial(type(self), **self._arguments), ()

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], **kwargs: Any
    ) -> list[float | None]:
        """Score this rank's rollouts, together with all other ranks.

        Args:
            prompts: M prompts (text or chat messages with content blocks), each prompt `num_generations` times (in
                evaluation `num_generations_eval` times) in a row in the global, rank-major batch.
            completions: M completions, text or chat messages.
            **kwargs: the rest of what TRL passes; `image`, `images`, `reference_response`, `trainer_state`,
                `log_extra` and `log_metric` are used if there.

        Returns:
            M rewards; None for the rollouts of a dropped group.

        Raises:
            CheckpointError: the ranks hold different reward models (first call only).
            ConfigurationError: the trainer has another `num_generations` or `num_generations_eval`.
            GroupAssemblyError: the global batch cannot be cut into groups of `num_generations`.
            GroupError: a prompt or completion has a shape that TRL does not produce.
            MediaError: media are missing or unreadable.
            PeerRankError: another rank failed.
        """
        state, log_metric, log_extra = (kwargs.get(name) for name in ("trainer_state", "log_metric", "log_extra"))
        evaluating = is_evaluating(log_metric)
        # As the trainer's log counts: what is scored after two steps is for the third, which logs itself as 3.
        step = None if state is None else state.global_step + (not evaluating)
        with self.exchange.fail_together("reading the rollouts") as phase:
            size = group_size(log_metric, self.num_generations, self.num_generations_eval)
            local, rows = read_rollouts(prompts, completions, kwargs)
            references = read_references(kwargs)
            phase.payload = rows, "" if self._ranks_agree else self._weights_digest(), references is not None
        rows_by_rank = [rows for rows, *_ in phase.gathered]
        has_references = any(given for *_, given in phase.gathered)
        # In the first call, not at construction: there the ranks may not know each other yet.
        check_same_weights([digest for _, digest, _ in phase.gathered])
        self._ranks_agree = True
        plan = plan_groups(rows_by_rank, size)

        rank = self.exchange.rank
        with self.exchange.fail_together("scoring") as phase:
            own = [group for group in plan if group.owner == rank]
            prefix = "" if step is None else f"step {step} "
            phase.at = _name_groups(prefix, own)
            results, seconds = self._score(own, local, prefix, step)
            shares = self._shares_above(own, references) if references is not None else []
            phase.payload = results, seconds, shares
            if self._group_log is not None:
                args = getattr(getattr(log_metric, "__self__", None), "args", None)
                self._group_log.write(
                    self.last_scored,
                    step=step or 0,
                    rank=rank,
                    evaluating=evaluating,
                    num_steps=updates_per_generation(args) if hasattr(args, "num_iterations") else 1,
                )
        by_index = {index: result for scored, *_ in phase.gathered for index, result in scored.items()}
        ordered = self._last_results = [by_index[group.index] for group in plan]

        if log_metric is not None:
            metrics = measure(plan, ordered, math.fsum(seconds for _, seconds, _ in phase.gathered))
            if has_references:
                metrics |= win_rate(share for *_, own_shares in phase.gathered for share in own_shares)
            for key, value in metrics.items():
                log_metric(key, value)
        start = sum(len(rows) for rows in rows_by_rank[:rank])
        mine = slice(start, start + len(local))
        if log_extra is not None:
            for name, column in describe_rows(plan, ordered).items():
                log_extra(name, column[mine])
        return [value for result in ordered for value in self._rewards(result)][mine]

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """A block whose calls leave `last_scored` and the group log as they are."""
        kept = self.last_scored, self._group_log
        self._group_log = None
        try:
            yield
        finally:
            self.last_scored, self._group_log = kept

    @property
    def scorer(self) -> Scorer:
        """What scores the groups."""
        return self._scorer

    def agreement(self, truths: Sequence[float | None]) -> dict[str, float]:
        """How the scores of the last call agree with the truth of its rows, those of all ranks."""
        if len(truths) != sum(len(result.truncated) for result in self._last_results):
            raise ConfigurationError(
                f"got {len(truths)} values of a truth, expected one for each rollout that the reward model has just "
                "scored; put it behind the reward model in reward_funcs"
            )
        return agreement(self._last_results, truths)

    def _weights_digest(self) -> str:
        """Checksum of the model that scores for this rank: its own, or that of its server."""
        model = getattr(self._scorer, "model", None)
        return getattr(self._scorer, "model_hash", "") if model is None else weights_digest(model)

    def _score(
        self, own: Sequence[PlannedGroup], local: Sequence[ResponseGroup], prefix: str, step: int | None
    ) -> tuple[dict[int, GroupScores], float]:
        """Score the groups that this rank owns; their results by group index, and the seconds it took."""
        self.last_scored = []
        if not own:
            return {}, 0.0
        groups = []
        for planned in own:
            prompt, name = local[planned.owner_row], f"{prefix}group {planned.index}"
            messages = prompt.messages
            if planned.opening is not None:
                messages = with_opening(messages, planned.opening)
                if not self._told_of_openings:
                    logger.warning("%s: its environments began differently; each response begins with its own", name)
                self._told_of_openings = True
            if is_prefilled(messages) and not self._told_of_prefill:
                logger.warning(
                    "%s: its prompt ends in an assistant turn, and each response is judged as the rest of that turn; "
                    "GRPOTrainer of TRL 1.16 closes it and lets the policy begin a new one",
                    name,
                )
                self._told_of_prefill = True
            groups.append(replace(prompt, prompt=messages, responses=planned.responses, id=name))
        started = time.perf_counter()
        results = self._scorer.score_detailed(groups)
        seconds = time.perf_counter() - started
        for group, result in zip(groups, results, strict=True):
            if result.scores is None:
                logger.warning("%s gets no reward: %s", group.id, result.drop_reason)
            rewards = tuple(self._rewards(result))
            self.last_scored.append(ScoredGroup(group=group, result=result, rewards=rewards, step=step))
        return {planned.index: result for planned, result in zip(own, results, strict=True)}, seconds

    def _shares_above(self, own: Sequence[PlannedGroup], references: Sequence[str | None]) -> list[float]:
        """Of each group of `last_scored` whose prompt has a reference: the share of responses above it, ties half.

        Scored beside the responses: under most layouts only scores of one row can be compared. What goes wrong here
        costs the metric and no reward.
        """
        groups = [
            replace(scored.group, prompt=scored.group.messages, responses=[*scored.group.responses, reference])
            for scored, planned in zip(self.last_scored, own, strict=True)
            if (reference := references[planned.owner_row]) is not None
        ]
        shares = []
        for group, found in zip(groups, score_each(self._scorer, groups), strict=True):
            if not isinstance(found, GroupScores) or found.scores is None:
                reason = found.drop_reason if isinstance(found, GroupScores) else found
                logger.warning("%s is not compared with its reference: %s", group.id, reason)
                continue
            *scores, reference_score = found.scores
            shares.append(statistics.fmean((one > reference_score) + 0.5 * (one == reference_score) for one in scores))
        return shares

    def _rewards(self, result: GroupScores) -> list[float | None]:
        """N rewards of a group; None for each if it was dropped."""
        return [None] * len(result.truncated) if result.scores is None else [*self._transform(result.scores)]


def _name_groups(prefix: str, groups: Sequence[PlannedGroup]) -> str | None:
    """As in "step 12 group 3" or "step 12 groups 3, 4, 5"; at most eight are listed."""
    if not groups:
        return None
    listed = ", ".join(str(group.index) for group in groups[:8])
    more = f" and {len(groups) - 8} more" if len(groups) > 8 else ""
    return f"{prefix}group{'s' if len(groups) > 1 else ''} {listed}{more}"


def check_same_weights(digests: Sequence[str]) -> None:
    """Refuse ranks with different reward models, by their checksums; every rank sees the same list, so all raise."""
    if len(set(digests)) <= 1:
        return
    ranks_by_digest: defaultdict[str, list[str]] = defaultdict(list)
    for rank, digest in enumerate(digests):
        ranks_by_digest[digest].append(str(rank))
    found = "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}: {digest}"
        for digest, ranks in ranks_by_digest.items()
    )
    raise CheckpointError(
        f"the ranks hold different reward models (checksums of the weights: {found}), expected the same weights "
        "everywhere. Either the folder differs from machine to machine, or the model was loaded while a DeepSpeed "
        "ZeRO-3 configuration was alive (set_zero3_state gives random weights on every rank but 0), or a new head was "
        "drawn with a different seed on each rank; give MultiResponseReward the folder itself and it keeps out of "
        "ZeRO-3's way, or load the model inside mr_reward.checkpoint.zero3.outside_zero3()"
    )
