"""`GroupScorer`: groups -> scores. Used by evaluation, the GRPO adapter and the command line.

Legend: N responses of a group, K orders.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mr_reward.errors import ConfigurationError, NonFiniteScoreError
from mr_reward.groups import ResponseGroup
from mr_reward.modeling import MultiResponseRewardModel
from mr_reward.packing import PackedRow, Packer, collate, plan_batches
from mr_reward.rendering import Renderer

__all__ = ["GroupScorer", "GroupScores", "Scorer"]

logger = logging.getLogger(__name__)

_OVER_BUDGET = "over the token budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScores:
    """What scoring one group gave.

    Args:
        scores: N scores in input order; None if the group was dropped.
        truncated: N flags, True where the end of the response was cut off.
        order_spread: standard deviation of a response's score over the K orders, averaged over the group; 0 for K = 1.
        drop_reason: why the group was dropped, else None.
    """

    scores: tuple[float, ...] | None
    truncated: tuple[bool, ...]
    order_spread: float = 0.0
    drop_reason: str | None = None


class Scorer(Protocol):
    """What scores groups, here or elsewhere: `GroupScorer`, `OffloadedScorer`, `RemoteScorer`."""

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As `GroupScorer.score_detailed`."""


class GroupScorer:
    """Scores groups with a reward model within a token budget.

    Identical responses of a group are scored once and share the score bit for bit: a rounding difference between twins
    would become a full-size advantage under GRPO's normalisation.

    Args:
        model: the reward model; it is put into evaluation mode.
        device: where to run; None keeps the model's device.
        dtype: of the backbone; None keeps the model's. The value head stays float32.
        max_tokens_per_batch: largest number of tokens of one forward pass, padding included; also the largest row.
        over_length: `error`, `drop_group` or `truncate_responses`, see `mr_reward.packing.Packer`.
        num_orders: K orders of the responses over which scores are averaged. Only `causal` depends on the order; for
            `isolated` and `set` one order gives the same scores.

    Raises:
        ConfigurationError: no processor, unknown policy, K < 1.

    Example:
        >>> scorer = GroupScorer.from_pretrained("rm")  # doctest: +SKIP
        >>> scorer.score([ResponseGroup(prompt="2 + 2?", responses=["4", "5"])])  # doctest: +SKIP
        [[1.7, -0.9]]
    """

    def __init__(
        self,
        model: MultiResponseRewardModel,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_tokens_per_batch: int = 16384,
        over_length: str = "error",
        num_orders: int = 1,
    ) -> None:
        if model.processor is None:
            raise ConfigurationError("the model has no processor; load it with from_pretrained or from_backbone")
        if num_orders < 1:
            raise ConfigurationError(f"num_orders is {num_orders}, expected at least 1")
        self.model = model.eval()
        if dtype is not None:
            model.backbone.to(dtype)
        if device is not None:
            model.to(device)
        self.max_tokens_per_batch = max_tokens_per_batch
        self.num_orders = num_orders if model.config.layout == "causal" else 1
        self.packer = Packer(
            Renderer(model.processor, model.config.template),
            layout=model.config.layout,
            max_tokens=max_tokens_per_batch,
            context_tokens=model.context_tokens,
            over_length=over_length,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        template: str | None = None,
        attn_implementation: str | None = None,
        **options: Any,
    ) -> GroupScorer:
        """Load a reward model for scoring.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            dtype: of the backbone; None for the checkpoint's.
            template: for a checkpoint in the paper's format, see `MultiResponseRewardModel.from_pretrained`.
            attn_implementation: attention backend; None for transformers' default.
            **options: as for the constructor.

        Returns:
            The scorer.

        Raises:
            CheckpointError: the folder is not a complete reward model.
        """
        given = {"dtype": dtype, "template": template, "attn_implementation": attn_implementation}
        load_options = {key: value for key, value in given.items() if value is not None}
        return cls(MultiResponseRewardModel.from_pretrained(pretrained_model_name_or_path, **load_options), **options)

    def score(self, groups: Sequence[ResponseGroup]) -> list[list[float] | None]:
        """Score groups.

        Args:
            groups: any number of groups of any size.

        Returns:
            For each group its N scores in input order, or None if it was dropped (policy `drop_group` only).

        Raises:
            OverLengthError: a group does not fit the budget.
            NonFiniteScoreError: the model gave NaN or infinity.
        """
        return [None if result.scores is None else list(result.scores) for result in self.score_detailed(groups)]

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """Score groups and tell what happened to them.

        Args:
            groups: any number of groups of any size.

        Returns:
            One result per group, in input order.

        Raises:
            OverLengthError: a group does not fit the budget and the policy is `error`.
            NonFiniteScoreError: the model gave NaN or infinity.
        """
        passes = [self._pack(group) for group in groups]
        rows = [(group, row) for group, group_passes in zip(groups, passes, strict=True) for _, row in group_passes]
        row_scores = iter(self._score_rows(rows))
        results = [
            self._combine(group, [(order, next(row_scores), row.truncated) for order, row in group_passes])
            for group, group_passes in zip(groups, passes, strict=True)
        ]
        num_dropped = sum(result.scores is None for result in results)
        if num_dropped:
            logger.warning("dropped %d of %d groups: %s", num_dropped, len(groups), _OVER_BUDGET)
        return results

    def _pack(self, group: ResponseGroup) -> list[tuple[list[int], PackedRow]]:
        """One (order, row) per pass over the group's unique responses; none if the group is dropped."""
        unique = list(dict.fromkeys(group.responses))
        rendered = self.packer.renderer.render(group.select([group.responses.index(response) for response in unique]))
        passes = []
        for order in self._orders(group, len(unique)):
            row = self.packer.lay_out(rendered.select(order), group.name)
            if row is None:
                return []
            passes.append((order, row))
        return passes

    def _orders(self, group: ResponseGroup, num_unique: int) -> list[list[int]]:
        """K orders; the same group gets the same ones on any rank and in any batch."""
        orders = [list(range(num_unique))]
        if self.num_orders > 1:
            content = repr((group.messages, group.responses)).encode("utf-8", "surrogatepass")
            generator = random.Random(hashlib.sha256(content).digest())
            orders += [generator.sample(range(num_unique), num_unique) for _ in range(self.num_orders - 1)]
        return orders

    @torch.inference_mode()
    def _score_rows(self, rows: list[tuple[ResponseGroup, PackedRow]]) -> list[list[float]]:
        scores: list[list[float]] = [[] for _ in rows]
        for batch in plan_batches([row.num_tokens for _, row in rows], self.max_tokens_per_batch):
            inputs = collate([rows[i][1] for i in batch]).model_inputs()
            inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
            with torch.inference_mode():
                output = self.model(**inputs).scores.tolist()
            for i, values in zip(batch, output, strict=True):
                group, row = rows[i]
                scores[i] = values[: len(row.score_sites)]
                if not all(map(math.isfinite, scores[i])):
                    raise NonFiniteScoreError(
                        f"{group.name}: scores {scores[i]} are not finite; the weights or the activations overflow, "
                        "try a wider dtype (float32) and check the checkpoint"
                    )
        return scores

    @staticmethod
    def _combine(group: ResponseGroup, passes: list[tuple[list[int], list[float], tuple[bool, ...]]]) -> GroupScores:
        """Undo the orders, average over them, and give twins their shared score."""
        if not passes:
            return GroupScores(scores=None, truncated=(False,) * group.num_responses, drop_reason=_OVER_BUDGET)
        unique = list(dict.fromkeys(group.responses))
        over_orders: list[list[float]] = [[] for _ in unique]
        truncated = [False] * len(unique)
        for order, scores, cut in passes:
            for slot, score, was_cut in zip(order, scores, cut, strict=True):
                over_orders[slot].append(score)
                truncated[slot] |= was_cut
        slots = [unique.index(response) for response in group.responses]
        return GroupScores(
            scores=tuple(statistics.fmean(over_orders[slot]) for slot in slots),
            truncated=tuple(truncated[slot] for slot in slots),
            order_spread=statistics.fmean(map(statistics.pstdev, over_orders)),
        )
