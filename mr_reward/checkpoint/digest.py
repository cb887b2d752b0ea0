"""A checksum of a reward model: do two processes, or a client and its server, hold the same one?"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mr_reward.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Besides the weights, what decides the scores.
_CONFIG_KEYS = ("layout", "template", "template_hash", "score_scale", "head_activation", "head_bias")
_CHUNK = 1 << 22  # 64-bit words: each temporary copy takes 32 MB


def weights_digest(model: PreTrainedModel) -> str:
    """Checksum of weights and settings; equal for equal models, on any device and with any number of threads.

    It is taken over names, shapes, dtypes and sums of the weights' bits, read as whole numbers of 64 bits and
    multiplied by odd factors that grow with the position. Such sums wrap around and are exact in any order, which sums
    of floats are not; one changed bit always shows. One pass over the weights where they are: nothing is copied to the
    CPU but the sums.

    Args:
        model: a reward model.

    Returns:
        16 hexadecimal digits.

    Raises:
        CheckpointError: a weight is empty, as on a rank where ZeRO-3 keeps it elsewhere.

    Example:
        >>> weights_digest(MultiResponseRewardModel.from_pretrained("rm"))  # doctest: +SKIP
        '5d41402abc4b2a76'
    """
    settings = {key: getattr(model.config, key, None) for key in _CONFIG_KEYS}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.numel():
            raise CheckpointError(
                f"the weight {name} is empty, so there is no checksum; under DeepSpeed ZeRO-3 load the model inside "
                "mr_reward.checkpoint.zero3.outside_zero3()"
            )
        entry = (name, list(tensor.shape), str(tensor.dtype), _sums(tensor))
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


@torch.no_grad()
def _sums(tensor: Tensor) -> list[int]:
    """One position-weighted sum for each chunk of 64-bit words, then the bytes that fill no word."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    if data.data_ptr() % 8 or data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    factors = torch.arange(min(_CHUNK, len(words)), device=words.device) * 2 + 1
    sums = [int((chunk * factors[: len(chunk)]).sum()) for chunk in words.split(_CHUNK) if len(chunk)]
    return sums + data[whole:].tolist()
