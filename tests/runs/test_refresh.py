"""A reward model that is refreshed in a real GRPO run, and by the command between two parts of one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from killed_runs import policy_world, recipe_file
from launching import environment
from refresh_truth import early_letter
from safetensors.torch import load_file
from tiny_runs import SHORT_RUN, handwriting_rows, save_policy_that_sees
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from typer.testing import CliRunner

from mr_reward import GroupScorer, MultiResponseReward, MultiResponseRewardModel, ResponseGroup
from mr_reward.cli.app import app
from mr_reward.data.groups_file import load_preferences, save_preferences
from mr_reward.errors import ConfigurationError
from mr_reward.runs.refresh import learn
from mr_reward.runs.refresh_callback import RefreshCallback
from mr_reward.runs.resume import ContinuedEpochs
from mr_reward.templates.images import load_image
from mr_reward.training.batches import GroupCollator
from mr_reward.training.further import FurtherSteps, train_further
from mr_reward.worlds.world_policy import handwriting_accuracy

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 48
TOP_K = 16  # few different tokens, so that what is learnt of some rollouts tells of others


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)  # a new reward model draws its head
    return policy_world(tmp_path_factory.mktemp("refresh"), NUM_PROMPTS)


@pytest.fixture(scope="module")
def old(world: Path) -> list[ResponseGroup]:
    """Groups that the reward model might have been trained on, some of them with the prompts of the run."""
    rng = random.Random(0)
    groups = []
    for i in range(40):
        texts = [f"{rng.choice('abcxyz')} {i} {j}" for j in range(3)]
        prompt = [{"role": "user", "content": f"Say {i}" if i % 2 else f"Write {i}"}]
        groups.append(ResponseGroup(prompt=prompt, responses=texts, rankings=[1, 2, 2], id=f"old {i}"))
    save_preferences(groups, world / "old.jsonl")
    return groups


def make_trainer(world: Path, out: Path, *more_rewards: Any, rloo: bool = False, **changes: Any) -> Any:
    options = {
        **SHORT_RUN,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "top_k": TOP_K,
        **changes,
    }
    kind, config = (RLOOTrainer, RLOOConfig) if rloo else (GRPOTrainer, GRPOConfig)
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    return kind(
        model=str(world / "policy"),
        reward_funcs=[MultiResponseReward(world / "rm", num_generations=4), early_letter, *more_rewards],
        args=config(str(out), **options),
        train_dataset=Dataset.from_list(rows),
        callbacks=[ContinuedEpochs()],
    )


def add_refresh(trainer: Any, **changes: Any) -> RefreshCallback:
    options = {"every": 2, "verifier": early_letter, "num_prompts": 40, "steps": 40, **changes}
    options = {"batch_size": 8, "learning_rate": 3e-3, **options}
    callback = RefreshCallback(trainer, **options)
    trainer.add_callback(callback)
    return callback


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Of the reward model that a trainer asks."""
    return {name: each.detach().clone() for name, each in trainer.reward_funcs[0].scorer.model.named_parameters()}


def logged(trainer: Any) -> list[dict[str, float]]:
    """The history without what depends on the clock, and without the lines of the refresh."""
    clock = ("step_time", "ms_per_group", "runtime", "second")
    entries = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    return [{k: v for k, v in entry.items() if not k.endswith(clock) and "refresh" not in k} for entry in entries]


def naive_share(scorer: GroupScorer, groups: list[ResponseGroup]) -> float:
    """Right above wrong, counted pair by pair."""
    shares = []
    for group, scores in zip(groups, scorer.score(groups), strict=True):
        ranked = list(zip(group.rankings or (), scores, strict=True))
        pairs = [(a, b) for rank, a in ranked if rank == 1 for other, b in ranked if other > 1]
        if pairs:
            shares.append(statistics.fmean((a > b) + 0.5 * (a == b) for a, b in pairs))
    return statistics.fmean(shares)


@pytest.mark.parametrize("rloo", [False, True])
def test_the_refreshed_reward_model_ranks_new_rollouts_better(
    world: Path, old: list[ResponseGroup], tmp_path: Path, rloo: bool
) -> None:
    trainer = make_trainer(world, tmp_path, rloo=rloo, max_steps=3)
    begin = weights(trainer)
    add_refresh(trainer, groups=old, batch_size=16)
    trainer.train()
    folder = tmp_path / "refresh-2"
    assert {path.name for path in tmp_path.glob("refresh-*")} == {"refresh-2"}
    train, heldout = (load_preferences(folder / f"{name}.jsonl") for name in ("train", "heldout"))
    entry = next(entry for entry in trainer.state.log_history if entry["step"] == 2)
    before, after = (entry[f"mr_reward/refresh/right_above_wrong_{when}"] for when in ("before", "after"))
    for model, found in ((world / "rm", before), (folder / "rm", after)):
        assert found == pytest.approx(naive_share(GroupScorer.from_pretrained(model), heldout), abs=1e-6)
    assert after > before + 0.1, (before, after)

    # The labels are the verifier's, the prompts of the run's set, and those of the two sides differ.
    sides = [{group.messages[-1]["content"][0]["text"] for group in side} for side in (train, heldout)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert sides[0] | sides[1] <= {f"Say {i}" for i in range(NUM_PROMPTS)}
    for group in train + heldout:
        assert len(set(group.responses)) == group.num_responses <= 4
        assert list(group.ratings or ()) == early_letter(list(group.responses))
        truths = early_letter(list(group.responses))
        assert [rank == 1 for rank in group.rankings or ()] == [truth == max(truths) for truth in truths]
    # The run asks the new one, which is the one that was written.
    saved = dict(MultiResponseRewardModel.from_pretrained(folder / "rm").named_parameters())
    assert all(torch.equal(saved[name], weight) for name, weight in weights(trainer).items())
    assert any(not torch.equal(begin[name], weight) for name, weight in weights(trainer).items())


def test_of_pictures_too(world: Path, tmp_path: Path) -> None:
    save_policy_that_sees(tmp_path / "policy")
    MultiResponseRewardModel.from_backbone(tmp_path / "policy").save_pretrained(tmp_path / "rm")
    rows = handwriting_rows("train", 12)
    given = {"num_generations": 4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16}
    trainer = GRPOTrainer(
        model=str(tmp_path / "policy"),
        reward_funcs=[MultiResponseReward(tmp_path / "rm", num_generations=4)],
        args=GRPOConfig(str(tmp_path / "out"), **{**SHORT_RUN, **given}, max_steps=2, save_strategy="no"),
        train_dataset=rows,
    )

    def verifier(completions: list[Any], **columns: Any) -> list[float]:
        """Asks the truth, which needs the columns; a policy that knows nothing is graded by what it wrote first."""
        assert set(handwriting_accuracy(completions, **columns)) <= {0.0, 1.0}
        return [float(ord(one[-1]["content"][:1] or "a") % 2) for one in completions]

    add_refresh(trainer, verifier=verifier, every=1, num_prompts=12, steps=2, batch_size=4, holdout=0.4)
    trainer.train()
    groups = load_preferences(tmp_path / "out" / "refresh-1" / "labelled.jsonl")
    pixels = {load_image(row["image"] if "image" in row else row["images"][0]).tobytes() for row in rows}
    assert len(groups) > 4 and all(load_image(group.images[0]).tobytes() in pixels for group in groups)


def lucky(completions: list[Any], **_: Any) -> list[float]:
    """A reward that draws from Python's and numpy's random states."""
    return [random.random() + float(np.random.random()) for _ in completions]


def test_a_run_whose_refresh_teaches_nothing_is_the_run_without_it(world: Path, tmp_path: Path) -> None:
    """What is drawn, switched and trained for a refresh leaves nothing behind but the weights."""
    runs = []
    for name in ("with", "without"):
        options = {"max_steps": 5, "steps_per_generation": 2, "log_completions": True}
        trainer = make_trainer(world, tmp_path / name, lucky, **options)
        if name == "with":
            add_refresh(trainer, learning_rate=1e-30, steps=4)
        trainer.train()
        runs.append(trainer)
    assert {path.name for path in (tmp_path / "with").glob("refresh-*")} == {"refresh-2", "refresh-4"}
    assert logged(runs[0]) == logged(runs[1])
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, other)
    for file in (tmp_path / "without" / "completions").iterdir():
        assert (tmp_path / "with" / "completions" / file.name).read_bytes() == file.read_bytes()


def test_a_resumed_run_has_the_refreshed_reward_model(world: Path, old: list[ResponseGroup], tmp_path: Path) -> None:
    def run(out: Path, resume: bool | str | None = None, **changes: Any) -> Any:
        trainer = make_trainer(world, out, max_steps=5, save_strategy="steps", save_steps=3, **changes)
        add_refresh(trainer, groups=old, steps=6)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, broken = run(tmp_path / "whole"), tmp_path / "broken"
    for name in ("checkpoint-3", "refresh-2", "refresh-4"):  # the last one is behind the checkpoint
        shutil.copytree(tmp_path / "whole" / name, broken / name)
    resumed = run(broken, resume=True)
    assert logged(resumed) == logged(whole)
    own = weights(resumed)
    assert all(torch.equal(own[name], weight) for name, weight in weights(whole).items())
    # Its checkpoint may lie elsewhere.
    named = str(tmp_path / "whole" / "checkpoint-3")
    assert logged(run(tmp_path / "elsewhere", resume=named, resume_from_checkpoint=named)) == logged(whole)


def test_a_new_run_does_not_take_up_the_refreshes_of_an_earlier_one(world: Path, tmp_path: Path) -> None:
    for _ in range(2):
        trainer = make_trainer(world, tmp_path, max_steps=3)
        callback = add_refresh(trainer, steps=4)
        begin = weights(trainer)
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        assert all(torch.equal(begin[name], weight) for name, weight in weights(trainer).items())
        assert not (tmp_path / "refresh-2" / "refresh.json").exists()
        trainer.train()
        assert (tmp_path / "refresh-2" / "refresh.json").exists()


def test_where_all_are_right_nothing_is_refreshed(world: Path, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, max_steps=3)
    begin = weights(trainer)
    add_refresh(trainer, verifier=lambda completions, **_: [1.0] * len(completions))
    trainer.train()
    assert all(torch.equal(begin[name], weight) for name, weight in weights(trainer).items())
    assert not any("refresh" in key for entry in trainer.state.log_history for key in entry)


def test_what_cannot_work_is_refused(world: Path, tmp_path: Path) -> None:
    async def slow(**_: Any) -> list[float]:
        return []

    trainer = make_trainer(world, tmp_path)

    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(ConfigurationError, match=words):
            add_refresh(trainer, **changes)

    refused("every is 0", every=0)
    refused("holdout is 1", holdout=1)
    refused("asynchronous", verifier=slow)
    refused("unexpected keyword argument 'epochs'", epochs=3)
    refused("learning rate is 0", learning_rate=0)
    refused("share is 0", share=0)
    weight = next(trainer.model.parameters())
    weight.ds_id = 0  # how ZeRO-3 marks what it has cut
    refused("partitioned")
    del weight.ds_id
    trainer.args.per_device_eval_batch_size = 6
    refused("6 rollouts on all devices, expected a multiple of 4")
    trainer.args.per_device_eval_batch_size = 8
    data, trainer.train_dataset = trainer.train_dataset, trainer.train_dataset.to_iterable_dataset()
    refused("is a stream")
    trainer.train_dataset = data
    model = trainer.reward_funcs[0].scorer.model
    model.head.register_parameter("eight", torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    refused("quantized")
    trainer.reward_funcs[0] = MultiResponseReward(world / "rm", num_generations=4, placement="offload")
    refused("behind a OffloadedScorer")
    trainer.reward_funcs = [early_letter]
    refused("has 0 MultiResponseReward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_further_steps_are_those_of_a_plain_loop(world: Path, old: list[ResponseGroup], dtype: torch.dtype) -> None:
    """One group a step, so that its order is all that is drawn; layout `set` does not depend on it."""
    how = FurtherSteps(steps=30, batch_size=1, learning_rate=1e-3)
    scorer, plain = (
        GroupScorer.from_pretrained(world / "rm", dtype=kind, max_tokens_per_batch=512) for kind in (dtype, None)
    )
    group = old[0]
    train_further(scorer, [group], [], how)
    optimizer = torch.optim.AdamW(plain.model.parameters(), weight_decay=0.0)
    rows = GroupCollator(plain.packer)([group])["rows"]
    for step in range(how.steps):
        plain.model.zero_grad()
        loss = -plain.model(rows=rows).scores[0].log_softmax(0)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / how.steps)
        optimizer.step()
    (found,), (expected,) = scorer.score([group]), plain.score([group])
    assert expected[0] - max(expected[1:]) > 1.0, "it learns"
    assert found == pytest.approx(expected, abs=1e-3 if dtype == torch.float32 else 0.5)


def run_with_checkpoint(world: Path, folder: Path) -> list[str]:
    """A run that stopped at its second step; the arguments of its refresh."""
    make_trainer(world, folder, max_steps=2, save_strategy="steps", save_steps=2).train()
    config = {
        "model_name_or_path": str(world / "policy"),
        "reward_model": str(world / "rm"),
        "output_dir": str(folder),
        "dataset": str(world / "prompts.jsonl"),
        **{key: SHORT_RUN[key] for key in ("num_generations", "max_completion_length", "use_cpu", "bf16")},
        "per_device_train_batch_size": 3,  # with one process TRL would refuse it
        "save_steps": 2,
        "top_k": TOP_K,
    }
    recipe = recipe_file(folder, config)
    given = [str(folder), "--config", recipe, "--verifier", "refresh_truth.early_letter"]
    return [*given, "--groups", str(world / "old.jsonl"), "--learning-rate", "3e-3", "--prompts", "44"]


def test_the_command_refreshes_between_two_parts_of_a_run(
    world: Path, old: list[ResponseGroup], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = run_with_checkpoint(world, run)

    def command(*more: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["refresh", *given, *more])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output + str(result.exception or "")

    told = command("--steps", "40")
    rm = run / "refresh-2" / "rm"
    assert f"--resume_from_checkpoint true --reward_model {rm}" in told
    result = json.loads((run / "refresh-2" / "refresh.json").read_text())
    heldout = load_preferences(run / "refresh-2" / "heldout.jsonl")
    for model, found in ((world / "rm", result["before"]), (rm, result["after"])):
        assert found[0] == pytest.approx(naive_share(GroupScorer.from_pretrained(model), heldout), abs=1e-6)
    assert result["after"][0] > result["before"][0] + 0.1, result
    # Done: the same again is told, anything else refused.
    before = rm.stat().st_mtime_ns
    assert f"{result['after'][0]:.3f}" in command("--steps", "40") and rm.stat().st_mtime_ns == before
    assert "begun with other settings (steps: 40)" in command("--steps", "30", code=1)
    assert "no option or field --nothing" in command("--nothing", "1", code=1)
    # The run goes on with it.
    trainer = make_trainer(world, run, max_steps=3, save_strategy="steps", save_steps=3)
    trainer.reward_funcs[0] = MultiResponseReward(rm, num_generations=4)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert [entry["step"] for entry in logged(trainer)][-1] == 3


def test_the_command_waits_for_who_labels(world: Path, tmp_path: Path) -> None:
    given = run_with_checkpoint(world, tmp_path / "run")
    given = given[: given.index("--verifier")] + ["--steps", "2", "--prompts", "30"]
    folder = tmp_path / "run" / "refresh-2"
    result = CliRunner().invoke(app, ["refresh", *given])
    assert result.exit_code == 3 and f"mr-reward label {folder / 'rollouts.jsonl'}" in result.output
    label = ["label", str(folder / "rollouts.jsonl"), "--verifier", "refresh_truth.early_letter"]
    assert CliRunner().invoke(app, [*label, "--out", str(folder / "labelled.jsonl")]).exit_code == 0
    result = CliRunner().invoke(app, ["refresh", *given])
    assert result.exit_code == 0 and (folder / "rm" / "SHA256SUMS").exists(), result.output
    # Without a checkpoint a run could not go on.
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    result = CliRunner().invoke(app, ["refresh", *given])
    assert result.exit_code == 1 and "holds no whole checkpoint" in str(result.exception)


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(world: Path, old: list[ResponseGroup], tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = [
        sys.executable,
        "-c",
        "from mr_reward.cli import main; main()",
        "refresh",
        *run_with_checkpoint(world, run),
        "--steps",
        "60",
    ]
    env = {**environment(), "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    folder = run / "refresh-2"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(given, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def result() -> list[Any]:
        process = start()
        told = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 0, told
        lines = [json.loads((folder / "refresh.json").read_text())]
        lines += [(folder / f"{name}.jsonl").read_bytes() for name in ("train", "heldout")]
        return [*lines, load_file(folder / "rm" / "model.safetensors")]

    def killed(when: Callable[[], bool]) -> None:
        process = start()
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline and not when():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert not (folder / "refresh.json").exists(), "it was to be killed on its way"

    part = folder / "rollouts.jsonl.part0"
    killed(lambda: part.exists() and part.read_bytes().count(b"\n") > 2)
    killed((folder / "train.jsonl").exists)
    kept = (folder / "train.jsonl").stat().st_mtime_ns
    killed((folder / "rm").exists)
    *found, model = result()
    assert (folder / "train.jsonl").stat().st_mtime_ns == kept
    shutil.rmtree(folder)
    *expected, uninterrupted = result()
    assert found == expected
    assert all(torch.equal(model[name], weight) for name, weight in uninterrupted.items())


@pytest.mark.slow
def test_two_processes_refresh_as_one_does(world: Path, old: list[ResponseGroup], tmp_path: Path) -> None:
    """Sampling differs with the number of processes; from the same rollouts one process makes the same model."""
    out = tmp_path / "out"
    config = {
        **SHORT_RUN,
        "model_name_or_path": str(world / "policy"),
        "reward_model": str(world / "rm"),
        "output_dir": str(out),
        "dataset": str(world / "prompts.jsonl"),
        "verifiers": ["refresh_truth.early_letter"],
        "refresh_steps": 2,
        "refresh_groups": [str(world / "old.jsonl")],
        "refresh_learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
        "top_k": TOP_K,
        "max_steps": 5,
        "save_steps": 5,
        "skip_doctor": True,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu", "--main_process_port", "0"]
    command += [str(ROOT / "grpo_recipes" / "train_policy.py"), "--config", recipe_file(out, config)]
    env = {**environment(), "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    model = str(world / "rm")
    for step in (2, 4):
        folder = out / f"refresh-{step}"
        groups = load_preferences(folder / "labelled.jsonl")
        assert len(groups) > 40
        shutil.copytree(folder, tmp_path / "alone", ignore=shutil.ignore_patterns("rm"))
        scorer = GroupScorer.from_pretrained(model)
        alone = learn(tmp_path / "alone", step, scorer, old, FurtherSteps(learning_rate=3e-3))
        told = json.loads((folder / "refresh.json").read_text())
        assert alone is not None and list(alone.after) == pytest.approx(told["after"], abs=1e-5)
        one, two = (load_file(place / "rm" / "model.safetensors") for place in (tmp_path / "alone", folder))
        for name, weight in one.items():
            torch.testing.assert_close(weight, two[name], rtol=0, atol=1e-5)
        model = str(folder / "rm")
        shutil.rmtree(tmp_path / "alone")
