"""What can be evaluated: reward models, single-response models, baselines, scores that are there already."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mr_reward.checkpoint.verify import check_there, weights_digest
from mr_reward.data.jsonl import read_json_lines
from mr_reward.errors import ConfigurationError, GroupError, NonFiniteScoreError, OverLengthError
from mr_reward.evaluation.evaluator import BenchmarkScorer
from mr_reward.groups import GroupScores, ResponseGroup
from mr_reward.messages.completions import Transcript
from mr_reward.model.rows import check_over_length, plan_batches
from mr_reward.model.scorer import GroupScorer
from mr_reward.scorers.opening import default_device, open_scorer, require_local, scored_by
from mr_reward.templates.chat import ChatTemplate, is_prefilled

_USUAL = {"max_tokens_per_batch": 16384, "num_orders": 1}  # of a reward model's options


class RewardModel:
    """A reward model of this package; `name` is that of its folder or hub id."""

    def __init__(self, scorer: GroupScorer, name: str) -> None:
        self._scorer = scorer
        digest, options = scored_by(scorer)
        # What is as usual goes unsaid, so that a file of an earlier version is resumed.
        told = [f" {key}={value}" for key, value in options.items() if value != _USUAL.get(key)]
        self.name = f"{name} {digest}{''.join(told)}"
        self.order_free = scorer.model.config.layout != "causal"
        self.score_detailed = scorer.score_detailed


class Alone:
    """Each response as a group of its own: what a single-response model does, and the price of it."""

    def __init__(self, scorer: BenchmarkScorer) -> None:
        self._scorer = scorer
        self.name = f"{scorer.name} alone"
        self.order_free = True

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As `GroupScorer.score_detailed`; a group of which one response is dropped is dropped."""
        singles = [group.select([i]) for group in groups for i in range(group.num_responses)]
        results = iter(self._scorer.score_detailed(singles))
        found = []
        for group in groups:
            own = [next(results) for _ in group.responses]
            dropped = next((result.drop_reason for result in own if result.scores is None), None)
            scores = None if dropped else tuple(result.scores[0] for result in own if result.scores is not None)
            truncated = tuple(result.truncated[0] for result in own)
            found.append(GroupScores(scores=scores, truncated=truncated, drop_reason=dropped))
        return found


def _whole(scores: Iterable[float]) -> GroupScores:
    """The result of a group of which nothing was cut off."""
    scores = tuple(scores)
    return GroupScores(scores=scores, truncated=(False,) * len(scores))


BASELINES: dict[str, Callable[[ResponseGroup, str], float]] = {
    "longest": lambda group, response: float(len(response)),
    "shortest": lambda group, response: -float(len(response)),
    "random": lambda group, response: random.Random(f"{group.id} {response}").random(),
    "constant": lambda group, response: 0.0,
}


class Baseline:
    """Scores that look at nothing but the length, or at nothing at all: one of `BASELINES`.

    `constant` shows what chance gives where equal scores share the credit.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.order_free = True
        self._score = BASELINES[name]

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As `GroupScorer.score_detailed`."""
        return [_whole(self._score(group, response) for response in group.responses) for group in groups]


class ScoresFile:
    """Scores from elsewhere: one line `{"uid": ..., "scores": [...]}` for each item, in its own order.

    The uids are those of `items.jsonl`.
    """

    def __init__(self, path: str | Path) -> None:
        self.order_free = True
        self.is_stored = True  # the evaluator shows it no other order
        self._scores: dict[str, list[float]] = {}
        for number, row in read_json_lines(path):
            uid, scores = (row.get(key) if isinstance(row, dict) else None for key in ("uid", "scores"))
            if not isinstance(uid, str) or not isinstance(scores, list) or not all(map(_is_number, scores)):
                raise GroupError(
                    f"{path}, line {number}: {row!r:.100}, expected a uid and finite scores; write one object a line"
                )
            self._scores[uid] = [float(score) for score in scores]
        content = json.dumps(self._scores, sort_keys=True).encode()
        self.name = f"scores of {path} {hashlib.blake2b(content, digest_size=8).hexdigest()}"

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As `GroupScorer.score_detailed`; an item that is not in the file is an error."""
        found = []
        for group in groups:
            scores = self._scores.get(str(group.id))
            if scores is None or len(scores) != group.num_responses:
                count = "no" if scores is None else len(scores)
                raise GroupError(
                    f"{group.name}: {count} scores in the file, expected {group.num_responses}; add the item's line"
                )
            found.append(_whole(scores))
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class ClassifierScorer:
    """Any reward model for text that transformers loads as a sequence classifier with one label.

    Each response stands alone behind the prompt, as the tokenizer's chat template writes them. Padding
    counts towards `max_tokens_per_batch`. Nothing is cut off: a group of which one response is longer than that or
    than the context is dropped or an error.
    """

    def __init__(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        max_tokens_per_batch: int = 16384,
        over_length: str = "error",
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        check_over_length(over_length)
        if over_length == "truncate_responses":
            raise ConfigurationError(
                f"classifier:{name}: got over_length='truncate_responses', but a sequence classifier reads whole "
                "responses; choose 'drop_group' or 'error'"
            )
        check_there(name)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        options = {} if dtype is None else {"dtype": dtype}
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, **options
        )
        if model.config.num_labels != 1:
            raise ConfigurationError(
                f"{name} has {model.config.num_labels} labels, expected a reward model with one; give another model"
            )
        if self._tokenizer.chat_template is None:
            raise ConfigurationError(f"{name} has no chat template, so prompts cannot be written; save one with it")
        self._chat = ChatTemplate(self._tokenizer, sees_images=False)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = model.to(device).eval()
        self._max_tokens, self._over_length = max_tokens_per_batch, over_length
        self._context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.name = f"{name} {weights_digest(model)}"
        self.order_free = True

    @torch.no_grad()
    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As `GroupScorer.score_detailed`, for text only."""
        encoded = [self._encode(group) for group in groups]
        too_long = [self._too_long(group, own) for group, own in zip(groups, encoded, strict=True)]
        rows = [ids for own, reason in zip(encoded, too_long, strict=True) if not reason for ids in own]
        scores: dict[int, float] = {}
        for batch in plan_batches([len(ids) for ids in rows], self._max_tokens):
            inputs = self._tokenizer.pad({"input_ids": [rows[i] for i in batch]}, return_tensors="pt")
            logits = self._model(**inputs.to(self._model.device)).logits[:, 0].float().tolist()
            scores.update(zip(batch, logits, strict=True))
        values = iter(scores[i] for i in range(len(rows)))
        found = []
        for group, reason in zip(groups, too_long, strict=True):
            if reason:
                found.append(GroupScores(scores=None, truncated=(False,) * group.num_responses, drop_reason=reason))
                continue
            own = tuple(next(values) for _ in range(group.num_responses))
            if not all(map(math.isfinite, own)):
                raise NonFiniteScoreError(f"{group.name}: scores {own} are not finite; check the model or its dtype")
            found.append(_whole(own))
        return found

    def _too_long(self, group: ResponseGroup, rows: list[list[int]]) -> str | None:
        longest, limit = max(map(len, rows)), min(self._max_tokens, self._context or self._max_tokens)
        if longest <= limit:
            return None
        context = "" if self._context is None else f" and a context of {self._context} positions"
        reason = f"prompt and a response of {longest} tokens do not fit {self._max_tokens} tokens{context}"
        if self._over_length == "error":
            raise OverLengthError(
                f"{group.name}: {reason}; raise max_tokens_per_batch or choose over_length='drop_group'"
            )
        return reason

    def _encode(self, group: ResponseGroup) -> list[list[int]]:
        if group.images or group.videos:
            raise GroupError(
                f"{group.name}: has images or videos, a sequence classifier reads text; take another model"
            )
        if any(isinstance(response, Transcript) for response in group.responses):
            raise GroupError(
                f"{group.name}: a response has tool calls or results, a sequence classifier reads one turn of text; "
                "take a reward model whose chat template shows them"
            )
        self._chat.check(group)
        options: dict[str, Any] = {"tools": list(group.tools)} if group.tools else {}
        *earlier, last = group.messages
        rows = []
        for response in group.responses:
            text = {"type": "text", "text": response}
            if is_prefilled(group.messages):  # the response continues it
                chat = [*earlier, {**last, "content": [*last["content"], text]}]
            else:
                chat = [*earlier, last, {"role": "assistant", "content": [text]}]
            turns = [self._chat.turn(turn) for turn in chat]
            rows.append(self._tokenizer.apply_chat_template(turns, return_dict=True, **options)["input_ids"])
        return rows


def load_scorer(
    spec: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_tokens_per_batch: int = 16384,
    over_length: str = "drop_group",
    alone: bool = False,
) -> BenchmarkScorer:
    """A scorer from its description.

    Args:
        spec: a name of `BASELINES`; `scores:FILE`; `classifier:FOLDER` for a sequence classifier; anything else is the
            folder or hub id of a reward model.
        device: where to run; None for this process's.
        dtype: of the weights; None for the checkpoint's.
        max_tokens_per_batch: of a forward pass.
        over_length: see `mr_reward.model.rows.Packer`; a classifier cuts nothing off.
        alone: score each response alone.

    Returns:
        The scorer.

    Raises:
        CheckpointError: the reward model cannot be loaded.
        ConfigurationError: the classifier does not fit, or an option does not go with the scorer.
        GroupError: the file of scores has a wrong line.

    Example:
        >>> load_scorer("longest", device="cpu").name
        'longest'
    """
    kind, _, place = spec.partition(":")
    options: dict[str, Any] = {"max_tokens_per_batch": max_tokens_per_batch, "over_length": over_length}
    scorer: BenchmarkScorer
    if spec in BASELINES:
        scorer = Baseline(spec)
    elif kind == "scores":
        if alone:
            raise ConfigurationError(
                f"{spec}: got alone=True (--alone), but these scores are made already; leave it out"
            )
        scorer = ScoresFile(place)
    elif kind == "classifier":
        scorer = ClassifierScorer(place, device=device or default_device(), dtype=dtype, **options)
    else:
        opened = open_scorer(spec, device=device, dtype=dtype, **options)
        scorer = RewardModel(require_local(opened, "an evaluation"), spec)
    return Alone(scorer) if alone else scorer
