"""What a reward model is trained on: sets in their shares, each text of a group once, best against the rest."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import reward_model

from mr_reward import ResponseGroup
from mr_reward.groups import dense_ranks
from mr_reward.model.rows import Packer
from mr_reward.training.batches import GroupCollator, check_groups
from mr_reward.training.losses import LOSSES
from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments


def arguments(folder: Path, **options: Any) -> RewardTrainingArguments:
    usual = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return RewardTrainingArguments(str(folder), logging_steps=1, per_device_train_batch_size=4, **usual, **options)


def graded(count: int, seed: int, name: str = "g") -> list[ResponseGroup]:
    """Four grades, ties among them, and several best ones at times."""
    rng = random.Random(seed)
    groups = []
    for i in range(count):
        ranks = [1, *(rng.randint(1, 4) for _ in range(3)), 4]
        texts = [f"{name} {i} {k} {rank}" for k, rank in enumerate(ranks)]
        groups.append(ResponseGroup(prompt=f"{name} {i}?", responses=texts, rankings=dense_ranks(ranks), id=f"{i}"))
    return groups


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [{}, {"max_responses": 3}, {"degenerate_negatives": 0.5}], ids=str)
def test_binary_labels_train_as_if_the_file_said_so(loss: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The same losses and weights, to the bit; with graded labels others."""
    groups = graded(24, 0)
    said = [
        ResponseGroup(
            prompt=group.prompt,
            responses=group.responses,
            rankings=[1 if rank == 1 else 2 for rank in group.rankings or ()],
            id=group.id,
        )
        for group in groups
    ]
    logs, weights = [], []
    for data, binary in ((groups, True), (said, False), (said, True), (groups, False)):
        torch.manual_seed(0)
        trainer = RewardTrainer(
            reward_model("llama", fresh=True),
            arguments(tmp_path, loss=loss, binary_labels=binary, max_steps=3, learning_rate=1e-3, **options),
            data,
            graded(4, 1),
        )
        assert trainer.eval_dataset.groups[0].rankings == graded(4, 1)[0].rankings, "evaluation keeps its grades"
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(trainer.model.head.dense.weight.detach().clone())
    assert logs[0] == logs[1] == logs[2] and torch.equal(weights[0], weights[1])
    alike = loss == "best_of_n" and "max_responses" not in options  # its target asks for the best alone
    assert (logs[0] == logs[3]) is alike


@pytest.mark.parametrize("seed", range(5))
def test_a_text_that_a_group_holds_twice_counts_once(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    packer = Packer.of(reward_model("llama", fresh=True), max_tokens=4096)
    once, again, repeats = [], [], 0
    for group in graded(8, seed):
        extra = [rng.randrange(group.num_responses) for _ in range(rng.randint(0, 4))]
        ranks: Any = group.rankings
        once.append(group)
        order = [*range(group.num_responses), *extra]
        texts, ranked = ([given[i] for i in order] for given in (group.responses, ranks))
        again.append(ResponseGroup(prompt=group.prompt, responses=texts, rankings=ranked))
        repeats += len(extra)
    with caplog.at_level(logging.WARNING):
        kept = check_groups(again, packer, "rollouts", same_text_once=True, show_progress=False)
    assert f"rollouts: left out {repeats} responses" in caplog.text
    expected = check_groups(once, packer, "plain", same_text_once=True, show_progress=False)
    for (found, tokens), (plain, length) in zip(kept, expected, strict=True):
        assert (found.responses, found.rankings, tokens) == (plain.responses, plain.rankings, length)
    assert "plain: left out" not in caplog.text
    collated = [GroupCollator(packer)([group for group, _ in groups])["rankings"] for groups in (kept, expected)]
    assert torch.equal(*collated)
    evaluated = check_groups(again, packer, "evaluation", training=False, show_progress=False)
    assert [group.num_responses for group, _ in evaluated] == [group.num_responses for group in again]


def test_ranks_of_one_text_that_differ_are_averaged(caplog: pytest.LogCaptureFixture) -> None:
    packer = Packer.of(reward_model("llama", fresh=True), max_tokens=4096)

    def group(texts: str, ranks: list[int]) -> ResponseGroup:
        return ResponseGroup(prompt="?", responses=list(texts), rankings=ranks, ratings=[float(-r) for r in ranks])

    (found, _), *rest = check_groups(
        [group("abac", [1, 2, 3, 4])], packer, "people", same_text_once=True, show_progress=False
    )
    assert not rest and found.responses == ("a", "b", "c") and found.rankings == (1, 1, 2)
    once = [group("abac", [1, 2, 3, 4]), group("aabc", [1, 2, 1, 3])]
    binary = check_groups(once, packer, "people", same_text_once=True, binary_labels=True, show_progress=False)
    assert [found.rankings for found, _ in binary] == [(1, 1, 2), (2, 1, 2)], "of the means, and no third grade"
    mixed = [group("aab", [1, 3, 2]), group("aa", [1, 2]), group("ab", [1, 2])]
    with caplog.at_level(logging.WARNING):
        kept = check_groups(mixed, packer, "people", same_text_once=True, show_progress=False)
    plain = check_groups(mixed, packer, "people", show_progress=False)
    assert [found for found, _ in plain] == mixed, "a run that was begun before resumes on the same rows"
    assert len(kept) == 1 and "dropped 2 of 3 groups, all their responses are tied" in caplog.text


def test_the_shares_of_a_mixture_are_logged_and_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A third of the groups of an epoch are rollouts, whatever the sizes of the files."""
    sets = {"made up": graded(40, 0, "made"), "rollouts": graded(6, 1, "rollout")}
    for options, shares in (
        ({"mixture_weights": [2.0, 1.0]}, {"made up": 2 / 3, "rollouts": 1 / 3}),
        ({}, {"made up": 40 / 46, "rollouts": 6 / 46}),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="mr_reward"):
            trainer = RewardTrainer(reward_model("llama", fresh=True), arguments(tmp_path, **options), sets)
        data = trainer.train_dataset
        assert trainer.shares == pytest.approx(shares, abs=0.01)
        counted = Counter(item.prompt[0]["content"][0]["text"].split()[0] for item in data)
        assert counted["rollout"] / len(data) == pytest.approx(trainer.shares["rollouts"])
        told = ", ".join(f"{name} {share:.1%}" for name, share in trainer.shares.items())
        assert f"an epoch has {len(data)} groups: {told}" in caplog.text
