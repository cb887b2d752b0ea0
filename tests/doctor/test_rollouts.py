"""Held-out rollouts before a run: the doctor and the start say how the reward model does on them."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from http_server import running
from published_schemas import write_jsonl
from tiny_models import reward_model
from trl import ModelConfig

from mr_reward import GroupScorer
from mr_reward.doctor import examine_recipe
from mr_reward.doctor.findings import Finding
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.evaluation.evaluator import report_rollouts
from mr_reward.runs.recipe import PolicyArguments, PolicyTrainingArguments
from mr_reward.serving import build_app
from mr_reward.worlds.world_policy import WorldPolicyArguments

sys.path.insert(0, str(Path(__file__).parents[2] / "grpo_recipes"))
import train_policy  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model, a policy to be, prompts, and files of rollouts."""
    folder = tmp_path_factory.mktemp("run")
    reward_model("llama", "set").save_pretrained(folder / "rm")
    model = reward_model("llama", "set")
    model.backbone.save_pretrained(folder / "policy")
    model.processor.save_pretrained(folder / "policy")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{i}?"} for i in range(4)])
    # Whatever an untrained model likes is right in some groups and wrong in others.
    rows = [
        {
            "prompt": f"{i}?",
            "responses": [f"{i} {k}" for k in range(4)],
            "rankings": [2, 1, 2, 1] if i % 3 else [1, 2, 1, 2],
        }
        for i in range(10)
    ]
    write_jsonl(folder / "heldout.jsonl", [*rows, {**rows[0], "rankings": [1, 1, 1, 1]}])
    write_jsonl(folder / "right.jsonl", [{**row, "rankings": [1, 1, 1, 1]} for row in rows])
    write_jsonl(folder / "unranked.jsonl", [{"prompt": "?", "responses": ["a", "b"]}])
    return folder


def options(folder: Path, **more: Any) -> list[str]:
    given = {
        "model_name_or_path": folder / "policy",
        "reward_model": folder / "rm",
        "dataset": folder / "prompts.jsonl",
        "output_dir": folder / "out",
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        **more,
    }
    return [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]


def found(folder: Path, **more: Any) -> list[Finding]:
    return [one for one in examine_recipe(options(folder, **more)) if one.what == "held-out rollouts"]


def test_the_doctor_says_what_the_evaluation_says_and_warns_below_the_limit(folder: Path) -> None:
    file = folder / "heldout.jsonl"
    expected = report_rollouts(GroupScorer.from_pretrained(folder / "rm"), file).metrics["right_above_wrong"].value
    assert 0 < expected < 1
    read, judged = found(folder, heldout_rollouts=file)
    assert read.level == judged.level == "green" and "11 groups, 10 of them with right and wrong" in read.text
    assert judged.text.startswith(f"right above wrong {expected:.3f} (95 %: ") and "10 of 11 groups" in judged.text
    _, judged = found(folder, heldout_rollouts=file, min_right_above_wrong=expected + 0.01)
    assert judged.level == "yellow" and "below min_right_above_wrong=" in judged.text
    _, judged = found(folder, heldout_rollouts=file, min_right_above_wrong=expected - 0.01)
    assert judged.level == "green"
    assert found(folder) == [], "nothing is loaded where nobody asks"
    with running(build_app(GroupScorer.from_pretrained(folder / "rm"))) as url:
        _, judged = found(folder, heldout_rollouts=file, reward_server=url, reward_model=None)
        assert judged.level == "green" and f"{expected:.3f}" in judged.text
    _, judged = found(folder, heldout_rollouts=file, reward_server=url, reward_model=None)
    assert judged.level == "yellow" and "need not run yet" in judged.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("right.jsonl", "10 groups, 0 of them with right and wrong responses"),
        ("unranked.jsonl", "line 1: .*rankings"),
        ("nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_a_file_that_says_nothing_is_red_before_a_weight_is_loaded(
    name: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mr_reward.doctor.examine.make_reward", None)
    (only,) = found(folder, heldout_rollouts=folder / name)
    assert only.level == "red" and re.search(message, only.text), only.text


def test_a_limit_is_a_share() -> None:
    with pytest.raises(ConfigurationError, match="min_right_above_wrong is 91.*from 0 to 1"):
        PolicyArguments(min_right_above_wrong=91)
    with pytest.raises(ConfigurationError, match="needs heldout_rollouts, or verifiers"):
        WorldPolicyArguments(min_right_above_wrong=0.9, dataset="prompts.jsonl")
    for told in ({"heldout_rollouts": "file"}, {"verifiers": ["a.b"]}, {}):  # its own prompts come with their truth
        assert WorldPolicyArguments(min_right_above_wrong=0.9, **told).min_right_above_wrong == 0.9


class Reached(Exception):
    """The policy would be loaded now."""


@pytest.mark.parametrize(("rank", "limit", "level"), [(0, 0.0, "INFO"), (0, 1.0, "WARNING"), (1, 1.0, None)])
def test_the_start_of_a_run_says_it_before_the_policy_is_loaded(
    rank: int,
    limit: float,
    level: str | None,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def trainer(**given: Any) -> None:
        names = [function.__name__ for function in given["reward_funcs"]]
        assert names == ["multi_response_reward", "odd_length"] and given["args"].reward_weights == [1.0, 0.0]
        assert type(given["reward_funcs"][1]).__name__ == "Truth"
        raise Reached

    monkeypatch.setattr(train_policy, "GRPOTrainer", trainer)
    recipe = WorldPolicyArguments(
        reward_model=str(folder / "rm"),
        dataset=str(folder / "prompts.jsonl"),
        heldout_rollouts=str(folder / "heldout.jsonl"),
        min_right_above_wrong=limit,
        verifiers=["test_truth.odd_length"],
    )
    kind = type("Arguments", (PolicyTrainingArguments,), {"process_index": rank})
    args = kind(output_dir=str(tmp_path), num_generations=4, bf16=False, use_cpu=True, report_to="none")
    policy = ModelConfig(str(folder / "policy"))
    with caplog.at_level(logging.INFO), pytest.raises(Reached):
        train_policy.train_policy(recipe, args, policy)
    told = [record for record in caplog.records if record.getMessage().startswith("held-out rollouts: right above")]
    assert [record.levelname for record in told] == ([] if level is None else [level])
    recipe.heldout_rollouts = str(folder / "unranked.jsonl")
    if rank == 0:
        with pytest.raises(GroupError, match="rankings"):
            train_policy.train_policy(recipe, args, policy)


def test_a_verifier_that_is_not_there_is_named() -> None:
    from mr_reward.runs.recipe import truths

    with pytest.raises(ConfigurationError, match="verifiers: 'nowhere.right' cannot be imported"):
        truths(PolicyArguments(verifiers=["nowhere.right"]))
