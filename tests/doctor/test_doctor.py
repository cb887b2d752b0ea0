"""The checks before a run: every GPU recipe passes on this machine, and what would fail later is refused now."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from http_server import running
from large_model import QWEN3_VL_4B, large_reward_model
from safetensors.torch import save_file
from tiny_models import reward_model
from transformers import Qwen3VLConfig
from trl import ModelConfig

from mr_reward import GroupScorer, MultiResponseRewardModel
from mr_reward.checkpoint import weights_digest
from mr_reward.doctor import check_before_start
from mr_reward.errors import ConfigurationError
from mr_reward.runs.launch import Launch, read_environment, read_launch
from mr_reward.runs.recipe import PolicyArguments, PolicyTrainingArguments, first_prompts
from mr_reward.serving import build_app
from mr_reward.worlds import tiny
from mr_reward.worlds.world_policy import WorldPolicyArguments

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "grpo_recipes"
ACCELERATE = ROOT / "configs" / "deepspeed"
sys.path.insert(0, str(RECIPES))
import train_policy  # noqa: E402

# Recipe, and the accelerate file that it is launched with.
GPU_RECIPES = {
    "policy_qwen3vl_4b_lora_1gpu.yaml": None,
    "policy_qwen3vl_4b_zero3_vllm_8gpu.yaml": "zero3.yaml",
    "policy_qwen3vl_4b_2nodes_vllm_server.yaml": "zero3.yaml",
}
Check = Callable[..., tuple[bool, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model where the recipes expect theirs, one that scores in sequence, and a policy to be."""
    folder = tmp_path_factory.mktemp("run")
    backbone = tiny.build_qwen3_vl(0, hidden_size=64, num_layers=2)
    backbone.config.text_config.max_position_embeddings = 2048
    backbone.save_pretrained(folder / "policy")
    tiny.build_qwen3_vl_processor().save_pretrained(folder / "policy")
    MultiResponseRewardModel.from_backbone(folder / "policy").save_pretrained(folder / "outputs" / "rm")
    MultiResponseRewardModel.from_backbone(folder / "policy", layout="causal").save_pretrained(folder / "causal")
    return folder


@pytest.fixture
def check(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Dry-run a recipe with options; whether it may start, and what was printed, in one line."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "500")

    def run(recipe: str, **options: Any) -> tuple[bool, str]:
        launch = GPU_RECIPES.get(recipe)
        command = ["--config", str(RECIPES / recipe), "--dry_run"]
        if launch is not None:
            command += ["--accelerate_config", str(ACCELERATE / launch)]
        for key, value in options.items():
            command += [f"--{key}", *(value if isinstance(value, list) else [str(value)])]
        passed = train_policy.dry_run(command)
        return passed, re.sub(r"\s+", " ", capsys.readouterr().out)

    return run


@pytest.mark.parametrize("recipe", GPU_RECIPES)
class TestRecipes:
    def test_passes(self, recipe: str, check: Check) -> None:
        passed, shown = check(recipe)
        assert passed, shown
        assert "outputs/rm: layout set, template unchanged" in shown
        assert "8 completions of 1024 = 8217 tokens at most" in shown
        assert f"{8 if GPU_RECIPES[recipe] else 1} process" in shown

    def test_group_size_that_does_not_divide_the_batch(self, recipe: str, check: Check) -> None:
        passed, shown = check(recipe, num_generations=7)
        assert not passed and "divisible by the number of generations used for evaluation (7)" in shown, shown
        passed, shown = check(recipe, num_generations=7, eval_strategy="no")
        assert not passed and "divisible by num_generations (7)" in shown, shown

    def test_folder_of_the_reward_model_missing(self, recipe: str, check: Check) -> None:
        for name in ("./outputs/other", "outputs/other"):
            passed, shown = check(recipe, reward_model=name)
            assert not passed and f"{name} is no folder, and no hub within reach has it; give the folder" in shown

    def test_layout_with_flash_attention(self, recipe: str, check: Check) -> None:
        passed, shown = check(recipe, reward_attn_implementation="flash_attention_2")
        assert not passed and "attention backend 'flash_attention_2' cannot express layout 'set'" in shown

    def test_context_too_small(self, recipe: str, check: Check) -> None:
        """2048 positions: a row of layout `set` needs as many as its longest completion, one of `causal` all."""
        passed, shown = check(recipe, reward_model="causal")
        assert not passed, shown
        assert "do not fit a row of 16384 tokens and a context of 2048 positions in layout 'causal'" in shown
        passed, shown = check(recipe, max_completion_length=2047)
        assert not passed and "context of 2048 positions in layout 'set'" in shown

    def test_budget_too_small(self, recipe: str, check: Check) -> None:
        dense = {"reward_attn_implementation": "sdpa", "reward_max_tokens": 8000}
        passed, shown = check(recipe, **dense)
        assert not passed and "do not fit a row of 8000 tokens" in shown and "over_length='drop_group'" in shown
        passed, shown = check(recipe, **dense, reward_over_length="truncate_responses")
        assert passed and "This run has over_length='truncate_responses'" in shown
        passed, shown = check(recipe, reward_max_tokens=8000)
        assert passed and "reward_max_tokens=8000: scored in chunks over the prompt" in shown
        passed, shown = check(recipe, reward_max_tokens=100)
        assert not passed and "a response of" in shown and "into a pass of 100 tokens" in shown


LORA = "policy_qwen3vl_4b_lora_1gpu.yaml"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_weights": ["1", "1", "1"]}, "3 weights for 2 reward functions"),
        ({"extra_reward_funcs": ["trl.rewards.no_such_reward"]}, "'trl.rewards.no_such_reward' cannot be imported"),
        ({"extra_reward_funcs": ["nowhere"]}, "'nowhere' cannot be imported"),
        ({"dataset": "prompts.jsonl"}, "dataset prompts.jsonl is no file"),
        ({"per_device_eval_batch_size": 3}, "The global eval batch size (3 * 1) must be divisible"),
        ({"vllm_max_model_length": 1000}, "vllm_max_model_length=1000 leaves no room for a prompt"),
        ({"model_name_or_path": "./none"}, "./none is no folder with a config.json"),
        ({"resume_from_checkpoint": "none"}, "resume_from_checkpoint: none is not whole"),
        ({"eval_dataset": "held_out.jsonl"}, "dataset held_out.jsonl is no file"),
        ({"accelerate_config": "none.yaml"}, "none.yaml cannot be read as an accelerate file"),
        ({"reward_placement": "elsewhere"}, "reward_placement is 'elsewhere', expected one of resident, offload"),
        ({"reward": "best"}, "reward is 'best', expected one of centred"),
        ({"reward_dtype": "float33"}, "reward_dtype is 'float33'"),
        ({"reward_max_tokens": 0}, "reward_max_tokens is 0, expected at least 1"),
        ({"num_generatoins": 4}, "num_generatoins"),
    ],
)
def test_other_mistakes(options: dict[str, Any], message: str, check: Check) -> None:
    passed, shown = check(LORA, **options)
    assert not passed and message in shown, shown


def red(shown: str) -> list[str]:
    """What is red, of the table in one line."""
    return [row.split("│")[0].strip() for row in re.findall(r"● red │ ([^●]*)", shown)]


def test_all_problems_are_shown_at_once(check: Check, folder: Path) -> None:
    """What would show one after the other: slips in two fields, prompts, weights, reward model, policy, length."""
    (folder / "questions.jsonl").write_text('{"question": "?"}\n')
    wrong = {
        "num_generatoins": 4,
        "reward_modell": "rm",
        "dataset": "questions.jsonl",
        "reward_weights": ["1", "1", "1"],
        "reward_model": "./nowhere",
        "model_name_or_path": "./none",
        "vllm_max_model_length": 1000,
    }
    passed, shown = check(LORA, **wrong)
    assert not passed
    kinds = ["configuration"] * 3 + ["reward_weights", "policy", "vLLM", "reward model"]
    assert sorted(red(shown)) == sorted(kinds), shown
    for part in (
        "there is no field num_generatoins; num_generations is one",
        "there is no field reward_modell; reward_model is one",
        "columns ['question'], expected prompt among them",
        "./nowhere is no folder",
    ):
        assert part in shown, shown
    _, shown = check(LORA, reward="best", reward_placement="elsewhere", reward_model="./nowhere")
    assert "reward is 'best'" in shown and "reward_placement is 'elsewhere'" in shown
    assert sorted(red(shown)) == ["configuration", "reward model"]


def test_a_slip_in_the_file_and_one_without_a_neighbour(check: Check, folder: Path) -> None:
    recipe = yaml.safe_load((RECIPES / LORA).read_text())
    (folder / "slip.yaml").write_text(yaml.safe_dump({**recipe, "learning_rat": 1e-5, "zzzz": 1}))
    passed, shown = check(str(folder / "slip.yaml"))
    assert not passed and "there is no field learning_rat; learning_rate is one" in shown
    assert "there is no field zzzz; take it out" in shown and red(shown) == ["configuration"] * 2


@pytest.mark.parametrize(
    ("rows", "is_red"),
    [
        ([{"prompt": "?", "images": ["a.png"]}], True),
        ([{"prompt": "?", "image": "a.png"}], True),
        ([{"prompt": "?", "images": []}], False),
        ([{"prompt": [{"role": "user", "content": "?"}], "images": ["a.png"]}], False),
    ],
)
def test_text_beside_images_is_red(rows: list[dict[str, Any]], is_red: bool, check: Check, folder: Path) -> None:
    """GRPOTrainer takes chat messages only where there are images."""
    from PIL import Image

    Image.new("RGB", (56, 56)).save(folder / "a.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passed, shown = check(LORA, dataset="rows.jsonl")
    assert passed is not is_red and ("prompt is text beside the column" in shown) is is_red, shown


def test_an_average_of_weights_in_pieces_is_red(check: Check) -> None:
    passed, shown = check("policy_qwen3vl_4b_zero3_vllm_8gpu.yaml", ema_half_life=20)
    assert not passed and red(shown) == ["average of the weights"], shown
    passed, shown = check(LORA, ema_half_life=-1)
    assert not passed and "ema_half_life is -1.0, expected 0 for no average" in shown


def test_a_guard_without_held_out_prompts_is_red(check: Check) -> None:
    passed, shown = check("policy_tiny_handwriting_cpu.yaml", stop_when_fooled=True)
    assert not passed and "stop_when_fooled is true and there is no eval_dataset" in shown


def test_foreign_code_is_told(check: Check) -> None:
    """It is the user's to decide, so it stops nothing."""
    quiet, loud = (check(LORA, trust_remote_code=on) for on in (False, True))
    assert "trust_remote_code" not in quiet[1] and "is run with your rights" in loud[1].replace("\n", " ")
    assert quiet[0] == loud[0]


def test_what_the_scorer_would_do_on_the_device_of_the_run(check: Check) -> None:
    """On CUDA in float32, and with a dense backend, nothing is scored in chunks: such a group is dropped."""
    budget = {"reward_max_tokens": 8000}
    for dense in ({"reward_dtype": "float32"}, {"reward_attn_implementation": "eager"}):
        passed, shown = check(LORA, **budget, **dense)
        assert not passed and "do not fit a row of 8000 tokens" in shown and "over_length='drop_group'" in shown, shown
        assert "scored in chunks" not in shown, shown
    for flat in ({}, {"reward_dtype": "float32", "use_cpu": True, "bf16": False}):
        passed, shown = check(LORA, **budget, **flat)
        assert "scored in chunks over the prompt" in shown and "layout set on mr_group" in shown, shown


def test_memory_of_a_dense_mask_only_where_there_is_one(check: Check) -> None:
    """16,384^2 places of 3 bytes are 0.81 GB."""
    for options, mask in (
        ({}, False),
        ({"reward_dtype": "float32"}, True),
        ({"reward_attn_implementation": "sdpa"}, True),
        ({"reward_attn_implementation": "sdpa", "reward_model": "causal", "max_completion_length": 64}, False),
    ):
        _, shown = check(LORA, **options)
        found = re.search(r"a forward pass (\d\.\d\d)", shown)
        assert found is not None and (float(found[1]) > 0.8) is mask, shown


def test_broken_reward_models(check: Check, folder: Path, tmp_path: Path) -> None:
    source = folder / "outputs" / "rm"
    for name, spoil, message in (
        ("weights", lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        ("template", lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), "template"),
        ("config", lambda f: (f / "config.json").write_text("{"), "config.json"),
    ):
        copy = tmp_path / name
        copy.mkdir()
        for file in source.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        spoil(copy)
        passed, shown = check(LORA, reward_model=copy)
        assert not passed and message in shown, shown


def test_no_weight_is_loaded(check: Check, folder: Path, tmp_path: Path) -> None:
    """A reward model and a policy of four billion parameters whose weights are not there."""
    rm = tmp_path / "rm"
    numbers = large_reward_model(rm, folder / "outputs" / "rm", Qwen3VLConfig(**QWEN3_VL_4B))
    assert numbers > 4e9
    Qwen3VLConfig(**QWEN3_VL_4B).save_pretrained(tmp_path / "policy")
    save_file({}, tmp_path / "policy" / "model.safetensors")  # a whole file, in which nothing is
    started = time.monotonic()
    passed, shown = check(LORA, reward_model=rm, model_name_or_path=tmp_path / "policy")
    assert passed, shown
    assert time.monotonic() - started < 20
    assert f"{numbers / 1e6:,.1f} million numbers, names and shapes as expected" in shown
    assert re.search(r"weights 8\.(88|89) \+ a forward pass", shown), shown


def test_prompts_are_measured(check: Check, folder: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "x" * 500}]}, {"prompt": [{"role": "user", "content": "y"}]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passed, shown = check(LORA, dataset="prompts.jsonl")
    assert passed and "read 2 of them" in shown
    tokens = int(re.search(r"prompt (\d+) \+ 8 completions of 1024", shown)[1])  # type: ignore[index]
    assert 500 < tokens < 540
    (folder / "prompts.jsonl").write_text('{"question": "?"}\n')
    passed, shown = check(LORA, dataset="prompts.jsonl")
    assert not passed and "columns ['question'], expected prompt among them" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read (nothing in it)"),
        ('{"prompt": "?"}\n{"prom', "cannot be read (JSON parse error"),
        ('{"prompt": 3}', "row 0: prompt is 3, expected text or a list of messages"),
        ('{"prompt": "?"}\n{"prompt": null}', "row 1: prompt is None"),
        ('{"prompt": [{"content": "?"}]}', "role"),
    ],
)
def test_prompts_that_cannot_be_read(content: str, message: str, check: Check, folder: Path) -> None:
    (folder / "prompts.jsonl").write_text(content)
    for field in ("dataset", "eval_dataset"):
        passed, shown = check(LORA, **{field: "prompts.jsonl"})
        assert not passed and message in shown, shown


def test_policies_that_cannot_be_loaded(check: Check, folder: Path, tmp_path: Path) -> None:
    for name, spoil, message in (
        ("missing", lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        ("cut", lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors is cut off"),
        ("config", lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        ("kind", lambda f: (f / "config.json").write_text('{"model_type": "other"}'), "model type `other`"),
    ):
        copy = tmp_path / name
        shutil.copytree(folder / "policy", copy)
        spoil(copy)
        passed, shown = check(LORA, model_name_or_path=copy)
        assert not passed and message in shown, shown


def test_memory_is_compared_with_that_of_the_machine(
    check: Check, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, whose size is known here. 4.4 billion weights in float32 are 17.8 GB, the tiny ones some MB."""
    common = {"model_name_or_path": folder / "policy", "output_dir": tmp_path / "run"}
    recipe, tiny_model = "policy_tiny_handwriting_cpu.yaml", folder / "outputs" / "rm"
    large_reward_model(tmp_path / "large", tiny_model, Qwen3VLConfig(**QWEN3_VL_4B))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    passed, shown = check(recipe, **common, reward_model=tiny_model)
    assert passed and f"of {whole:.1f} GB; the policy comes on top" in shown, shown
    monkeypatch.setattr("mr_reward.doctor.reward_model.device_memory", lambda **options: 10e9)
    passed, shown = check(recipe, **common, reward_model=tmp_path / "large")
    assert not passed and re.search(r"weights 17\.\d\d .* of 10\.0 GB.*: it does not fit", shown), shown
    dense = {"reward_model": tiny_model, "reward_attn_implementation": "sdpa"}
    passed, shown = check(recipe, **common, **dense, reward_max_tokens=int((10e9 / 3) ** 0.5))  # its mask alone
    assert passed and "too tight; lower reward_max_tokens" in shown, shown


def test_each_rank_shows_what_is_red_and_the_first_shows_all(
    folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = WorldPolicyArguments(reward_model=str(folder / "outputs" / "rm"), num_digits=1)
    common = {"num_generations": 8, "bf16": False, "use_cpu": True, "report_to": "none"}
    for rank, output, good, titles in (
        (0, tmp_path, True, ["rank 0: may start", "who holds what"]),
        (1, tmp_path, True, []),
        (
            0,
            folder / "policy" / "config.json" / "run",
            False,
            ["rank 0: not started", "who holds what", "cannot be written"],
        ),
        (1, folder / "policy" / "config.json" / "run", False, ["rank 1: not started", "cannot be written"]),
    ):
        kind = type("Arguments", (PolicyTrainingArguments,), {"process_index": rank})
        args = kind(output_dir=str(output), **common)
        assert check_before_start(recipe, args, ModelConfig(str(folder / "policy"))) is good
        shown = re.sub(r"\s+", " ", capfd.readouterr().err)
        assert all(title in shown for title in titles) and ("green" in shown) is (rank == 0), shown


def test_prompts_with_images_as_the_recipes_data_set_has_them(folder: Path) -> None:
    """trl-lib/rlaif-v: `text` is null in the image's block."""
    from datasets import Dataset, Image, List
    from PIL import Image as PILImage

    content = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    rows = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": content}]],
            "images": [[PILImage.new("RGB", (56, 56))]],
            "chosen": [[{"role": "assistant", "content": [{"type": "text", "text": "A", "x": None}]}]],
        }
    ).cast_column("images", List(Image()))
    rows.save_to_disk(str(folder / "rows"))
    rows.to_parquet(str(folder / "parquet" / "train.parquet")) if (folder / "parquet").mkdir() is None else None
    (group,) = first_prompts(PolicyArguments(dataset=str(folder / "parquet")))
    assert len(group.images) == 1 and [block["type"] for block in group.messages[0]["content"]] == ["image", "text"]


def test_servers(check: Check) -> None:
    """A vLLM server or a scoring server need not run yet; one that does is looked at."""
    passed, shown = check("policy_qwen3vl_4b_2nodes_vllm_server.yaml", vllm_server_host="127.0.0.1")
    assert passed and "it need not run yet" in shown
    scorer = GroupScorer(reward_model("llama"), over_length="drop_group")
    with running(build_app(scorer)) as url:
        passed, shown = check(LORA, reward_server=url)
        assert passed and f"{url}: layout set, model {weights_digest(scorer.model)}" in shown
        passed, shown = check(LORA, reward_server=url, reward_server_hash="abc")
        assert not passed and "expected abc" in shown
    passed, shown = check(LORA, reward_server=url)
    assert passed and "it need not run yet" in shown


def test_from_the_command_line(folder: Path) -> None:
    command = [sys.executable, str(RECIPES / "train_policy.py"), "--config", str(RECIPES / LORA), "--dry_run"]
    good = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run([*command, "--reward_model", "./no"], cwd=folder, capture_output=True, text=True, timeout=100)
    assert bad.returncode == 1 and "./no is no folder" in bad.stdout and "Traceback" not in bad.stderr


def test_launch_files(tmp_path: Path) -> None:
    found = {path.name: read_launch(path) for path in ACCELERATE.glob("*.yaml")}
    assert found["zero3.yaml"] == Launch(num_processes=8, num_machines=1, zero_stage=3)
    assert found["zero2_cpu.yaml"] == Launch(num_processes=2, zero_stage=2)
    assert found["zero3_offload.yaml"].zero_stage == 3 and len(found) == 8
    path = tmp_path / "a.yaml"
    for content, message in (
        ("[", "cannot be read"),
        ("a: 1", "has no num_processes"),
        (yaml.safe_dump({"num_processes": 2, "deepspeed_config": {"zero_stage": 4}}), "zero_stage 4, expected 0"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match=re.escape(message)):
            read_launch(path)


def test_deepspeed_in_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found from the accelerate file and from the environment that `accelerate launch` makes of it."""
    inner, outer = tmp_path / "zero.json", tmp_path / "accelerate.yaml"
    inner.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    outer.write_text(yaml.safe_dump({"num_processes": 4, "deepspeed_config": {"deepspeed_config_file": str(inner)}}))
    expected = Launch(num_processes=4, zero_stage=3)
    assert read_launch(outer) == expected
    for name, value in (
        ("WORLD_SIZE", 4),
        ("LOCAL_WORLD_SIZE", 2),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", inner),
    ):
        monkeypatch.setenv(name, str(value))
    assert read_environment() == replace(expected, num_machines=2) and read_environment().num_local_processes == 2
    inner.write_text("[")
    with pytest.raises(ConfigurationError, match="cannot be read as DeepSpeed's configuration"):
        read_launch(outer)
