"""Who sees whom, where the scores are read, and which attention backend can do which layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mr_reward.attention.backends import BACKENDS, attention_mask, check_backend
from mr_reward.errors import BackendError, ConfigurationError
from mr_reward.layouts import LAYOUTS, PADDING_SEGMENT, TokenKind, check_layout, plan_row, visible

DENSE_BACKENDS = ("eager", "sdpa")


class Row:
    """One row written out from the table of the design, token by token, without the code under test.

    A token is (who, what): who is "prompt", "padding" or the number of a response, what is "text", "s" or "c".
    """

    def __init__(self, layout: str, prompt: int, lengths: list[int], left: int = 0, right: int = 0) -> None:
        tokens: list[tuple[object, str]] = [("prompt", "text")] * prompt
        for i, length in enumerate(lengths):
            tokens += [(i, "text")] * length
            tokens += [(i, "s"), (i, "c")] if layout == "set" else [(i, "s")]
        self.layout = layout
        self.tokens = [("padding", "text")] * left + tokens + [("padding", "text")] * right

    @property
    def segments(self) -> torch.Tensor:
        numbers = {"padding": -1, "prompt": 0}
        return torch.tensor([numbers[w] if isinstance(w, str) else int(w) + 1 for w, _ in self.tokens])  # type: ignore[call-overload]

    @property
    def kinds(self) -> torch.Tensor:
        return torch.tensor([{"text": 0, "s": 1, "c": 2}[what] for _, what in self.tokens])

    def sees(self, q: int, k: int) -> bool:
        (query, query_kind), (key, key_kind) = self.tokens[q], self.tokens[k]
        if "padding" in (query, key):
            return q == k
        if self.layout == "causal":
            return k <= q
        if self.layout == "set" and query_kind == "c" and key_kind == "s":
            return True
        return k <= q and key in ("prompt", query)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    return Row(
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(1, 5)),
        draw(st.lists(st.integers(0, 5), min_size=1, max_size=6)),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 3)),
    )


@settings(max_examples=150, deadline=None)
@given(row=rows())
def test_visible_equals_the_table(row: Row) -> None:
    found = visible(row.layout, row.segments[None], row.kinds[None])
    assert found.dtype == torch.bool
    n = len(row.tokens)
    assert found[0].tolist() == [[row.sees(q, k) for k in range(n)] for q in range(n)]


def test_visible_keeps_the_rows_of_a_batch_apart() -> None:
    one, other = Row("set", 2, [1, 2], right=3), Row("set", 3, [0, 1], left=4)
    segments, kinds = torch.stack([one.segments, other.segments]), torch.stack([one.kinds, other.kinds])
    together = visible("set", segments, kinds)
    for i in range(2):
        assert torch.equal(together[i], visible("set", segments[i : i + 1], kinds[i : i + 1])[0])
    assert not torch.equal(together[0], together[1])


@settings(max_examples=60, deadline=None)
@given(row=rows())
def test_no_query_is_blind_and_padding_is_seen_by_itself_only(row: Row) -> None:
    mask = visible(row.layout, row.segments[None], row.kinds[None])[0]
    assert mask.diagonal().all()
    padding = row.segments == PADDING_SEGMENT
    assert not (mask[:, padding] & ~torch.eye(len(padding), dtype=torch.bool)[:, padding]).any()


# --- plan_row ---


@pytest.mark.parametrize(
    ("layout", "segments", "kinds", "offsets", "spans", "sites"),
    [
        (
            "causal",
            [0, 0, 1, 1, 1, 2, 3, 3],
            [0, 0, 0, 0, 1, 1, 0, 1],
            [0, 0, 0, 1, 2, 3, 4, 5],
            ((2, 4), (5, 5), (6, 7)),
            (4, 5, 7),
        ),
        (
            "isolated",
            [0, 0, 1, 1, 1, 2, 3, 3],
            [0, 0, 0, 0, 1, 1, 0, 1],
            [0, 0, 0, 1, 2, 0, 0, 1],
            ((2, 4), (5, 5), (6, 7)),
            (4, 5, 7),
        ),
        (
            "set",
            [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3],
            [0, 0, 0, 0, 1, 2, 1, 2, 0, 1, 2],
            [0, 0, 0, 1, 2, 3, 0, 1, 0, 1, 2],
            ((2, 4), (6, 6), (8, 9)),
            (5, 7, 10),
        ),
    ],
)
def test_a_row_by_hand(
    layout: str,
    segments: list[int],
    kinds: list[int],
    offsets: list[int],
    spans: tuple[tuple[int, int], ...],
    sites: tuple[int, ...],
) -> None:
    """Two prompt tokens; responses of two, no and one tokens."""
    plan = plan_row(layout, 2, [2, 0, 1])
    assert plan.segments.tolist() == segments
    assert plan.kinds.tolist() == kinds
    assert plan.offsets.tolist() == offsets
    assert plan.spans == spans and plan.score_sites == sites
    assert {plan.segments.dtype, plan.kinds.dtype, plan.offsets.dtype} == {torch.int64}


@settings(max_examples=100, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    prompt=st.integers(1, 6),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
)
def test_the_plan_equals_the_table(layout: str, prompt: int, lengths: list[int]) -> None:
    plan, row = plan_row(layout, prompt, lengths), Row(layout, prompt, lengths)
    assert torch.equal(plan.segments, row.segments) and torch.equal(plan.kinds, row.kinds)
    for i, ((start, end), site) in enumerate(zip(plan.spans, plan.score_sites, strict=True)):
        assert row.tokens[start:end] == [(i, "text")] * lengths[i]
        assert row.tokens[site] == (i, "c" if layout == "set" else "s")
        # The same kind of token everywhere, the last response included, and the last token of its response.
        assert site == len(row.tokens) - 1 or row.tokens[site + 1][0] == i + 1
    assert (plan.offsets[:prompt] == 0).all()
    if layout == "causal":
        assert plan.offsets[prompt:].tolist() == list(range(len(row.tokens) - prompt))
    else:
        for i in range(len(lengths)):
            own = plan.offsets[row.segments == i + 1]
            assert own.tolist() == list(range(len(own)))


def test_kinds_have_the_numbers_that_rows_hold() -> None:
    assert [*TokenKind] == [0, 1, 2] == [TokenKind.TEXT, TokenKind.SUMMARY, TokenKind.COMPARISON]


@pytest.mark.parametrize("layout", ["ring", "", "SET"])
def test_unknown_layout_is_refused(layout: str) -> None:
    message = f"unknown layout '{layout}', expected one of causal, isolated, set"
    segments = torch.zeros(1, 2, dtype=torch.long)
    for call in (
        lambda: check_layout(layout),
        lambda: plan_row(layout, 1, [1]),
        lambda: visible(layout, segments, segments),
        lambda: check_backend(layout, "sdpa"),
        lambda: attention_mask(layout, "sdpa", segments, segments, torch.float32),
    ):
        with pytest.raises(ConfigurationError, match=message):
            call()


# --- backends ---


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3", "paged", None, "sdpa "])
@pytest.mark.parametrize("layout", ["isolated", "set"])
def test_backends_that_would_ignore_the_mask_are_refused(layout: str, backend: str | None) -> None:
    able = "'mr_group' or 'sdpa' or 'eager' or 'flex_attention'"
    with pytest.raises(BackendError, match=f"{backend!r} cannot express layout '{layout}'.*{able}.*'causal'"):
        check_backend(layout, backend)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"])
def test_causal_runs_on_all_known_backends(backend: str) -> None:
    check_backend("causal", backend)
    row = Row("causal", 2, [1, 2], left=1, right=2)
    mask = attention_mask("causal", backend, row.segments[None], row.kinds[None], torch.float32)
    assert mask.tolist() == [[0, 1, 1, 1, 1, 1, 1, 1, 0, 0]]


def test_every_layout_runs_somewhere_and_unknown_backends_nowhere() -> None:
    assert set(BACKENDS) == set(LAYOUTS)
    for layout in LAYOUTS:
        for backend in DENSE_BACKENDS:
            check_backend(layout, backend)
        with pytest.raises(BackendError, match="'my_backend' cannot express"):
            check_backend(layout, "my_backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["isolated", "set"])
def test_additive_mask_says_what_the_boolean_mask_says(layout: str, dtype: torch.dtype) -> None:
    row = Row(layout, 3, [2, 0, 4], left=2, right=1)
    arguments = (row.segments[None], row.kinds[None], dtype)
    boolean = attention_mask(layout, "sdpa", *arguments)
    additive = attention_mask(layout, "eager", *arguments)
    n = len(row.tokens)
    assert boolean.shape == additive.shape == (1, 1, n, n)
    assert boolean.dtype == torch.bool and additive.dtype == dtype
    assert torch.equal(additive == 0, boolean)
    assert torch.equal(boolean[0, 0], visible(layout, *arguments[:2])[0])
    # Finite, or a softmax could give NaN; and out of the reach of any logit.
    assert additive.isfinite().all() and (additive[~boolean] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_one_block_see_each_other_and_no_other_block(layout: str) -> None:
    """Two blocks side by side, a third apart, in two rows of which one is padded."""
    row = Row(layout, 8, [2, 1])
    blocks = torch.full((2, len(row.tokens) + 1), -1)
    blocks[0, 1:7] = torch.tensor([0, 0, 1, 1, -1, 2])
    blocks[1, 2:5] = 0
    segments, kinds = (
        torch.stack([F.pad(t, (0, 1), value=v), F.pad(t, (1, 0), value=v)])
        for t, v in ((row.segments, -1), (row.kinds, 0))
    )
    causal, seen = visible(layout, segments, kinds), visible(layout, segments, kinds, blocks)
    for b in range(2):
        for query in range(seen.shape[1]):
            for key in range(seen.shape[1]):
                together = blocks[b, query] == blocks[b, key] >= 0
                assert seen[b, query, key] == (causal[b, query, key] | together), (b, query, key)
    assert (seen & ~causal).sum() == 1 + 1 + 3, "a pair for each of two blocks of two, three in a block of three"


@settings(max_examples=30, deadline=None)
@given(row=rows(), seed=st.integers(0, 2**31))
def test_attention_with_either_mask_is_attention_over_what_is_visible(row: Row, seed: int) -> None:
    if row.layout == "causal":
        return  # there is no 4-D mask
    generator = torch.Generator().manual_seed(seed)
    n = len(row.tokens)
    query, key, value = torch.randn(3, 1, 1, n, 4, generator=generator)
    arguments = (row.segments[None], row.kinds[None], torch.float32)
    results = [
        F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask(row.layout, backend, *arguments))
        for backend in DENSE_BACKENDS
    ]
    for q in range(n):
        seen = [k for k in range(n) if row.sees(q, k)]
        weights = (key[0, 0, seen] @ query[0, 0, q] / 2).softmax(0)
        for result in results:
            torch.testing.assert_close(result[0, 0, q], weights @ value[0, 0, seen], rtol=0, atol=1e-5)
