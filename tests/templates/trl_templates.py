"""The chat templates that TRL ships, on tiny tokenizers and processors; and a tool to call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import trl
from tiny_models import family

from mr_reward.worlds import tiny

_TOKENIZER = tiny.build_tokenizer()
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "one"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def tokenizer(name: str) -> Any:
    made = copy.deepcopy(_TOKENIZER)
    made.bos_token = "<|endoftext|>"
    made.chat_template = template(name)
    return made


def processor(name: str = "qwen3_vl") -> Any:
    made = copy.deepcopy(family("qwen3_vl").processor)
    made.chat_template = made.tokenizer.chat_template = template(name)
    return made


def call(a: int, b: int, **more: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}]
    return {"role": "assistant", "tool_calls": calls, **more}
