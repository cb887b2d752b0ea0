"""`mr-reward doctor` on the recipe of a reward model: all that the training would refuse, at once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.doctor import examine_recipe
from mr_reward.doctor.recipes import trains_reward_model
from mr_reward.worlds import tiny
from mr_reward.worlds.world_pretraining import WorldRewardArguments

RECIPES = Path(__file__).parents[2] / "grpo_recipes"
SMOLLM2 = RECIPES / "rm_smollm2_lora_cpu.yaml"
ROW = {"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones with pictures and without, and files of groups, good and bad."""
    folder = tmp_path_factory.mktemp("pretraining")
    tiny.build_qwen3_vl(0, hidden_size=64, num_layers=2).save_pretrained(folder / "vl")
    tiny.build_qwen3_vl_processor().save_pretrained(folder / "vl")
    tiny.build_llama(0).save_pretrained(folder / "llama")
    tiny.build_tokenizer().save_pretrained(folder / "llama")
    files: dict[str, list[Any]] = {
        "train": [{**ROW, "prompt": f"{i}?"} for i in range(70)],
        "unranked": [ROW, {"prompt": "?", "responses": ["a", "b"]}],
        "gone": [ROW, {**ROW, "images": ["gone.png"]}],
        "long": [{**ROW, "responses": ["a" * 3000, "b"]}],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def examine(recipe: Path | str, **options: Any) -> list[Any]:
    arguments = ["--config", str(recipe)]
    for key, value in options.items():
        arguments += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert trains_reward_model(arguments)
    return examine_recipe(arguments, recipe_type=WorldRewardArguments)


def red(recipe: Path | str, **options: Any) -> list[tuple[str, str]]:
    return [(finding.what, finding.text) for finding in examine(recipe, **options) if finding.level == "red"]


def test_every_recipe_is_known_for_what_it_trains() -> None:
    names = {path.name for path in RECIPES.glob("*.yaml")} - {"sft_tiny_handwriting_cpu.yaml"}
    kinds = {name: trains_reward_model(["--config", str(RECIPES / name)]) for name in names}
    assert len(kinds) >= 8 and all(kinds[name] is name.startswith("rm_") for name in names)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("rm_tiny_handwriting_cpu.yaml", {"model_name_or_path": "vl"}),
        (SMOLLM2.name, {"model_name_or_path": "llama", "train_file": ["train.jsonl"], "eval_file": ["train.jsonl"]}),
    ],
)
def test_the_recipes_pass(recipe: str, options: dict[str, Any], folder: Path) -> None:
    before = sorted(os.listdir(folder))
    findings = examine(RECIPES / recipe, **options)
    assert {finding.level for finding in findings} == {"green"}, findings
    texts = {finding.what: finding.text for finding in findings}
    assert "64 of the first 64 can be used" in texts["training data"]
    assert texts["trainer"].startswith("best_of_n, all weights" if "tiny" in recipe else "bradley_terry, LoRA of rank")
    assert sorted(os.listdir(folder)) == before, "nothing is left behind"


def test_all_problems_are_shown_at_once(folder: Path) -> None:
    """In the file and on the command line: slips, values, data of three kinds, backbone, and what excludes another."""
    recipe = {**yaml.safe_load(SMOLLM2.read_text()), "learning_rat": 1e-5, "loss": "best", "over_length": "cut"}
    (folder / "slips.yaml").write_text(yaml.safe_dump(recipe))
    found = red(
        "slips.yaml",
        model_name_or_path="./lama",
        train_file=["trian.jsonl", "unranked.jsonl", "train.jsonl"],
        eval_file=["gone.jsonl"],
        layout="sett",
        thoughts="all",
        trian_file="x",
    )
    expected = [
        ("configuration", "there is no field learning_rat; learning_rate is one"),
        ("configuration", "there is no field trian_file; train_file is one"),
        ("configuration", "got loss 'best'.*; unknown over-length policy 'cut'"),
        ("backbone", r"./lama is no folder with a config.json.*\(there is llama\)"),
        ("configuration", "unknown layout 'sett'"),
        ("configuration", "all"),
        ("training data", r"trian.jsonl: is not a file.*\(there is train.jsonl\)"),
        ("training data", r"unranked.jsonl, line 2: keys \['rankings'\] are missing"),
        ("evaluation data", "gone.jsonl, line 2: .*gone.png"),
    ]
    assert sorted(what for what, _ in found) == sorted(what for what, _ in expected), found
    for what, pattern in expected:
        assert any(kind == what and re.search(pattern, text) for kind, text in found), (pattern, found)


@pytest.mark.parametrize(
    ("options", "what", "pattern"),
    [
        ({"mixture_weights": [1, 2], "max_responses": 1}, "trainer", "2.0] for 1 data sets.*max_responses=1"),
        ({"attn_implementation": "flash_attention_2"}, "reward model", "cannot express layout 'set'"),
        (
            {"attn_implementation": "flash_attention_2", "layout": "causal"},
            "reward model",
            "flash_attention_2 cannot run here",
        ),
        ({"max_tokens": 0}, "trainer", "the token budget is 0"),
        ({"train_file": ["long.jsonl"], "over_length": "error"}, "training data", "do not fit a row of 512 tokens"),
        ({"model_name_or_path": "train.jsonl"}, "backbone", "train.jsonl"),
        ({"output_dir": "train.jsonl/out"}, "output folder", "cannot be written"),
    ],
)
def test_one_problem(options: dict[str, Any], what: str, pattern: str) -> None:
    good = {"model_name_or_path": "llama", "train_file": ["train.jsonl"], "eval_file": ["train.jsonl"]}
    found = red(SMOLLM2, **good | options)
    assert {kind for kind, _ in found} >= {what} and re.search(pattern, dict(found)[what]), found


def test_what_is_missing(folder: Path) -> None:
    """No data, no backbone; an evaluation without data is what the trainer itself says."""
    (folder / "empty.yaml").write_text(yaml.safe_dump({"loss": "bradley_terry", "use_cpu": True, "output_dir": "o"}))
    found = dict(red("empty.yaml"))
    assert "model_name_or_path is missing" in found["backbone"] and "train_file is missing" in found["training data"]
    (text,) = dict(red(SMOLLM2, model_name_or_path="llama", train_file=["train.jsonl"])).items()
    assert text[0] == "trainer" and "eval" in text[1]


def test_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of recipe is known by its fields; the word --config may be left out."""
    monkeypatch.setenv("COLUMNS", "300")
    given = ["--model_name_or_path", "llama", "--train_file", "train.jsonl", "--eval_file", "train.jsonl"]
    for start in ([str(SMOLLM2)], ["--config", str(SMOLLM2)]):
        good = CliRunner().invoke(app, ["doctor", *start, *given])
        assert good.exit_code == 0 and "training data" in good.output, good.output
    bad = CliRunner().invoke(app, ["doctor", str(SMOLLM2), *given, "--layuot", "set"])
    assert bad.exit_code == 1 and "there is no field layuot; layout is one" in bad.output
