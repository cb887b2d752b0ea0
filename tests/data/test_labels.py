"""Rollouts to ranked groups by a verifier: TRL's form of a reward function, ties, resuming, what is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_image, random_text
from trl.rewards import think_format_reward
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.data.groups_file import load_preferences
from mr_reward.data.labels import Label, RolloutsToLabel, Verifier, label_groups
from mr_reward.errors import ConfigurationError, GroupError, MRRewardError


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    """Nine groups as `mr-reward collect` writes them, every second one with an image, and one of one response."""
    rng = random.Random(4)
    rows = []
    (tmp_path / "in").mkdir()
    for i in range(10):
        count = (2, *(rng.randint(2, 5) for _ in range(8)), 1)[i]
        texts = ["ab", "cd"] if i == 0 else [f"{random_text(rng, 6, 1)}{j}" for j in range(count)]
        row: dict[str, Any] = {"id": f"g{i}", "prompt": [{"role": "user", "content": f"q{i}"}], "responses": texts}
        row |= {"counts": [1] * len(texts), "columns": {"wanted": rng.randint(1, 6), "source": "exam"}}
        if i % 2:
            random_image(rng).save(tmp_path / "in" / f"{i}.png")
            row["images"] = [f"{i}.png"]
            row["prompt"] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"q{i}"}]}]
        rows.append(row)
    return write(tmp_path / "in" / "rollouts.jsonl", rows)


def closeness(completions: list[Any], wanted: list[int], **columns: Any) -> list[float]:
    """A reward function: the length should be the wanted one."""
    assert all(len(values) == len(completions) for values in columns.values())
    return [-float(abs(len(one[0]["content"]) - length)) for one, length in zip(completions, wanted, strict=True)]


def test_rewards_become_ranks_with_ties(rollouts: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "train.jsonl"
    done = label_groups(rollouts, out, Verifier(closeness, "mine.closeness"))
    rows, given = lines(out), lines(rollouts)
    assert (done.labelled, done.single, done.left_out) == (9, 1, {}), "one response cannot be compared"
    groups = load_preferences(out, media_within=tmp_path)
    ties = 0
    for group, row, before in zip(groups, rows, given[:9], strict=True):
        rewards = [-abs(len(text) - before["columns"]["wanted"]) for text in before["responses"]]
        for i, a in enumerate(rewards):
            for j, b in enumerate(rewards):
                assert (row["rankings"][i] < row["rankings"][j]) == (a > b)
                ties += i != j and a == b
        assert row["ratings"] == rewards and list(group.ratings or ()) == rewards
        assert row["labelled_by"] == "verifier mine.closeness"
        assert {key: row[key] for key in ("id", "prompt", "responses", "counts", "columns")} == {
            key: before[key] for key in ("id", "prompt", "responses", "counts", "columns")
        }
        assert len(group.images) == len(before.get("images", ()))
    assert ties > 0 and done.all_tied == sum(len(set(row["rankings"])) == 1 for row in rows) > 0


def test_a_verifier_gets_what_trl_gives(tmp_path: Path) -> None:
    """Texts for text prompts, messages for messages; turns with tool calls as they are; a column entry a response."""
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    rows = [
        {"prompt": "plain", "responses": ["a", "b"], "solution": "x"},
        {"prompt": [{"role": "user", "content": "chat"}], "responses": ["a", call], "columns": {"solution": "y"}},
    ]
    seen: dict[str, Any] = {}

    def verifier(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [1.0, 2.0, 3.0, 4.0]

    label_groups(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", Verifier(verifier, "v"))
    chat = rows[1]["prompt"]
    assert seen["prompts"] == ["plain", "plain", chat, chat]
    assert seen["completions"] == ["a", "b", [{"role": "assistant", "content": "a"}], call]
    assert seen["solution"] == ["x", "x", "y", "y"]
    assert lines(tmp_path / "out.jsonl")[1]["responses"] == ["a", call]


def test_a_reward_function_of_trl(tmp_path: Path) -> None:
    texts = ["<think>\nwhy\n</think>\nyes", "no thought"]
    source = write(tmp_path / "in.jsonl", [{"prompt": [{"role": "user", "content": "?"}], "responses": texts}])
    label_groups(source, tmp_path / "out.jsonl", Verifier(think_format_reward, "trl"))
    expected = think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    assert lines(tmp_path / "out.jsonl")[0]["ratings"] == expected and len(set(expected)) == 2


def test_an_asynchronous_verifier(rollouts: Path, tmp_path: Path) -> None:
    async def slow(completions: list[Any], **columns: Any) -> list[float]:
        return [float(len(one[0]["content"])) for one in completions]

    assert label_groups(rollouts, tmp_path / "out.jsonl", Verifier(slow, "slow")).labelled == 9


def test_a_missing_reward_leaves_its_group_out(rollouts: Path, tmp_path: Path) -> None:
    def unsure(completions: list[Any], **columns: Any) -> list[float | None]:
        rewards: list[float | None] = [1.0] * len(completions)
        rewards[0], rewards[-1] = None, math.nan
        return rewards

    done = label_groups(rollouts, tmp_path / "out.jsonl", Verifier(unsure, "unsure"))
    assert done.labelled == 7 and done.left_out == {"no reward for some response": 2}
    again = label_groups(rollouts, tmp_path / "out.jsonl", Verifier(unsure, "unsure"))
    assert (again.before, again.labelled, sum(again.left_out.values())) == (7, 0, 2), "they are tried again"


class OneByOne:
    """Labels a group at a time, and is interrupted after some."""

    name = "me"
    at_a_time = 1

    def __init__(self, count: int, stop: str) -> None:
        self.count, self.stop = count, stop
        self.seen: list[int] = []

    def label(self, items: Sequence[RolloutsToLabel]) -> Iterator[tuple[RolloutsToLabel, Label]]:
        for item in items:
            if len(self.seen) == self.count:
                if self.stop == "budget":
                    return
                raise KeyboardInterrupt
            self.seen.append(item.number)
            yield item, Label(ratings=list(range(item.group.num_responses)))


@pytest.mark.parametrize("stop", ["budget", "interrupt"])
def test_labelling_is_resumed(rollouts: Path, tmp_path: Path, stop: str) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    first = OneByOne(4, stop)
    if stop == "budget":
        assert label_groups(rollouts, out, first).not_reached == 5
    else:
        with pytest.raises(KeyboardInterrupt):
            label_groups(rollouts, out, first)
    out.write_bytes(out.read_bytes()[:-7])  # and the last line is torn
    second = OneByOne(99, stop)
    done = label_groups(rollouts, out, second)
    assert (done.before, done.labelled, done.not_reached) == (3, 6, 0) and second.seen == [4, 5, 6, 7, 8, 9]
    label_groups(rollouts, whole, OneByOne(99, stop))
    assert out.read_bytes() == whole.read_bytes()


def test_another_labeller_or_input_is_refused(rollouts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    label_groups(rollouts, out, Verifier(closeness, "a"))
    with pytest.raises(GroupError, match="labelled by 'verifier a', now it would be 'verifier b'"):
        label_groups(rollouts, out, Verifier(closeness, "b"))
    other = write(tmp_path / "in" / "other.jsonl", lines(rollouts)[::-1])
    with pytest.raises(GroupError, match="line 1: is of no group of this input"):
        label_groups(other, out, Verifier(closeness, "a"))
    with pytest.raises(ConfigurationError, match="is the file that is read"):
        label_groups(rollouts, rollouts, Verifier(closeness, "a"))


def needs_more(completions: Any, solution: Any, digits: Any, wanted: Any) -> list[float]:
    raise AssertionError


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (needs_more, "needs the columns solution, digits, line 1 has source, wanted; collect from a data set"),
        (lambda completions, **_: [1.0], "gave 1 rewards for"),
        (lambda completions, **_: None, "gave NoneType rewards for"),
    ],
)
def test_a_verifier_that_does_not_fit_is_refused(rollouts: Path, tmp_path: Path, function: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        label_groups(rollouts, tmp_path / "out.jsonl", Verifier(function, "f"))
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_the_command(tmp_path: Path) -> None:
    """The handwriting world's own truth as verifier; a group without a reward makes the exit code 3."""
    row = {"prompt": [{"role": "user", "content": "?"}], "responses": ["13", "12", "14"]}
    rows = [row | {"columns": {"question": "read", "digits": [1, 2]}}]
    source = write(tmp_path / "in.jsonl", rows)
    truth = "mr_reward.worlds.world_policy.handwriting_accuracy"
    command = ["label", str(source), "--verifier", truth, "--out", str(tmp_path / "out.jsonl")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "labelled now" in result.output
    assert load_preferences(tmp_path / "out.jsonl")[0].rankings == (2, 1, 2)
    with pytest.raises(ConfigurationError, match="--verifier: 'nowhere.at.all' cannot be imported"):
        command[3] = "nowhere.at.all"
        CliRunner().invoke(app, command, catch_exceptions=False)
    for more in ([], ["--judge", "http://127.0.0.1:1", "--verifier", truth]):
        with pytest.raises(MRRewardError, match="give one of --verifier, --judge and --people"):
            CliRunner().invoke(app, [*command[:2], "--out", "x.jsonl", *more], catch_exceptions=False)
    for more in (["--passes", "5"], ["--port", "8000"], ["--judge-model", "m"], ["--seed", "1"]):
        with pytest.raises(ConfigurationError, match=f"got {more[0]} without --"):
            CliRunner().invoke(
                app, [*command[:2], "--out", "x.jsonl", "--verifier", truth, *more], catch_exceptions=False
            )
