"""Where the reward model's weights are between two reward calls: on the device, or on the CPU.

The third placement, a scoring server on other GPUs, is `mr_reward.serving`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mr_reward.groups import GroupScores, ResponseGroup
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.scorer import GroupScorer

__all__ = ["PLACEMENTS", "OffloadedScorer"]

PLACEMENTS = ("resident", "offload")


class OffloadedScorer:
    """A `GroupScorer` whose weights are on its device only while it scores.

    Between calls the device holds nothing of the reward model, so a policy's optimizer step or a colocated vLLM that
    wakes from sleep mode has the memory. Each call pays one copy of the weights to the device; none is copied back,
    they do not change. The copies in CPU memory are pinned if the device is a GPU. Scores equal those of the scorer
    itself bit for bit.

    With the CPU as device the weights are copied all the same: useless, and the way the code is tested without a GPU.

    Args:
        scorer: a scorer whose model is on the CPU.
        device: where to score.

    Example:
        >>> scorer = OffloadedScorer(GroupScorer.from_pretrained("rm"), "cuda:0")  # doctest: +SKIP
    """

    def __init__(self, scorer: GroupScorer, device: torch.device | str) -> None:
        self.scorer = scorer
        self._device = torch.device(device)
        self._is_cuda = self._device.type == "cuda"
        # Weights that are tied are one object here, and stay so.
        self._tensors = [*scorer.model.parameters(), *scorer.model.buffers()]
        self._at_home = [tensor.data.pin_memory() if self._is_cuda else tensor.data for tensor in self._tensors]
        self._return()

    @property
    def model(self) -> MultiResponseRewardModel:
        """The model; on the CPU between calls."""
        return self.scorer.model

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As `GroupScorer.score_detailed`."""
        if not groups:
            return []
        with self._on_device():
            return self.scorer.score_detailed(groups)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        try:
            for tensor, home in zip(self._tensors, self._at_home, strict=True):
                tensor.data = home.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            self._return()

    def _return(self) -> None:
        for tensor, home in zip(self._tensors, self._at_home, strict=True):
            tensor.data = home
        if self._is_cuda:
            torch.cuda.empty_cache()  # give the blocks back: others on this GPU cannot use this process's cache
