"""Each format by rows of our own: recognised by its columns, with ties, several turns and pictures."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_converters import ROWS as PAPER_ROWS
from test_converters import chat
from typer.testing import CliRunner

from mr_reward.cli import data as data_commands
from mr_reward.cli.app import app
from mr_reward.data.conversion import Conversion
from mr_reward.data.converters import CONVERTERS, get_converter, recognise
from mr_reward.data.groups_file import load_preferences
from mr_reward.data.sources import RowSource
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.groups import ResponseGroup


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def picture() -> dict[str, Any]:
    """As `datasets` stores it."""
    return {"bytes": png(), "path": None}


def blocks(text: str) -> list[dict[str, Any]]:
    return [{"type": "image"}, {"type": "text", "text": text}]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def v1(*texts: str) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "value": message["content"]}], "loss_weight": float(i % 2)}
        for i, message in enumerate(chat(*texts))
    ]


ASSISTANT = {"role": "assistant"}
THREE = ["Q1", "A1", "Q2"]
GOOD_BAD = {"responses": ("good", "bad"), "rankings": (1, 2)}
# Name of the format, its rows, the turns of the prompt, what the first group has.
CASES: list[tuple[str, list[dict[str, Any]], list[str], dict[str, Any]]] = [
    (
        "groups",
        [{"prompt": "Q", "responses": list("abcd"), "rankings": [2, 1, 1, 4]}],
        ["Q"],
        {"rankings": (2, 1, 1, 3)},
    ),
    ("groups", [{"prompt": "Q", "responses": list("abc"), "scores": [0.5, 2, 0.5]}], ["Q"], {"rankings": (2, 1, 2)}),
    ("preference", [{"prompt": "Q", "chosen": "good", "rejected": "bad"}], ["Q"], GOOD_BAD),
    (
        "preference",
        [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
        ["The sky is"],
        {"rankings": (1, 2)},
    ),
    (
        "preference",
        [
            {
                "prompt": chat("Q"),
                "chosen": [{**ASSISTANT, "content": "good"}],
                "rejected": [{**ASSISTANT, "content": "bad"}],
            }
        ],
        ["Q"],
        GOOD_BAD,
    ),
    ("preference", [{"chosen": chat(*THREE, "good"), "rejected": chat(*THREE, "bad")}], THREE, GOOD_BAD),
    (
        "preference",
        [{"prompt": "Q2", "chosen": chat(*THREE, "good"), "rejected": chat(*THREE, "bad")}],
        THREE,
        GOOD_BAD,
    ),
    (
        "preference",
        [
            {
                "images": [picture()],
                "prompt": [{"role": "user", "content": blocks("Q")}],
                "chosen": [{**ASSISTANT, "content": [{"type": "text", "text": "good"}]}],
                "rejected": [{**ASSISTANT, "content": [{"type": "text", "text": "bad"}]}],
            }
        ],
        ["Q"],
        GOOD_BAD,
    ),
    (
        "preference",
        [{"prompt": "<image>\nQ", "chosen": "good", "rejected": "bad", "image": picture()}],
        ["Q"],
        GOOD_BAD,
    ),
    ("preference", [{"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"}], ["S", "Q"], GOOD_BAD),
    (
        "preference",
        [{"prompt": "Q", "chosen": ["good", "right"], "rejected": ["bad"]}],
        ["Q"],
        {"responses": ("good", "right", "bad"), "rankings": (1, 1, 2)},
    ),
    (
        "unpaired",
        [
            {"prompt": "Q", "completion": "good", "label": True},
            {"prompt": "other", "completion": "single", "label": True},
            {"prompt": "Q", "completion": "bad", "label": False},
            {"prompt": "Q", "completion": "worse", "label": False},
        ],
        ["Q"],
        {"responses": ("good", "bad", "worse"), "rankings": (1, 2, 2)},
    ),
    (
        "unpaired",
        [
            {"prompt": chat(*THREE), "completion": [{**ASSISTANT, "content": text}], "label": text == "good"}
            for text in ("good", "bad")
        ],
        THREE,
        GOOD_BAD,
    ),
    (
        "sharegpt",
        [
            {
                "conversations": turns("<image>Q1", "A1", "Q2"),
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
                "system": "S",
                "images": [picture()],
            }
        ],
        ["S", *THREE],
        GOOD_BAD,
    ),
    (
        "sharegpt_kto",
        [{"conversations": turns(*THREE, text), "kto_tag": text == "good"} for text in ("bad", "good")],
        THREE,
        {"responses": ("bad", "good"), "rankings": (2, 1)},
    ),
    ("sharegpt_kto", [{"messages": chat("Q", t), "kto_tag": t == "good"} for t in ("good", "bad")], ["Q"], GOOD_BAD),
    (
        "llama_factory_v1",
        [{"chosen_messages": v1(*THREE, "good"), "rejected_messages": v1(*THREE, "bad")}],
        THREE,
        GOOD_BAD,
    ),
    (
        "alpaca",
        [
            {
                "instruction": "Q2",
                "input": "",
                "history": [["Q1", "A1"]],
                "system": "S",
                "chosen": "good",
                "rejected": "bad",
            }
        ],
        ["S", *THREE],
        GOOD_BAD,
    ),
    (
        "alpaca",
        [{"instruction": "Add.", "input": "2 2", "chosen": "good", "rejected": "bad"}],
        ["Add.\n2 2"],
        GOOD_BAD,
    ),
    ("ms_swift", [{"messages": chat(*THREE, "good"), "rejected_response": "bad"}], THREE, GOOD_BAD),
    (
        "ms_swift",
        [{"messages": chat("<image>Q", "good"), "rejected_response": ["bad", "worse"], "images": [picture()]}],
        ["Q"],
        {"responses": ("good", "bad", "worse"), "rankings": (1, 2, 2)},
    ),
    ("ms_swift", [{"messages": chat(*THREE, "good"), "rejected_messages": chat(*THREE, "bad")}], THREE, GOOD_BAD),
    (
        "ms_swift",
        [{"query": "Q2", "response": "good", "rejected_response": "bad", "history": [["Q1", "A1"]]}],
        THREE,
        GOOD_BAD,
    ),
    (
        "openai",
        [
            {
                "input": {"messages": chat(*THREE), "tools": [], "parallel_tool_calls": True},
                "preferred_output": [{**ASSISTANT, "content": "good"}],
                "non_preferred_output": [{**ASSISTANT, "content": "bad"}],
            }
        ],
        THREE,
        GOOD_BAD,
    ),
    (
        "ultrafeedback",
        [
            {
                "instruction": "Q",
                "completions": [
                    {"response": text, "overall_score": score, "fine-grained_score": 1.0, "model": "m"}
                    for text, score in (("good", 8.0), ("bad", 3), ("as good", 8), ("unrated", "N/A"))
                ],
            }
        ],
        ["Q"],
        {"responses": ("good", "bad", "as good"), "rankings": (1, 2, 1)},
    ),
    (
        "helpsteer2",
        [{"prompt": "Q", "response": text, "helpfulness": n, "verbosity": 1} for text, n in (("good", 4), ("bad", 2))],
        ["Q"],
        GOOD_BAD,
    ),
    (
        "helpsteer2",
        [
            {"prompt": "Q1\n<extra_id_1>Assistant\nA1\n<extra_id_1>User\nQ2", "response": text, "helpfulness": n}
            for text, n in (("bad", 0), ("good", 4))
        ],
        THREE,
        {"rankings": (2, 1)},
    ),
    (
        "helpsteer2_preference",
        [{"prompt": "Q", "response_1": "good", "response_2": "bad", "preference_strength": -2}],
        ["Q"],
        GOOD_BAD,
    ),
    (
        "helpsteer3",
        [{"context": chat(*THREE), "response1": "bad", "response2": "good", "overall_preference": 1}],
        THREE,
        {"responses": ("bad", "good"), "rankings": (2, 1)},
    ),
    (
        "rlhf_v",
        [{"idx": 3, "image": picture(), "text": json.dumps({"question": "Q", "chosen": "good", "rejected": "bad"})}],
        ["Q"],
        GOOD_BAD | {"id": "RLHF-V-3"},
    ),
    (
        "arena",
        [
            {
                "images": [picture()],
                "conversation_a": [[message] for message in chat("Q", "bad")],
                "conversation_b": [[message] for message in chat("Q", "good")],
                "winner": "model_b",
            }
        ],
        ["Q"],
        {"responses": ("bad", "good"), "rankings": (2, 1)},
    ),
    (
        "hh_rlhf",
        [
            {
                name: f"\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant: {text}"
                for name, text in (("chosen", "good"), ("rejected", "bad"))
            }
        ],
        THREE,
        GOOD_BAD,
    ),
    (
        "rewardbench",
        [
            {
                "id": 3,
                "prompt": "Q",
                "chosen": "good",
                "rejected": "bad",
                "subset": "s",
                "chosen_model": "a",
                "rejected_model": "b",
            }
        ],
        ["Q"],
        GOOD_BAD | {"id": "3"},
    ),
]


def source(rows: list[Any], folder: Path) -> RowSource:
    return RowSource("rows", folder, lambda: iter([(f"row {i}", row) for i, row in enumerate(rows, start=1)]))


def convert(name: str, rows: list[Any], folder: Path) -> list[ResponseGroup]:
    return list(Conversion(get_converter(name), source(rows, folder), keep_order=True))


@pytest.mark.parametrize(("name", "rows", "prompt", "expected"), CASES)
def test_a_format_is_recognised_and_read(
    name: str, rows: list[dict[str, Any]], prompt: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    assert recognise(source(rows, tmp_path)).name == name
    group = convert(name, rows, tmp_path)[0]
    for key, value in expected.items():
        assert getattr(group, key) == value, key
    contents = [block for turn in group.messages for block in turn["content"]]
    assert [block["text"] for block in contents if block["type"] == "text"] == prompt
    pictures = [key for key in ("image", "images") if key in rows[0]]
    assert len(group.images) == len(pictures) == sum(block["type"] == "image" for block in contents)
    assert group.source == name


def test_every_format_has_a_case() -> None:
    assert {name for name, *_ in CASES} | set(PAPER_ROWS) | {"verl"} == set(CONVERTERS)


@pytest.mark.parametrize("name", list(PAPER_ROWS))
def test_the_mixture_of_the_paper_is_recognised(name: str, tmp_path: Path) -> None:
    """Tulu and Skywork are pairs of chats like others."""
    expected = {"tulu": "preference", "skywork": "preference"}.get(name, name)
    assert recognise(source([PAPER_ROWS[name]], tmp_path)).name == expected


@pytest.mark.parametrize("index", range(len(CASES)))
def test_auto_writes_each_format_from_a_file(index: int, tmp_path: Path) -> None:
    """Through the command, where pictures are paths."""
    name, rows, _, expected = CASES[index]
    (tmp_path / "a.png").write_bytes(png())
    one = {"image": "a.png", "images": ["a.png"]}
    lines = [{key: one.get(key, value) for key, value in row.items()} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["data", "convert", "auto", str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl"), "--keep-order"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and f"{name} ->" in result.output, result.output
    group = load_preferences(tmp_path / "out.jsonl")[0]
    assert group.rankings == expected["rankings"] and group.source == name


@pytest.mark.parametrize(
    ("row", "near"),
    [
        ({"prompt": "Q", "good": "a", "rejected": "b"}, "preference"),
        ({"messages": [], "rejected": "b"}, "ms_swift"),
        ({"text": "a"}, "rlhf_v"),
        ({"conversations": [], "chosen": {"from": "gpt", "value": "a"}}, "sharegpt"),
    ],
)
def test_other_columns_are_an_error_that_names_the_nearest(row: dict[str, Any], near: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"fits no format; the nearest are .*\b{near} \("):
        recognise(source([row], tmp_path))
    with pytest.raises(ConfigurationError, match="holds no row"):
        recognise(source([3], tmp_path))


def test_columns_of_two_formats_are_an_error_that_names_both(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "completion": "a", "label": True}
    with pytest.raises(ConfigurationError, match=r"several formats; the nearest are .*unpaired.*preference"):
        recognise(source([row], tmp_path))


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        (
            "preference",
            {"prompt": "other", "chosen": chat("Q", "a"), "rejected": chat("Q", "b")},
            "'prompt' is no turn",
        ),
        ("preference", {"chosen": chat("a"), "rejected": chat("b")}, "assistant"),
        ("preference", {"chosen": "abc", "rejected": "xyz"}, "share no start"),
        ("preference", {"chosen": chat("Q", "a"), "rejected": chat("P", "b")}, "differ before their last turn"),
        ("preference", {"prompt": "Q", "chosen": "a", "rejected": "b", "system_prompt": "S"}, "'system_prompt'"),
        ("preference", {"prompt": "Q", "chosen": "a", "rejected": "b", "image": "a", "images": ["a"]}, "both given"),
        ("unpaired", {"prompt": "Q", "completion": "a"}, "'label' is missing"),
        ("unpaired", {"prompt": "Q", "completion": "a", "label": "yes"}, "'label\\[0\\]' is 'yes'"),
        ("sharegpt", {"conversations": turns("Q"), "chosen": "a", "rejected": "b"}, "'chosen' is str"),
        ("alpaca", {"instruction": "Q", "history": ["Q1"], "chosen": "a", "rejected": "b"}, "'history'"),
        (
            "helpsteer3",
            {"context": chat("Q"), "response1": "a", "response2": "b", "overall_preference": 7},
            "from -3 to 3",
        ),
        ("verl", {"data_source": "x", "prompt": chat("Q"), "reward_model": {}}, "prompts without responses"),
        ("openai", {"input": {"messages": chat("Q"), "tools": [{"a": 1}]}}, "'preferred_output' is missing"),
    ],
)
def test_a_wrong_row_says_what_is_wrong(name: str, row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(GroupError, match=words):
        convert(name, [row], tmp_path)


def test_answers_of_one_prompt_about_two_pictures_are_two_groups(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "Q",
            "completion": f"{label} {colour}",
            "label": label,
            "image": {"bytes": png(colour), "path": None},
        }
        for label in (True, False)
        for colour in ("red", "blue")
    ]
    groups = convert("unpaired", rows, tmp_path)
    assert [group.responses for group in groups] == [("True red", "False red"), ("True blue", "False blue")]


def test_what_gives_no_preference_is_counted(tmp_path: Path) -> None:
    rows = [
        {"context": chat("Q"), "response1": "a", "response2": "b", "overall_preference": strength}
        for strength in (0, 2)
    ]
    groups = Conversion(get_converter("helpsteer3"), source(rows, tmp_path))
    assert len(list(groups)) == 1 and groups.skipped == {"all responses tie": 1}


def test_the_documented_rows_are_of_the_documented_formats(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "data-formats.md"
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| `(\{.*\})` \|$", page.read_text(), re.MULTILINE))
    assert {*table, "tulu", "skywork"} == set(CONVERTERS)
    for name, row in table.items():
        assert recognise(source([json.loads(row)], tmp_path)).name == name


def test_the_help_names_every_format() -> None:
    words = set(re.findall(r"\w+", data_commands.convert.__doc__ or ""))
    assert words >= set(CONVERTERS)
