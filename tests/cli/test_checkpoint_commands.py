"""`mr-reward merge | export | card | verify` through their entry point."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from tiny_models import family, reward_model
from typer.testing import CliRunner

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.cli.app import app, main
from mr_reward.errors import CheckpointError, ConfigurationError
from mr_reward.training.trainer import _with_lora

GROUPS = [ResponseGroup(prompt="2 + 2?", responses=["4", "5", ""])]


def run(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_merge_export_and_card(tmp_path: Path) -> None:
    family("llama").full_model.save_pretrained(tmp_path / "backbone")
    family("llama").processor.save_pretrained(tmp_path / "backbone")
    model = MultiResponseRewardModel.from_backbone(tmp_path / "backbone", layout="causal", template="mr2rm-assistant")
    _with_lora(model, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    model.processor.save_pretrained(tmp_path / "adapter")
    run("merge", tmp_path / "adapter", tmp_path / "rm")
    run("export", tmp_path / "rm", tmp_path / "public")
    scores = GroupScorer.from_pretrained(tmp_path / "rm").score(GROUPS)
    assert GroupScorer.from_pretrained(tmp_path / "public").score(GROUPS) == scores
    (tmp_path / "metrics.json").write_text(json.dumps({"test": {"best_of_n": 0.5}}))
    (tmp_path / "data.json").write_text(json.dumps([{"name": "sums", "groups": 3}]))
    run(
        *("card", tmp_path / "rm", "--metrics", tmp_path / "metrics.json", "--training-data", tmp_path / "data.json"),
        *("--licence", "mit", "--limitation", "Sums only.", "--limitation", "English.", "--repo-id", "a/b"),
    )
    card = ModelCard.load(tmp_path / "rm" / "README.md")
    assert card.data.license == "mit" and 'from_pretrained("a/b")' in card.text
    for line in ("| test | 0.5 |", "| sums | 3 |", "- Sums only.", "- English."):
        assert line in card.text.splitlines()


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    reward_model("llama", "set").save_pretrained(tmp_path / "rm")
    run("verify", tmp_path / "rm")
    with (tmp_path / "rm" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(CheckpointError, match="model.safetensors is missing or not the file that was saved"):
        run("verify", tmp_path / "rm")
    with pytest.raises(CheckpointError, match="no SHA256SUMS there"):
        run("verify", tmp_path)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    reward_model("llama", "set").save_pretrained(tmp_path)
    (tmp_path / "bad.json").write_text("[1]")
    for option, expected in (("--metrics", "an object of objects"), ("--training-data", "a list of objects")):
        with pytest.raises(ConfigurationError, match=f"bad.json holds list, expected {expected}"):
            run("card", tmp_path, option, tmp_path / "bad.json")
        with pytest.raises(ConfigurationError, match="nowhere.json cannot be read as JSON"):
            run("card", tmp_path, option, tmp_path / "nowhere.json")


def test_an_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(CheckpointError):
        run("merge", tmp_path, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["mr-reward", "merge", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    output = capsys.readouterr().err.strip()
    assert "nothing is to be merged" in output and len(output.splitlines()) == 1
