"""Losses over the scores of whole groups: best-of-N cross-entropy, Plackett-Luce, pairwise Bradley-Terry.

Pure functions of three tensors, with B groups of N responses (the largest group of the batch; smaller groups have
padding slots): `scores` (B, N) of any float dtype; `rankings` (B, N) integers, 1 = best, ties share a rank, 0 by
convention in padding slots; `mask` (B, N) bool, True where there is a response. Each gives the mean over the groups,
() float32. Wrong shapes or dtypes, a group without responses and a response without a rank are a ConfigurationError.

All of them depend on differences of scores within a group only, so adding a constant to a group changes nothing;
`centring_penalty`, which may be added to any of them, is what ties the scores down. They are computed in float32
whatever the dtype of the scores, and what a padding slot holds, NaN included, reaches neither the loss nor a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mr_reward.errors import ConfigurationError

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores, rankings, mask) -> scalar loss."""


def best_of_n_cross_entropy(scores: Tensor, rankings: Tensor, mask: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy over the N scores of a group; the best response is the class to be picked.

    Cross-entropy over N scores is the loss of "You Only Judge Once" (arXiv 2604.10966). Sharing the target equally
    among tied best responses is ours: with T of them the loss of the group cannot fall below log(T), which it nears
    as their scores become equal and leave the others behind. A group of one response has loss 0.
    `label_smoothing`: share of the target that is spread evenly over all responses of the group.
    """
    scores, rankings = _checked(scores, rankings, mask)
    best_rank = rankings.masked_fill(~mask, torch.iinfo(rankings.dtype).max).amin(dim=-1, keepdim=True)
    best = mask & (rankings == best_rank)
    target = (1.0 - label_smoothing) * best / best.sum(dim=-1, keepdim=True)
    target = target + label_smoothing * mask / mask.sum(dim=-1, keepdim=True)
    log_probs = scores.masked_fill(~mask, -torch.inf).log_softmax(dim=-1)
    # 0 * -inf is NaN: the padding's log-probabilities must be gone before the target weighs them.
    return -(target * log_probs.masked_fill(~mask, 0.0)).sum(dim=-1).mean()


def plackett_luce(scores: Tensor, rankings: Tensor, mask: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of the whole ranking, per response.

    Luce (1959) and Plackett (1975): the best response is drawn with softmax probability, then the second best from
    those left, and so on; as a loss over scores this is ListMLE (Xia et al., 2008). Ties by Breslow's rule (1974):
    responses that share a rank are each drawn from the same set, which holds all of them. Response i contributes
    `logsumexp(s_j for j with rank_j >= rank_i) - s_i`.

    The group's loss is the mean, not the sum, of these contributions, so that it does not grow with N. The negative
    log-likelihood of a group is therefore N times its loss; for N = 2 without a tie the loss is half of
    `best_of_n_cross_entropy` and of `pairwise_bradley_terry`. A group of one response has loss 0.
    `label_smoothing`: share of each draw's target that is spread evenly over the responses left to draw from.
    """
    scores, rankings = _checked(scores, rankings, mask)
    # Rank 0 takes the padding out of every response's candidates, as real ranks start at 1.
    rankings = rankings.masked_fill(~mask, 0)
    candidates = rankings.unsqueeze(-2) >= rankings.unsqueeze(-1)
    # (B, N, N) rather than a sort and a running logsumexp: ties need no special case, and N is small.
    gaps = _gaps(scores)
    nll = gaps.masked_fill(~candidates, -torch.inf).logsumexp(dim=-1)
    # Smoothing moves target from s_i to the mean of the candidates: minus the mean gap.
    mean_gap = gaps.masked_fill(~candidates, 0.0).sum(dim=-1) / candidates.sum(dim=-1).clamp(min=1)
    nll = nll - label_smoothing * mean_gap
    return (nll.masked_fill(~mask, 0.0).sum(dim=-1) / mask.sum(dim=-1)).mean()


def pairwise_bradley_terry(
    scores: Tensor, rankings: Tensor, mask: Tensor, *, margin: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """Mean of `softplus(-(s_i - s_j - m_ij))` over the pairs where response i is ranked strictly before response j.

    Bradley and Terry (1952), the usual loss of reward models (Ouyang et al., arXiv 2203.02155), over all pairs of a
    group. The margin m_ij is `margin * (rank_j - rank_i)`: responses far apart in the ranking have to be further
    apart in score (margins by degree of preference: Touvron et al., arXiv 2307.09288). Tied pairs say nothing and are
    left out; a group without an ordered pair does not count in the mean over groups. Without any the loss is 0, still
    connected to `scores`. `label_smoothing`: probability that a pair is taken to be labelled the wrong way round.
    """
    scores, rankings = _checked(scores, rankings, mask)
    ordered = mask.unsqueeze(-1) & mask.unsqueeze(-2) & (rankings.unsqueeze(-1) < rankings.unsqueeze(-2))
    margins = margin * (rankings.unsqueeze(-2) - rankings.unsqueeze(-1))
    logits = _gaps(scores) + margins
    # softplus(-x) = softplus(x) - x: the pair read the wrong way round.
    pair_losses = (torch.nn.functional.softplus(logits) - label_smoothing * logits).masked_fill(~ordered, 0.0)
    num_pairs = ordered.sum(dim=(-2, -1))
    group_losses = pair_losses.sum(dim=(-2, -1)) / num_pairs.clamp(min=1)
    return group_losses.sum() / (num_pairs > 0).sum().clamp(min=1)


def centring_penalty(scores: Tensor, mask: Tensor) -> Tensor:
    """Mean square of the groups' mean scores: keeps scores near 0, so that they can be read across groups.

    For N = 2 it is a quarter of the penalty of Eisenstein et al. (arXiv 2312.09244), the square of the sum.
    """
    total = scores.float().masked_fill(~mask, 0.0).sum(dim=-1)
    return (total / mask.sum(dim=-1)).square().mean()


LOSSES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "best_of_n": best_of_n_cross_entropy,
        "plackett_luce": plackett_luce,
        "bradley_terry": pairwise_bradley_terry,
    }
)
"""The losses by the name that configurations use."""


def get_loss(
    name: str, *, margin: float = 0.0, label_smoothing: float = 0.0, centring_coefficient: float = 0.0
) -> LossFunction:
    """The loss called `name`, a key of `LOSSES`, with its options filled in."""
    if name not in LOSSES:
        raise ConfigurationError(
            f"got loss {name!r}, expected one of {', '.join(map(repr, LOSSES))}; choose one of them"
        )
    if margin < 0.0 or (margin and name != "bradley_terry"):
        raise ConfigurationError(
            f"got margin {margin} with loss {name!r}, expected 0, or a positive margin with 'bradley_terry', "
            "the only loss over pairs"
        )
    limit = 0.5 if name == "bradley_terry" else 1.0  # half of all pairs wrong would teach nothing, more the opposite
    if not 0.0 <= label_smoothing < limit:
        raise ConfigurationError(
            f"got label smoothing {label_smoothing}, expected at least 0 and below {limit} for loss {name!r}"
        )
    if centring_coefficient < 0.0:
        raise ConfigurationError(f"got centring coefficient {centring_coefficient}, expected 0 or more")
    options = {"margin": margin, "label_smoothing": label_smoothing}
    given = {key: value for key, value in options.items() if value}
    loss = functools.partial(LOSSES[name], **given) if given else LOSSES[name]
    return functools.partial(_centred, loss, centring_coefficient) if centring_coefficient else loss


def _centred(loss: LossFunction, coefficient: float, scores: Tensor, rankings: Tensor, mask: Tensor) -> Tensor:
    return loss(scores, rankings, mask) + coefficient * centring_penalty(scores, mask)


def _gaps(scores: Tensor) -> Tensor:
    """(B, N) -> (B, N, N), s_j - s_i at [i, j]. Gaps, so that a large common offset does not cost precision."""
    return scores.unsqueeze(-2) - scores.unsqueeze(-1)


def _checked(scores: Tensor, rankings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Check the arguments; the scores in float32 with 0 in the padding, and the rankings in int64."""
    if scores.dim() != 2 or 0 in scores.shape:
        raise ConfigurationError(
            f"got scores of shape {tuple(scores.shape)}, expected (B groups, N responses), neither 0; "
            "add a group dimension to the scores of a single group"
        )
    for name, tensor in (("rankings", rankings), ("mask", mask)):
        if tensor.shape != scores.shape:
            raise ConfigurationError(
                f"got {name} of shape {tuple(tensor.shape)} with scores of shape {tuple(scores.shape)}, "
                "expected the same shape; pad rankings with 0 and mask with False"
            )
    if not scores.is_floating_point():
        raise ConfigurationError(
            f"got scores of dtype {scores.dtype}, expected a float dtype; pass the model's scores"
        )
    if rankings.is_floating_point() or rankings.is_complex() or rankings.dtype == torch.bool:
        raise ConfigurationError(
            f"got rankings of dtype {rankings.dtype}, expected int64; 1 = best, ties share a rank"
        )
    if mask.dtype != torch.bool:
        raise ConfigurationError(f"got a mask of dtype {mask.dtype}, expected torch.bool; use mask.bool()")
    # One host sync each. Both mistakes would otherwise train on a wrong target, or give NaN, without a word.
    empty = ~mask.any(dim=-1)
    if empty.any():
        raise ConfigurationError(
            f"got groups {empty.nonzero().flatten().tolist()} without a response, expected at least one True in every "
            "row of mask; drop the empty groups"
        )
    unranked = (mask & (rankings < 1)).any(dim=-1)
    if unranked.any():
        raise ConfigurationError(
            f"got responses with a rank below 1 in groups {unranked.nonzero().flatten().tolist()}, expected 1 = best; "
            "mask padding slots and give every response of a training group a rank"
        )
    return scores.float().masked_fill(~mask, 0.0), rankings.long()
