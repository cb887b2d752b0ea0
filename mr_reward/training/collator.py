"""Groups -> a training batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mr_reward.errors import OverLengthError
from mr_reward.groups import ResponseGroup
from mr_reward.model.rows import Packer, collate

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
        """Make one batch; the responses stay in the order they have.

        Args:
            groups: B ranked groups; those that the packer drops are left out with their rankings.

        Returns:
            The model's inputs and `rankings` (B, N) int64, 0 in empty slots.

        Raises:
            OverLengthError: a group does not fit under the policy `error`, or none is left.
        """
        # A dropped group leaves with its rankings, or the labels of the following ones would shift.
        kept = [(group, row) for group in groups if (row := self.packer.pack(group)) is not None]
        if not kept:
            raise OverLengthError(
                f"all {len(groups)} groups of a batch were dropped, rows are limited to {self.packer.max_tokens} "
                "tokens; raise max_tokens, or take out such groups with check_groups first"
            )
        batch = collate([row for _, row in kept]).model_inputs()
        rankings = torch.zeros_like(batch["response_mask"], dtype=torch.long)
        for i, (group, _) in enumerate(kept):
            rankings[i, : group.num_responses] = torch.tensor(group.rankings)
        return {**batch, "rankings": rankings}
