"""Training of reward models and GRPO in one process without a trainer: the arithmetic of `RewardTrainer` and TRL.

For choosing between many arms on one core. A step of GRPO takes a tenth of the time that TRL takes for it, because
prompts are encoded and pictures are cut into patches once per world, and equal completions of a prompt are read once,
with the sum of their weights. What it leaves out: everything that does not change the arithmetic (logging, saving,
several processes), and the order of random numbers, which is another one. `benchmarks/policy_comparison.py` runs the
trainers themselves; docs/results.md has both side by side.

Legend: a group is (task, responses, ranks); G groups of N responses.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comparison_setups import SETUPS, options_of
from torch import Tensor
from transformers import AutoProcessor

from mr_reward import MultiResponseRewardModel
from mr_reward.groups import dense_ranks
from mr_reward.model.rows import build_row, collate
from mr_reward.templates.rendering import RenderedGroup, Renderer
from mr_reward.training.losses import get_loss
from mr_reward.worlds import handwriting
from mr_reward.worlds.named import WORLDS

Group = tuple[Any, list[str], list[int]]
RewardFunction = Callable[[Sequence[Any], Sequence[Sequence[str]]], list[list[float | None]]]

CLIP = 1.0  # the largest norm of a gradient, as in both trainers


class LeanWorld:
    """A world by its name: tasks, made-up groups, pictures in pieces."""

    def __init__(self, name: str) -> None:
        self.name, self.setup = name, SETUPS[name]
        self.options = options_of(name, self.setup)

    def tasks(self, split: str, count: int, seed: int) -> Sequence[Any]:
        """Questions of a split."""
        return WORLDS[self.name].make_tasks(split, count, seed=seed, **self.options)

    def made_up(self, split: str, count: int, size: int, seed: int) -> list[Group]:
        """Groups whose responses are made up, as the recipes train on."""
        tasks = self.tasks(split, count, seed)
        if self.name == "handwriting":  # as `make_groups`, without the pictures
            responses = handwriting.draw_responses(tasks, size, split=split, seed=seed)
        else:
            groups = WORLDS[self.name].make_groups(split, count, num_responses=size, seed=seed, **self.options)
            responses = [list(group.responses) for group in groups]
        return [(task, own, rank(task, own)) for task, own in zip(tasks, responses, strict=True)]

    def pieces(self, task: Any) -> Sequence[Any]:
        """Keys of the parts of the picture whose patches, one after the other, are those of the whole."""
        return task.scans if self.name == "handwriting" else [task.path]

    def piece(self, task: Any, index: int) -> Any:
        """One of these parts."""
        return task.frames()[index] if self.name == "handwriting" else task.image()


def rank(task: Any, responses: Sequence[str]) -> list[int]:
    """Ranks by the true quality."""
    return list(dense_ranks([-task.grade(response) for response in responses]))


class Reader:
    """Prompts and pictures of a world as tensors, each made once, for a tiny Qwen3-VL."""

    def __init__(self, world: Any, processor_folder: Any) -> None:
        self.world = world
        self.processor = AutoProcessor.from_pretrained(processor_folder)
        self.tokenizer = self.processor.tokenizer
        self.renderer: Renderer | None = None
        keep = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        # A policy that writes the placeholder of a picture cannot be read again: its picture is missing.
        self.forbidden = [
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special and i not in keep
        ]
        self.responses: dict[str, list[int]] = {}
        self.prompts: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
        self.patches: dict[Any, Tensor] = {}

    def prompt(self, task: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, token types, grid of the picture."""
        found = self.prompts.get(task.text)
        if found is None:
            blocks = [{"type": "image", "image": task.image()}, {"type": "text", "text": task.text}]
            encoded = self.processor.apply_chat_template(
                [[{"role": "user", "content": blocks}]],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
            if not torch.equal(encoded["pixel_values"], self.pixels([task])):
                raise AssertionError("the pieces of the picture are not its patches")
            found = (encoded["input_ids"][0], encoded["mm_token_type_ids"][0].long(), encoded["image_grid_thw"])
            self.prompts[task.text] = found
        return found

    def pixels(self, tasks: Sequence[Any]) -> Tensor:
        """Patches of the pictures, one below the other."""
        result = []
        for task in tasks:
            for i, key in enumerate(self.world.pieces(task)):
                if key not in self.patches:
                    image = self.world.piece(task, i)
                    self.patches[key] = self.processor.image_processor([image], return_tensors="pt")["pixel_values"]
                result.append(self.patches[key])
        return torch.cat(result)

    def batch(self, tasks: Sequence[Any]) -> dict[str, Tensor]:
        """Prompts padded on the left, as a policy reads them."""
        prompts = [self.prompt(task) for task in tasks]
        length = max(len(ids) for ids, _, _ in prompts)
        ids = torch.full((len(tasks), length), self.tokenizer.pad_token_id)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (own, kinds, _) in enumerate(prompts):
            ids[i, length - len(own) :], types[i, length - len(own) :] = own, kinds
            mask[i, length - len(own) :] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": types,
            "pixel_values": self.pixels(tasks),
            "image_grid_thw": torch.cat([grid for _, _, grid in prompts]),
        }

    def rows(self, model: MultiResponseRewardModel, groups: Sequence[tuple[Any, Sequence[str]]]) -> Any:
        """Groups as a batch of packed rows."""
        if self.renderer is None:
            self.renderer = Renderer(self.processor, adapter=model.adapter)
        rows = []
        for task, responses in groups:
            for text in responses:
                if text not in self.responses:
                    self.responses[text] = self.renderer.encode_text(text)
            ids, types, grid = self.prompt(task)
            rendered = RenderedGroup(
                prompt_ids=ids,
                response_ids=[self.responses[text] for text in responses],
                media={"pixel_values": self.pixels([task]), "image_grid_thw": grid},
                mm_token_type_ids=types,
            )
            rows.append(build_row(rendered, model.config.layout))
        return collate(rows, model.adapter)


# ------------------------------------------------------------------------------------------------------ the policy


@torch.inference_mode()
def generate(
    reader: Reader, policy: Any, tasks: Sequence[Any], count: int = 1, *, sample: bool = True
) -> tuple[list[list[tuple[int, ...]]], list[list[str]]]:
    """N completions of each task, as token ids (with the end token if it came) and as texts."""
    policy.eval()
    options: dict[str, Any] = {"do_sample": sample}
    if sample:
        options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    batch = reader.batch(tasks)
    options |= {
        "max_new_tokens": WORLDS[reader.world.name].answer_tokens,
        "num_return_sequences": count,
        "suppress_tokens": reader.forbidden,
    }
    tokens = policy.generate(**batch, **options)
    end = reader.tokenizer.eos_token_id
    completions = []
    for ids in tokens[:, batch["input_ids"].shape[1] :].tolist():
        completions.append(tuple(ids[: ids.index(end) + 1] if end in ids else ids))
    texts = reader.tokenizer.batch_decode([list(ids) for ids in completions], skip_special_tokens=True)
    places = range(0, len(completions), count)
    return [completions[i : i + count] for i in places], [texts[i : i + count] for i in places]


def sample_texts(reader: Reader, policy: Any, tasks: Sequence[Any], count: int, batch: int = 256) -> list[list[str]]:
    """N texts of each task at temperature 1."""
    texts: list[list[str]] = []
    for start in range(0, len(tasks), batch):
        texts += generate(reader, policy, tasks[start : start + batch], count)[1]
    return texts


def greedy_answers(reader: Reader, policy: Any, tasks: Sequence[Any], batch: int = 256) -> list[str]:
    """A greedy answer to each task."""
    answers: list[str] = []
    for start in range(0, len(tasks), batch):
        answers += [text for (text,) in generate(reader, policy, tasks[start : start + batch], sample=False)[1]]
    return answers


def share_right(tasks: Sequence[Any], answers: Sequence[str]) -> float:
    """Share of right answers."""
    return statistics.fmean(task.is_correct(answer) for task, answer in zip(tasks, answers, strict=True))


def greedy_accuracy(reader: Reader, policy: Any, tasks: Sequence[Any]) -> float:
    """Share of right greedy answers."""
    return share_right(tasks, greedy_answers(reader, policy, tasks))


def log_probabilities(
    reader: Reader, policy: Any, tasks: Sequence[Any], completions: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Of each token of each completion, (M, T), and a mask of the same shape."""
    batch = reader.batch(tasks)
    length = max(map(len, completions))
    ids = torch.full((len(completions), length), reader.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, completion in enumerate(completions):
        ids[i, : len(completion)], mask[i, : len(completion)] = torch.tensor(completion), 1
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], mask], 1)
    batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    logits = policy(**batch, logits_to_keep=length + 1).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0], mask.float()


# ------------------------------------------------------------------------------------------------ the reward model


@dataclass(frozen=True)
class Fit:
    """How a reward model is trained; the defaults are those of grpo_recipes/rm_tiny_handwriting_cpu.yaml."""

    loss: str = "best_of_n"
    rate: float = 6e-4
    warmup: int = 20
    batch: int = 32
    epochs: int = 1
    beta2: float = 0.999
    average: float = 0.0  # share of the last steps whose weights are averaged


def train_reward_model(
    reader: Reader, model: Any, groups: Sequence[Group], fit: Fit, seed: int
) -> dict[str, list[float]]:
    """Epochs over the groups, in random order, with the responses in random order; loss and gradient by step."""
    rng = random.Random(seed)
    order = [i for _ in range(fit.epochs) for i in rng.sample(range(len(groups)), len(groups))]
    loss_function = get_loss(fit.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.rate, betas=(0.9, fit.beta2), weight_decay=0.0)
    steps = len(order) // fit.batch
    log: dict[str, list[float]] = {"loss": [], "gradient": []}
    averaged: dict[str, Tensor] = {}
    model.train()
    for step in range(steps):
        factor = min(1.0, step / max(1, fit.warmup))
        if step >= fit.warmup:
            factor = 0.5 * (1 + math.cos(math.pi * (step - fit.warmup) / max(1, steps - fit.warmup)))
        for part in optimizer.param_groups:
            part["lr"] = fit.rate * factor
        chosen, ranks = [], []
        for i in order[step * fit.batch : (step + 1) * fit.batch]:
            task, responses, own = groups[i]
            places = rng.sample(range(len(responses)), len(responses))
            chosen.append((task, [responses[place] for place in places]))
            ranks.append([own[place] for place in places])
        rows = reader.rows(model, chosen)
        rankings = torch.zeros_like(rows.response_mask, dtype=torch.long)
        for i, own in enumerate(ranks):
            rankings[i, : len(own)] = torch.tensor(own)
        loss = loss_function(model(rows).scores, rankings, rows.response_mask)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        log["loss"].append(round(loss.item(), 4))
        log["gradient"].append(round(norm.item(), 3))
        if fit.average and step >= steps * (1 - fit.average):
            count = step - math.ceil(steps * (1 - fit.average)) + 1
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    averaged.setdefault(name, value.clone()).lerp_(value, 1 / count)
    if averaged:
        model.load_state_dict(averaged, strict=False)
    model.eval()
    return log


@torch.inference_mode()
def score(reader: Reader, model: Any, tasks: Sequence[Any], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """Scores of each group's responses; equal texts of a group are read once, as `MultiResponseReward` does."""
    result = []
    for start in range(0, len(tasks), 64):
        part = list(zip(tasks[start : start + 64], responses[start : start + 64], strict=True))
        distinct = [list(dict.fromkeys(texts)) for _, texts in part]
        rows = reader.rows(model, [(task, texts) for (task, _), texts in zip(part, distinct, strict=True)])
        for (_, texts), own, scores in zip(part, distinct, model(rows).scores.tolist(), strict=True):
            found = dict(zip(own, scores, strict=False))
            result.append([found[text] for text in texts])
    return result


def ranked(tasks: Sequence[Any], texts: Sequence[Sequence[str]], flip: float = 0.0, rng: Any = None) -> list[Group]:
    """Rollouts as training groups: equal texts once, ranked by the truth; groups in which all tie are left out.

    `flip` is the chance that a response's quality is judged as that of another one of the group.
    """
    groups = []
    for task, own in zip(tasks, texts, strict=True):
        distinct = list(dict.fromkeys(own))
        qualities = [task.grade(text) for text in distinct]
        if flip:
            qualities = [rng.choice(qualities) if rng.random() < flip else quality for quality in qualities]
        ranks = dense_ranks([-quality for quality in qualities])
        if len(set(ranks)) > 1:
            groups.append((task, distinct, list(ranks)))
    return groups


def measure(reader: Reader, model: Any, groups: Sequence[Group]) -> dict[str, float]:
    """Best of N, pairwise accuracy, right above wrong: means over groups, equal scores count a half."""
    best, pairs, right_wrong = [], [], []
    scores = score(reader, model, [group[0] for group in groups], [group[1] for group in groups])
    for (task, texts, ranks), own in zip(groups, scores, strict=True):
        top = [i for i, value in enumerate(own) if value == max(own)]
        best.append(statistics.fmean(ranks[i] == 1 for i in top))
        right = [task.is_correct(text) for text in texts]
        places = range(len(texts))
        won = {(i, j): (own[i] > own[j]) + 0.5 * (own[i] == own[j]) for i in places for j in places}
        ordered = [won[i, j] for i in places for j in places if ranks[i] < ranks[j]]
        truth = [won[i, j] for i in places for j in places if right[i] and not right[j]]
        pairs += [statistics.fmean(ordered)] if ordered else []
        right_wrong += [statistics.fmean(truth)] if truth else []
    return {
        "best_of_n": round(statistics.fmean(best), 4),
        "pairwise": round(statistics.fmean(pairs), 4),
        "right_above_wrong": round(statistics.fmean(right_wrong), 4) if right_wrong else math.nan,
        "groups": len(groups),
    }


# -------------------------------------------------------------------------------------------------------------- GRPO


@dataclass(frozen=True)
class Run:
    """A GRPO run; the defaults are those of benchmarks/policy_comparison.py."""

    steps: int = 200
    rate: float = 3e-4
    schedule: str = "linear"  # or constant
    warmup: int = 5
    prompts: int = 16
    count: int = 8
    beta: float = 0.0
    average: float = 0.97  # decay of the average of the weights
    eval_steps: int = 20


def grpo(
    reader: Reader,
    policy: Any,
    reward: RewardFunction,
    run: Run,
    seed: int,
    validation: Sequence[Any],
    judge: Any = None,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train the policy; returns a log at each evaluation, and the average of the weights.

    A reward of None has no advantage, as in TRL. With a judge the log tells what it makes of the greedy answers to the
    validation tasks, each in one group with the answer of the policy before training.
    """
    torch.manual_seed(seed + 100)
    world = reader.world
    reference = copy.deepcopy(policy).eval() if run.beta else None
    averaged = {name: value.detach().clone() for name, value in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.rate, weight_decay=0.0)
    tasks = world.tasks("train", 4096, seed)
    order = random.Random(seed).sample(range(len(tasks)), len(tasks))
    first = greedy_answers(reader, policy, validation)

    def evaluate(step: int, answers: Sequence[str]) -> dict[str, float]:
        entry = {"step": step, "truth": share_right(validation, answers)}
        if judge is not None:
            scores = score(reader, judge, validation, [list(pair) for pair in zip(answers, first, strict=True)])
            entry["win_rate"] = statistics.fmean((own > other) + 0.5 * (own == other) for own, other in scores)
            entry["score_mean"] = statistics.fmean(own for own, _ in scores)
        return entry

    log = [evaluate(0, first)]
    rollouts: list[float] = []
    for step in range(run.steps):
        factor = min(1.0, step / run.warmup)
        if run.schedule == "linear" and step >= run.warmup:
            factor = (run.steps - step) / (run.steps - run.warmup)
        for part in optimizer.param_groups:
            part["lr"] = run.rate * factor
        chosen = [tasks[order[(step * run.prompts + j) % len(order)]] for j in range(run.prompts)]
        completions, texts = generate(reader, policy, chosen, run.count)
        gains = [advantages(rewards) for rewards in reward(chosen, texts)]
        rollouts += [task.is_correct(text) for task, own in zip(chosen, texts, strict=True) for text in own]
        policy.train()
        loss = policy_loss(reader, policy, chosen, completions, gains, reference, run.beta)
        if loss is not None:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
            optimizer.step()
        for name, value in policy.state_dict().items():
            if value.is_floating_point():
                averaged[name].lerp_(value, 1 - min(run.average, (1 + step) / (10 + step)))
        if (step + 1) % run.eval_steps == 0:
            entry = evaluate(step + 1, greedy_answers(reader, policy, validation))
            log.append(entry | {"rollouts": round(statistics.fmean(rollouts), 4)})
            rollouts = []
    return log, averaged


def policy_loss(
    reader: Reader,
    policy: Any,
    tasks: Sequence[Any],
    completions: Sequence[Sequence[tuple[int, ...]]],
    advantages: Sequence[Sequence[float]],
    reference: Any = None,
    beta: float = 0.0,
) -> Tensor | None:
    """TRL's loss `dapo` for fresh rollouts, with its KL term where beta is not 0; None where no token counts.

    Equal completions of a task share one pass: their advantages are added up.
    """
    total = sum(len(ids) for own in completions for ids in own)
    weights: dict[tuple[int, tuple[int, ...]], list[float]] = {}
    for i, own in enumerate(completions):
        for ids, advantage in zip(own, advantages[i], strict=True):
            entry = weights.setdefault((i, ids), [0.0, 0.0])
            entry[0] += advantage
            entry[1] += 1
    keys = [key for key, (weight, _) in weights.items() if beta or abs(weight) > 1e-9]
    if not keys:
        return None
    asked, written = [tasks[i] for i, _ in keys], [ids for _, ids in keys]
    found, mask = log_probabilities(reader, policy, asked, written)
    loss = -(torch.tensor([weights[key][0] for key in keys])[:, None] * found * mask).sum() / total
    if beta:
        with torch.no_grad():
            gap = log_probabilities(reader, reference, asked, written)[0]
        gap = gap - found
        counts = torch.tensor([weights[key][1] for key in keys])[:, None]
        ratio = (found - found.detach()).exp()  # 1, with the gradient that TRL's unbiased KL has
        loss = loss + beta * (counts * (gap.exp() - gap - 1) * ratio * mask).sum() / total
    return loss


def advantages(rewards: Sequence[float | None]) -> list[float]:
    """Standardised within the group; None gets 0."""
    known = torch.tensor([value for value in rewards if value is not None])
    if len(known) < 2:
        return [0.0] * len(rewards)
    values = ((known - known.mean()) / (known.std() + 1e-4)).tolist()
    found = iter(values)
    return [0.0 if value is None else next(found) for value in rewards]
