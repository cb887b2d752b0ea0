"""A reward model that is in use already, trained some steps further, where it is: no trainer and no second process.

`RewardTrainer` cannot do it inside another training: two trainers of one process share accelerate's state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mr_reward.checkpoint.verify import non_finite_cause
from mr_reward.errors import ConfigurationError, NonFiniteScoreError, whole_number
from mr_reward.groups import ResponseGroup
from mr_reward.model.scorer import GroupScorer
from mr_reward.training.batches import GroupCollator, TrainingGroups, check_groups
from mr_reward.training.losses import get_loss

_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherSteps:
    """How a reward model is trained further."""

    steps: int = 50
    batch_size: int = 16  # groups of a step, read one after the other
    learning_rate: float = 1e-5  # of the first step; it falls to zero
    share: float = 0.5  # of the new groups among all, where there are old ones
    loss: str = "best_of_n"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            whole_number(getattr(self, name), name, "of the reward model's further training")
        get_loss(self.loss)
        if not 0 < self.learning_rate < 1:
            raise ConfigurationError(f"the learning rate is {self.learning_rate}, expected a number above 0, below 1")
        if not 0 < self.share <= 1:
            raise ConfigurationError(
                f"share is {self.share}, expected the share of the new groups, above 0, at most 1"
            )

    @property
    def num_groups(self) -> int:
        """Groups that are read in all."""
        return self.steps * self.batch_size


@torch.enable_grad()
def train_further(
    scorer: GroupScorer, new: Sequence[ResponseGroup], old: Sequence[ResponseGroup], how: FurtherSteps
) -> None:
    """Train a scorer's model on new groups and old ones, within the scorer's token budget and as it treats long ones.

    AdamW on float32 copies of the weights, as small steps of bfloat16 weights are rounded away: 12 bytes a weight.
    """
    model = scorer.model
    rng = random.Random(f"{how.seed}")
    sets: Mapping[str, Sequence[ResponseGroup]] = {"new": new, **({"old": old} if old and how.share < 1 else {})}
    data = TrainingGroups(
        [
            check_groups(groups, scorer.packer, name, same_text_once=True, show_progress=False)
            for name, groups in sets.items()
        ],
        weights=[how.share, 1 - how.share] if len(sets) == 2 else None,
        seed=how.seed,
    )
    loss_of, collate = get_loss(how.loss), GroupCollator(scorer.packer)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    exact = [weight.detach().to(torch.float32, copy=True) for weight in weights]
    optimizer = torch.optim.AdamW(exact, weight_decay=0.0)
    left: list[int] = []
    model.train()
    try:
        for step in range(how.steps):
            for _ in range(how.batch_size):
                if not left:
                    left = rng.sample(range(len(data)), len(data))
                    data.set_epoch(data.epoch + 1)
                batch: dict[str, Any] = collate([data[left.pop()]])
                rows = batch["rows"].to(model.device)
                scores = model(rows=rows).scores
                if not scores.isfinite().all():
                    raise NonFiniteScoreError(
                        f"further step {step}: the scores are not finite: {non_finite_cause(model)}. Lower the "
                        "learning rate of the refresh"
                    )
                loss = loss_of(scores, batch["rankings"].to(model.device), rows.response_mask)
                (loss / how.batch_size).backward()
            for own, weight in zip(exact, weights, strict=True):
                own.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            torch.nn.utils.clip_grad_norm_(exact, _LARGEST_GRADIENT)
            optimizer.param_groups[0]["lr"] = how.learning_rate * (1 - step / how.steps)
            optimizer.step()
            with torch.no_grad():
                for own, weight in zip(exact, weights, strict=True):
                    weight.copy_(own)
    finally:
        model.zero_grad()
        model.eval()
