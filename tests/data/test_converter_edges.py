"""Rows that real data sets hold besides the clean ones: other types, texts like markup, duplicates, no ids."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from test_converters import CRITIC, PICTURE, ROWS, changed, chat, convert, ratings

from mr_reward.data.conversion import Conversion, SkippedRow, graded_group
from mr_reward.data.converters import CONVERTERS
from mr_reward.data.sources import RowSource, read_rows
from mr_reward.errors import ConfigurationError, GroupError, MediaError
from mr_reward.groups import ResponseGroup


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


@pytest.mark.parametrize(("first", "other"), [("a b", "a  b"), ("a", "A"), ("a\nb", "a b"), ("1", "1.0"), ("a", "a.")])
def test_what_differs_inside_is_no_twin(first: str, other: str) -> None:
    """Line breaks and indents are a part of code and of lists; the text stays as it was written."""
    group = graded_group("q", [f" {first} ", other, "worse"], [1, 2, 3], id=None)
    assert group.responses == (f" {first} ", other, "worse") and group.rankings == (1, 2, 3)


def test_twins_with_other_grades_go_and_empty_ones_too() -> None:
    group = graded_group("q", ["a", "a ", "b", " \n", "", "c"], [1, 2, 1, 1, 2, 3], id=None)
    assert group.responses == ("b", "c") and group.rankings == (1, 2)


@pytest.mark.parametrize(
    ("text", "images", "videos", "types"),
    [
        ("a <image> b", 1, 0, ["text", "image", "text"]),
        ("a <image> b <video> c", 1, 1, ["text", "image", "text", "video", "text"]),
        ("a b", 2, 0, ["image", "image", "text"]),  # none: they stand before the question
        ("a <image> b", 1, 1, ["video", "text", "image", "text"]),
        ("a <image> b <video> c", 1, 0, ["text", "image", "text"]),  # without videos it is text
        ("a <image> b", 0, 1, ["video", "text"]),
        ("a <image> b", 0, 0, ["text"]),
    ],
)
def test_placeholders_stay_where_there_is_one_for_each_medium(
    text: str, images: int, videos: int, types: list[str]
) -> None:
    """As in every other group."""
    media: dict[str, Any] = {"images": [PICTURE] * images, "videos": [[PICTURE]] * videos}
    groups = [graded_group(prompt, ["a", "b"], [1, 2], id=None, **media) for prompt in (text, chat(text))]
    plain = ResponseGroup(prompt=text, responses=["a"], **media).messages[0]["content"]
    for group in groups:
        content = group.messages[0]["content"]
        assert [block["type"] for block in content] == types == [block["type"] for block in plain]
        texts = [[block["text"].strip() for block in each if block["type"] == "text"] for each in (content, plain)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("prompt", ["<image>a<image>", chat("<image>a<image>")])
def test_another_number_of_placeholders_than_of_media_is_an_error(prompt: Any) -> None:
    with pytest.raises(MediaError, match="has 2 <image> but 1 images came with it"):
        graded_group(prompt, ["a", "b"], [1, 2], id=None, images=[PICTURE])


def test_a_second_reading_counts_anew_and_gives_the_same(tmp_path: Path) -> None:
    completions = ROWS["vlfeedback"]["completions"]
    rows: list[Any] = [
        {**ROWS["vlfeedback"], "image": PICTURE, "note": "x"},
        {**ROWS["vlfeedback"], "image": PICTURE, "completions": completions[:2]},
        {},
    ]
    places = [(f"row {i}", row) for i, row in enumerate(rows)]
    groups = Conversion(
        CONVERTERS["vlfeedback"], RowSource("rows", tmp_path, lambda: iter(places)), skip_bad=True, keep_order=True
    )

    def read() -> Any:
        found = [(group.messages, group.responses) for group in groups]
        counts = [dict(one) for one in (groups.skipped, groups.left_out, groups.unread)]
        return found, groups.num_rows, counts, list(groups.bad_rows)

    first = read()
    assert first[1] == 3 and all(first[2]) and len(first[3]) == 1
    assert read() == first


def test_answers_that_are_left_out_add_up_over_rows(tmp_path: Path) -> None:
    rows = [{**ROWS["vlfeedback"], "image": PICTURE}] * 3
    places = [(f"row {i}", row) for i, row in enumerate(rows)]
    groups = Conversion(CONVERTERS["vlfeedback"], RowSource("rows", tmp_path, lambda: iter(places)))
    assert len(list(groups)) == 3 and groups.left_out == {"without a rating of every aspect": 3}


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad", "bothbad"])
def test_every_way_to_say_that_nobody_won(winner: str) -> None:
    with pytest.raises(SkippedRow, match=f"^{re.escape(winner)}$"):
        convert("wildvision", changed("wildvision", winner=winner))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "2", True])
def test_grades_that_are_no_finite_numbers_are_refused(bad: Any) -> None:
    with pytest.raises(GroupError, match="'final_ranking' is .*expected 4 numbers, one per response"):
        convert("mm_rlhf", changed("mm_rlhf", final_ranking=[1, 2, bad, 4]))


@pytest.mark.parametrize(
    ("ranking", "best"),
    [([1, 2, 3, 4], 0), ([2, 1, 3, 4], 1), ([4, 3, 2, 1], 0), ([4, 2, 3, 1], 0), ([1, 3, 4, 2], 0)],
)
def test_the_direction_of_a_ranking_by_scores_that_agree_in_part(ranking: list[int], best: int) -> None:
    """Humans' scores fall from A to D; a ranking need not be the same order to say where its best end is."""
    row = changed("mm_rlhf", final_ranking=ranking, faithfulness=[9, 6, 4, 1], helpfulness=[9, 6, 4, 1])
    group = CONVERTERS["mm_rlhf"].make([row])(row)
    assert (group.rankings or ())[best] == 1
    assert sorted(group.rankings or ()) == [1, 2, 3, 4]


def test_rows_of_one_id_are_not_shuffled_alike(tmp_path: Path) -> None:
    """Ids of data sets repeat; one order for all of them would let a model learn the place."""
    places = [(f"row {i}", {**ROWS["nectar"], "id": "same"}) for i in range(8)]
    groups = list(Conversion(CONVERTERS["nectar"], RowSource("rows", tmp_path, lambda: iter(places))))
    assert len({group.responses for group in groups}) == 8
    again = Conversion(CONVERTERS["nectar"], RowSource("rows", tmp_path, lambda: iter(places)))
    assert [group.responses for group in again] == [group.responses for group in groups]


@pytest.mark.parametrize("name", ["skywork", "tulu"])
def test_a_chat_pair_keeps_its_pictures_where_they_stand(name: str) -> None:
    """They were dropped, and the answers compared without them."""
    turns = ("Hi", "Hello", "And <image> this?")
    row = {"chosen": chat(*turns, "A cat."), "rejected": chat(*turns, "A dog."), "images": [PICTURE]}
    group = convert(name, {**ROWS[name], **row})
    assert group.images == (PICTURE,)
    assert [block["type"] for block in group.messages[2]["content"]] == ["text", "image", "text"]


def test_equal_scores_tie_and_scores_against_the_choice_are_an_error() -> None:
    with pytest.raises(SkippedRow, match="all responses tie"):
        convert("skywork", {**ROWS["skywork"], "score_chosen": 7.0, "score_rejected": 7.0})
    assert convert("tulu", {**ROWS["tulu"], "score_chosen": 7.5, "score_rejected": 7}).rankings == (1, 2)
    with pytest.raises(GroupError, match=r"score_chosen and score_rejected' is \[3, 7\], expected a chosen answer"):
        convert("skywork", {**ROWS["skywork"], "score_chosen": 3, "score_rejected": 7})
    for pair in ((math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan)):
        with pytest.raises(GroupError, match="expected a chosen answer that is not the worse one"):
            convert("skywork", {**ROWS["skywork"], **dict(zip(("score_chosen", "score_rejected"), pair, strict=True))})


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("nectar", {"image": PICTURE}, "'image' holds image data that nectar does not read"),
        ("pku_saferlhf", {"video": ["a.mp4"]}, "'video' holds video"),
        ("skywork", {"audio": b"RIFF"}, "'audio' holds audio"),
        ("nectar", {"system": "Answer in French."}, "'system' is a part of the prompt"),
        ("nectar", {"tools": [{"name": "add"}]}, "'tools' is a part of the prompt"),
    ],
)
def test_a_column_with_a_meaning_that_no_one_reads_is_an_error(
    name: str, columns: dict[str, Any], words: str, tmp_path: Path
) -> None:
    def groups(row: dict[str, Any]) -> Conversion:
        return Conversion(CONVERTERS[name], RowSource("rows", tmp_path, lambda: iter([("row 1", row)])))

    with pytest.raises(GroupError, match=words):
        list(groups({**ROWS[name], **columns}))
    empty = groups({**ROWS[name], **dict.fromkeys(columns)})
    assert len(list(empty)) == 1 and not set(columns) & set(empty.unread), "empty columns mean nothing"


def test_columns_that_are_not_read_are_counted(tmp_path: Path) -> None:
    rows = [("row 1", {**ROWS["skywork"], "note": "x"}), ("row 2", {**ROWS["skywork"], "note": ""})]
    groups = Conversion(CONVERTERS["skywork"], RowSource("rows", tmp_path, lambda: iter(rows)))
    assert len(list(groups)) == 2 and groups.unread == {"source": 2, "note": 1}


@pytest.mark.parametrize("broken", [{"Rating": None}, None, "missing", {"Rationale": "no rating"}])
def test_vlfeedback_leaves_out_an_answer_without_a_rating_and_counts_it(broken: Any, tmp_path: Path) -> None:
    completions = [dict(completion) for completion in ROWS["vlfeedback"]["completions"][:3]]
    annotations = dict(completions[0]["annotations"])
    annotations["Helpfulness"] = broken
    if broken == "missing":
        del annotations["Helpfulness"]
    completions[0]["annotations"] = annotations
    row = {**ROWS["vlfeedback"], "completions": completions, "image": PICTURE}
    groups = Conversion(CONVERTERS["vlfeedback"], RowSource("rows", tmp_path, lambda: iter([("row 1", row)])))
    assert [sorted(group.responses) for group in groups] == [["also good", "bad"]]
    assert groups.left_out == {"without a rating of every aspect": 1}


ARENA = (
    "[User Prompt]\nWhat colour?\n\n[The Start of Assistant A's Answer]\nIt is red.\n[The End of Assistant A's Answer]"
    "\n\n[The Start of Assistant B's Answer]\nIt is blue.\n[The End of Assistant B's Answer]\n"
)
BENCH = (
    "[Question]\nWhat colour?\n\n[Assistant 1]\nIt is red.\n\n[End of Assistant 1]\n\n[Assistant 2]\nIt is blue.\n\n"
    "[End of Assistant 2]\n\n[System]\nPlease rate both.\n"
)


@pytest.mark.parametrize("request_text", [ARENA, BENCH])
@pytest.mark.parametrize(
    ("verdict", "rankings"),
    [
        ("My final verdict is: [[B>A]]", (2, 1)),
        ("[[A>>B]]", (1, 2)),
        ("So [[A<B]].", (2, 1)),
        ("Tie. [[A=B]]", None),
        ("8 9.5\nThe second is better.", (2, 1)),
        ("9 7", (1, 2)),
        ("7 7\nBoth.", None),
        ("[[A>B]], no: [[B>A]]", None),
    ],
)
def test_llava_critic_in_the_forms_of_arena_and_llava_bench(
    request_text: str, verdict: str, rankings: tuple[int, int] | None
) -> None:
    turns = [{"from": "human", "value": "<image>\n" + request_text}, {"from": "gpt", "value": verdict}]
    if rankings is None:
        with pytest.raises(SkippedRow, match=r"tie|no verdict"):
            convert("llava_critic", changed("llava_critic", conversations=turns))
        return
    group = convert("llava_critic", changed("llava_critic", conversations=turns))
    assert group.responses == ("It is red.", "It is blue.") and group.rankings == rankings
    assert [block.get("text") for block in group.messages[0]["content"]] == [None, "What colour?"]


def test_mm_rlhf_folder_as_its_readme_has_it(tmp_path: Path) -> None:
    """The pairs made of the rankings lie beside them, in a schema of their own."""
    (tmp_path / "data.jsonl").write_text(json.dumps(ROWS["mm_rlhf"]) + "\n")
    pair = {"prompt": "Which?", "image": "mcq/1.png", "chosen": "A", "rejected": "B"}
    (tmp_path / "dpo_pairs.jsonl").write_text(json.dumps(pair) + "\n")
    rows = read_rows(tmp_path, columns=CONVERTERS["mm_rlhf"].columns)
    assert [row["id"] for _, row in rows] == ["mcq/1"]
    with pytest.raises(ConfigurationError, match=r"has the fields answers, .*found data.jsonl, dpo_pairs.jsonl"):
        read_rows(tmp_path, columns=CONVERTERS["nectar"].columns)
