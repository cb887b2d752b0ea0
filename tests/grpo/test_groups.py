"""Rollouts -> rows -> groups, without processes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mr_reward.errors import GroupAssemblyError, GroupError, MediaError
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.groups import (
    RolloutRow,
    plan_groups,
    prompt_fingerprint,
    read_rollouts,
    with_opening,
)
from mr_reward.messages.completions import completion_text
from mr_reward.templates.images import load_image


def _rows(*fingerprints: str, response: str = "r") -> list[RolloutRow]:
    return [RolloutRow(fingerprint, f"{response}{i}") for i, fingerprint in enumerate(fingerprints)]


def test_neighbours_with_the_same_prompt_stay_two_groups() -> None:
    plan = plan_groups([_rows("p", "p", "p"), _rows("p", "p", "p")], 2)
    assert [group.responses for group in plan] == [("r0", "r1"), ("r2", "r0"), ("r1", "r2")]
    assert [group.holders for group in plan] == [(0,), (0, 1), (1,)]
    assert [group.straddles for group in plan] == [False, True, False]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_every_owner_holds_its_group(num_ranks: int, size: int) -> None:
    rows = [RolloutRow(f"p{i // size}", "x" * (i % 5)) for i in range(12)]
    per_rank = 12 // num_ranks
    rows_by_rank = [rows[rank * per_rank : (rank + 1) * per_rank] for rank in range(num_ranks)]
    plan = plan_groups(rows_by_rank, size)
    assert [response for group in plan for response in group.responses] == [row.response for row in rows]
    for group in plan:
        assert group.owner in group.holders
        assert group.owner_row == [row.fingerprint for row in rows_by_rank[group.owner]].index(f"p{group.index}")
    assert plan == plan_groups(rows_by_rank, size)


def test_straddling_groups_go_to_the_least_loaded_holder() -> None:
    long = _rows("a", "a", "b", response="long " * 9)
    plan = plan_groups([long, _rows("b", "c", "c")], 2)
    assert [group.owner for group in plan] == [0, 1, 1]
    assert plan[1].owner_row == 0
    # two ranks that hold half of every group get every other one
    assert {group.owner for group in plan_groups([_rows("a"), _rows("a", "b"), _rows("b")], 2)} == {0, 1}


def test_the_load_is_what_a_rank_has_to_read_wherever_it_stands() -> None:
    """Groups of one rank count before those that could be another's; a group of empty responses counts too."""
    short, long = _rows("a", "a"), _rows("c", "c", response="long " * 9)
    for before, behind, owner in ((short, long, 0), (long, short, 1), (short, short, 0)):
        plan = plan_groups([[*before, *_rows("b")], [*_rows("b"), *behind]], 2)
        assert [group.owner for group in plan] == [0, owner, 1]
    silent = [RolloutRow("a", "")] * 2
    plan = plan_groups([[*silent, RolloutRow("b", "")], [RolloutRow("b", "")]], 2)
    assert [group.owner for group in plan] == [0, 1]


def test_ranks_may_hold_different_numbers_of_rows_or_none() -> None:
    plan = plan_groups([[], _rows("a", "a", "a"), [], _rows("a")], 4)
    assert [group.holders for group in plan] == [(1, 3)]
    assert plan_groups([[], []], 4) == []


def test_row_counts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(GroupAssemblyError, match=r"got 5 rows in all \(rank 0: 3, rank 1: 2\).*num_generations=4"):
        plan_groups([_rows("a", "a", "a"), _rows("a", "a")], 4)


def test_mixed_prompts_are_refused_with_rows_and_ranks() -> None:
    with pytest.raises(GroupAssemblyError, match=r"rows 4 to 7 .*ranks 1 to 2.*row 6 \(rank 2\).*row 4 \(rank 1\)"):
        plan_groups([_rows("a", "a", "a"), _rows("a", "b", "b"), _rows("c", "c")], 4)


def _opened(*texts: str) -> list[RolloutRow]:
    prompts = [[{"role": "system", "content": "s"}, {"role": "user", "content": text}] for text in texts]
    return read_rollouts(
        prompts, [f"answer {i}" for i in range(len(texts))], {"environments": [object()] * len(texts)}
    )[1]


@pytest.mark.parametrize(
    ("openings", "shared", "seen"),
    [
        (["Play.\n\nroom 12", "Play.\n\nroom 15"], "Play.\n\nroom", ["12", "15"]),
        (["Play.\n\nroom 1", "Play.\n\nroom 12"], "Play.\n\nroom", ["1", "12"]),
        (["Play.\n\nroom 12", "Play.\n\nroom 1"], "Play.\n\nroom", ["12", "1"]),
        (["Play.\n\nroom 1", "Play.\n\nroom 1!"], "Play.\n\nroom 1", ["", "!"]),
        (["Play. You see a door", "Play. You see a wall"], "Play. You see a", ["door", "wall"]),
        (["Play.", "Play. A door"], "Play.", ["", "A door"]),
        (["数 \u4e00", "数 \u4e8c"], "数", ["\u4e00", "\u4e8c"]),
        (["Play. one", "Play. one"], None, None),
    ],
)
def test_first_observations_that_differ_begin_the_responses(
    openings: list[str], shared: str | None, seen: list[str] | None
) -> None:
    """What all have in common, in whole words, is the prompt; nothing of what a policy saw is lost."""
    for rows_by_rank in ([_opened(*openings)], [_opened(opening) for opening in openings]):  # on one rank, on two
        (group,) = plan_groups(rows_by_rank, 2)
        rows = [row for rows in rows_by_rank for row in rows]
        parts = [""] * 2 if seen is None else [f"{text}\n\n" if text else "" for text in seen]
        assert group.opening == shared
        assert group.responses == tuple(part + row.response for part, row in zip(parts, rows, strict=True))


def test_the_opening_takes_the_place_of_what_it_stands_for() -> None:
    image = Image.new("RGB", (4, 2), "red")
    group = ResponseGroup(prompt="Look.\n\nroom 1", responses=[""], images=[image])
    messages = with_opening(group.messages, "Look.\n\nroom")
    assert messages == ResponseGroup(prompt="Look.\n\nroom", responses=[""], images=[image]).messages
    assert group.messages[0]["content"][-1]["text"] == "Look.\n\nroom 1", "the group itself stays"


def test_openings_without_environments_or_without_a_common_beginning_are_refused() -> None:
    prompts = ["Play. one", "Play. two"]
    with pytest.raises(GroupAssemblyError, match="row 1 .* has another prompt"):
        plan_groups([read_rollouts(prompts, ["a", "b"], {})[1]], 2)
    with pytest.raises(GroupAssemblyError, match=r"rows 2 to 3 .* begin differently \('one', 'two'\)"):
        plan_groups([_opened("same", "same"), _opened("one", "two")], 2)
    images = [[Image.new("RGB", (4, 2), colour)] for colour in ("red", "blue")]
    with pytest.raises(GroupAssemblyError, match="first observations hold different images"):
        plan_groups([read_rollouts(prompts, ["a", "b"], {"environments": [0, 0], "images": images})[1]], 2)
    others = [[{"role": "system", "content": text}, {"role": "user", "content": "Play."}] for text in "st"]
    with pytest.raises(GroupAssemblyError, match="row 1 .* has another prompt"):
        plan_groups([read_rollouts(others, ["a", "b"], {"environments": [0, 0]})[1]], 2)


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain ", "plain "),
        ([{"role": "assistant", "content": "chat"}], "chat"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": None, "tool_calls": None}], ""),
        ([{"role": "assistant", "reasoning_content": "hm"}], "<think>\nhm\n</think>\n\n"),
        ([], ""),
        (
            [
                {"role": "assistant", "content": "first"},
                {"role": "assistant", "content": ""},
                {"role": "assistant", "content": "then", "reasoning_content": "hm"},
            ],
            "first\n\n<think>\nhm\n</think>\n\nthen",
        ),
        ("\ud800 <|im_end|>", "\ud800 <|im_end|>"),
    ],
)
def test_completion_text(completion: Any, text: str) -> None:
    assert completion_text(completion) == text


def test_parsed_reasoning_stands_before_its_turn_again_with_its_own_white_space() -> None:
    turns = [
        {"role": "assistant", "content": "4", "reasoning_content": "\n  indented\n\tmore \n"},
        {"role": "assistant", "content": "5", "reasoning": "again"},
    ]
    thoughts = "<think>\n  indented\n\tmore \n</think>\n\n4\n\n<think>\nagain\n</think>\n\n5"
    assert completion_text(turns) == thoughts


@pytest.mark.parametrize("completion", [None, 3, ["text"], b"bytes"])
def test_unknown_completion_shapes_are_refused(completion: Any) -> None:
    with pytest.raises(GroupError, match="rollout 3: completion is .*expected a string or a list"):
        completion_text(completion, name="rollout 3")


def test_images_in_completions_are_refused() -> None:
    with pytest.raises(GroupError, match="'image', expected text blocks"):
        completion_text([{"role": "assistant", "content": [{"type": "image"}]}])


def _fingerprint(prompt: Any, **media: Any) -> str:
    return prompt_fingerprint(ResponseGroup(prompt=prompt, responses=[""], **media))


def test_fingerprints_see_text_roles_and_pixels(tmp_path: Path) -> None:
    red, also_red, blue = (Image.new("RGB", (4, 2), colour) for colour in ("red", "red", "blue"))
    assert _fingerprint("a", images=[red]) == _fingerprint("a", images=[also_red])
    assert _fingerprint("a") == _fingerprint([{"role": "user", "content": "a"}])
    different = [
        _fingerprint("a"),
        _fingerprint("b"),
        _fingerprint([{"role": "system", "content": "a"}]),
        _fingerprint("\ud800"),
        _fingerprint("a", images=[red]),
        _fingerprint("a", images=[blue]),
        _fingerprint("a", images=[Image.new("RGB", (2, 4), "red")]),
        _fingerprint("a", images=[red, blue]),
        _fingerprint("a", images=[blue, red]),
        _fingerprint("a", videos=[[red, blue]]),
        _fingerprint("a", videos=[[red], [blue]]),
    ]
    assert len(set(different)) == len(different)

    buffer = BytesIO()
    red.save(buffer, "PNG")
    path = tmp_path / "red.png"
    path.write_bytes(buffer.getvalue())
    same = {_fingerprint("a", images=[image]) for image in (red, buffer.getvalue(), path, str(path))}
    assert len(same) == 1
    with pytest.raises(MediaError, match="missing"):
        _fingerprint("a", images=[tmp_path / "missing.png"])


def test_rollouts_take_images_from_blocks_first_then_from_the_columns() -> None:
    red, blue = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "blue")
    filled = [{"role": "user", "content": [{"type": "image", "image": red}, {"type": "text", "text": "?"}]}]
    empty = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    plain = [{"role": "user", "content": "?"}]
    for prompt, columns, expected in [
        (filled, {"image": [blue]}, (red,)),
        (empty, {"image": [blue]}, (blue,)),
        (plain, {"images": [[blue, red]], "image": [red]}, (blue, red)),
        (plain, {"images": [None]}, ()),
        (plain, {"image": [None]}, ()),
        (plain, {}, ()),
    ]:
        groups, rows = read_rollouts([prompt], ["answer"], columns)
        assert groups[0].images == expected
        assert rows == [RolloutRow(prompt_fingerprint(groups[0]), "answer")]
    with pytest.raises(MediaError, match="'rollout 0': the prompt has 1 image placeholders but 0 images"):
        read_rollouts([empty], ["answer"], {})
    assert prompt_fingerprint(read_rollouts([filled], [""], {})[0][0]) == prompt_fingerprint(
        read_rollouts([plain], [""], {"image": [red]})[0][0]
    )


def test_rollouts_need_one_completion_each() -> None:
    with pytest.raises(GroupError, match="got 2 prompts, 1 completions"):
        read_rollouts(["a", "b"], ["c"], {})
    assert read_rollouts([], [], {}) == ([], [])


def test_turns_of_the_prompt_without_content_count_as_empty() -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
    assert read_rollouts([prompt], [""], {})[0][0].messages[1] == {**prompt[1], "content": []}
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    assert read_rollouts([prompt], [""], {})[0][0].messages[1]["content"] == [{"type": "text", "text": ""}]


def test_an_image_is_decoded_once_for_all_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By object, by path and by content of a file; equal images that are different objects stay equal."""
    red, also_red, blue = (Image.new("RGB", (4, 2), colour) for colour in ("red", "red", "blue"))
    red.save(tmp_path / "red.png")
    content = (tmp_path / "red.png").read_bytes()
    decoded: list[Any] = []

    def counting(source: Any) -> Image.Image:
        decoded.append(source)
        return load_image(source)

    monkeypatch.setattr("mr_reward.templates.images.load_image", counting)
    path = str(tmp_path / "red.png")
    rows = [{"bytes": bytes(bytearray(content)), "path": None} for _ in range(8)]  # as `datasets` has them undecoded
    for images in ([red] * 8, [path] * 8, [Path(path)] * 8, rows):
        decoded.clear()
        fingerprints = {row.fingerprint for row in read_rollouts(["?"] * 8, ["!"] * 8, {"image": images})[1]}
        assert len(decoded) == 1 and len(fingerprints) == 1
    decoded.clear()
    columns = {"image": [red, also_red, blue, path, red, also_red, blue, path]}
    fingerprints = [row.fingerprint for row in read_rollouts(["?"] * 8, ["!"] * 8, columns)[1]]
    assert len(decoded) == 4
    assert len(set(fingerprints)) == 2 and fingerprints[0] == fingerprints[1] == fingerprints[3] != fingerprints[2]
