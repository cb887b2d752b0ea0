"""Rows within their budget, batches within theirs, and padding on either side."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LAYOUTS, family, random_group

from mr_reward import ResponseGroup
from mr_reward.backbones.base import BackboneAdapter
from mr_reward.errors import ConfigurationError, OverLengthError
from mr_reward.model.rows import OVER_LENGTH_POLICIES, Packer, Rows, collate, plan_batches
from mr_reward.templates.rendering import TEMPLATE, RenderedGroup

READOUTS = {"causal": 1, "isolated": 1, "set": 2}


def rendered(prompt: int, lengths: list[int]) -> RenderedGroup:
    """Every token has an id of its own: 1.. in the prompt, then 100 i + 1.. in response i."""
    return RenderedGroup(
        prompt_ids=torch.arange(1, prompt + 1),
        response_ids=[[100 * (i + 1) + j + 1 for j in range(length)] for i, length in enumerate(lengths)],
        media={},
        mm_token_type_ids=None,
    )


def packer(layout: str, max_tokens: int, context: int | None = None, policy: str = "truncate_responses") -> Packer:
    renderer: Any = SimpleNamespace(template=TEMPLATE)  # `lay_out` takes rendered groups
    return Packer(renderer, layout=layout, max_tokens=max_tokens, context_tokens=context, over_length=policy)


def naive_fit(layout: str, prompt: int, lengths: list[int], max_tokens: int, context: int | None) -> list[int] | None:
    """Try every common length from the longest down."""
    readouts = READOUTS[layout]
    for limit in range(max(lengths), -1, -1):
        kept = [min(length, limit) for length in lengths]
        row = prompt + sum(kept) + readouts * len(kept)
        positions = row if layout == "causal" else prompt + max(kept) + readouts
        if row <= max_tokens and (context is None or positions <= context):
            return kept
    return None


FITS = st.tuples(
    st.sampled_from(LAYOUTS),
    st.integers(1, 10),
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(1, 70),
    st.none() | st.integers(1, 50),
)


@settings(max_examples=400, deadline=None)
@given(case=FITS)
def test_truncation_equals_trying_every_length(case: tuple[str, int, list[int], int, int | None]) -> None:
    layout, prompt, lengths, max_tokens, context = case
    kept = naive_fit(layout, prompt, lengths, max_tokens, context)
    group = rendered(prompt, lengths)
    if kept is None:
        # Even without a single response token: cutting cannot help.
        with pytest.raises(OverLengthError, match="'g'"):
            packer(layout, max_tokens, context).lay_out(group, "group 'g'")
        return
    row = packer(layout, max_tokens, context).lay_out(group, "g")
    assert row is not None
    assert row.num_tokens == prompt + sum(kept) + READOUTS[layout] * len(kept) <= max_tokens
    assert [end - start for start, end in row.spans[0]] == kept
    assert row.truncated == (tuple(k < length for k, length in zip(kept, lengths, strict=True)),)
    # The prompt is whole, and of each response the beginning is kept.
    assert row.input_ids[0, :prompt].tolist() == group.prompt_ids.tolist()
    for (start, end), ids, keep in zip(row.spans[0], group.response_ids, kept, strict=True):
        assert row.input_ids[0, start:end].tolist() == ids[:keep]
    assert (row.input_ids[row.kinds > 0] == 0).all()


@settings(max_examples=200, deadline=None)
@given(case=FITS)
def test_policies_agree_on_what_fits(case: tuple[str, int, list[int], int, int | None]) -> None:
    layout, prompt, lengths, max_tokens, context = case
    fits = naive_fit(layout, prompt, lengths, max_tokens, context) == lengths
    group = rendered(prompt, lengths)
    dropped = packer(layout, max_tokens, context, "drop_group").lay_out(group, "g")
    assert (dropped is not None) == fits
    if fits:
        row = packer(layout, max_tokens, context, "error").lay_out(group, "g")
        assert row is not None and dropped is not None
        assert torch.equal(row.input_ids, dropped.input_ids)
        assert not any(row.truncated[0])
    else:
        with pytest.raises(OverLengthError):
            packer(layout, max_tokens, context, "error").lay_out(group, "g")


@settings(max_examples=300, deadline=None)
@given(case=FITS.filter(lambda case: case[0] != "causal"))
def test_responses_over_a_prompt_are_cut_one_by_one(case: tuple[str, int, list[int], int, int | None]) -> None:
    """Read over a prompt that was read before, each has to fit as if it stood alone behind it."""
    layout, prompt, lengths, max_tokens, context = case
    group = rendered(prompt, lengths)
    kept = [naive_fit(layout, prompt, [length], max_tokens, context) for length in lengths]
    if None in kept:
        for policy in ("error", "truncate_responses"):
            with pytest.raises(OverLengthError, match="'g'"):
                packer(layout, max_tokens, context, policy).trim(group, "group 'g'")
    else:
        cut = packer(layout, max_tokens, context).trim(group, "g")
        assert cut is not None
        assert cut[0].response_ids == [ids[: one[0]] for ids, one in zip(group.response_ids, kept, strict=True) if one]
        assert cut[1] == tuple([length] != one for length, one in zip(lengths, kept, strict=True))
        assert torch.equal(cut[0].prompt_ids, group.prompt_ids)
    fits = kept == [[length] for length in lengths]
    assert (packer(layout, max_tokens, context, "drop_group").trim(group, "g") is not None) == fits
    if not fits:
        with pytest.raises(OverLengthError, match="'g'"):
            packer(layout, max_tokens, context, "error").trim(group, "group 'g'")


@pytest.mark.parametrize(
    ("layout", "context", "truncated"),
    [
        # Prompt 4 and responses of 5, 3, 3: positions run on in `causal` (18) and are shared otherwise (10, 11).
        ("causal", 18, (False, False, False)),
        ("causal", 17, (True, False, False)),
        ("isolated", 10, (False, False, False)),
        ("isolated", 9, (True, False, False)),
        ("set", 11, (False, False, False)),
        ("set", 10, (True, False, False)),
    ],
)
def test_positions_of_the_context(layout: str, context: int, truncated: tuple[bool, ...]) -> None:
    row = packer(layout, 1000, context).lay_out(rendered(4, [5, 3, 3]), "g")
    assert row is not None and row.truncated == (truncated,)


def test_messages_say_what_was_got_expected_and_to_do() -> None:
    group = rendered(7, [5, 30])
    with pytest.raises(OverLengthError) as caught:
        packer("set", 20, 15, "error").lay_out(group, "group 'g'")
    message = str(caught.value)
    for part in ("group 'g'", "7 prompt tokens", "[5, 30]", "20 tokens", "15 positions", "'set'"):
        assert part in message
    for advice in ("raise max_tokens_per_batch", "drop_group", "truncate_responses"):
        assert advice in message
    with pytest.raises(OverLengthError) as caught:
        packer("set", 20, None, "error").lay_out(group, "g")
    assert "positions" not in str(caught.value)


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_a_budget_below_one_is_refused(max_tokens: int) -> None:
    with pytest.raises(ConfigurationError, match=f"token budget is {max_tokens}, expected at least 1"):
        packer("set", max_tokens)


def test_unknown_policy_and_layout_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="unknown over-length policy 'skip', expected one of error, drop_gr"):
        packer("set", 10, policy="skip")
    with pytest.raises(ConfigurationError, match="unknown layout 'ring'"):
        packer("ring", 10)
    assert OVER_LENGTH_POLICIES == ("error", "drop_group", "truncate_responses")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncation_never_touches_media(layout: str) -> None:
    renderer = family("qwen3_vl").renderer()
    group = random_group(random.Random(0), 3, images=2)
    whole = Packer(renderer, layout=layout, max_tokens=10_000).pack(group)
    assert whole is not None
    prompt = int((whole.segments == 0).sum())
    empty = Packer(
        renderer, layout=layout, max_tokens=prompt + 3 * READOUTS[layout], over_length="truncate_responses"
    ).pack(group)
    assert empty is not None
    assert all(start == end for start, end in empty.spans[0])
    assert torch.equal(empty.input_ids[:, :prompt], whole.input_ids[:, :prompt])
    for key, value in whole.media.items():
        if key == "mm_token_type_ids":
            assert torch.equal(empty.media[key], value[:, : empty.num_tokens]) and not value[:, prompt:].any()
        else:
            assert torch.equal(empty.media[key], value)
    with pytest.raises(OverLengthError, match=f"{prompt} prompt tokens"):
        Packer(
            renderer, layout=layout, max_tokens=prompt + 3 * READOUTS[layout] - 1, over_length="truncate_responses"
        ).pack(group)


# --- batches ---


@settings(max_examples=300, deadline=None)
@given(data=st.data(), max_tokens=st.integers(1, 60))
def test_batches_hold_every_row_once_and_keep_the_budget(data: st.DataObject, max_tokens: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, max_tokens), max_size=25))
    batches = plan_batches(lengths, max_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    longest = [max(lengths[row] for row in batch) for batch in batches]
    for batch, width in zip(batches, longest, strict=True):
        assert len(batch) * width <= max_tokens
    assert longest == sorted(longest, reverse=True)
    # No room is left that the next row would have fitted in.
    for batch, width, following in zip(batches, longest, batches[1:], strict=False):
        assert (len(batch) + 1) * width > max_tokens, following


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=12), max_tokens=st.integers(9, 24))
def test_rows_without_padding_go_where_there_is_room_first(lengths: list[int], max_tokens: int) -> None:
    expected: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for batch in expected:
            if sum(lengths[i] for i in batch) + lengths[row] <= max_tokens:
                batch.append(row)
                break
        else:
            expected.append([row])
    assert plan_batches(lengths, max_tokens, padded=False) == expected


@pytest.mark.parametrize("padded", [True, False])
def test_rows_that_just_fill_a_batch_are_one_and_rows_of_one_length_keep_their_order(padded: bool) -> None:
    assert plan_batches([4, 4, 4, 4, 4], 12, padded) == [[0, 1, 2], [3, 4]]
    assert plan_batches([4, 4, 4], 11, padded) == [[0, 1], [2]]
    assert plan_batches([7, 9], 8, padded) == [[1], [0]], "one that is too large stands alone"


def test_no_rows_make_no_batches() -> None:
    assert plan_batches([], 10) == []


# --- collate ---


def packed(layout: str, prompt: int, lengths: list[int]) -> Rows:
    row = packer(layout, 1000).lay_out(rendered(prompt, lengths), "g")
    assert row is not None
    return row


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_found_again_in_the_batch(layout: str, padding_side: str) -> None:
    rows = [packed(layout, 2, [1, 3, 0]), packed(layout, 5, [4]), packed(layout, 1, [0, 0])]
    batch = collate(rows, BackboneAdapter(), padding_side)
    longest = max(row.num_tokens for row in rows)
    assert batch.input_ids.shape == (3, longest) and batch.score_sites.shape == (3, 3)
    for i, row in enumerate(rows):
        start = longest - row.num_tokens if padding_side == "left" else 0
        inside = slice(start, start + row.num_tokens)
        for field in ("input_ids", "segments", "kinds", "offsets"):
            assert torch.equal(getattr(batch, field)[i, inside], getattr(row, field)[0]), field
        outside = torch.ones(longest, dtype=torch.bool)
        outside[inside] = False
        assert (batch.segments[i, outside] == -1).all() and (batch.kinds[i, outside] == 0).all()
        n = row.score_sites.shape[1]
        assert batch.response_mask[i].tolist() == [True] * n + [False] * (3 - n)
        assert batch.score_sites[i, :n].tolist() == [site + start for site in row.score_sites[0].tolist()]
        assert batch.spans[i] == tuple((first + start, end + start) for first, end in row.spans[0])
        assert (batch.score_sites[i, n:] == 0).all()
    assert batch.media == {}


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_media_of_a_batch_follow_its_rows(padding_side: str) -> None:
    rng = random.Random(1)
    pack = Packer(family("qwen3_vl").renderer(), layout="set", max_tokens=10_000).pack
    groups = [
        random_group(rng, 2, images=2),
        random_group(rng, 2, longest=60),
        ResponseGroup(prompt="text", responses=["a"]),
        random_group(rng, 3, images=1, videos=1),
    ]
    rows = [row for group in groups if (row := pack(group)) is not None]
    batch = collate(rows, family("qwen3_vl").adapter, padding_side)
    inputs = batch.media
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(inputs[key], torch.cat([rows[0].media[key], rows[3].media[key]]))
    for key in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(inputs[key], rows[3].media[key])
    types = inputs["mm_token_type_ids"]
    for i, row in enumerate(rows):
        own = row.media.get("mm_token_type_ids", torch.zeros_like(row.input_ids))
        assert torch.equal(types[i][batch.segments[i] == 0], own[row.segments == 0])
        assert (types[i][batch.segments[i] != 0] == 0).all()
    tokenizer = family("qwen3_vl").tokenizer
    assert torch.equal(types == 1, batch.input_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    assert torch.equal(types == 2, batch.input_ids == tokenizer.convert_tokens_to_ids("<|video_pad|>"))
