"""Benchmarks with bad rows: listed with their place, the others scored; images behind URLs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from datasets import Dataset
from http_server import serving_files
from PIL import Image
from published_schemas import write_jsonl
from tiny_models import random_image, reward_model
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.data.groups_file import load_preferences
from mr_reward.errors import GroupError, MediaError
from mr_reward.evaluation.report import read_records
from mr_reward.training import RewardTrainer, RewardTrainingArguments


@pytest.mark.parametrize("layout", ["set", "causal"])
def test_bad_rows_are_listed_and_the_others_scored(layout: str, tmp_path: Path) -> None:
    """One picture that cannot be read or shown ended the evaluation, and nothing said which."""
    reward_model("qwen3_vl", layout).save_pretrained(tmp_path / "rm")
    random_image(random.Random(0)).save(tmp_path / "good.png")
    Image.new("RGB", (4000, 12)).save(tmp_path / "strip.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-2000])
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    names = ["good", "strip", "good", "cut", "page", "gone", "good"]
    rows = [
        {"prompt": f"{i}?", "responses": ["a", "b", "cc"], "rankings": [1, 2, 2], "images": [f"{name}.png"]}
        for i, name in enumerate(names)
    ]
    lines = [*map(json.dumps, rows), "{no json", json.dumps({**rows[0], "rankings": None})]
    source, out, clean = tmp_path / "groups.jsonl", tmp_path / "out", tmp_path / "clean"
    source.write_text("\n".join(lines) + "\n")
    command = ["evaluate", "groups", str(tmp_path / "rm"), "--source", str(source), "--resamples", "10"]

    def evaluate(*options: str, exit_code: int) -> str:
        result = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
        assert result.exit_code == exit_code, result.output
        return result.stdout

    with pytest.raises(MediaError, match=rf"{source}, line 6: .*gone.png' is not a file.*--media FOLDER"):
        evaluate("--out", str(out), exit_code=1)
    source.write_text("\n".join(lines[:5]) + "\n")
    with pytest.raises(GroupError, match=rf"{source}, line 2: .*aspect ratio.*--skip-bad"):
        evaluate("--out", str(out), exit_code=1)
    assert len(read_records(out / "items.jsonl")[1]) == 1, "the first one is kept"
    source.write_text("\n".join(lines) + "\n")
    output = evaluate("--out", str(out), "--skip-bad", exit_code=3)
    words = {
        2: "aspect ratio",
        4: "cannot be read",
        5: "no known type",
        6: "is not a file",
        8: "no JSON",
        9: "rankings",
    }
    for number, word in words.items():
        assert any(f"bad: {source}, line {number}: " in line and word in line for line in output.splitlines()), output
    assert "6 bad rows" in output
    _, records = read_records(out / "items.jsonl")
    assert [record.scores is None for record in records] == [name != "good" for name in names]
    assert all((record.bad_row is None) == (record.scores is not None) for record in records)
    results = json.loads((out / "results.json").read_text())
    assert len(results["bad_rows"]) == 6 and results["items"] == 7
    assert evaluate("--out", str(out), "--skip-bad", exit_code=3) == output, "known again, nothing is scored again"

    source.write_text("\n".join(line if "good" in line else json.dumps(rows[0]) for line in lines[:7]) + "\n")
    evaluate("--out", str(clean), exit_code=0)
    for bad, good in zip(records, read_records(clean / "items.jsonl")[1], strict=True):
        if bad.scores is not None:
            assert bad.orders == good.orders and good.scores is not None
            for mine, theirs in zip(bad.scores, good.scores, strict=True):
                assert mine == pytest.approx(theirs, abs=1e-5)


def test_urls_are_fetched_when_asked_for(tmp_path: Path) -> None:
    """By `evaluate`, and by `load_preferences`, which the trainer names; without the option nothing is asked."""
    (tmp_path / "served").mkdir()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "served" / "a.png")
    with serving_files(tmp_path / "served") as (base, asked):
        url = f"{base}/a.png"
        row = {"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2], "images": [url]}
        write_jsonl(tmp_path / "groups.jsonl", [row])
        command = ["evaluate", "groups", "longest", "--source", str(tmp_path / "groups.jsonl"), "--out"]
        refused = CliRunner().invoke(app, [*command, str(tmp_path / "no")])
        assert "is a URL and nothing is fetched" in str(refused.exception) and "--fetch-urls" in str(refused.exception)
        with pytest.raises(GroupError, match="fetch_urls=True to load_preferences"):
            RewardTrainer(
                reward_model("qwen3_vl"),
                RewardTrainingArguments(str(tmp_path), use_cpu=True),
                Dataset.from_list([row]),
            )
        assert not asked
        fetched = CliRunner().invoke(app, [*command, str(tmp_path / "yes"), "--fetch-urls"])
        assert fetched.exit_code == 0, fetched.output
        (group,) = load_preferences(Dataset.from_list([row]), fetch_urls=True)
        assert group.images[0] == (tmp_path / "served" / "a.png").read_bytes() and len(asked) == 2
