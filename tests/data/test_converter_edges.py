"""Rows that real data sets hold besides the clean ones: other types, texts like markup, duplicates, no ids."""

from __future__ import annotations

from typing import Any

import pytest
from test_converters import CRITIC, PICTURE, ROWS, changed, chat, convert, ratings

from mr_reward.data.converters import CONVERTERS, SkippedRow, graded_group
from mr_reward.errors import GroupError


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("row", [3, [1], "text", None, {}])
def test_what_is_no_row_is_refused(name: str, row: Any) -> None:
    with pytest.raises(GroupError):
        convert(name, row)


def test_mm_rlhf_first_look_leaves_wrong_rows_to_the_second() -> None:
    make = CONVERTERS["mm_rlhf"].make([{}, ROWS["mm_rlhf"], changed("mm_rlhf", final_ranking="1"), 3])  # type: ignore[list-item]
    assert make(ROWS["mm_rlhf"]).rankings == (1, 2, 2, 3)
    with pytest.raises(GroupError, match="correlate by 0.00 over 0 rows"):
        CONVERTERS["mm_rlhf"].make([])


def test_vlfeedback_nan_is_no_rating_and_an_embedded_image_comes_first() -> None:
    completions = [*ROWS["vlfeedback"]["completions"][:3]]
    completions[0] = {**completions[0], "annotations": ratings("nan", "5", "5")}
    group = convert("vlfeedback", changed("vlfeedback", completions=completions, image=PICTURE))
    assert group.responses == ("also good", "bad") and group.images == (PICTURE,)
    assert convert("vlfeedback", {**ROWS["vlfeedback"], "image": None}).images == ("images/1.jpg",)


def test_llava_critic_keeps_brackets_inside_a_response() -> None:
    text = CRITIC.replace("It is blue,\nI think.", "Blue [1].\nSee [2]\nand [3]")
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "The better response: [second]"}]
    group = convert("llava_critic", changed("llava_critic", conversations=turns))
    assert group.responses == ("It is red.", "Blue [1].\nSee [2]\nand [3]")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (CRITIC.replace("It is red.", "Red.\nThe second response: [no]"), "The better response: [first]"),
        (CRITIC, "The better response: a short one"),
        (CRITIC, "The better response: [first]. No: The better response: [second]"),
    ],
)
def test_llava_critic_does_not_guess(text: str, verdict: str) -> None:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": verdict}]
    with pytest.raises(SkippedRow):
        convert("llava_critic", changed("llava_critic", conversations=turns))


def test_nectar_prompt_may_speak_of_its_own_markers() -> None:
    prompt = "\n\nHuman: Write a talk between Human: and Assistant: please\n\nAssistant: "
    group = convert("nectar", changed("nectar", prompt=prompt))
    assert group.messages[0]["content"][0]["text"] == "Write a talk between Human: and Assistant: please"


def test_placeholders_are_words_where_there_is_no_medium() -> None:
    turns = chat("What does <image> mean in SVG?", "Good"), chat("What does <image> mean in SVG?", "Bad")
    group = convert("skywork", changed("skywork", chosen=turns[0], rejected=turns[1]))
    assert "<image>" in group.messages[0]["content"][0]["text"]
    pku = convert("pku_saferlhf", changed("pku_saferlhf", prompt="Explain <video> tags"))
    assert pku.messages[0]["content"][0]["text"] == "Explain <video> tags"


def test_rows_without_an_id_have_none() -> None:
    assert convert("skywork", ROWS["skywork"]).id is None
    assert convert("tulu", {**ROWS["tulu"], "id": None}).id is None
    assert convert("rlaif_v", ROWS["rlaif_v"]).id == "RLAIF-V-7"


def test_twins_may_differ_in_white_space() -> None:
    group = graded_group("q", ["a", " a\n", "b"], [1, 1, 2], id=None)
    assert group.responses == ("a", "b")
