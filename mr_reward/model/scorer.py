"""`GroupScorer`: groups -> scores. Used by evaluation, the GRPO adapter and the command line.

Legend: N responses of a group, K orders.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import operator
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mr_reward.attention.backends import GROUP_ATTENTION
from mr_reward.checkpoint.verify import non_finite_cause
from mr_reward.errors import ConfigurationError, NonFiniteScoreError
from mr_reward.groups import GroupScores, ResponseGroup, as_groups
from mr_reward.metrics import order_flip_rate
from mr_reward.model.chunks import score_over_prompt
from mr_reward.model.configuration import RewardMemory
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.rows import Packer, Rows, collate, plan_batches
from mr_reward.templates.rendering import RenderedGroup

__all__ = ["GroupScorer", "memory_advice"]

logger = logging.getLogger(__name__)

_OVER_BUDGET = "over the token budget"
# Groups are prepared in windows, each while the model runs on the one before; each has twice the groups of the one
# before, up to so many full forward passes. Small calls are one window: on a CPU, preparing beside the model costs
# such a call more than it hides.
_FIRST_GROUPS, _LAST_WINDOW_PASSES = 64, 4


# (place of the group in its window, order of its different responses, their row)
_Pass = tuple[int, list[int], Rows]
# (place of the group in its window, its different responses, a flag for each: whether tokens were cut off)
_Sharing = tuple[int, RenderedGroup, tuple[bool, ...]]
# Groups, passes, and the groups that are read over one prompt; what is in neither is dropped.
_Window = tuple[Sequence[ResponseGroup], list[_Pass], list[list[_Sharing]]]


class GroupScorer:
    """Scores groups with a reward model within a token budget.

    Equal responses of a group are scored once and share the score bit for bit: a rounding difference between them
    would become a full-size advantage under GRPO's normalisation.

    Args:
        model: the reward model; it is put into evaluation mode.
        device: where to run; None keeps the model's device.
        dtype: of the backbone; None keeps the model's. The value head stays float32.
        max_tokens_per_batch: largest number of tokens that one forward pass computes, padding included. A larger group
            is read in chunks over its prompt (docs/speed.md), unless the layout is `causal` or attention dense.
        over_length: `error`, `drop_group` or `truncate_responses`, for a group that does not fit and is not read in
            chunks, or a response that does not fit beside its prompt.
        num_orders: K orders of the responses over which scores are averaged. Only `causal` depends on the order; for
            `isolated` and `set` one order gives the same scores.
        compile: compile the backbone's layers with `torch.compile`; the first passes then take a minute or so.

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
        compile: bool = False,
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
        if compile:
            model.reads_flat()  # its check would be one more shape to compile for
            for layer in model.backbone.get_decoder().layers:
                layer.compile(dynamic=True)
        self.max_tokens_per_batch = max_tokens_per_batch
        self.num_orders = num_orders if model.config.layout == "causal" else 1
        self.packer = Packer.of(model, max_tokens=max_tokens_per_batch, over_length=over_length)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        template: str | None = None,
        attn_implementation: str | None = None,
        verify: bool = False,
        **options: Any,
    ) -> GroupScorer:
        """Load a reward model for scoring.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            dtype: of the backbone; None for the checkpoint's.
            template: for a checkpoint in the paper's format, see `MultiResponseRewardModel.from_pretrained`.
            attn_implementation: attention backend; None for the fastest that fits.
            verify: compare every byte with `SHA256SUMS` first.
            **options: as for the constructor.

        Returns:
            The scorer.

        Raises:
            CheckpointError: the folder is not a complete reward model.
        """
        given = {"dtype": dtype, "template": template, "attn_implementation": attn_implementation}
        load_options = {key: value for key, value in given.items() if value is not None} | {"verify": verify}
        return cls(MultiResponseRewardModel.from_pretrained(pretrained_model_name_or_path, **load_options), **options)

    def score(
        self, groups: ResponseGroup | Mapping[str, Any] | Sequence[ResponseGroup | Mapping[str, Any]]
    ) -> list[list[float] | None]:
        """Score groups.

        Args:
            groups: any number of groups of any size: `ResponseGroup`, or dicts of its fields (with `image` or `video`
                for a single one). One that is not in a list counts as a list of one.

        Returns:
            For each group its N scores in input order, or None if it was dropped (policy `drop_group` only).

        Raises:
            GroupError: what was given is no group; a dict lacks a field, or has one that would not be read.
            OverLengthError: a group does not fit the budget.
            NonFiniteScoreError: the model gave NaN or infinity.
        """
        return [
            None if result.scores is None else list(result.scores) for result in self.score_detailed(as_groups(groups))
        ]

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
        results: list[GroupScores] = []
        self.model.reads_flat()  # checked here, not while a window is prepared
        windows = self._prepare(groups)
        window = next(windows, None)
        if window is not None and len(window[0]) == len(groups):
            results = self._score_window(window)
        elif window is not None:
            # The next window is rendered, tokenized and laid out while the model runs on this one.
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="preparing") as thread:
                while window is not None:
                    following = thread.submit(next, windows, None)
                    results += self._score_window(window)
                    window = following.result()
        num_dropped = sum(result.scores is None for result in results)
        if num_dropped:
            logger.warning("dropped %d of %d groups: %s", num_dropped, len(groups), _OVER_BUDGET)
        return results

    def would_chunk(
        self,
        group: ResponseGroup,
        *,
        response_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> bool:
        """Whether a group is read in chunks over its prompt, as it is larger than a pass.

        Args:
            group: the group.
            response_tokens: as if each response had so many tokens; None for those it has.
            device: where it would be scored; None for where the model is.
            dtype: of the backbone there; None for the model's.

        Returns:
            True for chunks, False for one pass.

        Raises:
            OverLengthError: it is taken neither way; `over_length` then says what becomes of it.
        """
        (rendered,) = self._render([group])
        if response_tokens is not None:
            filled = [[0] * response_tokens for _ in rendered.response_ids]
            rendered = replace(rendered, response_ids=filled, joiner=None)
        packer = copy.copy(self.packer)
        packer.over_length = "error"
        if self.packer.num_tokens(rendered) > packer.max_tokens and self._shares_prompts(device, dtype):
            packer.trim(rendered, group.name)
            return True
        packer.lay_out(rendered, group.name)
        return False

    def memory(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RewardMemory:
        """Bytes of the model and of a full pass of `max_tokens_per_batch` tokens, see `memory` of the model."""
        return self.model.memory(self.max_tokens_per_batch, device=device, dtype=dtype)

    def _shares_prompts(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> bool:
        """Whether responses are read over a prompt that was read before."""
        return self.packer.layout != "causal" and self.model.attention_for(device, dtype) == GROUP_ATTENTION

    def _prepare(self, groups: Sequence[ResponseGroup]) -> Iterator[_Window]:
        """Windows of groups. Their sizes follow from the groups alone, so the same call gives the same scores."""
        position, count, size = 0, _FIRST_GROUPS, _FIRST_GROUPS
        while position < len(groups):
            own = groups[position : position + count]
            rendered = self._render(own)
            yield own, *self._lay_out(own, rendered)
            position += len(own)
            # As many groups as have the tokens of some full passes, if they are like the ones before.
            mean = sum(map(self.packer.num_tokens, rendered)) / len(own)
            size *= 2
            count = max(1, min(size, int(_LAST_WINDOW_PASSES * self.max_tokens_per_batch / mean)))

    def _render(self, groups: Sequence[ResponseGroup]) -> list[RenderedGroup]:
        """Each group with its different responses."""
        items = self.packer.renderer.render_all(groups)
        for i, group in enumerate(groups):
            unique = dict.fromkeys(group.responses)
            if len(unique) < group.num_responses:
                items[i] = items[i].select([group.responses.index(text) for text in unique])
        return items

    def _lay_out(
        self, groups: Sequence[ResponseGroup], rendered: Sequence[RenderedGroup]
    ) -> tuple[list[_Pass], list[list[_Sharing]]]:
        """Lay each group out as rows, or let it share the reading of its prompt."""
        shares_prompts = self._shares_prompts()
        same_tokens: dict[bytes, list[list[int]]] = {}
        for index, item in enumerate(rendered):
            candidates = same_tokens.setdefault(item.prompt_ids.numpy().tobytes(), [])
            same = next((found for found in candidates if rendered[found[0]].has_prompt_of(item)), None)
            candidates.append([index]) if same is None else same.append(index)
        passes: list[_Pass] = []
        sharing: list[list[_Sharing]] = []
        for same in (found for candidates in same_tokens.values() for found in candidates):
            over_prompt: list[_Sharing] = []
            for index in same:
                group, item = groups[index], rendered[index]
                too_large = self.packer.num_tokens(item) > self.max_tokens_per_batch
                if shares_prompts and len(item.prompt_ids) and (too_large or len(same) > 1):
                    trimmed = self.packer.trim(item, group.name)
                    over_prompt += [] if trimmed is None else [(index, *trimmed)]
                else:
                    passes += self._pack(index, group, item)
            sharing += [over_prompt] if over_prompt else []
        return sorted(passes, key=operator.itemgetter(0)), sharing

    def _pack(self, index: int, group: ResponseGroup, rendered: RenderedGroup) -> list[_Pass]:
        """One pass for each order of the group's different responses; none if the group is dropped."""
        passes = []
        for order in self._orders(group, len(rendered.response_ids)):
            row = self.packer.lay_out(rendered.select(order), group.name)
            if row is None:
                return []
            passes.append((index, order, row))
        return passes

    def _score_window(self, window: _Window) -> list[GroupScores]:
        groups, passes, sharing = window
        found: list[list[GroupScores]] = [[] for _ in groups]
        with memory_advice(f"a pass holds up to max_tokens_per_batch={self.max_tokens_per_batch} tokens, lower that"):
            row_scores = self._score_rows([row for *_, row in passes])
            for (index, order, row), scores in zip(passes, row_scores, strict=True):
                found[index].append(GroupScores(scores=tuple(scores), truncated=row.truncated[0]).undo_order(order))
            for same in sharing:
                scored = score_over_prompt(self.model, self.packer, [rendered for _, rendered, _ in same])
                for (index, _, truncated), scores in zip(same, scored, strict=True):
                    found[index].append(GroupScores(scores=tuple(scores), truncated=truncated))
        return [self._combine(group, own) for group, own in zip(groups, found, strict=True)]

    def _orders(self, group: ResponseGroup, num_unique: int) -> list[list[int]]:
        """K orders; the same group gets the same ones on any rank and in any batch."""
        orders = [list(range(num_unique))]
        if self.num_orders > 1:
            content = repr((group.messages, group.responses)).encode("utf-8", "surrogatepass")
            generator = random.Random(hashlib.sha256(content).digest())
            orders += [generator.sample(range(num_unique), num_unique) for _ in range(self.num_orders - 1)]
        return orders

    def _score_rows(self, rows: Sequence[Rows]) -> list[list[float]]:
        scores: list[list[float]] = [[] for _ in rows]
        batches = plan_batches(
            [row.num_tokens for row in rows], self.max_tokens_per_batch, padded=not self.model.reads_flat()
        )
        with torch.inference_mode():
            # Nothing waits for a GPU in here: scores are fetched when all passes are under way.
            collated = (collate([rows[i] for i in batch], self.model.adapter) for batch in batches)
            outputs = [self.model(self.model.place(one)).scores for one in collated]
        for batch, output in zip(batches, outputs, strict=True):
            for i, values in zip(batch, output.tolist(), strict=True):
                scores[i] = values[: rows[i].score_sites.shape[1]]
        return scores

    def _combine(self, group: ResponseGroup, passes: Sequence[GroupScores]) -> GroupScores:
        """Average the passes over the group's different responses, and give equal responses their shared score."""
        if not passes:
            return GroupScores(scores=None, truncated=(False,) * group.num_responses, drop_reason=_OVER_BUDGET)
        by_order = [result.scores or () for result in passes]
        if not all(math.isfinite(score) for scores in by_order for score in scores):
            raise NonFiniteScoreError(
                f"{group.name}: scores {by_order} are not finite: {non_finite_cause(self.model)}"
            )
        over_orders = list(zip(*by_order, strict=True))
        means = [scores[0] if len(scores) == 1 else statistics.fmean(scores) for scores in over_orders]
        truncated = [any(cuts) for cuts in zip(*(result.truncated for result in passes), strict=True)]
        unique = list(dict.fromkeys(group.responses))
        slots = [unique.index(response) for response in group.responses]
        flip_rate = None if self.packer.layout == "causal" else 0.0
        if len(by_order) > 1:
            flip_rate = order_flip_rate(by_order[1:], [by_order[0]] * (len(by_order) - 1))
        return GroupScores(
            scores=tuple(means[slot] for slot in slots),
            truncated=tuple(truncated[slot] for slot in slots),
            order_spread=0.0 if len(passes) == 1 else statistics.fmean(map(statistics.pstdev, over_orders)),
            order_flip_rate=flip_rate,
        )


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """A block that needs memory; an error about it keeps its type and gets a note.

    Example:
        >>> with memory_advice("lower max_tokens_per_batch"):
        ...     scores = model(**inputs).scores  # doctest: +SKIP
    """
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator has no type of its own.
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            error.add_note(f"mr_reward: out of memory; {advice}")
        raise
