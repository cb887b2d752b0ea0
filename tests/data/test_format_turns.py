"""A file of each trainer's format with several turns, a picture in the first of them and ties, through the command."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from test_converters import chat
from test_formats import ASSISTANT, png, turns
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.data import load_preferences

IMAGE = {"images": ["a.png"]}
URI = "data:image/png;base64," + base64.b64encode(png()).decode()
CHAT = chat("<image>Q1", "A1", "Q2")
SHARED = ("<image>Q1", "A1", "Q2")


def said(text: str) -> dict[str, str]:
    return {**ASSISTANT, "content": text}


def blocks(image: dict[str, Any], key: str) -> list[dict[str, Any]]:
    first = {"role": "user", "content": [image, {"type": "text", key: "Q1"}]}
    return [first, *({**turn, "content": [{"type": "text", key: turn["content"]}]} for turn in CHAT[1:])]


def v1(text: str) -> list[dict[str, Any]]:
    answer = {**ASSISTANT, "content": [{"type": "text", "value": text}]}
    return [*blocks({"type": "image_url", "value": "a.png"}, "value"), answer]


TIED = {"good": 1, "bad": 2, "as good": 1}
FILES: list[tuple[str, list[dict[str, Any]], dict[str, int]]] = [
    ("groups", [{"prompt": CHAT, "responses": [*TIED], "rankings": [*TIED.values()], **IMAGE}], TIED),
    ("preference", [{"prompt": CHAT, "chosen": [said("good")], "rejected": [said("bad")], **IMAGE}], {}),
    ("preference", [{"chosen": [*CHAT, said("good")], "rejected": [*CHAT, said("bad")], **IMAGE}], {}),
    (
        "preference",
        [{"prompt": blocks({"type": "image"}, "text"), "chosen": [said("good")], "rejected": [said("bad")], **IMAGE}],
        {},
    ),
    ("preference", [{"prompt": CHAT, "chosen": ["good", "as good"], "rejected": ["bad"], **IMAGE}], TIED),
    ("unpaired", [{"prompt": CHAT, "completion": [said(t)], "label": n == 1, **IMAGE} for t, n in TIED.items()], TIED),
    (
        "sharegpt",
        [
            {
                "conversations": turns(*SHARED),
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
                **IMAGE,
            }
        ],
        {},
    ),
    (
        "sharegpt_kto",
        [{"conversations": turns(*SHARED, t), "kto_tag": n == 1, **IMAGE} for t, n in TIED.items()],
        TIED,
    ),
    ("llama_factory_v1", [{"chosen_messages": v1("good"), "rejected_messages": v1("bad")}], {}),
    (
        "alpaca",
        [{"instruction": "Q2", "history": [["<image>Q1", "A1"]], "chosen": "good", "rejected": "bad", **IMAGE}],
        {},
    ),
    ("ms_swift", [{"messages": [*CHAT, said("good")], "rejected_response": "bad", **IMAGE}], {}),
    (
        "openai",
        [
            {
                "input": {"messages": blocks({"type": "image_url", "image_url": {"url": URI}}, "text")},
                "preferred_output": [said("good")],
                "non_preferred_output": [said("bad")],
            }
        ],
        {},
    ),
    (
        "arena",
        [
            {
                "conversation_a": [[turn] for turn in [*CHAT, said("bad")]],
                "conversation_b": [[turn] for turn in [*CHAT, said("good")]],
                "winner": "model_b",
                **IMAGE,
            }
        ],
        {},
    ),
]


@pytest.mark.parametrize(("name", "rows", "rankings"), FILES)
def test_several_turns_with_a_picture_and_ties(
    name: str, rows: list[dict[str, Any]], rankings: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["data", "convert", "auto", str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and f"{name} ->" in result.output, result.output
    (group,) = load_preferences(tmp_path / "out.jsonl")
    assert [turn["role"] for turn in group.messages] == ["user", "assistant", "user"]
    shown = [[block.get("text", "IMAGE") for block in turn["content"]] for turn in group.messages]
    assert shown == [["IMAGE", "Q1"], ["A1"], ["Q2"]] and len(group.images) == 1
    assert group.rankings is not None
    assert dict(zip(group.responses, group.rankings, strict=True)) == (rankings or {"good": 1, "bad": 2})
