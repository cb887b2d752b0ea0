"""What a real GRPO run leaves to look at: columns of TRL's completions table, logged groups, a figure."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image
from rich.console import Console
from tiny_models import ROUNDING
from tiny_runs import SHORT_RUN, handwriting_rows, save_policy_that_sees
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from mr_reward import GroupScorer, MultiResponseReward, MultiResponseRewardModel, ResponseGroup
from mr_reward.data.groups_file import ScoredGroup, read_scored
from mr_reward.errors import ConfigurationError
from mr_reward.groups import GroupScores
from mr_reward.grpo.telemetry import COLUMN_KEYS, GroupLog
from mr_reward.runs import callbacks
from mr_reward.runs.callbacks import RunFigure, ShownGroups, plot_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of 8 rollouts in groups of 4, read in one order and another (layout causal), with an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    save_policy_that_sees(folder / "policy")
    MultiResponseRewardModel.from_backbone(folder / "policy", layout="causal").save_pretrained(folder / "rm")
    rows = handwriting_rows("train", 8)
    rows = rows.add_column("reference_response", ["no"] * 8)
    log = GroupLog(folder / "out" / "groups", every=2)
    reward = MultiResponseReward(folder / "rm", 4, num_orders=3, group_log=log)
    terminal = Console(file=io.StringIO(), width=80)
    trainer = GRPOTrainer(
        model=str(folder / "policy"),
        reward_funcs=[reward],
        args=GRPOConfig(
            str(folder / "out"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=8,
            max_steps=3,
            log_completions=True,
            save_strategy="no",
            **SHORT_RUN,
        ),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        callbacks=[RunFigure(folder / "out"), ShownGroups(reward, every=2, console=terminal)],
    )
    trainer.train()
    trainer.evaluate()
    (folder / "terminal.txt").write_text(terminal.file.getvalue())
    (entry,) = [entry for entry in trainer.state.log_history if entry["step"] == 3 and "mr_reward/score_mean" in entry]
    assert 0.0 <= entry["mr_reward/order_flip_rate"] <= 1.0
    (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
    return folder


def test_the_completions_table_tells_what_the_reward_model_did(run: Path) -> None:
    table = pandas.read_parquet(run / "out" / "completions" / "completions_00001.parquet")
    assert set(COLUMN_KEYS) <= set(table.columns) and len(table) == 8
    assert table["mr_reward_group"].tolist() == [0] * 4 + [1] * 4
    for _, group in table.groupby("mr_reward_group"):
        texts = [completion[-1]["content"] for completion in group["completion"]]
        scores = group["mr_reward_score"].to_numpy()
        assert group["mr_reward_rank"].tolist() == [1 + len({s for s in scores if s > score}) for score in scores]
        for i, (text, slot, again) in enumerate(
            zip(texts, group["mr_reward_slot"], group["mr_reward_duplicate_of"], strict=True)
        ):
            first = texts.index(text)
            assert slot == len(set(texts[:first])) and again == (slot if first < i else -1)
        rewards = group["multi_response_reward"].to_numpy()
        assert np.allclose(rewards, scores - scores.mean(), atol=1e-6)


def test_groups_are_shown_within_80_characters(run: Path) -> None:
    """Of the steps asked for, whole words, best first."""
    text = (run / "terminal.txt").read_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and text.count("rollouts, best first") == 1 and "step 2:" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    shown = [float(score) for _, score, _ in rows if score]
    logged = read_scored(run / "out" / "groups" / "step_00002.rank0.jsonl")
    assert shown == [round(score, 3) for scored in logged for score in sorted(scored.scores or (), reverse=True)]
    words = {word for scored in logged for text in _texts(scored.group) for word in text.split()}
    assert {word for prompt, _, _ in rows for word in prompt.split()} <= words


def _texts(group: ResponseGroup) -> list[str]:
    return [block.get("text", f"({block['type']})") for turn in group.messages for block in turn["content"]]


def test_the_win_rate_over_the_reference_of_a_prompt(run: Path) -> None:
    """Of training and evaluation: the share of responses above it in a row with them."""
    history = json.loads((run / "history.json").read_text())
    scorer = GroupScorer.from_pretrained(run / "rm", num_orders=3)
    rates = [entry["mr_reward/win_rate"] for entry in history if "mr_reward/score_mean" in entry]
    assert len(rates) == 3
    groups = [scored.group for scored in read_scored(run / "out" / "groups" / "step_00002.rank0.jsonl")]
    compared = scorer.score([replace(one, prompt=one.messages, responses=[*one.responses, "no"]) for one in groups])
    shares = [
        sum((score > scores[-1]) + 0.5 * (score == scores[-1]) for score in scores[:-1]) / 4
        for scores in compared
        if scores is not None
    ]
    assert len(shares) == 2 and rates[1] == pytest.approx(sum(shares) / 2)
    assert any("eval_mr_reward/win_rate" in entry for entry in history)


def test_logged_groups_are_those_of_the_table_and_can_be_scored_again(run: Path) -> None:
    folder = run / "out" / "groups"
    files = sorted(path.name for path in folder.glob("*.jsonl"))
    assert files == ["eval_step_00003.rank0.jsonl", "step_00002.rank0.jsonl"]  # of every second step
    table = pandas.read_parquet(run / "out" / "completions" / "completions_00002.parquet")
    logged = read_scored(folder / "step_00002.rank0.jsonl")
    assert [scored.step for scored in logged] == table["step"].unique().tolist() * 2 == [2, 2]
    assert [scored.group.id for scored in logged] == ["step 2 group 0", "step 2 group 1"]
    # The metrics of a step are those of its groups.
    history = json.loads((run / "history.json").read_text())
    (entry,) = [entry for entry in history if entry["step"] == 2 and "mr_reward/score_mean" in entry]
    scores = [score for scored in logged for score in scored.scores or ()]
    assert entry["mr_reward/score_mean"] == pytest.approx(np.mean(scores))
    (evaluated,) = [entry for entry in history if "eval_mr_reward/score_mean" in entry]
    scores = [score for scored in read_scored(folder / files[0]) for score in scored.scores or ()]
    assert evaluated["step"] == 3 and evaluated["eval_mr_reward/score_mean"] == pytest.approx(np.mean(scores))
    assert [list(scored.group.responses) for scored in logged] == [
        [completion[-1]["content"] for completion in group["completion"]]
        for _, group in table.groupby("mr_reward_group")
    ]
    assert all(len(scored.group.images) == 1 for scored in logged)
    for column, values in (
        ("mr_reward_score", [score for scored in logged for score in scored.scores or ()]),
        ("multi_response_reward", [reward for scored in logged for reward in scored.rewards or ()]),
    ):
        assert table[column].tolist() == pytest.approx(values, abs=1e-6), column
    replayed = GroupScorer.from_pretrained(run / "rm", num_orders=3).score_detailed([one.group for one in logged])
    for found, expected in zip(replayed, logged, strict=True):
        assert found.scores == pytest.approx(expected.scores, abs=ROUNDING)
        assert found.order_spread == pytest.approx(expected.result.order_spread, abs=ROUNDING)
        assert found.order_flip_rate is not None, "three orders"
        assert found.order_flip_rate == expected.result.order_flip_rate


def test_the_figure_at_the_end(run: Path) -> None:
    with Image.open(run / "out" / "training.png") as figure:
        assert 1.5 < figure.width / figure.height < 2.5  # five panels in two rows
        assert len(figure.convert("RGB").getcolors(1 << 20) or ()) > 100


def test_a_figure_shows_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = [{"step": i, "rewards/mine/mean": 0.1 * i, "mr_reward/score_spread": None} for i in range(3)]
    assert not plot_run([{"step": 1, "loss": 0.1}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert plot_run(history, tmp_path / "deep" / "one.png")
    with Image.open(tmp_path / "deep" / "one.png") as figure:
        assert figure.width < 2 * figure.height  # a panel of the rewards alone
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(callbacks, "plot_curves", lambda panels, *_, **__: drawn.update(panels))
    logged = {"mr_reward/score_mean": 1.0, "mr_reward/win_rate": 0.5, "rewards/multi_response_reward/mean": 0.0}
    centred = [{**entry, **logged} for entry in history]
    assert plot_run(centred, tmp_path / "two.png")
    # First what moves; the mean of rewards that compare is the same at every step, by construction.
    assert {name: list(curves) for name, curves in drawn.items()} == {
        "score of the reward model": ["score_mean"],
        "share above the reference": ["win_rate"],
        "other rewards": ["mine"],
    }
    other_rank = TrainerState(is_world_process_zero=False, log_history=history)
    RunFigure(tmp_path).on_train_end(TrainingArguments(str(tmp_path), use_cpu=True), other_rank, TrainerControl())
    assert not (tmp_path / "training.png").exists()


def _scored(text: str) -> ScoredGroup:
    return ScoredGroup(
        group=ResponseGroup(prompt="?", responses=[text, "b"]),
        result=GroupScores(scores=(1.0, 2.0), truncated=(False, False)),
    )


def test_group_log_keeps_all_calls_of_a_step_and_replaces_older_runs(tmp_path: Path) -> None:
    log = GroupLog(tmp_path, every=5)
    for step, text in ((0, "a"), (0, "b"), (3, "c"), (5, "d")):
        log.write([_scored(text)], step=step, rank=1, evaluating=False)
    log.write([_scored("e")], step=3, rank=1, evaluating=True)
    log.write([], step=10, rank=1, evaluating=False)
    found = {path.name: [s.group.responses[0] for s in read_scored(path)] for path in tmp_path.iterdir()}
    assert found == {
        "step_00000.rank1.jsonl": ["a", "b"],
        "step_00005.rank1.jsonl": ["d"],
        "eval_step_00003.rank1.jsonl": ["e"],
    }
    for step in (1, 4, 7, 10):  # a generation serves three steps each, as the trainer's 5 and 10 are of 4 and 10
        log.write([_scored(str(step))], step=step, rank=2, evaluating=False, num_steps=3)
    assert sorted(path.name for path in tmp_path.glob("*rank2*")) == [
        "step_00004.rank2.jsonl",
        "step_00010.rank2.jsonl",
    ]
    pickle.loads(pickle.dumps(GroupLog(tmp_path))).write([_scored("f")], step=0, rank=1, evaluating=False)
    assert [s.group.responses[0] for s in read_scored(tmp_path / "step_00000.rank1.jsonl")] == ["f"]
    for every in (0, -1, True, 1.5):
        with pytest.raises(ConfigurationError, match="expected a whole number from 1 on"):
            GroupLog(tmp_path, every=every)  # type: ignore[arg-type]
