"""Losses against naive loops over single responses, the definitions, and each other."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mr_reward.errors import ConfigurationError
from mr_reward.training.losses import LOSSES, best_of_n_cross_entropy, get_loss, pairwise_bradley_terry, plackett_luce

Groups = list[tuple[list[float], list[int]]]


def naive_best_of_n(scores: list[Tensor], ranks: list[int]) -> Tensor:
    total = torch.stack(scores).exp().sum()
    losses = [-(scores[i].exp() / total).log() for i, rank in enumerate(ranks) if rank == min(ranks)]
    return torch.stack(losses).mean()


def naive_plackett_luce(scores: list[Tensor], ranks: list[int]) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for i, rank in enumerate(ranks):
        left = sum(scores[j].exp() for j in range(len(ranks)) if ranks[j] >= rank)
        loss = loss - (scores[i].exp() / left).log()
    return loss / len(ranks)


def naive_bradley_terry(scores: list[Tensor], ranks: list[int]) -> Tensor | None:
    losses = []
    for i, j in itertools.permutations(range(len(ranks)), 2):
        if ranks[i] < ranks[j]:
            losses.append(-(scores[i].exp() / (scores[i].exp() + scores[j].exp())).log())
    return torch.stack(losses).mean() if losses else None


NAIVE: dict[str, Callable[[list[Tensor], list[int]], Tensor | None]] = {
    "best_of_n": naive_best_of_n,
    "plackett_luce": naive_plackett_luce,
    "bradley_terry": naive_bradley_terry,
}


def naive(name: str, scores: Tensor, groups: Groups) -> Tensor:
    """The batch's loss in float64 from `scores` (B, N), one response at a time."""
    losses = [NAIVE[name](list(scores[b, : len(ranks)]), ranks) for b, (_, ranks) in enumerate(groups)]
    kept = [loss for loss in losses if loss is not None]
    return torch.stack(kept).mean() if kept else scores.sum() * 0.0


def pad(
    groups: Groups, extra: int = 0, fill: float = 0.0, rank_fill: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(ranks) for _, ranks in groups) + extra
    scores = torch.full((len(groups), width), fill, dtype=dtype)
    rankings = torch.full((len(groups), width), rank_fill)
    mask = torch.zeros(len(groups), width, dtype=torch.bool)
    for b, (values, ranks) in enumerate(groups):
        scores[b, : len(values)] = torch.tensor(values, dtype=dtype)
        rankings[b, : len(ranks)] = torch.tensor(ranks)
        mask[b, : len(ranks)] = True
    return scores, rankings, mask


def loss_and_grad(name: str, scores: Tensor, rankings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores.clone().requires_grad_()
    loss = LOSSES[name](scores, rankings, mask)
    (grad,) = torch.autograd.grad(loss, scores)
    return loss.detach(), grad


@st.composite
def group_lists(draw: st.DrawFn) -> Groups:
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 6))
        # A coarse grid, so that equal scores occur; width 32 so that float32 is exact on it.
        values = [draw(st.integers(-40, 40)) / 8 for _ in range(n)]
        levels = [draw(st.integers(0, 3)) for _ in range(n)]
        competition = draw(st.booleans())
        ranks = [
            1 + (sum(o < v for o in levels) if competition else len({o for o in levels if o < v})) for v in levels
        ]
        groups.append((values, ranks))
    return groups


MIXED: Groups = [
    ([0.3, -1.2, 2.0, 0.7], [1, 2, 2, 3]),
    ([1.5], [1]),
    ([0.1, 0.4, -0.6], [1, 1, 1]),
    ([2.0, 1.0, 0.5], [3, 1, 2]),
]
every_loss = pytest.mark.parametrize("name", list(LOSSES))


@every_loss
@settings(max_examples=150, deadline=None)
@given(groups=group_lists())
def test_equals_naive_loops_in_value_and_gradient(name: str, groups: Groups) -> None:
    scores, rankings, mask = pad(groups)
    reference = scores.double().requires_grad_()
    expected = naive(name, reference, groups)
    (expected_grad,) = torch.autograd.grad(expected, reference)
    loss, grad = loss_and_grad(name, scores, rankings, mask)
    torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-4, atol=1e-6)


@every_loss
@settings(max_examples=60, deadline=None)
@given(groups=group_lists(), data=st.data())
def test_permutation_of_slots_keeps_loss_and_permutes_gradient(name: str, groups: Groups, data: st.DataObject) -> None:
    scores, rankings, mask = pad(groups, extra=1)
    order = torch.tensor(data.draw(st.permutations(range(scores.shape[1]))))
    loss, grad = loss_and_grad(name, scores, rankings, mask)
    moved_loss, moved_grad = loss_and_grad(name, scores[:, order], rankings[:, order], mask[:, order])
    torch.testing.assert_close(moved_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved_grad, grad[:, order], rtol=1e-5, atol=1e-6)


@every_loss
@pytest.mark.parametrize("fill", [0.0, 1e4, 3e38, -3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("rank_fill", [0, 1, 99, -7])
def test_padding_changes_nothing_whatever_it_holds(name: str, fill: float, rank_fill: int) -> None:
    loss, grad = loss_and_grad(name, *pad(MIXED))
    padded_loss, padded_grad = loss_and_grad(name, *pad(MIXED, extra=3, fill=fill, rank_fill=rank_fill))
    width = grad.shape[1]
    torch.testing.assert_close(padded_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(padded_grad[:, :width], grad, rtol=1e-6, atol=1e-7)
    mask = pad(MIXED, extra=3)[2]
    assert (padded_grad[~mask] == 0).all()


@every_loss
def test_batch_loss_is_the_mean_over_groups(name: str) -> None:
    groups = [group for group in MIXED if len(set(group[1])) > 1]
    singles = [LOSSES[name](*pad([group])) for group in groups]
    assert singles[0] != singles[1]
    torch.testing.assert_close(LOSSES[name](*pad(groups)), torch.stack(singles).mean())


@every_loss
def test_float32_whatever_the_input(name: str) -> None:
    groups: Groups = [([0.25, -1.5, 2.0], [2, 1, 3]), ([1.0, 0.5, 3.0], [1, 2, 2])]
    expected, expected_grad = loss_and_grad(name, *pad(groups))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        loss, grad = loss_and_grad(name, *pad(groups, dtype=dtype))
        assert loss.dtype == torch.float32
        # The scores are exact in every dtype: a computation in it would be off by far more than float32's rounding.
        assert loss == expected
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.float(), expected_grad, rtol=1e-2, atol=1e-4)


@every_loss
@pytest.mark.parametrize("size", [1e3, 1e6, 1e30])
def test_finite_with_huge_scores(name: str, size: float) -> None:
    groups: Groups = [([size, -size, 0.0], [2, 3, 1]), ([-size], [1]), ([size, size], [1, 2])]
    loss, grad = loss_and_grad(name, *pad(groups))
    assert loss.isfinite() and grad.isfinite().all()
    assert loss > size / 10


@every_loss
def test_a_common_offset_changes_nothing(name: str) -> None:
    groups: Groups = [([0.25, -1.5, 2.0], [2, 1, 3])]
    scores, rankings, mask = pad(groups)
    loss, grad = loss_and_grad(name, scores, rankings, mask)
    moved_loss, moved_grad = loss_and_grad(name, scores + 2.0**20, rankings, mask)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-6, atol=1e-7)


@every_loss
@pytest.mark.parametrize("ranks", [[1, 2, 2, 4], [2, 3, 3, 4], [3, 7, 7, 90]])
def test_ranks_count_by_their_order_only(name: str, ranks: list[int]) -> None:
    values = [0.3, -1.2, 2.0, 0.7]
    assert LOSSES[name](*pad([(values, ranks)])) == LOSSES[name](*pad([(values, [1, 2, 2, 3])]))


@every_loss
def test_gradient_descent_finds_the_order(name: str) -> None:
    _, rankings, mask = pad([([0.0] * 4, [3, 1, 4, 2])], extra=1)
    scores = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        LOSSES[name](scores, rankings, mask).backward()
        optimizer.step()
    found = scores[0, :4].argsort(descending=True).tolist()
    # The cross-entropy knows the best only.
    assert found[0] == 1 if name == "best_of_n" else found == [1, 3, 0, 2]


def test_losses_of_two_responses_are_one_loss() -> None:
    for values in ([0.7, -0.4], [-3.0, 2.0], [1.0, 1.0]):
        for ranks in ([1, 2], [2, 1]):
            batch = pad([(values, ranks)])
            cross_entropy = best_of_n_cross_entropy(*batch)
            torch.testing.assert_close(pairwise_bradley_terry(*batch), cross_entropy)
            # The mean over two responses, of which the last contributes 0.
            torch.testing.assert_close(2 * plackett_luce(*batch), cross_entropy)


def test_best_of_n_shares_the_target_among_tied_best() -> None:
    _, grad = loss_and_grad("best_of_n", *pad([([0.0, 0.0, 0.0, 0.0], [1, 1, 2, 3])]))
    torch.testing.assert_close(grad, torch.tensor([[-0.25, -0.25, 0.25, 0.25]]))
    floor = best_of_n_cross_entropy(*pad([([50.0, 50.0, 0.0], [1, 1, 2])]))
    assert floor.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("ranks", list(itertools.permutations([1, 2, 3, 4])))
def test_plackett_luce_is_the_product_over_stages(ranks: tuple[int, ...]) -> None:
    values = [0.3, -1.2, 2.0, 0.7]
    left = list(range(4))
    probability = 1.0
    for stage in range(1, 5):
        winner = ranks.index(stage)
        probability *= math.exp(values[winner]) / sum(math.exp(values[j]) for j in left)
        left.remove(winner)
    loss = plackett_luce(*pad([(values, list(ranks))]))
    assert math.exp(-4 * loss.item()) == pytest.approx(probability, rel=1e-5)


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one() -> None:
    values = [0.3, -1.2, 2.0, 0.7, -0.1]
    rankings = [list(ranks) for ranks in itertools.permutations(range(1, 6))]
    total = sum(math.exp(-5 * plackett_luce(*pad([(values, ranks)])).item()) for ranks in rankings)
    assert total == pytest.approx(1.0, abs=1e-4)


def test_plackett_luce_breslow_by_hand() -> None:
    # Three equal scores, two tied for first: each is drawn from all three, the last from itself.
    loss = plackett_luce(*pad([([0.0, 0.0, 0.0], [1, 1, 2])]))
    assert loss.item() == pytest.approx(2 * math.log(3) / 3)


def test_bradley_terry_leaves_out_ties_and_groups_without_pairs() -> None:
    ordered = ([0.0, 0.0, 5.0], [1, 2, 2])
    expected = (math.log(2) + math.log1p(math.exp(5))) / 2
    alone = pairwise_bradley_terry(*pad([ordered]))
    assert alone.item() == pytest.approx(expected)
    with_others = pairwise_bradley_terry(*pad([ordered, ([1.0, 2.0], [1, 1]), ([3.0], [1])]))
    assert with_others.item() == pytest.approx(expected)


def test_bradley_terry_without_any_pair_is_zero_with_a_gradient() -> None:
    loss, grad = loss_and_grad("bradley_terry", *pad([([1.0, 2.0], [1, 1]), ([3.0], [1])]))
    assert loss == 0
    assert (grad == 0).all()


@every_loss
def test_single_response_has_no_loss(name: str) -> None:
    loss, grad = loss_and_grad(name, *pad([([7.0], [1])], extra=2))
    assert loss == 0
    assert (grad == 0).all()


@every_loss
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, r, m: (s[0], r, m), r"shape \(4,\), expected \(B groups"),
        (lambda s, r, m: (s[:0], r[:0], m[:0]), r"shape \(0, 4\)"),
        (lambda s, r, m: (s, r[:, :3], m), r"rankings of shape \(4, 3\) with scores of shape \(4, 4\)"),
        (lambda s, r, m: (s, r, m[:1]), r"mask of shape \(1, 4\)"),
        (lambda s, r, m: (s.long(), r, m), "scores of dtype torch.int64"),
        (lambda s, r, m: (s, r.float(), m), "rankings of dtype torch.float32"),
        (lambda s, r, m: (s, r, m.long()), "mask of dtype torch.int64"),
        (lambda s, r, m: (s, r, m & torch.tensor([[True], [False], [True], [False]])), r"groups \[1, 3\] without"),
        (lambda s, r, m: (s, r, m | True), r"rank below 1 in groups \[1, 2, 3\]"),
    ],
)
def test_wrong_arguments_are_refused(name: str, change: Callable[..., tuple[Tensor, ...]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LOSSES[name](*change(*pad(MIXED)))


@every_loss
def test_arguments_are_not_changed(name: str) -> None:
    batch = pad(MIXED, extra=1, fill=5.0, rank_fill=3)
    copies = [tensor.clone() for tensor in batch]
    LOSSES[name](*batch)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(batch, copies, strict=True))


def test_get_loss() -> None:
    assert get_loss("best_of_n") is best_of_n_cross_entropy
    assert get_loss("plackett_luce") is plackett_luce
    assert get_loss("bradley_terry") is pairwise_bradley_terry
    with pytest.raises(ConfigurationError, match="'hinge'.*'best_of_n', 'plackett_luce', 'bradley_terry'"):
        get_loss("hinge")
    with pytest.raises(TypeError):
        LOSSES["hinge"] = best_of_n_cross_entropy  # type: ignore[index]
