"""`ResponseGroup`: what it makes of a prompt, and everything it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mr_reward.errors import CheckpointError, GroupError, MediaError, MRRewardError, OverLengthError
from mr_reward.groups import GroupScores, ResponseGroup, as_groups, dense_ranks, score_each

PIXEL, OTHER = Image.new("RGB", (1, 1)), Image.new("RGB", (2, 2))


def turn(*blocks: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(blocks)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


# --- what it makes ---


def test_a_string_becomes_a_user_turn() -> None:
    group = ResponseGroup(prompt="2 + 2?", responses=["4", ""])
    assert group.messages == turn(text("2 + 2?"))
    assert group.responses == ("4", "") and group.num_responses == 2
    assert group.images == () and group.videos == () and group.rankings is None
    assert group.name == "group (no id)"
    assert dataclasses.replace(group, id="a").name == "group 'a'"


def test_chat_messages_become_lists_of_blocks() -> None:
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("Which digit?"), {"type": "image"}], "name": "ignored"},
        {"role": "assistant", "content": ""},
    ]
    group = ResponseGroup(prompt=prompt, responses=["4"], images=[PIXEL])
    assert group.messages == [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [text("Which digit?"), {"type": "image"}]},
        {"role": "assistant", "content": [text("")]},
    ]


def test_media_are_taken_out_of_blocks_in_order() -> None:
    prompt = turn({"type": "image", "image": PIXEL}, text("and"), {"type": "image", "image": OTHER})
    group = ResponseGroup(prompt=prompt, responses=["a"])
    assert group.images == (PIXEL, OTHER)
    assert group.messages == turn({"type": "image"}, text("and"), {"type": "image"})
    video = [PIXEL, OTHER]
    assert ResponseGroup(prompt=turn({"type": "video", "video": video}), responses=["a"]).videos == (video,)


def test_a_prompt_without_placeholders_gets_them_in_the_first_user_turn() -> None:
    prompt = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    group = ResponseGroup(prompt=prompt, responses=["a"], images=[PIXEL, OTHER])
    contents = [message["content"] for message in group.messages]
    assert contents == [[text("s")], [{"type": "image"}, {"type": "image"}, text("u")], [text("a")], [text("v")]]
    both = ResponseGroup(prompt="u", responses=["a"], images=[PIXEL], videos=[[PIXEL]])
    assert sorted(block["type"] for block in both.messages[0]["content"]) == ["image", "text", "video"]
    # An image placeholder says nothing about videos.
    mixed = ResponseGroup(prompt=turn(text("u"), {"type": "image"}), responses=["a"], images=[PIXEL], videos=[[PIXEL]])
    assert mixed.messages == turn({"type": "video"}, text("u"), {"type": "image"})


def test_none_means_no_media() -> None:
    group = ResponseGroup(prompt=turn({**text("u"), "image": None}), responses=["a"], images=None, videos=None)
    assert group.images == () and group.videos == ()


def test_the_callers_prompt_is_not_changed() -> None:
    prompt = turn({"type": "image", "image": PIXEL})
    plain = turn(text("u"))
    ResponseGroup(prompt=prompt, responses=["a"])
    ResponseGroup(prompt=plain, responses=["a"], images=[PIXEL])
    assert prompt == turn({"type": "image", "image": PIXEL})
    assert plain == turn(text("u"))


def test_what_the_caller_changes_later_does_not_reach_the_group() -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 2}}}]
    tools = [{"function": {"name": "add"}}]
    prompt = [
        {"role": "user", "content": "2 + 2?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning": "why not", "name": "model"},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "1", "other": 3},
    ]
    group = ResponseGroup(prompt=prompt, responses=["4"], tools=tools)
    before = json.dumps([group.messages, group.tools])
    calls[0]["function"]["arguments"] = {"a": 9}
    tools[0]["function"]["name"] = "sub"
    assert json.dumps([group.messages, group.tools]) == before
    assert [sorted(message.keys() - {"role", "content"}) for message in group.messages] == [
        [],
        ["reasoning", "tool_calls"],
        ["name", "tool_call_id"],
    ]


def test_a_group_cannot_be_changed() -> None:
    group = ResponseGroup(prompt="p", responses=["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        group.responses = ("b",)  # type: ignore[misc]


# --- selection and ranks ---


def test_select_reorders_shrinks_and_ranks_again() -> None:
    group = ResponseGroup(
        prompt=turn(text("u"), {"type": "image", "image": PIXEL}),
        responses=["a", "b", "c", "d"],
        rankings=[3, 1, 2, 3],
        id="g",
    )
    assert group.select([3, 2, 1, 0]).rankings == (3, 2, 1, 3)
    fewer = group.select([0, 2])
    assert fewer.responses == ("a", "c") and fewer.rankings == (2, 1)
    assert fewer.images == (PIXEL,) and fewer.messages == group.messages and fewer.id == "g"
    assert group.select([1]).rankings == (1,)
    assert ResponseGroup(prompt="p", responses=["a", "b"]).select([1]).rankings is None
    with pytest.raises(GroupError, match="0 responses"):
        group.select([])


def test_select_keeps_all_that_is_not_of_the_responses() -> None:
    whole = ResponseGroup(
        prompt=turn(text("u"), {"type": "image"}, {"type": "video"}),
        responses=["a", "b", "c"],
        images=[PIXEL],
        videos=[[OTHER]],
        rankings=[1, 2, 3],
        id="g",
        source="s",
        tools=[{"function": {"name": "add"}}],
        ratings=[9, 5, 1],
    )
    chosen = whole.select([2, 0])
    for field in dataclasses.fields(ResponseGroup):
        kept = getattr(whole, field.name)
        assert kept, f"{field.name} is not tried"
        own = {"responses": ("c", "a"), "rankings": (2, 1), "ratings": (1, 9)}
        expected = {**own, "prompt": whole.messages}.get(field.name, kept)
        assert getattr(chosen, field.name) == expected, field.name


def test_a_group_with_media_in_its_blocks_can_be_replaced() -> None:
    group = ResponseGroup(prompt=turn({"type": "image", "image": PIXEL}, text("u")), responses=["a"])
    again = dataclasses.replace(group, responses=["b", "c"])
    assert again.images == group.images == (PIXEL,) and again.messages == group.messages


@given(values=st.lists(st.integers(-5, 5) | st.floats(-2, 2), max_size=8))
def test_dense_ranks_by_counting(values: list[float]) -> None:
    expected = tuple(1 + len({other for other in values if other < value}) for value in values)
    assert dense_ranks(values) == expected


@given(data=st.data(), values=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_both_ways_of_counting_ranks_are_accepted_and_selection_keeps_the_order(
    data: st.DataObject, values: list[int]
) -> None:
    responses = [f"r{i}" for i in range(len(values))]
    dense = dense_ranks(values)
    competition = tuple(1 + sum(other < value for other in values) for value in values)
    for rankings in (dense, competition):
        assert ResponseGroup(prompt="p", responses=responses, rankings=list(rankings)).rankings == rankings
    chosen = data.draw(st.lists(st.sampled_from(range(len(values))), min_size=1, max_size=6))
    group = ResponseGroup(prompt="p", responses=responses, rankings=competition).select(chosen)
    assert group.rankings == dense_ranks([values[i] for i in chosen])


def test_whole_floats_are_ranks() -> None:
    group = ResponseGroup(prompt="p", responses=["a", "b"], rankings=[2.0, 1.0])
    assert group.rankings == (2, 1) and all(type(rank) is int for rank in group.rankings or ())
    array = np.array([2, 1])
    group = ResponseGroup(prompt="p", responses=["a", "b"], rankings=array)  # type: ignore[arg-type]
    assert group.rankings == (2, 1) and all(type(rank) is int for rank in group.rankings or ())


# --- what it refuses ---


@pytest.mark.parametrize(
    ("rankings", "message"),
    [
        ([1], "got 1 rankings for 3 responses"),
        ([1, 2, 3, 4], "got 4 rankings for 3 responses"),
        ([], "got 0 rankings for 3 responses"),
        ([0, 1, 2], "not ranks, expected 1 = best"),
        ([0, 0, 0], "not ranks"),
        ([2, 2, 2], "not ranks"),
        ([1, 3, 4], "not ranks"),
        ([1, 2, 4], "not ranks"),
        ([1, 1, 4], "not ranks"),
        ([-1, 1, 2], "not ranks"),
        ([9, 7, 3], r"\[9, 7, 3\] are not ranks.*\[3, 2, 1\].*dense_ranks"),
        ([0.5, 0.1, 0.9], "not whole numbers"),
        ([1.5, 1, 2], "not whole numbers"),
        ([True, False, True], "not whole numbers"),
        ([True, 2, 3], "not whole numbers"),
        (np.array([True, True, True]), "not whole numbers"),
        ([1, 2, math.nan], "not whole numbers"),
        ([1, 2, math.inf], "not whole numbers"),
        ([1, 2, None], "not whole numbers"),
        ([1, 2, "3"], "not whole numbers"),
        ("abc", "not whole numbers"),
    ],
)
def test_rankings_that_are_not_ranks(rankings: Any, message: str) -> None:
    with pytest.raises(GroupError, match=f"group 'g': .*{message}"):
        ResponseGroup(prompt="p", responses=["a", "b", "c"], rankings=rankings, id="g")


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ([], "got 0 responses, expected at least 1"),
        ((), "got 0 responses"),
        ("one text", "responses is str, expected a list"),
        ({"a": 1}, "responses is dict"),
        (None, "responses is NoneType"),
        (["a", None], "response 1 is NoneType, expected str"),
        ([["a"]], "response 0 is list"),
        ([b"a"], "response 0 is bytes"),
        ([{"role": "assistant", "content": "a"}], "response 0 is dict.*text of the completion"),
    ],
)
def test_responses_that_are_not_texts(responses: Any, message: str) -> None:
    with pytest.raises(GroupError, match=message):
        ResponseGroup(prompt="p", responses=responses)


@pytest.mark.parametrize(
    ("block", "image"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "url": "a.png", "text": None, "image": None}, "a.png"),
        ({"type": "image", "base64": "aGk="}, {"base64": "aGk="}),
        ({"type": "image", "image": {"bytes": b"a", "path": None}}, {"bytes": b"a", "path": None}),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, {"url": "a.png", "detail": "low"}),
        ({"type": "image_url", "image_url": "data:,"}, "data:,"),
        ({"type": "input_image", "image_url": "a.png"}, "a.png"),
    ],
)
def test_blocks_that_carry_an_image(block: dict[str, Any], image: Any) -> None:
    """Of transformers, OpenAI's two interfaces and `datasets`, which fills the keys that a row lacks with None."""
    group = ResponseGroup(prompt=turn({"type": "text", "text": "?", "image_url": None}, block), responses=["a"])
    assert list(group.images) == [image]
    assert group.messages[0]["content"] == [{"type": "text", "text": "?"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is .*non-empty list"),
        (None, "prompt is None"),
        (3, "prompt is 3"),
        (["hello"], "message 0 is 'hello', expected a dict"),
        ([{"role": "user"}], "message 0 .*'role' and 'content'"),
        ([{"content": "a"}], "message 0"),
        ([{"role": None, "content": "a"}], "message 0"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": None}], "content of message 1 is NoneType"),
        (turn({"type": "audio", "audio": b""}), "a content block of message 0 is .*'audio'"),
        (turn({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}), "content block"),
        (turn({"type": "file", "file": {"file_data": "a" * 500}}), "content block.*'file_data': '.500 characters.'"),
        (turn({"text": "no type"}), "content block"),
        (turn({"type": "text"}), "content block"),
        (turn({"type": "text", "text": 4}), "content block"),
        (turn("bare"), "content block"),
    ],
)
def test_prompts_that_are_not_chats(prompt: Any, message: str) -> None:
    with pytest.raises(GroupError, match=message):
        ResponseGroup(prompt=prompt, responses=["a"])


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    ("placeholders", "given"), [(1, 0), (1, 2), (2, 1), (3, 2)], ids=["none", "too many", "too few", "one short"]
)
def test_media_that_do_not_match_the_placeholders(kind: str, placeholders: int, given: int) -> None:
    medium: Any = PIXEL if kind == "image" else [PIXEL]
    prompt = turn(text("u"), *[{"type": kind}] * placeholders)
    with pytest.raises(MediaError, match=f"{placeholders} {kind} placeholders but {given} {kind}s.*one for each"):
        ResponseGroup(prompt=prompt, responses=["a"], **{f"{kind}s": [medium] * given})


def test_media_in_two_places() -> None:
    prompt = turn({"type": "image", "image": PIXEL})
    with pytest.raises(MediaError, match="1 images were passed and 1 more sit inside.*one place only"):
        ResponseGroup(prompt=prompt, responses=["a"], images=[PIXEL])
    with pytest.raises(MediaError, match="2 image placeholders but 1 images"):
        ResponseGroup(prompt=turn({"type": "image", "image": PIXEL}, {"type": "image"}), responses=["a"])


@pytest.mark.parametrize("images", ["four.png", PIXEL, b"bytes"], ids=["path", "image", "bytes"])
def test_one_image_instead_of_a_list(images: Any) -> None:
    """A string is a sequence of characters, each of which would pass for a path."""
    with pytest.raises(MediaError, match="images is .*list"):
        ResponseGroup(prompt="p", responses=["a"], images=images)


def test_media_without_a_user_turn() -> None:
    with pytest.raises(MediaError, match="no user turn"):
        ResponseGroup(prompt=turn(text("s"), role="system"), responses=["a"], images=[PIXEL])


def test_errors_are_also_value_errors() -> None:
    for error in (GroupError, MediaError):
        assert issubclass(error, MRRewardError) and issubclass(error, ValueError)


@pytest.mark.parametrize("video", ["clip.mp4", b"bytes", [], 3], ids=["path", "bytes", "empty", "number"])
def test_a_video_is_a_list_of_frames(video: object) -> None:
    with pytest.raises(MediaError, match="expected a non-empty list of frames"):
        ResponseGroup(prompt="Number?", responses=["1"], videos=[video])  # type: ignore[list-item]


# --- scores, and groups from what a user has ---


@pytest.mark.parametrize("flip_rate", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("scores", [None, (0.0, -1.5)])
def test_scores_come_back_from_json(scores: tuple[float, ...] | None, flip_rate: float | None) -> None:
    """0.0 was measured and None was not."""
    group = ResponseGroup(prompt="p", responses=["a", "b"])
    for reason, spread in (("", 0.0), ("over the token budget", 0.25)):
        written = GroupScores(
            scores=scores,
            truncated=(False, True),
            order_spread=spread,
            order_flip_rate=flip_rate,
            drop_reason=reason or None,
        )
        assert GroupScores.from_dict(json.loads(json.dumps(written.to_dict())), group) == written


def test_dicts_keep_their_own_names_and_others_get_their_place() -> None:
    row = {"prompt": "p", "responses": ["a"]}
    named = ResponseGroup(prompt="p", responses=["a"], id="made")
    assert [group.id for group in as_groups([row, {**row, "id": "mine"}, named, row])] == [
        "row 0",
        "mine",
        "made",
        "row 3",
    ]
    with pytest.raises(GroupError, match="row 2 lacks responses"):
        as_groups([row, named, {"prompt": "p"}])


class _Picky:
    """Refuses groups by their id; counts its calls."""

    def __init__(self, error: type[Exception], *bad: str) -> None:
        self.error, self.bad, self.calls = error, bad, 0

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        self.calls += 1
        for group in groups:
            if group.id in self.bad:
                raise self.error(f"{group.name}: bad")
        return [GroupScores(scores=(float(str(group.id)),), truncated=(False,)) for group in groups]


@pytest.mark.parametrize("error", [GroupError, MediaError, OverLengthError])
@pytest.mark.parametrize("bad", [(), (0,), (6,), (2, 3), tuple(range(7))])
def test_the_error_of_a_group_stands_in_its_place(bad: tuple[int, ...], error: type[MRRewardError]) -> None:
    scorer = _Picky(error, *map(str, bad))
    groups = [ResponseGroup(prompt="p", responses=["a"], id=str(i)) for i in range(7)]
    found = score_each(scorer, groups)
    assert len(found) == 7
    for i, one in enumerate(found):
        if i in bad:
            assert type(one) is error and str(one) == f"group '{i}': bad"
        else:
            assert isinstance(one, GroupScores) and one.scores == (float(i),)
    assert bad or scorer.calls == 1


def test_what_is_no_fault_of_a_group_is_raised() -> None:
    group = ResponseGroup(prompt="p", responses=["a"], id="0")
    for error in (CheckpointError, RuntimeError):
        with pytest.raises(error, match="group '0': bad"):
            score_each(_Picky(error, "0"), [group])
    assert score_each(_Picky(RuntimeError), []) == []


@pytest.mark.parametrize("scores", [(2.0, 3.0, 1.0), None])
def test_a_result_of_another_order_comes_back_whole(scores: Any) -> None:
    """Scores and flags both: one that is put back without the other names the wrong response as cut off."""
    shown = GroupScores(scores=scores, truncated=(False, False, True), order_spread=0.5, drop_reason="why")
    own = None if scores is None else (1.0, 2.0, 3.0)
    expected = GroupScores(scores=own, truncated=(True, False, False), order_spread=0.5, drop_reason="why")
    assert shown.undo_order([1, 2, 0]) == expected
