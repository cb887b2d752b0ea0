"""Groups -> a training batch, with a new order of the responses at every draw."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mr_reward.groups import ResponseGroup
from mr_reward.packing import Packer, collate

__all__ = ["GroupCollator"]


class GroupCollator:
    """Packs groups into the inputs of the model, with their rankings.

    Args:
        packer: lays the groups out.

    Example:
        >>> batch = GroupCollator(packer)(groups)  # doctest: +SKIP
        >>> batch["rankings"].shape  # doctest: +SKIP
        torch.Size([32, 4])
    """

    def __init__(self, packer: Packer) -> None:
        self.packer = packer

    def __call__(self, groups: Sequence[ResponseGroup]) -> dict[str, Tensor]:
        """Make one batch.

        The order is drawn from torch's generator, which the Trainer seeds, saves and restores.

        Args:
            groups: B ranked groups that fit the packer's budget.

        Returns:
            The model's inputs and `rankings` (B, N) int64, 0 in empty slots.
        """
        shuffled = [group.select(torch.randperm(group.num_responses).tolist()) for group in groups]
        rows = [row for group in shuffled if (row := self.packer.pack(group)) is not None]
        batch = collate(rows).model_inputs()
        rankings = torch.zeros_like(batch["response_mask"], dtype=torch.long)
        for i, group in enumerate(shuffled):
            rankings[i, : group.num_responses] = torch.tensor(group.rankings)
        return {**batch, "rankings": rankings}
