"""The two parts that a reward model owns beside its backbone: the value head and the readout vectors.

Legend: B rows, N responses, L tokens, H width of the backbone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from mr_reward.checkpoint.zero3 import whole_weights
from mr_reward.errors import ConfigurationError
from mr_reward.layouts import TokenKind

__all__ = ["ReadoutVectors", "ValueHead"]

_INIT_STD = 0.02


class ValueHead(nn.Module):
    """Linear, activation, Linear: one score per response, always computed in float32.

    bf16 has steps of 0.008 near 1; jitter of that size between equal completions becomes a full-size GRPO advantage.
    The last layer has no bias unless asked for: a constant shift of all scores of a group has no meaning, but the
    public heads of arXiv 2604.10966 have one.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str = "silu", *, bias: bool = False
    ) -> None:
        super().__init__()
        if activation != "selu" and activation not in ACT2FN:
            raise ConfigurationError(
                f"unknown head activation {activation!r}, expected one of selu, {', '.join(ACT2FN)}"
            )
        self.dense = nn.Linear(hidden_size, intermediate_size, dtype=torch.float32)
        self.activation = nn.SELU() if activation == "selu" else ACT2FN[activation]
        self.out = nn.Linear(intermediate_size, 1, bias=bias, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, N, H) of any float dtype -> scores (B, N) float32."""
        # Weights are cast too: an engine that casts the whole module (DeepSpeed bf16) must not change the arithmetic.
        with torch.autocast(hidden.device.type, enabled=False):
            inner = F.linear(hidden.float(), self.dense.weight.float(), self.dense.bias.float())
            bias = None if self.out.bias is None else self.out.bias.float()
            return F.linear(self.activation(inner), self.out.weight.float(), bias).squeeze(-1)


class ReadoutVectors(nn.Module):
    """The learned input embeddings of the summary and the comparison token.

    They are vectors put into the row by position, not entries of a vocabulary: no text tokenizes to them, so a policy
    cannot write one, and no embedding matrix is resized.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Parameter(torch.empty(hidden_size))
        self.comparison = nn.Parameter(torch.empty(hidden_size))
        nn.init.normal_(self.summary, std=_INIT_STD)
        nn.init.normal_(self.comparison, std=_INIT_STD)

    @torch.no_grad()
    def initialise_from(self, embedding: nn.Embedding) -> None:
        """Start from the mean input embedding plus small noise: vectors of a scale that the backbone knows."""
        with whole_weights(embedding):
            mean, std = embedding.weight.float().mean(0), embedding.weight.float().std(0)
        for vector in (self.summary, self.comparison):
            vector.copy_(mean + 0.5 * std * torch.randn_like(mean))

    def forward(self, inputs_embeds: Tensor, kinds: Tensor) -> Tensor:
        """Put the vectors at their sites in (B, L, H) by kinds (B, L); text is untouched."""
        kinds = kinds[..., None]
        summary, comparison = (vector.to(inputs_embeds.dtype) for vector in (self.summary, self.comparison))
        inputs_embeds = torch.where(kinds == TokenKind.SUMMARY, summary, inputs_embeds)
        return torch.where(kinds == TokenKind.COMPARISON, comparison, inputs_embeds)
