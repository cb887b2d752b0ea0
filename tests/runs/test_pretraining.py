"""What the recipe of a reward model says of itself."""

from __future__ import annotations

import hashlib
import json
import logging
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from mr_reward import ResponseGroup
from mr_reward.data import save_preferences
from mr_reward.errors import ConfigurationError
from mr_reward.runs.pretraining import load_sets, training_data, without_evaluation
from mr_reward.training import RewardTrainingArguments
from mr_reward.worlds.world_pretraining import WorldRewardArguments


def test_a_card_says_what_was_trained_on_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files by their content; two of one name are two sets."""
    monkeypatch.chdir(tmp_path)
    for folder, count in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        row = json.dumps({"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2]}) + "\n"
        (tmp_path / folder / "train.jsonl").write_text(row * count)
    arguments = WorldRewardArguments(train_file=["a/train.jsonl", "b/train.jsonl", "handwriting"], num_train_groups=4)
    args = RewardTrainingArguments("out", loss="plackett_luce", seed=7, learning_rate=1e-4, use_cpu=True)
    shares = {"train": 0.125, "b/train.jsonl": 0.25, "handwriting": 0.625}
    rows = training_data(arguments, args, load_sets(arguments, seed=7), shares)
    assert [row["share"] for row in rows] == ["12.5%", "25.0%", "62.5%"]
    assert [(row["name"], row["groups"]) for row in rows] == [("train", 2), ("b/train.jsonl", 3), ("handwriting", 4)]
    digests = [hashlib.sha256((tmp_path / name / "train.jsonl").read_bytes()).hexdigest() for name in "ab"]
    assert [row["SHA-256"] for row in rows] == [*digests, None]
    assert all(row["loss"] == "plackett_luce" and row["seed"] == 7 and row["learning_rate"] == 1e-4 for row in rows)
    assert f"torch {version('torch')}" in rows[0]["made with"]


def test_groups_of_evaluation_prompts_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of rollouts too, whose answers are others: the same text, or the same picture, whatever is asked about it."""
    red, blue = (Image.effect_noise((64, 64), sigma).convert("RGB") for sigma in (60, 90))

    def group(prompt: str, answers: str, *images: Image.Image) -> ResponseGroup:
        return ResponseGroup(prompt=prompt, responses=list(answers), rankings=[1, 2], images=images)

    train = {
        "made": [group("2 + 2?", "45"), group("Which colour?", "ab", red), group("3 + 3?", "67")],
        "rollouts": [group("What is it?", "cd", red), group("What is it?", "cd", blue)],
    }
    for name, groups in train.items():
        save_preferences(groups, tmp_path / f"{name}.jsonl")
    save_preferences([group("2 +  2?", "89"), group("What is it?", "ef", red)], tmp_path / "eval.jsonl")
    files = [str(tmp_path / f"{name}.jsonl") for name in train]
    arguments = WorldRewardArguments(train_file=files, eval_file=[str(tmp_path / "eval.jsonl")], decontaminate=True)
    sets, evaluation = load_sets(arguments), load_sets(arguments, evaluation=True)
    with caplog.at_level(logging.WARNING):
        found = without_evaluation(sets, evaluation)
    kept = {name: [one.messages[0]["content"][-1]["text"] for one in groups] for name, groups in found.items()}
    assert kept == {"made": ["3 + 3?"], "rollouts": ["What is it?"]}
    for told in ("made: decontaminate leaves out 2 of 3 groups (1 by", "rollouts: decontaminate leaves out 1 of 2"):
        assert told in caplog.text
    with pytest.raises(ConfigurationError, match="leaves out 2 of 2.*all share something"):
        without_evaluation({"eval": evaluation["eval"]}, evaluation)
    with pytest.raises(ConfigurationError, match="decontaminate is on without eval_file"):
        WorldRewardArguments(train_file=files, decontaminate=True)
