"""The deep imports that README, docs and recipes of 0.1.0 showed: they work, warn once, and give the same objects."""

import importlib
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mr_reward.moved import MOVED

ROOT = Path(__file__).resolve().parents[2]
# What 0.1.0 showed by an import in README, docs or recipes, by a name in their text, or on a page of the reference.
DOCUMENTED = {
    "attention": ["BACKENDS", "attention_mask", "check_backend"],
    "backbones": ["get_adapter"],
    "checkpoint": ["export_paper_format", "merge"],
    "configuration": ["MultiResponseRewardConfig"],
    "data.degenerate": ["MASTER_KEYS", "with_degenerate_negative"],
    "data.handwriting": ["grade", "is_correct", "make_groups", "make_policy_rows", "make_sft_rows", "make_tasks"],
    "data.preferences": ["load_preferences"],
    "data.scored": ["read_scored"],
    "data.tiny": ["build_qwen3_vl", "build_qwen3_vl_processor", "build_llama", "build_tokenizer"],
    "errors": ["ConfigurationError"],
    "evaluation.attacks": ["run_attacks"],
    "evaluation.figures": ["plot_curves", "plot_scored_groups"],
    "evaluation.handwriting": ["handwriting_accuracy", "policy_answers"],
    "evaluation.ranking": ["evaluate_ranking"],
    "evaluation.run": ["evaluate_benchmark"],
    "evaluation.scorers": ["load_scorer"],
    "groups": ["ResponseGroup", "dense_ranks"],
    "grpo.arguments": ["PolicyTrainingArguments"],
    "grpo.doctor": ["check_before_start", "examine_machine", "examine_recipe"],
    "grpo.findings": ["may_start", "show_findings"],
    "grpo.group_log": ["GroupLog"],
    "grpo.recipe": ["PolicyArguments", "load_prompts", "make_reward", "other_rewards"],
    "grpo.resume": ["ContinuedEpochs", "checkpoint_to_resume"],
    "grpo.reward": ["MultiResponseReward"],
    "grpo.run_figure": ["RunFigure"],
    "grpo.validation": ["PolicyValidation"],
    "grpo.vllm_cpu": ["prepare_vllm_on_cpu"],
    "grpo.vllm_images": ["send_single_placeholders"],
    "grpo.vllm_server": ["check_vllm_server"],
    "grpo.warning_signs": ["WarningSigns"],
    "integrations.ms_swift": ["register"],
    "integrations.openrlhf": [],
    "integrations.verl": ["compute_score", "compute_score_single"],
    "layouts": ["LAYOUTS", "TokenKind", "plan_row", "visible"],
    "losses": ["LOSSES", "best_of_n_cross_entropy", "get_loss", "pairwise_bradley_terry", "plackett_luce"],
    "metrics": ["best_of_n_accuracy", "pairwise_accuracy"],
    "model_card": ["write_model_card"],
    "modeling": ["MultiResponseRewardConfig", "MultiResponseRewardModel", "RewardOutput"],
    "scoring": ["GroupScorer", "GroupScores", "Scorer"],
    "serving.client": ["RemoteScorer"],
    "serving.server": ["build_app", "serve"],
    "training.arguments": ["RewardTrainingArguments"],
    "training.saving": ["naming_a_full_disk"],
    "training.trainer": ["RewardTrainer"],
    "zero3": ["outside_zero3"],
}


def fresh(code: str) -> list[str]:
    """The lines that a new interpreter prints."""
    command = [sys.executable, "-W", "error", "-W", "always::FutureWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_old_place_warns_once_and_gives_the_object_of_the_new_one() -> None:
    """All in one process, twice, each import in a line of its own."""
    lines = ["import json, warnings, mr_reward", "told = []"]
    lines += ["warnings.showwarning = lambda message, kind, file, *rest: told.append([str(message), file])"]
    for module, names in DOCUMENTED.items():
        lines += [f"from mr_reward.{module} import {name} as {name.replace('.', '_')}" for name in names] * 2
    found = json.loads(fresh("\n".join([*lines, "print(json.dumps(told))"]))[-1])
    ours = [(message, file) for message, file in found if "the old place goes" in message]
    expected = [
        old.replace(":", ".")
        for old in MOVED
        if not (":" in old and old.partition(":")[0] in MOVED)  # told with the import of its module
    ]
    assert sorted(message.split()[0].removeprefix("mr_reward.") for message, _ in ours) == sorted(expected)
    assert {file for _, file in ours} == {"<string>"}  # the line that imports, not ours


@pytest.mark.filterwarnings("ignore:.*the old place goes:FutureWarning")
def test_documented_names_are_those_of_their_new_place() -> None:
    for module, names in DOCUMENTED.items():
        for name in names:
            old = getattr(importlib.import_module(f"mr_reward.{module}"), name)
            place = MOVED.get(f"{module}:{name}") or f"{MOVED.get(module, module)}:{name}"
            home, _, new_name = place.partition(":")
            assert old is getattr(importlib.import_module(f"mr_reward.{home}"), new_name), (module, name)


def test_the_table_has_what_was_documented_and_no_chains() -> None:
    assert {old.partition(":")[0] for old in MOVED} <= set(DOCUMENTED)
    new = {place.partition(":")[0] for place in MOVED.values()}
    assert not new & {old for old in MOVED if ":" not in old}
    assert all(Path(ROOT, "mr_reward", *place.split(".")).with_suffix(".py").is_file() for place in new)


def test_new_places_are_not_touched_by_the_old() -> None:
    """Python's import writes the spec of what it asked for into what it gets."""
    code = "import mr_reward.losses, mr_reward.training.losses as new; print(new.__spec__.name, new.__name__)"
    assert fresh(code) == ["mr_reward.training.losses mr_reward.training.losses"]


def test_walking_through_all_modules_loads_nothing() -> None:
    code = (
        "import inspect, sys, mr_reward.modeling\n"
        "[getattr(module, '__file__', None) for module in list(sys.modules.values())]\n"
        "print('torch' in sys.modules)"
    )
    assert fresh(code) == ["False"]


@pytest.mark.filterwarnings("ignore:.*the old place goes:FutureWarning")
def test_pickles_of_0_1_0_load() -> None:
    """`training_args.bin` of both trainers names the class by module."""
    for module, name in (
        ("training.arguments", "RewardTrainingArguments"),
        ("grpo.arguments", "PolicyTrainingArguments"),
    ):
        loaded = pickle.loads(f"cmr_reward.{module}\n{name}\n.".encode())
        assert loaded.__name__ == name


@pytest.mark.parametrize("name", ["modelling", "grpo.doctors", "losses.x"])
def test_what_never_was_is_not_found(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"mr_reward.{name}")
