"""The card says what it was told, its snippet runs, and a push uploads it with the processor."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from tiny_models import family, random_group, reward_model

from mr_reward import GroupScorer, MultiResponseRewardModel
from mr_reward.checkpoint.card import _attacks, _cell, write_model_card
from mr_reward.errors import CheckpointError, ConfigurationError
from mr_reward.model.export import merge
from mr_reward.training.trainer import _with_lora

DATA: list[dict[str, Any]] = [
    {"name": "scans", "groups": 12800, "licence": "CC BY 4.0"},
    {"name": "tables | and\nbreaks", "hub_id": "someone/some-data"},
]
METRICS = {"unseen scans": {"best_of_n": 0.92345678, "groups": 512}, "other": {"best_of_n": 1}}


def run_snippet(card: str) -> dict[str, Any]:
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "card", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("name", "layout", "task"),
    [("llama", "set", "text-ranking"), ("qwen3_vl", "causal", "image-text-to-text"), ("molmo2", "isolated", None)],
)
def test_the_snippet_runs(name: str, layout: str, task: str | None, tmp_path: Path) -> None:
    reward_model(name, layout).save_pretrained(tmp_path)
    path = write_model_card(tmp_path, training_data=DATA, metrics=METRICS, licence="mit")
    names = run_snippet(path.read_text())
    assert len(names["scores"]) == len(names["responses"]) == 2
    assert all(isinstance(score, float) for score in names["scores"])
    assert names["scorer"].model.config.layout == layout
    if task is not None:
        assert ModelCard.load(path).data.pipeline_tag == task


def test_what_was_given_is_there_and_nothing_else(tmp_path: Path) -> None:
    reward_model("llama", "causal").save_pretrained(tmp_path)
    path = write_model_card(
        tmp_path, training_data=DATA, metrics=METRICS, licence="apache-2.0", limitations=["Digits only."]
    )
    card = ModelCard.load(path)
    card.data.to_dict()
    assert card.data.license == "apache-2.0" and card.data.library_name == "mr_reward"
    assert card.data.datasets == ["someone/some-data"]
    assert {"reward-model", "layout-causal"} <= set(card.data.tags)
    assert card.data.base_model is None, "the backbone came from memory"
    for line in (
        "| name | groups | licence | hub_id |",
        "| scans | 12800 | CC BY 4.0 | not given |",
        "| tables \\| and breaks | not given | not given | someone/some-data |",
        "| evaluation set | best_of_n | groups |",
        "| unseen scans | 0.9235 | 512 |",
        "| other | 1 | not given |",
        "- Digits only.",
        "- Scores depend on the order of the responses; average over orders with `num_orders`.",
        "| backbone | not given (llama) |",
        "| backbone revision | not given |",
    ):
        assert line in card.text.splitlines(), line


def test_absent_facts_are_not_given(tmp_path: Path) -> None:
    reward_model("llama", "set").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    sections = dict(re.findall(r"^## (.*?)\n\n(.*?)(?=\n\n## |\Z)", text, re.DOTALL | re.MULTILINE))
    for title in ("Training data", "Metrics", "Licence"):
        assert sections[title].strip() == "Not given.", title
    metadata = text.split("---")[1]
    assert "license" not in metadata and "datasets" not in metadata and "base_model" not in metadata


@pytest.mark.parametrize(
    ("backbone", "told", "base_model"),
    [
        ("someone/some-model", "someone/some-model (llama)", "someone/some-model"),
        ("/somewhere/model", "a local folder (llama)", None),
        ("./model", "a local folder (llama)", None),
        (None, "not given (llama)", None),
    ],
)
def test_base_model(backbone: str | None, told: str, base_model: str | None, tmp_path: Path) -> None:
    reward_model("llama", "set").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "backbone_name_or_path": backbone}))
    card = ModelCard.load(write_model_card(tmp_path))
    assert f"| backbone | {told} |" in card.text.splitlines()
    assert card.data.base_model == base_model


def test_only_reward_models_get_a_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json could be read"):
        write_model_card(tmp_path)
    family("llama").full_model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a 'llama' model, expected 'multi_response_reward'"):
        write_model_card(tmp_path)


def test_a_card_goes_with_its_model_until_it_is_trained_on(tmp_path: Path) -> None:
    reward_model("llama", "set").save_pretrained(tmp_path / "one")
    path = write_model_card(tmp_path / "one", metrics=METRICS)
    model = MultiResponseRewardModel.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text() == path.read_text()
    model.train().eval()
    model.save_pretrained(tmp_path / "three")
    assert "0.9235" not in (tmp_path / "three" / "README.md").read_text()
    # A folder's own card is not overwritten by an empty one.
    model.save_pretrained(tmp_path / "one")
    assert "0.9235" in path.read_text()


def test_a_merged_model_does_not_take_the_card_of_its_adapter(tmp_path: Path) -> None:
    family("llama").full_model.save_pretrained(tmp_path / "backbone")
    family("llama").processor.save_pretrained(tmp_path / "backbone")
    model = MultiResponseRewardModel.from_backbone(tmp_path / "backbone")
    _with_lora(model, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    model.processor.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").exists(), "peft writes one"
    merge(tmp_path / "adapter", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.splitlines()[0] == "---" and "# Multi-response reward model" in card and "peft" not in card.lower()


@pytest.mark.parametrize("name", ["qwen3_vl", "llama"])
def test_push_uploads_a_whole_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> SimpleNamespace:
        calls["create"] = (repo_id, options)
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> str:
        shutil.copytree(folder_path, tmp_path / "uploaded")
        calls["upload"] = (repo_id, options)
        return "https://address.of/commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    reward_model(name, "set").save_pretrained(tmp_path / "rm")
    write_model_card(tmp_path / "rm", metrics=METRICS, licence="mit")
    model = MultiResponseRewardModel.from_pretrained(tmp_path / "rm")
    address = model.push_to_hub("rm", private=True, token="secret", commit_message="First")
    assert address == "https://address.of/commit"
    assert calls["create"] == ("rm", {"private": True, "exist_ok": True})
    assert calls["upload"] == ("someone/rm", {"commit_message": "First"})
    uploaded = tmp_path / "uploaded"
    files = {path.name for path in uploaded.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert ("processor_config.json" in files) == (name == "qwen3_vl")
    card = (uploaded / "README.md").read_text()
    assert 'from_pretrained("someone/rm")' in card and str(tmp_path) not in card and "0.9235" in card
    groups = [random_group(random.Random(0), 3)]
    assert GroupScorer.from_pretrained(uploaded).score(groups) == GroupScorer(model).score(groups)


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, "not given"),
        (0, "0"),
        (0.0, "0"),
        (False, "False"),
        ("", ""),
        (12800, "12800"),
        (0.92345678, "0.9235"),
        ("a | b\n c", "a \\| b c"),
    ],
)
def test_a_cell_of_zero_was_given(value: Any, cell: str) -> None:
    assert _cell(value) == cell


def test_attacks_in_their_columns() -> None:
    one = {"name": "padding", "shift": 0.5, "shift_low": -0.25, "shift_high": 1.0, "num_items": 20}
    (row,) = _attacks({"attacks": [{**one, "wins_before": 0.1, "wins_after": 0.35, "other": 1}]}) or []
    assert row == {
        "attack": "padding",
        "shift of the margin": "+0.50 [-0.25, +1.00]",
        "bad answer wins before": "10.0%",
        "after": "35.0%",
        "groups": 20,
    }
    assert _attacks(None) is None
    with pytest.raises(ConfigurationError, match=r"KeyError\('wins_before'\)"):
        _attacks({"attacks": [one]})
