"""What the recipe of a reward model says of itself."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import pytest

from mr_reward.runs.pretraining import load_sets, training_data
from mr_reward.training import RewardTrainingArguments
from mr_reward.worlds.handwriting_pretraining import HandwritingRewardArguments


def test_a_card_says_what_was_trained_on_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files by their content; two of one name are two sets."""
    monkeypatch.chdir(tmp_path)
    for folder, count in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        row = json.dumps({"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2]}) + "\n"
        (tmp_path / folder / "train.jsonl").write_text(row * count)
    arguments = HandwritingRewardArguments(
        train_file=["a/train.jsonl", "b/train.jsonl", "handwriting"], num_train_groups=4
    )
    args = RewardTrainingArguments("out", loss="plackett_luce", seed=7, learning_rate=1e-4, use_cpu=True)
    rows = training_data(arguments, args, load_sets(arguments, seed=7))
    assert [(row["name"], row["groups"]) for row in rows] == [("train", 2), ("b/train.jsonl", 3), ("handwriting", 4)]
    digests = [hashlib.sha256((tmp_path / name / "train.jsonl").read_bytes()).hexdigest() for name in "ab"]
    assert [row["SHA-256"] for row in rows] == [*digests, None]
    assert all(row["loss"] == "plackett_luce" and row["seed"] == 7 and row["learning_rate"] == 1e-4 for row in rows)
    assert f"torch {version('torch')}" in rows[0]["made with"]
