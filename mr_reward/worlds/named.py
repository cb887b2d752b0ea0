"""The worlds that recipes and benchmarks take by name: their prompts and groups have one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from mr_reward.groups import ResponseGroup
from mr_reward.messages.prompts import Message
from mr_reward.worlds import handwriting, shapes
from mr_reward.worlds.handwriting import Media


class Task(Protocol):
    """A prompt with a known truth."""

    @property
    def id(self) -> str: ...
    @property
    def question(self) -> str:
        """Which kind it is, one of the `QUESTIONS` of the world."""

    @property
    def media(self) -> Media: ...
    @property
    def text(self) -> str:
        """The question as it is asked."""

    @property
    def answer(self) -> str: ...
    @property
    def messages(self) -> list[Message]: ...
    @property
    def columns(self) -> dict[str, Any]:
        """For reward functions, beside the right answer."""

    def image(self) -> Image.Image: ...
    def is_correct(self, response: str) -> bool: ...
    def grade(self, response: str) -> float: ...


@dataclass(frozen=True)
class World:
    """Both take a split, a number, `seed`, `questions` and what else the world has."""

    make_tasks: Callable[..., Sequence[Task]]
    make_groups: Callable[..., list[ResponseGroup]]  # and `num_responses`
    answer_tokens: int  # of the tiny tokenizer, for the longest right answer and the end of its turn


WORLDS: Mapping[str, World] = {
    "handwriting": World(handwriting.make_tasks, handwriting.make_groups, 8),
    "shapes": World(shapes.make_tasks, shapes.make_groups, 12),
}


def world_options(name: str, *, num_digits: int, questions: Sequence[str]) -> dict[str, Any]:
    """What a world takes of a recipe's fields; of `read`, the recipes' default, shapes knows nothing."""
    if name == "handwriting":
        return {"num_digits": num_digits, "questions": questions}
    return {} if list(questions) == ["read"] else {"questions": questions}
