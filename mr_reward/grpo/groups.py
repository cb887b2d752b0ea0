"""Rollouts -> groups: what is read from the rows that a trainer hands over, how many of them are a group, and which
rank scores which group.

Pure, no collectives. Words: a *row* is one rollout; the *owner* of a group is the rank that scores it, a *holder* one
that holds at least one row of it; a *straddling* group has more than one holder. The owner is always a holder, because
holders have the prompt's images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mr_reward.errors import ConfigurationError, GroupAssemblyError, GroupError
from mr_reward.groups import ResponseGroup
from mr_reward.messages.completions import Completion, completion_text, with_before
from mr_reward.messages.prompts import Message, image_of, tools_of
from mr_reward.templates.images import DecodedImages

Prompt = str | Sequence[Mapping[str, Any]]


REFERENCE_COLUMN = "reference_response"  # of the data set: what the policy's responses are compared with


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """What the other ranks need to know of one rollout: two strings, never media."""

    fingerprint: str  # hash of the prompt's text and media; equal for all rollouts of one prompt
    response: str
    opening: str = ""  # with environments the text at the prompt's end, where the first observation stands


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedGroup:
    """One prompt's rollouts, wherever they are."""

    index: int  # number of the group in the global batch
    responses: tuple[str, ...]  # N = `num_generations` texts in global row order
    holders: tuple[int, ...]  # ranks that hold rows of it, ascending
    owner: int  # the holder that scores it
    owner_row: int  # position, among the owner's own rows, of the first one that belongs to this group
    # Where the first observations of a group's environments differ: what the ends of their prompts have in common. The
    # rest of each stands at the beginning of its response.
    opening: str | None = None

    @property
    def straddles(self) -> bool:
        """Whether more than one rank holds rows of it."""
        return len(self.holders) > 1


def read_rollouts(
    prompts: Sequence[Prompt], completions: Sequence[Completion], columns: Mapping[str, Any]
) -> tuple[list[ResponseGroup], list[RolloutRow]]:
    """M groups of one response each (they hold prompt and media), and the M rows to be gathered.

    Images are taken from the prompt's content blocks, where TRL puts them; from the `images` or else the `image`
    column if no block carries one. Each image is decoded once, whatever the number of rollouts that show it.

    With `environments` TRL appends what each one's `reset` has returned to the prompt, so the rollouts of one prompt
    may end in different texts: those are kept apart from what has to be equal.

    Tools are those that the trainer shows the policy; without a trainer, those of the `tools` column.
    """
    images = columns.get("images")  # wins over `image`, as in TRL
    if images is None:
        column = columns.get("image")
        images = [() if image is None else (image,) for image in ([None] * len(prompts) if column is None else column)]
    if not len(prompts) == len(completions) == len(images):
        raise GroupError(
            f"got {len(prompts)} prompts, {len(completions)} completions and {len(images)} entries in the image "
            "column, expected one of each per rollout; pass what GRPOTrainer passes to a reward function"
        )
    tools = _rollout_tools(columns, len(prompts))
    groups = []
    for i, (prompt, completion, media) in enumerate(zip(prompts, completions, images, strict=True)):
        name = f"rollout {i}"
        groups.append(
            ResponseGroup(
                prompt=_without_empty_content(prompt),
                responses=[completion_text(completion, name=name)],
                tools=tools[i],
                images=() if media is None or _carries_images(prompt) else media,
                id=name,
            )
        )
    load = DecodedImages()
    rows: list[RolloutRow] = []
    last: tuple[Any, str] = None, ""  # a prompt and its fingerprint; the rollouts of one come one after the other
    for group in groups:
        prompt, opening = _prompt_content(group, load.digest), ""
        if columns.get("environments") is not None:
            prompt[0], opening = split_opening(prompt[0])
        if prompt != last[0]:
            last = prompt, _hashed(prompt)
        rows.append(RolloutRow(last[1], group.responses[0], opening))
    return groups, rows


def read_references(columns: Mapping[str, Any]) -> list[str | None] | None:
    """The text of the column `reference_response` for each row, None for a prompt without one; None without it."""
    column = columns.get(REFERENCE_COLUMN)
    if column is None:
        return None
    return [
        None if one is None else completion_text(one, name=f"{REFERENCE_COLUMN} of rollout {i}")
        for i, one in enumerate(column)
    ]


def group_size(log_metric: Callable[..., None] | None, num_generations: int, num_generations_eval: int) -> int:
    """How many rows a group has in this call: training and evaluation may differ, and TRL does not say which it is.

    The rows do not tell it apart safely (two neighbouring groups of one prompt look like one of twice the size), so
    the trainer is asked: `log_metric`, which TRL hands to reward functions, is a method of it. What it says is also
    held against what the reward was given, in the first call already, not only when the first evaluation comes.
    """
    trainer = getattr(log_metric, "__self__", None)
    configured = tuple(getattr(trainer, name, None) for name in ("num_generations", "num_generations_eval"))
    if any(number is None for number in configured):
        if num_generations == num_generations_eval:
            return num_generations
        raise ConfigurationError(
            f"got num_generations={num_generations} and num_generations_eval={num_generations_eval}, but the caller "
            "is no GRPOTrainer or RLOOTrainer that could say whether this is training or evaluation; pass "
            "the trainer's own log_metric, or make one MultiResponseReward for each size"
        )
    if configured != (num_generations, num_generations_eval):
        raise ConfigurationError(
            f"MultiResponseReward has num_generations={num_generations} and "
            f"num_generations_eval={num_generations_eval}, but the trainer generates {configured[0]} completions per "
            f"prompt in training and {configured[1]} in evaluation; make it with MultiResponseReward(..., "
            f"num_generations={configured[0]}, num_generations_eval={configured[1]})"
        )
    return num_generations_eval if is_evaluating(log_metric) else num_generations


def is_evaluating(log_metric: Callable[..., None] | None) -> bool:
    """Whether the trainer that calls a reward is evaluating: its model's mode tells it. Without a trainer, no."""
    model: Any = getattr(getattr(log_metric, "__self__", None), "model", None)
    return model is not None and not model.training


def updates_per_generation(args: Any) -> int:
    """How many optimizer updates one generation of completions serves, by a `GRPOConfig`; at least one."""
    batches = args.steps_per_generation * args.num_iterations
    return int(max(1, batches // args.gradient_accumulation_steps))


def plan_groups(rows_by_rank: Sequence[Sequence[RolloutRow]], num_generations: int) -> list[PlannedGroup]:
    """Cut the global batch into groups and share them out. The same input gives the same plan on every rank.

    Groups are cut by count, never by content: two neighbouring groups with the same prompt stay two groups. The
    fingerprints only prove that the count is right. Ranks may hold different numbers of rows.

        >>> row = RolloutRow("prompt", "text")
        >>> [group.holders for group in plan_groups([[row] * 2, [row] * 2], 4)]
        [(0, 1)]
    """
    rows = [(rank, i, row) for rank, own in enumerate(rows_by_rank) for i, row in enumerate(own)]
    if len(rows) % num_generations:
        counts = ", ".join(f"rank {rank}: {len(own)}" for rank, own in enumerate(rows_by_rank))
        raise GroupAssemblyError(
            f"got {len(rows)} rows in all ({counts}), expected a multiple of num_generations={num_generations}; give "
            "MultiResponseReward the num_generations of the trainer's config (and the config the same "
            "num_generations_eval), and use it only in trainers that generate whole groups (GRPO, RLOO)"
        )
    groups = []
    for index, start in enumerate(range(0, len(rows), num_generations)):
        chunk = rows[start : start + num_generations]
        _check_same_prompt(chunk, start, num_generations)
        responses, opening = _share_opening([row for _, _, row in chunk], start)
        groups.append(
            PlannedGroup(
                index=index,
                responses=responses,
                opening=opening,
                holders=tuple(sorted({rank for rank, _, _ in chunk})),
                owner=chunk[0][0],
                owner_row=chunk[0][1],
            )
        )
    return _balance(groups, num_ranks=len(rows_by_rank))


def _rollout_tools(columns: Mapping[str, Any], count: int) -> list[Any]:
    """The JSON schemas of the tools that each rollout's prompt named."""
    trainer: Any = getattr(columns.get("log_metric"), "__self__", None)
    if not hasattr(trainer, "num_generations"):  # no GRPOTrainer
        column = columns.get("tools")
        return [()] * count if column is None else [tools_of(tools) for tools in column]
    if by_environment := getattr(trainer, "_env_tools", None):
        shown = [by_environment[name] for name in trainer._batch_environments]
    else:
        shown = [getattr(trainer, "tools", None) or ()] * count
    if not any(shown):
        return shown
    from transformers.utils import get_json_schema

    return [[tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools] for tools in shown]


def prompt_fingerprint(group: ResponseGroup, digest: Callable[[Any], str] | None = None) -> str:
    """Hash of everything that makes a prompt: roles, text, placeholders and media; 32 hex digits.

    A medium counts by its pixels, or by what `digest` says of it.
    """
    return _hashed(_prompt_content(group, DecodedImages().digest if digest is None else digest))


def _prompt_content(group: ResponseGroup, digest: Callable[[Any], str]) -> list[Any]:
    media = [*map(digest, group.images)], [[*map(digest, video)] for video in group.videos]
    return [group.messages, media, *([group.tools] if group.tools else [])]


def _hashed(content: list[Any]) -> str:
    # json escapes lone surrogates, which have no UTF-8
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _without_empty_content(prompt: Prompt) -> Prompt:
    """Give turns without content the empty text; `ResponseGroup` wants one, but beside tool calls, everywhere."""
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "content": ""}
        if isinstance(message, Mapping) and message.get("content") is None and not message.get("tool_calls")
        else message
        for message in prompt
    ]


def _carries_images(prompt: Prompt) -> bool:
    """Whether a content block has an image in it; what is no chat is refused later."""
    contents = [] if isinstance(prompt, str) else [m.get("content") for m in prompt if isinstance(m, Mapping)]
    blocks = [block for content in contents if isinstance(content, Sequence) for block in content]
    return any(isinstance(block, Mapping) and image_of(block) is not None for block in blocks)


def _check_same_prompt(chunk: Sequence[tuple[int, int, RolloutRow]], start: int, num_generations: int) -> None:
    first = chunk[0][2].fingerprint
    for offset, (rank, _, row) in enumerate(chunk):
        if row.fingerprint != first:
            raise GroupAssemblyError(
                f"rows {start} to {start + num_generations - 1} of the global batch (ranks {chunk[0][0]} to "
                f"{chunk[-1][0]}) should be the {num_generations} rollouts of one prompt, but row {start + offset} "
                f"(rank {rank}) has another prompt or image than row {start} (rank {chunk[0][0]}); give "
                "MultiResponseReward the num_generations of the trainer's config (and the config the same "
                "num_generations_eval), and turn off whatever changes prompts or images from rollout to rollout "
                "(random augmentation, environments whose first observations hold different images)"
            )


def split_opening(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The chat without the text at its end, behind the last medium, and that text."""
    *before, last = messages
    blocks = list(last["content"])
    texts: list[str] = []
    while blocks and blocks[-1]["type"] == "text":
        texts.insert(0, blocks.pop()["text"])
    return [*before, {**last, "content": blocks}], "".join(texts)


def with_opening(messages: Sequence[Message], opening: str) -> list[Message]:
    """The chat with another text at its end."""
    *before, last = split_opening(messages)[0]
    return [*before, {**last, "content": [*last["content"], {"type": "text", "text": opening}]}]


def _share_opening(rows: Sequence[RolloutRow], start: int) -> tuple[tuple[str, ...], str | None]:
    """The responses of a group, and what its openings have in common if they differ, in whole words."""
    openings = [row.opening for row in rows]
    if len(set(openings)) == 1:
        return tuple(row.response for row in rows), None
    shared = os.path.commonprefix(openings)
    if any(opening[len(shared) :][:1].isalnum() for opening in openings):
        shared = shared.rstrip("".join({char for char in shared if char.isalnum()}))
    if not shared.strip():
        begin = ", ".join(repr(text[:40]) for text in openings[:3])
        raise GroupAssemblyError(
            f"rows {start} to {start + len(rows) - 1} of the global batch should be the rollouts of one prompt, but "
            f"the last turns of their prompts begin differently ({begin}); give the data set a prompt "
            "that says the task, to which the environments append what they observe"
        )
    parts = zip(rows, (opening[len(shared) :].strip() for opening in openings), strict=True)
    return tuple(with_before(seen, row.response) if seen else row.response for row, seen in parts), shared.rstrip()


def _balance(groups: Sequence[PlannedGroup], *, num_ranks: int) -> list[PlannedGroup]:
    """Give each straddling group to its least loaded holder; the load is what the others already cost, in characters.

    The lowest rank wins a tie. A rank's rows are consecutive in the global batch, so a group that began on an earlier
    rank goes on at row 0 of a later one.
    """
    load = [0] * num_ranks
    balanced = list(groups)
    for index in sorted(range(len(groups)), key=lambda index: groups[index].straddles):  # the others come first
        group = groups[index]
        owner = group.owner
        if group.straddles:
            owner = min(group.holders, key=lambda rank: (load[rank], rank))
            balanced[index] = replace(group, owner=owner, owner_row=group.owner_row if owner == group.owner else 0)
        load[owner] += 1 + sum(map(len, group.responses))
    return balanced
