"""A row of each data set in its published schema, with ties and N > 2 where it has them; wrong ones name the field."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from PIL import Image

from mr_reward.data.conversion import SkippedRow, graded_group
from mr_reward.data.converters import CONVERTERS, get_converter
from mr_reward.data.paper_mixture import PAPER_MIXTURE
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import ResponseGroup

PICTURE = Image.new("RGB", (8, 8), "red")


def ratings(helpful: str, ethical: str, faithful: str) -> dict[str, Any]:
    values = {"Helpfulness": helpful, "Ethical Considerations": ethical, "Visual Faithfulness": faithful}
    return {name: {"Rating": value, "Rationale": "because"} for name, value in values.items()}


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CRITIC = (
    "<image>\nYou are given two answers.\n"
    "Question: [What colour is the car?]\n"
    "The first response: [It is red.]\n"
    "The second response: [It is blue,\nI think.]\nASSISTANT:\n"
)

ROWS: dict[str, dict[str, Any]] = {
    "mm_rlhf": {
        "id": "mcq/1",
        "question": "<image>\nWhich one?",
        "answer": "A",
        "image": "mcq/073712.png",
        "video": None,
        "models_output": ["A", "B", "C", "D"],
        "faithfulness": [9, 5, 5, 1],
        "helpfulness": [9, 6, 6, 1],
        "ethical": [9, 9, 9, 9],
        "final_ranking": [1, 2, 2, 4],
        "score_reasons": [""] * 4,
        "ranking_reason": "",
    },
    "llava_critic": {
        "id": "critic-1",
        "source": "vqa",
        "image": PICTURE,
        "conversations": [
            {"from": "human", "value": CRITIC},
            {"from": "gpt", "value": "The second is vague. The better response: [second]"},
        ],
    },
    "rlaif_v": {
        "question": "What is this?",
        "chosen": "A cat.",
        "rejected": "A dog.",
        "image": {"bytes": b"png", "path": None},
        "origin_dataset": "coco",
        "origin_split": "{}",
        "idx": 7,
        "image_path": "a.jpg",
    },
    "vlfeedback": {
        "id": "svit-1",
        "prompt": "Describe it.",
        "models": ["a", "b", "c", "d"],
        "img_path": "images/1.jpg",
        "completions": [
            {"model": "a", "response": "good", "annotations": ratings("5", "5", "5")},
            {"model": "b", "response": "also good", "annotations": ratings("5", "5", "5")},
            {"model": "c", "response": "bad", "annotations": ratings("1", "5", "2")},
            {"model": "d", "response": "unrated", "annotations": ratings("N/A", "5", "2")},
        ],
    },
    "povid": {
        "id": "COCO_train2014_1",
        "image": "./data/coco/COCO_train2014_1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
        "rejected_conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat and a dog."},
        ],
    },
    "wildvision": {
        "question_id": "q1",
        "model_a": "x",
        "model_b": "y",
        "conversation_a": chat("<image>\nWhat is it?", "A cat."),
        "conversation_b": chat("<image>\nWhat is it?", "A dog."),
        "language": "English",
        "image": PICTURE,
        "turn": 1,
        "anony": True,
        "winner": "model_b",
        "tstamp": 1,
        "judge": "z",
        "domain": "d",
    },
    "tulu": {
        "id": "t1",
        "prompt": "Hi",
        "chosen": chat("Hi", "Hello", "More?", "Yes."),
        "rejected": chat("Hi", "Hello", "More?", "No."),
        "source": "ultrafeedback",
    },
    "skywork": {"chosen": chat("Hi", "Good"), "rejected": chat("Hi", "Bad"), "source": "magpie"},
    "nectar": {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a fruit. \n\nAssistant: ",
        "answers": [{"answer": f"answer {i}", "model": "m", "rank": float(rank)} for i, rank in enumerate("3124567")],
        "turns": 2,
        "num_responses": 7,
        "source": ["lmsys"],
        "good_natured": True,
    },
    "pku_saferlhf": {
        "prompt": "How?",
        "response_0": "Like this.",
        "response_1": "Better not.",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": 1,
        "safer_response_id": 1,
    },
}

EXPECTED: dict[str, dict[str, Any]] = {
    "mm_rlhf": {"responses": ("A", "B", "C", "D"), "rankings": (1, 2, 2, 3), "images": ("mcq/073712.png",)},
    "llava_critic": {"responses": ("It is red.", "It is blue,\nI think."), "rankings": (2, 1), "images": (PICTURE,)},
    "rlaif_v": {"responses": ("A cat.", "A dog."), "rankings": (1, 2), "images": (b"png",)},
    "vlfeedback": {
        "responses": ("good", "also good", "bad"),
        "rankings": (1, 1, 2),
        "images": ("images/1.jpg",),
    },
    "povid": {
        "responses": ("A cat.", "A cat and a dog."),
        "rankings": (1, 2),
        "images": ("./data/coco/COCO_train2014_1.jpg",),
    },
    "wildvision": {"responses": ("A cat.", "A dog."), "rankings": (2, 1), "images": (PICTURE,)},
    "tulu": {"responses": ("Yes.", "No."), "rankings": (1, 2), "images": ()},
    "skywork": {"responses": ("Good", "Bad"), "rankings": (1, 2), "images": ()},
    "nectar": {"responses": tuple(f"answer {i}" for i in range(7)), "rankings": (3, 1, 2, 4, 5, 6, 7), "images": ()},
    "pku_saferlhf": {"responses": ("Like this.", "Better not."), "rankings": (2, 1), "images": ()},
}
PROMPTS = {
    "mm_rlhf": ["Which one?"],
    "llava_critic": ["What colour is the car?"],
    "rlaif_v": ["What is this?"],
    "vlfeedback": ["Describe it."],
    "povid": ["What?"],
    "wildvision": ["What is it?"],
    "tulu": ["Hi", "Hello", "More?"],
    "skywork": ["Hi"],
    "nectar": ["Hi", "Hello", "Name a fruit."],
    "pku_saferlhf": ["How?"],
}


def convert(name: str, row: dict[str, Any], **options: Any) -> ResponseGroup:
    return get_converter(name, **options).make([ROWS[name]])(row)


def changed(name: str, **changes: Any) -> dict[str, Any]:
    row = copy.copy(ROWS[name])
    for key, value in changes.items():
        if value is None:
            del row[key]
        else:
            row[key] = value
    return row


def test_there_is_one_for_each_data_set_of_the_paper() -> None:
    names = {converter.name for converter in PAPER_MIXTURE}
    assert names == set(ROWS) == set(EXPECTED) == set(PROMPTS) and names <= set(CONVERTERS)
    assert len(PAPER_MIXTURE) == 10


@pytest.mark.parametrize("name", list(ROWS))
def test_published_schema(name: str) -> None:
    group = convert(name, ROWS[name])
    for key, value in EXPECTED[name].items():
        assert tuple(getattr(group, key)) == tuple(value), key
    assert group.source == name
    texts = [block["text"] for turn in group.messages for block in turn["content"] if block["type"] == "text"]
    assert texts == PROMPTS[name], "placeholders and turn markers do not belong to the prompt"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mm_rlhf", {"question": None}, "'question' is missing"),
        ("mm_rlhf", {"models_output": "A"}, "'models_output' is str"),
        ("mm_rlhf", {"final_ranking": None}, "'final_ranking' is missing"),
        ("llava_critic", {"conversations": None}, "'conversations' is missing"),
        ("llava_critic", {"image": None}, "'image' is missing"),
        ("rlaif_v", {"chosen": 3}, "'chosen' is int"),
        ("rlaif_v", {"image": None}, "'image' is missing"),
        ("vlfeedback", {"completions": "none"}, "'completions' is str"),
        ("vlfeedback", {"completions": [{"response": "a"}]}, "'completions[0].annotations' is missing"),
        ("povid", {"rejected_conversations": []}, "'rejected_conversations' is"),
        ("povid", {"conversations": ROWS["povid"]["conversations"] * 2}, "'conversations' is"),
        (
            "povid",
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]},
            "ask different",
        ),
        ("povid", {"image": {"bytes": None, "path": None}}, "'image' is missing or empty"),
        ("rlaif_v", {"image": 3}, "'image' is 3"),
        ("mm_rlhf", {"models_output": ["A", "B", 3, "D"]}, "'models_output[2]' is 3"),
        ("mm_rlhf", {"final_ranking": ["1", "2", "2", "4"]}, "'final_ranking' is"),
        ("mm_rlhf", {"final_ranking": [1, 2, 3]}, "'final_ranking' is [1, 2, 3], expected 4 numbers"),
        ("mm_rlhf", {"video": ["a", "b"]}, "'video' is list"),
        ("vlfeedback", {"completions": [3]}, "completions[0] is 3"),
        (
            "vlfeedback",
            {"completions": {"response": ["a"], "annotations": []}},
            "'completions' has columns of lengths",
        ),
        ("vlfeedback", {"img_path": None}, "'img_path' is missing"),
        ("llava_critic", {"conversations": ["text"]}, "'conversations' is"),
        ("nectar", {"answers": ["text"]}, "answers[0] is 'text'"),
        ("nectar", {"answers": [{"answer": "a", "rank": float("nan")}]}, "'answers[0].rank' is nan"),
        ("pku_saferlhf", {"safer_response_id": True}, "'safer_response_id' is bool"),
        ("wildvision", {"winner": "model_c"}, "'winner' is 'model_c'"),
        ("wildvision", {"conversation_b": None}, "'conversation_b' is missing"),
        ("tulu", {"rejected": chat("Other", "Hello", "More?", "No.")}, "'chosen' and 'rejected' differ"),
        ("tulu", {"chosen": "text"}, "'rejected' is list"),
        ("skywork", {"chosen": chat("Hi")}, "'chosen' and 'rejected' differ"),
        ("nectar", {"prompt": "Name a fruit."}, "'prompt' is"),
        ("nectar", {"answers": [{"answer": "a"}]}, "'answers[0].rank' is missing"),
        ("pku_saferlhf", {"better_response_id": 2}, "'better_response_id' is 2"),
        ("pku_saferlhf", {"response_1": None}, "'response_1' is missing"),
    ],
)
def test_a_wrong_row_names_its_field(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(GroupError, match="expected|published schema") as caught:
        convert(name, changed(name, **changes))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("wildvision", {"winner": "tie"}, "tie"),
        ("wildvision", {"winner": "tie (bothbad)"}, "bothbad"),
        ("pku_saferlhf", {"safer_response_id": 0}, "not the safer"),
        ("pku_saferlhf", {"response_1": "Like this."}, "fewer than two"),
        ("skywork", {"rejected": chat("Hi", " ")}, "fewer than two"),
        ("vlfeedback", {"completions": ROWS["vlfeedback"]["completions"][:2]}, "all responses tie"),
        ("mm_rlhf", {"final_ranking": [1, 1, 1, 1]}, "all responses tie"),
    ],
)
def test_rows_without_a_preference_are_skipped_with_a_reason(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SkippedRow, match=words):
        convert(name, changed(name, **changes))


@pytest.mark.parametrize("flipped", [False, True])
def test_mm_rlhf_finds_the_direction_of_the_ranking(flipped: bool) -> None:
    row = ROWS["mm_rlhf"]
    if flipped:
        row = {**row, "final_ranking": [4, 2, 2, 1]}
    group = CONVERTERS["mm_rlhf"].make([row])(row)
    assert group.rankings == (1, 2, 2, 3), "the humans' scores say that A is the best, whatever 1 means"


def test_mm_rlhf_refuses_rankings_that_agree_with_nothing() -> None:
    row = ROWS["mm_rlhf"]
    rows = [row, {**row, "final_ranking": [4, 2, 2, 1]}]
    with pytest.raises(GroupError, match="'final_ranking' and the mean scores correlate by 0.00 over 2 rows"):
        CONVERTERS["mm_rlhf"].make(rows)


def test_mm_rlhf_video_is_a_folder_of_frames() -> None:
    row = {**ROWS["mm_rlhf"], "image": None, "video": "video/27799510"}
    group = convert("mm_rlhf", row)
    assert [list(video) for video in group.videos] == [["video/27799510"]] and not group.images


def test_vlfeedback_by_columns_is_the_same() -> None:
    completions = ROWS["vlfeedback"]["completions"]
    columns = {key: [completion[key] for completion in completions] for key in completions[0]}
    group = convert("vlfeedback", changed("vlfeedback", completions=columns))
    assert group.responses == EXPECTED["vlfeedback"]["responses"]
    assert group.rankings == EXPECTED["vlfeedback"]["rankings"]


@pytest.mark.parametrize(
    ("verdict", "rankings"),
    [
        ("The better response: [first]", (1, 2)),
        ("The better response: 2", (2, 1)),
        ("... The better response: B.", (2, 1)),
        ("The better response: [A]", (1, 2)),
    ],
)
def test_llava_critic_verdicts(verdict: str, rankings: tuple[int, int]) -> None:
    turns = [{"from": "human", "value": CRITIC}, {"from": "gpt", "value": verdict}]
    assert convert("llava_critic", changed("llava_critic", conversations=turns)).rankings == rankings


@pytest.mark.parametrize(
    ("request_text", "verdict", "words"),
    [
        (CRITIC, "Both are equally good.", "tie"),
        (CRITIC, "I cannot say.", "no verdict"),
        ("Question: [What?] Score this answer from 0 to 100.", "Final Score: 80", "two answers"),
    ],
)
def test_llava_critic_texts_without_a_pair_are_skipped(request_text: str, verdict: str, words: str) -> None:
    turns = [{"from": "human", "value": request_text}, {"from": "gpt", "value": verdict}]
    with pytest.raises(SkippedRow, match=words):
        convert("llava_critic", changed("llava_critic", conversations=turns))


@pytest.mark.parametrize(("number", "letter"), [("1", "A"), ("2", "B")])
def test_llava_critic_other_headings(number: str, letter: str) -> None:
    for first, second in (("Response 1", "Response 2"), ("Response A", "Response B")):
        text = CRITIC.replace("The first response", first).replace("The second response", second)
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"The better response: [{number}]"}]
        group = convert("llava_critic", changed("llava_critic", conversations=turns))
        assert group.responses == EXPECTED["llava_critic"]["responses"]
        assert group.rankings == ((1, 2) if number == "1" else (2, 1))


@pytest.mark.parametrize(("axis", "rankings"), [("better", (2, 1)), ("safer", (1, 2))])
def test_pku_axes(axis: str, rankings: tuple[int, int]) -> None:
    row = changed("pku_saferlhf", safer_response_id=0)
    assert convert("pku_saferlhf", row, axis=axis).rankings == rankings


def test_nectar_leaves_out_answers_that_go_on_with_the_dialogue() -> None:
    answers = [*ROWS["nectar"]["answers"], {"answer": "Yes. Human: and?", "model": "m", "rank": 8.0}]
    assert convert("nectar", changed("nectar", answers=answers)).num_responses == 7


def test_wildvision_of_several_turns() -> None:
    first, second = chat("<image>\nQ1", "A1", "Q2", "good"), chat("<image>\nQ1", "A1", "Q2", "bad")
    group = convert("wildvision", changed("wildvision", conversation_a=first, conversation_b=second))
    assert group.responses == ("good", "bad")
    assert [turn["role"] for turn in group.messages] == ["user", "assistant", "user"]
    second[1] = {"role": "assistant", "content": "other"}
    with pytest.raises(SkippedRow, match="part before"):
        convert("wildvision", changed("wildvision", conversation_a=first, conversation_b=second))


def test_contradictory_twins_go_and_agreeing_twins_stay_once() -> None:
    group = graded_group("q", ["a", "b", "a", "c", "c"], [1, 2, 1, 0, 3], id="1")
    assert group.responses == ("a", "b") and group.rankings == (1, 2)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'imdb'.*mm_rlhf"):
        get_converter("imdb")
    with pytest.raises(ConfigurationError, match="only pku_saferlhf"):
        get_converter("tulu", axis="safer")
    with pytest.raises(ConfigurationError, match="'nicer'"):
        get_converter("pku_saferlhf", axis="nicer")
