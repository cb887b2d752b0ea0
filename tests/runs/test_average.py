"""The average of a policy's weights in real GRPO runs: against a naive one over the recorded steps."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import SHORT_RUN
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from mr_reward import MultiResponseReward, MultiResponseRewardModel
from mr_reward.errors import ConfigurationError
from mr_reward.grpo.telemetry import GroupLog
from mr_reward.runs.average import EMACallback
from mr_reward.runs.callbacks import PolicyValidation
from mr_reward.runs.resume import ContinuedEpochs
from mr_reward.worlds import tiny

PROMPTS = [{"prompt": [{"role": "user", "content": f"Say {word}"}]} for word in range(8)]


def digits(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs from completion to completion."""
    return [sum(letter < "n" for letter in completion[0]["content"]) / 4 for completion in completions]


class Recorder(TrainerCallback):
    """Keeps the trained weights after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.steps.append({name: each.detach().double().clone() for name, each in weights.items()})


class Seed(TrainerCallback):
    """Evaluations of the average begin with a random state that a test can give again."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(state.global_step)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 0), ("backbone", 1)):
        tiny.build_llama(seed).save_pretrained(folder / name)
        tiny.build_tokenizer().save_pretrained(folder / name)
    MultiResponseRewardModel.from_backbone(folder / "backbone").save_pretrained(folder / "rm")
    return folder


def make_trainer(
    models: Path,
    out: Path,
    *callbacks: TrainerCallback,
    policy: Path | None = None,
    more_rewards: Sequence[Any] = (),
    **changes: Any,
) -> Any:
    reward = MultiResponseReward(models / "rm", num_generations=4, group_log=changes.pop("group_log", None))
    peft_config = (
        LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear") if changes.pop("lora", False) else None
    )
    kind, config = (RLOOTrainer, RLOOConfig) if changes.pop("rloo", False) else (GRPOTrainer, GRPOConfig)
    options = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        **SHORT_RUN,
        **changes,
    }
    return kind(
        model=str(policy or models / "policy"),
        reward_funcs=[reward, digits, *more_rewards],
        args=config(str(out), **options),
        train_dataset=Dataset.from_list(PROMPTS),
        eval_dataset=Dataset.from_list(PROMPTS),
        callbacks=[ContinuedEpochs(), *callbacks],
        peft_config=peft_config,
    )


def naive(steps: list[dict[str, torch.Tensor]], half_life: float) -> dict[str, torch.Tensor]:
    """The weighted mean of all steps, as it is written down, in float64."""
    shares = [0.5 ** ((len(steps) - 1 - i) / half_life) for i in range(len(steps))]
    return {
        name: sum(share * step[name] for share, step in zip(shares, steps, strict=True)) / sum(shares)
        for name in steps[0]
    }


def load(folder: Path, lora: bool) -> Any:
    return (AutoPeftModelForCausalLM if lora else AutoModelForCausalLM).from_pretrained(folder)


def logged(trainer: Any) -> list[dict[str, float]]:
    """The history without what depends on the clock."""
    clock = ("step_time", "ms_per_group", "runtime", "second")
    entries = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    return [{k: v for k, v in entry.items() if not k.endswith(clock)} for entry in entries]


@pytest.mark.parametrize("half_life", [0.7, 3.0, 200.0])
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_is_the_weighted_mean_of_the_steps(
    models: Path, tmp_path: Path, lora: bool, half_life: float
) -> None:
    recorder = Recorder()
    trainer = make_trainer(models, tmp_path, recorder, lora=lora, seed=int(half_life))
    trainer.add_callback(EMACallback(trainer, half_life=half_life))
    trainer.train()
    trainer.save_model(str(tmp_path))
    expected = naive(recorder.steps, half_life)
    last = recorder.steps[-1]
    distance = max(float((expected[name] - last[name]).abs().max()) for name in last)
    assert len(recorder.steps) == 5 and distance > 1e-3, "the weights hardly move, so this test shows little"
    for folder, weights in ((tmp_path, last), (tmp_path / "ema", expected)):
        loaded = dict(load(folder, lora).named_parameters())
        for name, weight in weights.items():
            torch.testing.assert_close(loaded[name].detach().double(), weight, rtol=0, atol=1e-6)
    assert (tmp_path / "ema" / "model.safetensors").exists() is not lora, "of LoRA only the adapter"
    for name, weight in trainer.model.named_parameters():
        if name in last:
            assert torch.equal(weight.detach().double(), last[name]), "the policy itself is the last one"


def lucky(completions: list[Any], **_: Any) -> list[float]:
    """A reward that draws from Python's and numpy's random states."""
    return [random.random() + float(np.random.random()) for _ in completions]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_a_run_with_the_average_is_the_run_without_it(models: Path, tmp_path: Path, seed: int, lora: bool) -> None:
    """Its evaluations draw random numbers and switch the weights; nothing of that is left behind."""
    runs, checkpoints = [], []
    for name in ("with", "without"):
        out = tmp_path / name
        trainer = make_trainer(
            models,
            out,
            group_log=GroupLog(out / "groups", every=1),
            more_rewards=[lucky],
            lora=lora,
            log_completions=True,
            seed=seed,
            max_steps=7,  # the last evaluation is out of turn, the second epoch begins with the third step
            steps_per_generation=2,
            save_strategy="steps",
            save_steps=3,
        )
        reward = trainer.reward_funcs[0]
        trainer.add_callback(PolicyValidation(reward, out, console=Console(file=io.StringIO())))
        if name == "with":
            trainer.add_callback(EMACallback(trainer, half_life=2))
        trainer.train()
        runs.append(trainer)
        # weights, optimizer, schedule, random states
        states = sorted(path for step in (3, 6, 7) for path in (out / f"checkpoint-{step}").glob("*.*t*"))
        checkpoints.append({path.relative_to(out): path.read_bytes() for path in states if path.is_file()})
    with_average, without = runs
    of_average = [entry for entry in logged(with_average) if "eval_ema_loss" in entry]
    assert [entry["step"] for entry in of_average] == [2, 4, 6, 7]
    assert [entry for entry in logged(with_average) if "eval_ema_loss" not in entry] == logged(without)
    for (name, one), other in zip(with_average.model.named_parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    own = {"trainer_state.json", "training_args.bin"}  # have the clock, and the folder, in them
    for path, content in checkpoints[1].items():
        assert path.name in own or checkpoints[0][path] == content, path
    names = {path.name for path in checkpoints[1]}
    assert {"optimizer.pt", "rng_state.pth", "scheduler.pt"} < names and any("safetensors" in name for name in names)
    written = [path.relative_to(tmp_path / "without") for path in (tmp_path / "without").rglob("*step_*.jsonl")]
    written += [Path("completions") / f"completions_{step:05d}.parquet" for step in range(1, 8)]
    assert len(written) > 7 + 4
    for file in [Path("samples.md"), *written]:
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes(), file
    records = [json.loads(line) for line in (tmp_path / "with" / "validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6, 7]
    for record, entry in zip(records, of_average, strict=True):
        for key in ("eval_ema_mr_reward/score_mean", "eval_ema_rewards/digits/mean", "eval_ema_loss"):
            assert record[key] == entry[key]
        assert record["eval_mr_reward/score_mean"] != record["eval_ema_mr_reward/score_mean"]


@pytest.mark.parametrize("half_life", [3.0, 200.0])
def test_of_bfloat16_weights_the_average_is_in_float32(models: Path, tmp_path: Path, half_life: float) -> None:
    """In bfloat16 a share of 1 in 200 is rounded away, and the average would not move."""
    recorder = Recorder()
    options = {"save_strategy": "steps", "save_steps": 12, "max_steps": 12, "eval_strategy": "no"}
    trainer = make_trainer(models, tmp_path, recorder, model_init_kwargs={"dtype": "bfloat16"}, **options)
    trainer.add_callback(EMACallback(trainer, half_life=half_life))
    trainer.train()
    average = load_file(tmp_path / "checkpoint-12" / "ema" / "average.safetensors")
    saved = load_file(tmp_path / "checkpoint-12" / "ema" / "model.safetensors")
    coarse = 0.0
    for name, expected in naive(recorder.steps, half_life).items():
        assert average[name].dtype == torch.float32 and trainer.model.get_parameter(name).dtype == torch.bfloat16
        torch.testing.assert_close(average[name].double(), expected, rtol=0, atol=1e-6)
        coarse = max(coarse, float((expected.bfloat16().double() - expected).abs().max()))
        if name in saved:
            assert torch.equal(saved[name], average[name].bfloat16()), name
    assert coarse > 1e-4, "an average in bfloat16 would pass, so this test shows little"


@pytest.mark.parametrize("rloo", [False, True])
def test_its_metrics_are_those_of_a_policy_with_its_weights(models: Path, tmp_path: Path, rloo: bool) -> None:
    trainer = make_trainer(models, tmp_path, Seed(), max_steps=4, rloo=rloo)
    trainer.add_callback(EMACallback(trainer, half_life=2))
    trainer.train()
    trainer.save_model(str(tmp_path))
    found = next(entry for entry in trainer.state.log_history if entry["step"] == 4 and "eval_ema_loss" in entry)
    alone = make_trainer(models, tmp_path / "alone", policy=tmp_path / "ema", rloo=rloo)
    torch.manual_seed(4)
    expected = alone.evaluate()
    for key in ("mr_reward/score_mean", "rewards/digits/mean", "completions/mean_length", "loss"):
        assert found[f"eval_ema_{key}"] == pytest.approx(expected[f"eval_{key}"], abs=1e-5), key


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_has_the_average_of_an_uninterrupted_one(models: Path, tmp_path: Path, lora: bool) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "lora": lora}

    def run(out: Path, resume: str | bool | None = None, **changes: Any) -> Any:
        trainer = make_trainer(models, out, **{**options, **changes})
        trainer.add_callback(EMACallback(trainer, half_life=3))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", broken / "checkpoint-2")
    resumed = run(broken, resume=True)
    assert logged(resumed) == logged(whole)
    for step in (4, 6):
        path = Path(f"checkpoint-{step}") / "ema" / "average.safetensors"
        one, other = load_file(broken / path), load_file(tmp_path / "whole" / path)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    load(broken / "checkpoint-4" / "ema", lora)

    # A checkpoint elsewhere has to be named where the callback sees it.
    named = str(tmp_path / "whole" / "checkpoint-4")
    elsewhere = run(tmp_path / "elsewhere", resume=named, resume_from_checkpoint=named)
    assert logged(elsewhere) == logged(whole)
    with pytest.raises(ConfigurationError, match="checkpoint-4/ema/average.safetensors is not there"):
        run(tmp_path / "nowhere", resume=named)


def test_what_cannot_be_resumed_is_refused(models: Path, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = make_trainer(models, tmp_path, **options)
    trainer.add_callback(EMACallback(trainer, half_life=3))
    trainer.train()
    for changes, half_life, words in (
        ({}, 4.0, "half-life 3, expected 4.0"),
        ({"lora": True}, 3, "average of other weights"),
    ):
        again = make_trainer(models, tmp_path, **{**options, "max_steps": 4, **changes})
        callback = EMACallback(again, half_life=half_life)
        state = trainer.state
        with pytest.raises(ConfigurationError, match=words):
            callback.on_train_begin(again.args, state, again.control)


@pytest.mark.parametrize("half_life", [0, -1.0, float("nan"), float("inf")])
def test_a_half_life_is_a_number_of_steps(models: Path, tmp_path: Path, half_life: float) -> None:
    trainer = make_trainer(models, tmp_path)
    with pytest.raises(ConfigurationError, match="half_life is"):
        EMACallback(trainer, half_life=half_life)


def test_weights_in_pieces_and_several_sets_are_refused(models: Path, tmp_path: Path) -> None:
    trainer = make_trainer(models, tmp_path)
    weight = next(trainer.model.parameters())
    weight.ds_id = 0  # how ZeRO-3 marks what it has cut
    with pytest.raises(ConfigurationError, match="ZeRO-3 or FSDP"):
        EMACallback(trainer, half_life=2)
    del weight.ds_id
    trainer.eval_dataset = {"one": Dataset.from_list(PROMPTS), "two": Dataset.from_list(PROMPTS)}
    with pytest.raises(ConfigurationError, match="evaluation sets one, two"):
        EMACallback(trainer, half_life=2)
