"""How many tokens batches of real groups compute beyond those that are there; part of `scoring_speed.py`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from speed_harness import plot_bars, print_table, quartiles
from transformers import AutoTokenizer

from mr_reward.attention.plan import GroupPlan
from mr_reward.backbones.base import BackboneAdapter
from mr_reward.model.rows import Rows, build_row, collate, plan_batches
from mr_reward.templates.rendering import RenderedGroup

_BYTES_PER_TOKEN = 4


def tokens_computed(rows: Sequence[Rows], layout: str, *, padded: bool) -> int:
    """Tokens that go through the backbone when a batch of rows is scored."""
    batch = collate(rows, BackboneAdapter())
    return batch.input_ids.numel() if padded else len(GroupPlan.of(layout, batch.segments, batch.kinds).tokens)


def run_padding(options: argparse.Namespace) -> dict[str, Any]:
    """Padding over what is needed: our batches, ours under the dense mask, and padded batches in file order."""
    rows = _read_rows(options.groups, options.layout, _counter(options.tokenizer))
    sizes = [row.num_tokens for row in rows]
    if max(sizes) > options.max_tokens:
        raise SystemExit(f"{options.groups}: a group has {max(sizes)} tokens; raise --max_tokens to at least that")
    ways = {
        "ours": (plan_batches(sizes, options.max_tokens, padded=False), False),
        "ours, dense mask": (plan_batches(sizes, options.max_tokens), True),
        "file order, padded": (_in_file_order(sizes, options.max_tokens), True),
    }
    found = {}
    for name, (batches, padded) in ways.items():
        computed = sum(tokens_computed([rows[i] for i in batch], options.layout, padded=padded) for batch in batches)
        found[name] = {"batches": len(batches), "computed": computed, "padding": computed / sum(sizes) - 1}
    table = [
        [name, str(each["batches"]), f"{each['computed']:,}", f"{each['padding']:.2%}"] for name, each in found.items()
    ]
    title = f"{len(rows)} groups, {sum(sizes):,} tokens, at most {options.max_tokens:,} a batch"
    print_table(title, ["", "batches", "tokens computed", "computed / needed - 1"], table)
    bars = {name: quartiles([100 * each["padding"]]) for name, each in found.items()}
    plot_bars(bars, options.output / "scoring_padding.png", "padding, % of the tokens needed")
    return {"groups": len(rows), "needed_tokens": sum(sizes), "ways": found}


def _in_file_order(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows one after the other; a new batch starts where the padded one would exceed the budget."""
    batches: list[list[int]] = [[]]
    for row, size in enumerate(sizes):
        longest = max(size, *(sizes[i] for i in batches[-1]), 0)
        if batches[-1] and longest * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _counter(tokenizer: str | None) -> Callable[[str], int]:
    if tokenizer is None:
        return lambda text: len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN + 1
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False).input_ids)


def _read_rows(path: Path, layout: str, count: Callable[[str], int]) -> list[Rows]:
    """A row of each line's lengths; which tokens they are does not matter."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SystemExit(f"--groups {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            group = json.loads(line)
            prompt, responses = count(_text(group["prompt"])), [[0] * count(text) for text in group["responses"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(
                f"{path}, line {number}: expected a JSON object with a `prompt` (text, or messages) and a list of "
                f"texts `responses`, got {line[:80]!r}"
            ) from error
        ids = torch.zeros(prompt, dtype=torch.long)
        group = RenderedGroup(prompt_ids=ids, response_ids=responses, media={}, mm_token_type_ids=None)
        rows.append(build_row(group, layout))
    if not rows:
        raise SystemExit(f"{path}: holds no groups")
    return rows


def _text(prompt: Any) -> str:
    """The texts of a prompt that is one text or a list of messages."""
    if isinstance(prompt, str):
        return prompt
    contents = [message["content"] for message in prompt]
    parts = [part for content in contents for part in ([content] if isinstance(content, str) else content)]
    return "\n".join(part if isinstance(part, str) else part.get("text", "") for part in parts)
