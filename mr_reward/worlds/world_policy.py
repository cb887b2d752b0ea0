"""A policy in one of the worlds: the prompts of a GRPO recipe, and how often it answers right on unseen pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mr_reward.errors import ConfigurationError
from mr_reward.runs.collect import CollectArguments
from mr_reward.runs.recipe import PolicyArguments, PromptSource
from mr_reward.worlds.handwriting import grade, is_correct, make_policy_rows
from mr_reward.worlds.named import WORLDS, Task, world_options
from mr_reward.worlds.shapes import shapes_accuracy, shapes_grade


def policy_answers(
    model: PreTrainedModel,
    processor: Any,
    tasks: Sequence[Task],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    show_progress: bool = True,
) -> list[str]:
    """Greedy answers of a vision-language policy to image tasks, one each."""
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in tqdm(range(0, len(tasks), batch_size), desc="answering", disable=not show_progress):
        prompts = []
        for task in tasks[start : start + batch_size]:
            blocks = [{"type": "image", "image": task.image()}, {"type": "text", "text": task.text}]
            prompts.append([{"role": "user", "content": blocks}])
        inputs = processor.apply_chat_template(
            prompts,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)
        with torch.inference_mode():
            generated = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        answers += processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return answers


def handwriting_accuracy(completions: Sequence[Any], question: Sequence[str], digits: Any, **_: Any) -> list[float]:
    """A TRL reward function that is the truth: 1 for a right answer, 0 otherwise.

    With weight 0 beside a reward model it shows in the logs whether the policy gets better in fact. `question` and
    `digits` are columns of `make_policy_rows`.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_correct(*row)) for row in zip(question, digits, texts, strict=True)]


def handwriting_grade(completions: Sequence[Any], question: Sequence[str], digits: Any, **_: Any) -> list[float]:
    """As `handwriting_accuracy`, with the true quality, `mr_reward.worlds.handwriting.grade`: ranks wrong ones too."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [grade(*row) for row in zip(question, digits, texts, strict=True)]


def _load_prompts(
    world: str, arguments: "WorldPolicyArguments", *, split: str, evaluation: bool, seed: int, limit: int | None
) -> Dataset:
    count = arguments.num_eval_prompts if evaluation else arguments.num_prompts
    options = world_options(world, num_digits=arguments.num_digits, questions=arguments.questions)
    tasks = WORLDS[world].make_tasks(split, count if limit is None else min(count, limit), seed=seed, **options)
    return Dataset.from_list(make_policy_rows(tasks))


# Whether an answer is right, and how good a wrong one is: reward functions, and verifiers of `mr-reward label`.
TRUTHS: Mapping[str, Callable[..., Any]] = {"handwriting": handwriting_accuracy, "shapes": shapes_accuracy}
GRADES: Mapping[str, Callable[..., Any]] = {"handwriting": handwriting_grade, "shapes": shapes_grade}
_SOURCES: Mapping[str, PromptSource] = {
    world: PromptSource(partial(_load_prompts, world), [truth]) for world, truth in TRUTHS.items()
}


@dataclass
class WorldCollectArguments(CollectArguments):
    """The fields of a collection, and those of the data sets `handwriting` and `shapes`."""

    sources: ClassVar[Mapping[str, PromptSource]] = _SOURCES

    num_prompts: int = field(default=256, metadata={"help": "Number of handwriting or shapes prompts"})
    num_digits: int = field(default=3, metadata={"help": "Digits per image of the handwriting world"})
    questions: list[str] = field(default_factory=lambda: ["read"], metadata={"help": "Questions of the world"})


@dataclass
class WorldPolicyArguments(PolicyArguments):
    """The fields of a GRPO recipe, and those of the data sets `handwriting` and `shapes`."""

    sources: ClassVar[Mapping[str, PromptSource]] = _SOURCES

    dataset: str | None = field(
        default="handwriting", metadata={"help": "Data set with prompts, or handwriting or shapes"}
    )
    num_prompts: int = field(default=4096, metadata={"help": "Number of prompts of the world"})
    num_eval_prompts: int = field(default=32, metadata={"help": "Number of held-out prompts of the world"})
    num_digits: int = field(default=3, metadata={"help": "Digits per image of the handwriting world"})
    questions: list[str] = field(default_factory=lambda: ["read"], metadata={"help": "Questions of the world"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_prompts", "num_eval_prompts"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected at least 1")
