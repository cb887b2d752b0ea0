"""Answers that are none: what a reward model must not like."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from mr_reward.groups import ResponseGroup

# Openers that made LLM judges say yes without any answer behind them ("One Token to Fool LLM-as-a-Judge",
# arXiv 2507.08794).
MASTER_KEYS = (":", ",", ".", "Solution", "Thought process:", "Let's solve this problem step by step.")


def with_degenerate_negative(group: ResponseGroup, rng: random.Random) -> ResponseGroup:
    """One response more, at the end, that is worth nothing and ranked behind all others of a ranked group.

    It is the empty text, the first quarter of one of the responses, or a "master key". A policy finds such texts when
    the reward model never saw them. A group that already holds the drawn text is returned as it is.
    """
    cut = rng.choice(group.responses)
    text = rng.choice(("", cut[: len(cut) // 4], rng.choice(MASTER_KEYS)))
    if text in group.responses:
        return group
    rankings: Any = group.rankings
    return replace(
        group,
        prompt=group.messages,
        responses=[*group.responses, text],
        rankings=[*rankings, max(rankings) + 1],
        ratings=None,
    )
