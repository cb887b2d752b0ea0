"""Texts as they are compared: without case, layout and the form of their Unicode."""

from __future__ import annotations

import unicodedata

from mr_reward.groups import ResponseGroup

__all__ = ["normalised_text", "prompt_text"]


def normalised_text(text: str) -> str:
    """Lower case, white space collapsed, Unicode in one form (NFKC).

    Args:
        text: any.

    Returns:
        The text to compare.

    Example:
        >>> normalised_text(" What\\n is THIS? ")
        'what is this?'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_text(group: ResponseGroup) -> str:
    """The text of the prompt, turn by turn, without system turns: they do not change what is asked.

    Args:
        group: any.

    Returns:
        The texts of its blocks, one per line; a conversation of several turns with its roles.

    Example:
        >>> prompt_text(ResponseGroup(prompt="Why?", responses=["a"]))
        'Why?'
    """
    turns = [message for message in group.messages if message["role"] != "system"]
    lines = []
    for message in turns:
        text = "\n".join(block["text"] for block in message["content"] if block["type"] == "text")
        lines.append(text if len(turns) == 1 else f"{message['role']}: {text}")
    return "\n".join(lines)
