"""Rows of the formats at their edges: what is one prompt, where a scale ends, a score of zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_converters import chat
from test_formats import ASSISTANT, convert

from mr_reward.data.converters import CONVERTERS
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
