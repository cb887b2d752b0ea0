"""Ranking evaluation, baselines, the truth of the handwriting world, and the figures."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mr_reward import ResponseGroup
from mr_reward.errors import GroupError
from mr_reward.evaluation.evaluator import evaluate_groups
from mr_reward.evaluation.plots import plot_curves, plot_scored_groups
from mr_reward.groups import GroupScores
from mr_reward.worlds.handwriting import make_groups, make_tasks
from mr_reward.worlds.tiny import build_qwen3_vl, build_qwen3_vl_processor
from mr_reward.worlds.world_policy import handwriting_accuracy, policy_answers


class FakeScorer:
    """Scores by a rule, so that every metric is known."""

    def __init__(self, by_position: bool = False, drop: str | None = None) -> None:
        self.by_position = by_position
        self.drop = drop

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        found: list[list[float] | None] = [
            [-float(slot) for slot in range(group.num_responses)]
            if self.by_position
            else (None if self.drop in group.responses else [float(response) for response in group.responses])
            for group in groups
        ]
        return [
            GroupScores(scores=None if scores is None else tuple(scores), truncated=(False,) * group.num_responses)
            for group, scores in zip(groups, found, strict=True)
        ]


def numbered_groups(count: int, num_responses: int) -> list[ResponseGroup]:
    """Responses are numbers; the larger is the better."""
    generator = random.Random(0)
    groups = []
    for _ in range(count):
        numbers = generator.sample(range(1000), num_responses)
        ranks = [1 + sum(other > number for other in numbers) for number in numbers]
        groups.append(ResponseGroup(prompt="?", responses=list(map(str, numbers)), rankings=ranks))
    return groups


def test_a_perfect_scorer_is_perfect_and_never_flips() -> None:
    metrics = evaluate_groups(FakeScorer(), numbered_groups(50, 5))
    for key in ("best_of_n_accuracy", "pairwise_accuracy", "kendall_tau_b", "ndcg"):
        assert metrics[key] == pytest.approx(1.0)
    assert metrics["order_flip_rate"] == 0
    assert metrics["num_groups"] == 50
    assert metrics["dropped_groups"] == 0


def test_a_scorer_that_likes_the_first_place_is_at_chance_and_flips() -> None:
    metrics = evaluate_groups(FakeScorer(by_position=True), numbered_groups(400, 4))
    # 400 groups: three standard errors are 0.065
    assert metrics["best_of_n_accuracy"] == pytest.approx(0.25, abs=0.065)
    assert metrics["order_flip_rate"] == pytest.approx(0.75, abs=0.065)


def test_the_second_order_follows_the_seed() -> None:
    groups = numbered_groups(60, 3)
    rates = [
        evaluate_groups(FakeScorer(by_position=True), groups, seed=seed)["order_flip_rate"] for seed in (0, 0, 1, 2)
    ]
    assert rates[0] == rates[1] and len(set(rates)) > 1


def test_dropped_groups_are_counted_and_unranked_ones_refused() -> None:
    groups = numbered_groups(10, 3)
    metrics = evaluate_groups(FakeScorer(drop=groups[4].responses[0]), groups)
    assert metrics["num_groups"] + metrics["dropped_groups"] == 10
    assert metrics["dropped_groups"] >= 1
    with pytest.raises(GroupError, match="no rankings"):
        evaluate_groups(FakeScorer(), [ResponseGroup(prompt="?", responses=["1"], id="x")])
    only = [groups[4]]
    with pytest.raises(GroupError, match="dropped"):
        evaluate_groups(FakeScorer(drop=groups[4].responses[0]), only)


def test_the_truth_as_a_reward_function() -> None:
    tasks = make_tasks("test", 3, seed=0)
    answers = [tasks[0].answer, "0" + tasks[1].answer, [{"role": "assistant", "content": tasks[2].answer}]]
    rewards = handwriting_accuracy(
        answers, [task.question for task in tasks], [task.digits for task in tasks], extra=1
    )
    assert rewards == [1.0, 0.0, 1.0]
    turns = [{"role": "assistant", "content": content} for content in ("0", tasks[0].answer)]
    for completion, reward in ((turns, 1.0), (turns[::-1], 0.0)):  # the last turn is the answer
        assert handwriting_accuracy([completion], [tasks[0].question], [tasks[0].digits]) == [reward]


def test_answers_do_not_depend_on_the_batch() -> None:
    """Prompts of different lengths are padded on the left; greedy answers stay the same."""
    model, processor = build_qwen3_vl(0, hidden_size=64, num_layers=2), build_qwen3_vl_processor()
    tasks = make_tasks("test", 4, questions=["read", "even"], seed=0)
    assert len({task.question for task in tasks}) == 2
    for training in (False, True):
        together = policy_answers(model.train(training), processor, tasks, max_new_tokens=4, show_progress=False)
        assert model.training is training, "the model is left as it was"
    alone = policy_answers(model, processor, tasks, batch_size=1, max_new_tokens=4, show_progress=False)
    assert together == alone


def test_figures_are_written_and_show_something(tmp_path: Path) -> None:
    groups = make_groups("test", 4)
    plot_scored_groups(groups, [[0.5, -1.0, 2.0, 2.0]] * 4, tmp_path / "groups.png")
    plot_curves({"a": {"x": ([1, 2, 3], [0.1, 0.5, 0.2])}, "b": {"y": ([1], [1.0])}}, tmp_path / "curves.png")
    for name in ("groups.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            assert len(image.convert("L").getcolors()) > 10  # grey levels in use
