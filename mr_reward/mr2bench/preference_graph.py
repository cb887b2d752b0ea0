"""The paper's denoising: preference graph ensemble, feedback arc set, rank by descendants.

Source: Hu et al., "Language Model Preference Evaluation with Multiple Weak Evaluators" (PGED), arXiv 2410.12869, used
by arXiv 2604.10966 for MR2Bench-Video. Each evaluator's graph has an arc u -> v of weight w where they prefer u to v
by net w votes; the ensemble adds the graphs up, and opposite arcs cancel. Added up, that is the net of all votes,
however they are divided among evaluators (or resamples of one), so it is computed from all votes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import networkx as nx  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from mr_reward.groups import dense_ranks

__all__ = ["descendant_ranks", "exact_order", "greedy_order", "is_cyclic", "net_weights", "removed_weight"]

Floats = NDArray[np.float64]


def net_weights(wins: Floats) -> Floats:
    """The ensemble's arcs: (M, M) of wins -> (M, M), entry (i, j) > 0 is the weight of i -> j, without an opposite."""
    return np.maximum(wins - wins.T, 0.0)


def greedy_order(weights: Floats) -> list[int]:
    """An order with few backward arcs, by the heuristic of Eades, Lin and Smyth (1993) on each cyclic component."""
    return _by_component(weights, _eades)


def exact_order(weights: Floats) -> list[int]:
    """The order with the least weight of backward arcs, as an integer program (linear ordering)."""
    return _by_component(weights, _linear_ordering)


def removed_weight(weights: Floats, order: Sequence[int]) -> float:
    """The weight of the arcs that an order removes, those that point backwards."""
    sorted_weights = weights[np.ix_(order, order)]
    return float(np.tril(sorted_weights).sum())


def descendant_ranks(weights: Floats, order: Sequence[int]) -> tuple[int, ...]:
    """Rank by how many others can be reached once the backward arcs are removed."""
    place = np.argsort(order)
    forward = np.where(place[:, None] < place[None, :], weights, 0.0)
    graph = _graph(forward)
    return dense_ranks([-len(nx.descendants(graph, node)) for node in range(len(weights))])


def is_cyclic(weights: Floats) -> bool:
    """Whether no ranking agrees with all arcs."""
    return not nx.is_directed_acyclic_graph(_graph(weights))


def _by_component(weights: Floats, solve: Callable[[Floats, list[int]], list[int]]) -> list[int]:
    """No arc between components has to be removed, so each is solved by itself."""
    components = nx.condensation(_graph(weights))
    order: list[int] = []
    for component in nx.lexicographical_topological_sort(components):
        order += solve(weights, sorted(components.nodes[component]["members"]))
    return order


def _graph(weights: Floats) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(weights)))
    graph.add_edges_from(zip(*map(np.ndarray.tolist, np.nonzero(weights)), strict=True))
    return graph


def _eades(weights: Floats, members: list[int]) -> list[int]:
    """Sinks to the end, sources to the front, else whoever gives most more than it takes to the front."""
    left: list[int] = []
    right: list[int] = []
    remaining = list(members)
    while remaining:
        part = weights[np.ix_(remaining, remaining)]
        given, taken = part.sum(axis=1), part.sum(axis=0)
        sinks = [node for node, out in zip(remaining, given, strict=True) if out == 0]
        if sinks:
            right = sinks + right
            remaining = [node for node in remaining if node not in sinks]
            continue
        sources = [node for node, into in zip(remaining, taken, strict=True) if into == 0]
        chosen = sources or [remaining[int(np.argmax(given - taken))]]
        left += chosen
        remaining = [node for node in remaining if node not in chosen]
    return left + right


def _linear_ordering(weights: Floats, members: list[int]) -> list[int]:
    """x_ij = 1 puts i before j; any three of them have to agree on an order."""
    size = len(members)
    if size < 3:
        return members
    pairs = {pair: k for k, pair in enumerate(combinations(range(size), 2))}
    part = weights[np.ix_(members, members)]
    cost = np.array([part[j, i] - part[i, j] for i, j in pairs])
    triples = list(combinations(range(size), 3))
    rows = np.repeat(np.arange(len(triples)), 3)
    columns = [pairs[pair] for i, j, k in triples for pair in ((i, j), (j, k), (i, k))]
    matrix = csr_matrix((np.tile([1.0, 1.0, -1.0], len(triples)), (rows, columns)), (len(triples), len(pairs)))
    result = milp(
        cost, integrality=np.ones(len(pairs)), bounds=Bounds(0, 1), constraints=LinearConstraint(matrix, 0, 1)
    )
    before = np.zeros(size)
    for (i, j), value in zip(pairs, result.x, strict=True):
        before[i if value > 0.5 else j] += 1
    return [members[i] for i in np.argsort(-before, kind="stable")]
