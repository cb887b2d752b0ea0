"""Groups with their scores as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_preferences import same

from mr_reward import ResponseGroup
from mr_reward.data.groups_file import ScoredGroup, read_scored, write_scored
from mr_reward.errors import GroupError
from mr_reward.groups import GroupScores


def test_round_trip(tmp_path: Path) -> None:
    red = Image.new("RGB", (9, 7), "red")
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "\ud800?"}]
    written = [
        ScoredGroup(
            group=ResponseGroup(prompt="one", responses=["", "b"], images=[red], id="1", rankings=[2, 1], source="s"),
            result=GroupScores(scores=(0.1, -2.0), truncated=(True, False), order_spread=0.25, order_flip_rate=0.5),
            rewards=(1.05, None),
            step=7,
        ),
        ScoredGroup(
            group=ResponseGroup(prompt=turns, responses=["a"], videos=[[red, red]], id="2"),
            result=GroupScores(scores=None, truncated=(False,), drop_reason="over the token budget"),
        ),
    ]
    path = tmp_path / "groups" / "step_00007.rank0.jsonl"
    write_scored(written, path)
    found = read_scored(path)
    assert len(found) == 2
    for one, other in zip(found, written, strict=True):
        assert same(one.group, other.group)
        for name in ("result", "scores", "rewards", "step"):
            assert getattr(one, name) == getattr(other, name), name
    assert sorted(file.name for file in path.parent.iterdir()) == ["step_00007.rank0.jsonl", "step_00007.rank0_media"]


@pytest.mark.parametrize("step", [None, 0, 1])
@pytest.mark.parametrize("rewards", [None, (0.0,), (None,)])
def test_nothing_that_is_zero_gets_lost(
    step: int | None, rewards: tuple[float | None, ...] | None, tmp_path: Path
) -> None:
    one = ScoredGroup(
        group=ResponseGroup(prompt="p", responses=["a"]),
        result=GroupScores(scores=(0.0,), truncated=(False,), order_flip_rate=0.0),
        rewards=rewards,
        step=step,
    )
    write_scored([one], tmp_path / "s.jsonl")
    (found,) = read_scored(tmp_path / "s.jsonl")
    assert (found.step, found.rewards, found.result) == (step, rewards, one.result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0]}, "got 1 scores for 2 responses"),
        ({"scores": "12"}, "scores is '12', expected a list"),
        ({"scores": [1.0, "2"]}, "expected a list with a value for each response"),
        ({"truncated": [0, 1]}, "truncated is"),
        ({"rewards": [1.0, 2.0, 3.0]}, "got 3 rewards for 2 responses"),
        ({"responses": None}, r"keys \['responses'\] are missing"),
    ],
)
def test_a_wrong_line_names_itself(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {"prompt": "?", "responses": ["a", "b"], "scores": [1.0, 2.0]}
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, **change}) + "\n")
    with pytest.raises(GroupError, match=rf"scores.jsonl, line 2: .*{message}"):
        read_scored(path)


def test_files_that_hold_no_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    with pytest.raises(GroupError, match="is not a file"):
        read_scored(path)
    path.write_text("\n")
    with pytest.raises(GroupError, match="holds no group"):
        read_scored(path)
    path.write_text(json.dumps({"prompt": "?", "responses": ["a"]}))
    with pytest.raises(GroupError, match="line 1: .*has no scores"):
        read_scored(path)
