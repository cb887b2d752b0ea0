"""Rows of the formats at their edges: what is one prompt, where a scale ends, a score of zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_converters import chat
from test_formats import ASSISTANT, convert, source

from mr_reward.data.conversion import Conversion
from mr_reward.data.converters import CONVERTERS, get_converter, recognise
from mr_reward.errors import GroupError


@pytest.mark.parametrize("as_array", [False, True])
def test_pictures_of_one_colour_differ_by_their_shape(as_array: bool, tmp_path: Path) -> None:
    """Equal bytes, and arrays so large that their text is cut in the middle."""
    shapes = [Image.new("RGB", size, "red") for size in ((40, 80), (80, 40), (40, 80))]
    shapes[2].putpixel((20, 40), (0, 0, 255))
    rows = [
        {"prompt": "Q", "completion": f"{label} {i}", "label": label, "image": np.asarray(one) if as_array else one}
        for label in (True, False)
        for i, one in enumerate(shapes)
    ]
    groups = convert("unpaired", rows, tmp_path)
    assert [group.responses for group in groups] == [(f"True {i}", f"False {i}") for i in range(3)]


@pytest.mark.parametrize(
    ("name", "row", "columns"),
    [
        ("unpaired", {"prompt": "Q", "completion": "a", "label": True}, ["prompt", "system", "image", "images"]),
        ("sharegpt_kto", {"messages": chat("Q", "a"), "kto_tag": True}, ["messages", "system", "images", "videos"]),
        ("helpsteer2", {"prompt": "Q", "response": "a", "helpfulness": 1}, ["prompt"]),
    ],
)
def test_rows_that_differ_in_a_part_of_the_prompt_are_not_gathered(
    name: str, row: dict[str, Any], columns: list[str]
) -> None:
    gather = CONVERTERS[name].gather
    assert gather is not None
    values: dict[str, Any] = {"messages": chat("Q2", "a"), "images": ["b.png"], "videos": [["b.png"]]}
    for column in columns:
        other = {**row, column: values.get(column, "b.png")}
        assert len(list(gather([("row 1", row), ("row 2", other), ("row 3", row)]))) == 2, column


@pytest.mark.parametrize(
    ("prompt", "turns_before", "expected"),
    [
        (chat("Q1"), chat("Q1", "A1", "Q2"), ["Q1", "A1", "Q2"]),  # repeated
        (chat("Q1", "A1", "Q2"), chat("Q1", "A1", "Q2"), ["Q1", "A1", "Q2"]),
        (chat("Q0", "A0"), chat("Q1", "A1", "Q2"), ["Q0", "A0", "Q1", "A1", "Q2"]),  # gone on with
        (chat("Q1", "A0"), chat("Q1", "A1", "Q2"), ["Q1", "A0", "Q1", "A1", "Q2"]),  # asked again
    ],
)
def test_a_prompt_of_several_turns_before_chats(
    prompt: list[Any], turns_before: list[Any], expected: list[str], tmp_path: Path
) -> None:
    row = {"prompt": prompt} | {
        name: [*turns_before, {**ASSISTANT, "content": text}] for name, text in (("chosen", "a"), ("rejected", "b"))
    }
    (group,) = convert("preference", [row], tmp_path)
    assert [turn["content"][0]["text"] for turn in group.messages] == expected


def test_columns_without_a_value_are_no_columns(tmp_path: Path) -> None:
    """Arrow has every column of a file in every row."""
    names = {name for converter in CONVERTERS.values() for form in converter.columns for name in form}
    empty = dict.fromkeys(names)
    for row, name in (
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": "Q", "completion": "a", "label": False}, "unpaired"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [0, 1]}, "groups"),
    ):
        assert recognise(source([empty | row], tmp_path)).name == name


def test_answers_keep_their_white_space(tmp_path: Path) -> None:
    """The model reads it; code begins with it."""
    texts = ["    return 1\n", " b"]
    ends = [[{**ASSISTANT, "content": text}] for text in texts]
    inside = [[{**ASSISTANT, "content": [{"type": "text", "text": text}]}] for text in texts]
    rows: list[tuple[str, dict[str, Any]]] = [
        ("preference", {"prompt": "Q", "chosen": texts[0], "rejected": texts[1]}),
        ("preference", {"prompt": chat("Q"), "chosen": ends[0], "rejected": ends[1]}),
        ("preference", {"prompt": chat("Q"), "chosen": inside[0], "rejected": inside[1]}),
        ("preference", {"prompt": "Q", "chosen": texts[:1], "rejected": texts[1:]}),
        ("ms_swift", {"messages": [*chat("Q"), *ends[0]], "rejected_response": texts[1]}),
        ("groups", {"prompt": "Q", "responses": texts, "rankings": [1, 2]}),
    ]
    for name, row in rows:
        (group,) = convert(name, [row], tmp_path)
        assert list(group.responses) == texts, (name, row)


def test_a_system_prompt_is_said_once(tmp_path: Path) -> None:
    pair = {"chosen": [{**ASSISTANT, "content": "a"}], "rejected": [{**ASSISTANT, "content": "b"}]}
    system = {"role": "system", "content": "S"}
    for said, expected in (([], ["S", "Q"]), ([system], ["S", "Q"]), ([{**system, "content": "T"}], ["S", "T", "Q"])):
        (group,) = convert("preference", [{"system": "S", "prompt": [*said, *chat("Q")], **pair}], tmp_path)
        assert [turn["content"][0]["text"] for turn in group.messages] == expected


@pytest.mark.parametrize(("chosen", "rejected"), [("Q: yes", "Q: yes and more"), ("Q: yes and more", "Q: yes")])
def test_an_answer_that_goes_on_where_the_other_ends(chosen: str, rejected: str, tmp_path: Path) -> None:
    """TRL's rule would make the shorter one a prompt with an empty answer, which is no response here."""
    groups = Conversion(get_converter("preference"), source([{"chosen": chosen, "rejected": rejected}], tmp_path))
    assert not list(groups) and groups.skipped == {"fewer than two different responses": 1}


@pytest.mark.parametrize("equal", [True, False])
def test_scores_of_a_pair_count_in_every_format_with_pairs(equal: bool, tmp_path: Path) -> None:
    scores = {"score_chosen": 2.0, "score_rejected": 2.0 if equal else None}
    rows: dict[str, dict[str, Any]] = {
        "preference": {"prompt": "Q", "chosen": "a", "rejected": "b"},
        "alpaca": {"instruction": "Q", "chosen": "a", "rejected": "b"},
        "ms_swift": {"messages": chat("Q", "a"), "rejected_response": "b"},
        "llama_factory_v1": {"chosen_messages": chat("Q", "a"), "rejected_messages": chat("Q", "b")},
    }
    for name, row in rows.items():
        groups = Conversion(get_converter(name), source([{**row, **scores}], tmp_path), keep_order=True)
        found = [group.rankings for group in groups]
        assert (found, groups.skipped) == (([], {"all responses tie": 1}) if equal else ([(1, 2)], {})), name


@pytest.mark.parametrize("several", [True, False])
def test_rejected_chats_may_hold_the_answer_alone(several: bool, tmp_path: Path) -> None:
    whole, alone = chat("Q1", "A1", "Q2", "bad"), [{**ASSISTANT, "content": "worse"}]
    row = {"messages": chat("Q1", "A1", "Q2", "good"), "rejected_messages": [whole, alone] if several else alone}
    (group,) = convert("ms_swift", [row], tmp_path)
    assert group.responses == (("good", "bad", "worse") if several else ("good", "worse"))
    assert len(group.messages) == 3


@pytest.mark.parametrize("limit", [0, 1, 2, 5, None])
def test_a_limit_counts_rows_and_names_count_groups_of_rows(limit: int | None, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"Q{i}", "chosen": "a", "rejected": "a" if i == 1 else "b"} for i in range(4)]
    groups = Conversion(get_converter("preference"), source(rows, tmp_path), limit=limit)
    made = list(groups)
    read = 4 if limit is None else min(limit, 4)
    assert groups.num_rows == read
    assert [group.id for group in made] == [f"preference-{i + 1}" for i in range(read) if i != 1]
    assert groups.skipped.total() == (read > 1)


@pytest.mark.parametrize(("strength", "rankings"), [(-3, (1, 2)), (-0.5, (1, 2)), (1, (2, 1)), (3, (2, 1))])
@pytest.mark.parametrize("name", ["helpsteer2_preference", "helpsteer3"])
def test_the_whole_scale_of_strengths(name: str, strength: float, rankings: tuple[int, int], tmp_path: Path) -> None:
    row = {
        "helpsteer2_preference": {"prompt": "Q", "response_1": "a", "response_2": "b"},
        "helpsteer3": {"context": chat("Q"), "response1": "a", "response2": "b"},
    }[name]
    column = {"helpsteer2_preference": "preference_strength", "helpsteer3": "overall_preference"}[name]
    (group,) = convert(name, [{**row, column: strength}], tmp_path)
    assert group.rankings == rankings
    for wrong in (-3.01, 3.01, float("nan")):
        with pytest.raises(GroupError, match="from -3 to 3"):
            convert(name, [{**row, column: wrong}], tmp_path)


def test_a_score_of_zero_is_a_score(tmp_path: Path) -> None:
    completions = [
        {"response": text, "overall_score": score, "fine-grained_score": 9.0}
        for text, score in (("zero", 0), ("one", 1.0), ("by the other score", None))
    ]
    (group,) = convert("ultrafeedback", [{"instruction": "Q", "completions": completions}], tmp_path)
    assert group.responses == ("zero", "one", "by the other score") and group.rankings == (3, 2, 1)
