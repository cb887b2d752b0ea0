"""`Truth`: how the scores of a run agree with a verifier, beside TRL's own table of rewards."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reward_worker
from tiny_runs import SHORT_RUN, handwriting_rows, save_policy_that_sees
from trl import GRPOConfig, GRPOTrainer

import mr_reward.grpo.reward as reward_module
from mr_reward import MultiResponseReward, MultiResponseRewardModel
from mr_reward.errors import ConfigurationError
from mr_reward.grpo import Truth
from mr_reward.runs.callbacks import WarningSigns, plot_run

KEY = "mr_reward/right_above_wrong"


def naive(scores: list[float | None], truths: list[float | None], size: int) -> float:
    """Over groups of so many rows."""
    shares = []
    for start in range(0, len(scores), size):
        rows = [(scores[i], truths[i]) for i in range(start, start + size)]
        known = [(s, t) for s, t in rows if s is not None and t is not None and not math.isnan(t)]
        best = max((t for _, t in known), default=0.0)
        pairs = [(a > b) + 0.5 * (a == b) for a, right in known for b, t in known if right == best and t < best]
        shares += [sum(pairs) / len(pairs)] if pairs else []
    return sum(shares) / len(shares) if shares else math.nan


@pytest.mark.parametrize("seed", range(8))
def test_the_metric_is_that_of_a_naive_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups that were dropped, rows without a truth, equal scores, and groups where all are right."""
    rng = random.Random(seed)
    size, count = rng.choice([2, 3, 4, 8]), 24
    texts = [f"{rng.randrange(4)} {i}" for i in range(size * count)]
    for _ in range(3):
        texts[rng.randrange(len(texts))] = "drop"

    class ByFirst(reward_worker.WholeGroupScorer):
        def _score(self, group: Any) -> Any:
            found = super()._score(group)
            scores = None if found.scores is None else tuple(float(text[0]) for text in group.responses)
            return replace(found, scores=scores)

    monkeypatch.setattr(reward_module, "open_scorer", lambda model, **options: ByFirst())
    truths: list[float | None] = [rng.choice([0.0, 1.0, 1.0, 0.5, None, math.nan]) for _ in texts]
    reward = MultiResponseReward("fake", size, reward="raw")
    prompts = [f"p{i // size}" for i in range(len(texts))]
    metrics: dict[str, float] = {}
    scores = reward(prompts, texts, log_metric=metrics.__setitem__)
    assert KEY not in metrics and None in scores
    given = Truth(lambda **_: truths, reward)(prompts=prompts, completions=texts, log_metric=metrics.__setitem__)
    assert given is not None and repr(given) == repr(truths)
    assert metrics[KEY] == pytest.approx(naive(scores, truths, size), nan_ok=True) and 0 <= metrics[KEY] <= 1
    Truth(lambda **_: [1] * len(texts), reward)(prompts=prompts, completions=texts, log_metric=metrics.__setitem__)
    assert math.isnan(metrics[KEY]), "where all are right there is nothing to say"


def test_what_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_module, "open_scorer", lambda model, **options: reward_worker.WholeGroupScorer())
    reward = MultiResponseReward("fake", 2)

    async def later(**_: Any) -> list[float]:
        return [1.0]

    with pytest.raises(ConfigurationError, match="asynchronous"):
        Truth(later, reward)
    truth = Truth(lambda **_: [1.0, 0.0], reward)
    with pytest.raises(ConfigurationError, match="behind the reward model in reward_funcs"):
        truth(prompts=["p"] * 2, completions=["a", "b"], log_metric=print)
    assert truth(prompts=["p"] * 2, completions=["a", "b"]) == [1.0, 0.0], (
        "without a trainer's log nothing is compared"
    )


def odd_length(completions: list[Any], **_: Any) -> list[float]:
    """Whether an answer has an odd number of characters: what a random policy gets right now and then."""
    return [float(len(completion[-1]["content"]) % 2) for completion in completions]


def test_in_a_real_run_it_agrees_with_the_table_of_trl(tmp_path: Path) -> None:
    save_policy_that_sees(tmp_path / "policy")
    MultiResponseRewardModel.from_backbone(tmp_path / "policy").save_pretrained(tmp_path / "rm")
    reward = MultiResponseReward(tmp_path / "rm", num_generations=4, reward="raw")
    rows = handwriting_rows("train", 8)
    trainer = GRPOTrainer(
        model=str(tmp_path / "policy"),
        reward_funcs=[reward, Truth(odd_length, reward)],
        args=GRPOConfig(
            str(tmp_path / "out"),
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            max_steps=2,
            save_strategy="no",
            reward_weights=[1.0, 0.0],
            **SHORT_RUN,
        ),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if KEY in entry]
    assert len(steps) == 2 and "rewards/odd_length/mean" in steps[0]
    table = trainer._logs["rewards"]  # of the last step, all ranks
    expected = naive(list(table["multi_response_reward"]), list(table["odd_length"]), 4)
    assert 0 <= expected <= 1 and steps[-1][KEY] == pytest.approx(expected)
    assert f"eval_{KEY}" in trainer.evaluate()


def test_a_panel_shows_it_and_a_limit_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("mr_reward.runs.callbacks.plot_curves", lambda panels, *_, **__: drawn.append(panels))
    assert plot_run([{"step": step, KEY: 0.9 - step / 10} for step in range(3)], tmp_path / "training.png")
    (panels,) = drawn
    steps, values = panels["right scored above wrong"]["right_above_wrong"]
    assert steps == (0, 1, 2) and values == pytest.approx((0.9, 0.8, 0.7))
    for limit, told in ((0.0, 0), (0.75, 1)):
        signs = WarningSigns(window=2, right_above_wrong=limit)
        texts = [text for value in (0.9, 0.9, 0.7, 0.7, math.nan) for text in signs.update({KEY: value})]
        assert len(texts) == told
    assert "only 70% of the pairs (limit 75%)" in texts[0]
