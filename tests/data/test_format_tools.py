"""Tool calls, results and schemas in each format that has them; tags of media; the source's own ratings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_converters import chat
from test_formats import ASSISTANT, convert, picture, turns
from typer.testing import CliRunner

from mr_reward import ResponseGroup
from mr_reward.cli.app import app
from mr_reward.data import load_preferences, save_preferences
from mr_reward.data.degenerate import with_degenerate_negative
from mr_reward.errors import GroupError, MRRewardError
from mr_reward.messages.completions import Transcript

ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
SCHEMA = {"type": "function", "function": ADD}
CALL = {"name": "add", "arguments": {"a": 2}}
TURN = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "4"}
QUESTION = {"role": "user", "content": "Q"}
WANTED = [QUESTION, TURN, RESULT]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
SHAREGPT = [*turns("Q"), {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "4"}]
SWIFT = [QUESTION, {"role": "tool_call", "content": json.dumps(CALL)}, {"role": "tool_response", "content": "4"}]
V1 = [
    {"role": "user", "content": [{"type": "text", "value": "Q"}]},
    {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL)}]},
    {"role": "tool", "content": [{"type": "text", "value": "4"}]},
]
EMPTY = {"type": "text", "text": ""}
PAIR = {"chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}
ROWS: list[tuple[str, list[dict[str, Any]]]] = [
    ("preference", [{"prompt": WANTED, "chosen": [GOOD], "rejected": [BAD], "tools": [SCHEMA]}]),
    ("preference", [{"chosen": [*WANTED, GOOD], "rejected": [*WANTED, BAD], "tools": json.dumps([SCHEMA])}]),
    ("unpaired", [{"prompt": WANTED, "completion": [t], "label": t is GOOD, "tools": [SCHEMA]} for t in (GOOD, BAD)]),
    ("sharegpt", [{"conversations": SHAREGPT, "tools": json.dumps([ADD]), **PAIR}]),
    (
        "sharegpt_kto",
        [
            {"conversations": [*SHAREGPT, *turns("", t)[1:]], "kto_tag": t == "good", "tools": [ADD]}
            for t in ("good", "bad")
        ],
    ),
    (
        "llama_factory_v1",
        [{"chosen_messages": [*V1, GOOD], "rejected_messages": [*V1, BAD], "tools": json.dumps([ADD])}],
    ),
    ("ms_swift", [{"messages": [*SWIFT, GOOD], "rejected_response": "bad", "tools": json.dumps([SCHEMA])}]),
    ("ms_swift", [{"messages": [*SWIFT, GOOD], "rejected_response": "bad", "tools": [json.dumps(SCHEMA)]}]),
    (
        "openai",
        [
            {
                "input": {"messages": WANTED, "tools": [SCHEMA]},
                "preferred_output": [GOOD],
                "non_preferred_output": [BAD],
            }
        ],
    ),
]


@pytest.mark.parametrize(("name", "rows"), ROWS)
def test_calls_results_and_tools_are_those_of_the_prompt(name: str, rows: list[Any], tmp_path: Path) -> None:
    (group,) = convert(name, rows, tmp_path)
    assert group.responses == ("good", "bad") and group.rankings == (1, 2) and group.tools == (SCHEMA,)
    wanted = ResponseGroup(prompt=WANTED, responses=["a"]).messages
    assert [message | {"content": message["content"] or []} for message in group.messages] in (
        wanted,
        [message if "tool_calls" not in message else message | {"content": [EMPTY]} for message in wanted],
    )


def test_calls_one_after_the_other_are_one_turn(tmp_path: Path) -> None:
    calls = [{"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": n}})} for n in (1, 2)]
    listed = {"from": "function_call", "value": json.dumps([{"name": "add", "arguments": {"a": n}} for n in (1, 2)])}
    rows = [{"conversations": [*turns("Q"), *form, SHAREGPT[-1]], **PAIR} for form in (calls, [listed])]
    first, second = convert("sharegpt", rows, tmp_path)
    assert first.messages == second.messages and len(first.messages[1]["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("preference", {"prompt": [QUESTION], "chosen": [TURN, RESULT, GOOD], "rejected": [BAD]}),
        ("preference", {"chosen": [QUESTION, TURN, RESULT, GOOD], "rejected": [QUESTION, BAD]}),
        (
            "llama_factory_v1",
            {"chosen_messages": [*V1, GOOD], "rejected_messages": [QUESTION | {"content": V1[0]["content"]}, BAD]},
        ),
    ],
)
def test_an_answer_may_call_tools(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    (group,) = convert(name, [row], tmp_path)
    first, second = group.responses
    assert isinstance(first, Transcript) and [turn["role"] for turn in first.turns] == [
        "assistant",
        "tool",
        "assistant",
    ]
    assert second == "bad" and [message["role"] for message in group.messages] == ["user"]


def test_an_answer_may_be_a_call(tmp_path: Path) -> None:
    call = {"from": "function_call", "value": json.dumps(CALL)}
    (group,) = convert("sharegpt", [{"conversations": turns("Q"), **PAIR, "chosen": call}], tmp_path)
    assert isinstance(group.responses[0], Transcript)
    save_preferences([group], tmp_path / "g.jsonl")
    assert load_preferences(tmp_path / "g.jsonl")[0].responses == group.responses


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tools": "{"}, "tools is '{', which is no JSON"),
        ({"tools": [3]}, "'tools' is .*expected a list of JSON schemas"),
        ({"conversations": [*turns("Q"), {"from": "function_call", "value": "add(2)"}]}, "'tool call' is 'add"),
        ({"conversations": [*turns("Q"), {"from": "function_call", "value": "[3]"}]}, "expected JSON with name"),
        ({"conversations": [*turns("Q"), {"from": "robot", "value": "a"}]}, "'conversations' is .*chat messages"),
    ],
)
def test_what_is_no_call_and_no_tool_is_an_error(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(GroupError, match=words):
        convert("sharegpt", [{"conversations": turns("Q"), **PAIR, **row}], tmp_path)


@pytest.mark.parametrize("messages", [False, True], ids=["text", "messages"])
def test_tags_stand_where_they_stand_in_every_prompt(messages: bool, tmp_path: Path) -> None:
    """By the rule of `ResponseGroup`: a tag for each medium, or none."""

    def read(text: str, number: int) -> list[str]:
        prompt = chat(text) if messages else text
        row = {"prompt": prompt, "images": [picture()] * number, **{"chosen": "a", "rejected": "b"}}
        if messages:
            row |= {name: [{**ASSISTANT, "content": row[name]}] for name in ("chosen", "rejected")}
        return [
            block.get("text", "IMAGE") for block in convert("preference", [row], tmp_path)[0].messages[0]["content"]
        ]

    assert read("Is <image> like\n<image>?", 2) == ["Is", "IMAGE", "like", "IMAGE", "?"]
    assert read("Q", 2) == ["IMAGE", "IMAGE", "Q"] and read("Q <image>", 0) == ["Q <image>"]
    with pytest.raises(MRRewardError, match="has 1 <image> but 2 images came with it"):
        read("Q <image>", 2)


RATED: list[tuple[str, list[dict[str, Any]], tuple[float, ...] | None]] = [
    ("groups", [{"prompt": "Q", "responses": list("abc"), "scores": [0.5, 2, 0.5]}], (0.5, 2, 0.5)),
    ("groups", [{"prompt": "Q", "responses": list("ab"), "rankings": [1, 2]}], None),
    (
        "preference",
        [{"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 7.5, "score_rejected": 2}],
        (7.5, 2),
    ),
    ("preference", [{"prompt": "Q", "chosen": "a", "rejected": "b"}], None),
    ("helpsteer2", [{"prompt": "Q", "response": t, "helpfulness": n} for t, n in (("a", 4), ("b", 1))], (4, 1)),
    (
        "helpsteer2_preference",
        [{"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": -3}],
        (3, 0),
    ),
    ("helpsteer3", [{"context": chat("Q"), "response1": "a", "response2": "b", "overall_preference": 2}], (-2, 0)),
    (
        "ultrafeedback",
        [
            {
                "instruction": "Q",
                "completions": [{"response": t, "overall_score": n} for t, n in (("a", 9), ("b", 2.5))],
            }
        ],
        (9, 2.5),
    ),
]


@pytest.mark.parametrize(("name", "rows", "ratings"), RATED)
def test_how_much_better_an_answer_is_stays(name: str, rows: list[Any], ratings: Any, tmp_path: Path) -> None:
    (group,) = convert(name, rows, tmp_path)
    assert group.ratings == ratings
    save_preferences([group], tmp_path / "g.jsonl")
    assert load_preferences(tmp_path / "g.jsonl")[0].ratings == ratings
    turned = group.select([1, 0])
    assert turned.ratings == (None if ratings is None else (ratings[1], ratings[0]))


def test_ratings_belong_to_ranked_responses(tmp_path: Path) -> None:
    group = ResponseGroup(prompt="Q", responses=["aaaaaaaa", "b"], rankings=[1, 2], ratings=[3, 0])
    assert all(with_degenerate_negative(group, random.Random(seed)).num_responses > 1 for seed in range(8))
    assert ResponseGroup(prompt="Q", responses=["a", "b"], ratings=[3, 0]).ratings is None
    for wrong in ([3], [3, "a"], [3, float("nan")], "ab", [3, True]):
        with pytest.raises(GroupError, match="ratings is .*expected a number for each of the 2 responses"):
            ResponseGroup(prompt="Q", responses=["a", "b"], rankings=[1, 2], ratings=wrong)  # type: ignore[arg-type]


def test_ratings_of_a_row_with_scores_are_those_it_names(tmp_path: Path) -> None:
    """Without any, its scores are its ratings."""
    row = {"prompt": "Q", "responses": ["a", "b"], "scores": [0.1, 0.9]}
    for extra, expected in (({}, (0.1, 0.9)), ({"ratings": [7, 8]}, (7.0, 8.0))):
        (tmp_path / "g.jsonl").write_text(json.dumps({**row, **extra}))
        (group,) = load_preferences(tmp_path / "g.jsonl")
        assert (group.rankings, group.ratings) == ((2, 1), expected)


def test_responses_of_a_group_may_be_messages(tmp_path: Path) -> None:
    """A call, and a text that reads like it, are two responses."""
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}]
    written = str(ResponseGroup(prompt="Q", responses=[call]).responses[0])
    row = {"prompt": "Q", "responses": ["4", [{"role": "assistant", "content": "5"}], call, written]}
    (tmp_path / "g.jsonl").write_text(json.dumps({**row, "rankings": [1, 4, 2, 3]}))
    command = ["data", "convert", "auto", str(tmp_path / "g.jsonl"), str(tmp_path / "out.jsonl"), "--keep-order"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (group,) = load_preferences(tmp_path / "out.jsonl")
    assert group.responses[:2] == ("4", "5") and group.rankings == (1, 4, 2, 3)
    assert isinstance(group.responses[2], Transcript) and not isinstance(group.responses[3], Transcript)
