"""The reward agrees with the trainer on the size of a group, and with the other ranks on the weights, or says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from mr_reward import MultiResponseReward, MultiResponseRewardModel
from mr_reward.checkpoint import weights_digest
from mr_reward.errors import CheckpointError, ConfigurationError
from mr_reward.grpo.groups import group_size
from mr_reward.grpo.reward import check_same_weights
from mr_reward.scorers.opening import open_scorer
from mr_reward.worlds import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.build_llama(0).save_pretrained(folder / "policy")
    tiny.build_tokenizer().save_pretrained(folder / "policy")
    MultiResponseRewardModel.from_backbone(folder / "policy").save_pretrained(folder / "rm")
    return folder


def make_trainer(
    world: Path, folder: Path, reward: MultiResponseReward, kind: str, eval_words: list[str], **changes: Any
) -> tuple[Any, list[tuple[int, list[int]]]]:
    """A trainer, and a list that gets (step, group sizes) of every reward call."""
    calls: list[tuple[int, list[int]]] = []

    def spy(prompts: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        calls.append((trainer_state.global_step, [found.group.num_responses for found in reward.last_scored]))
        return [0.0] * len(prompts)

    train, evaluation = (
        Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {word}"}]} for word in words])
        for words in ("abcdefgh", eval_words)
    )
    trainer_class, config_class = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    options = {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_completion_length": 4,
        "max_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **changes,
    }
    trainer = trainer_class(
        str(world / "policy"),
        reward_funcs=[reward, spy],
        args=config_class(str(folder), reward_weights=[1.0, 0.0], **options),
        train_dataset=train,
        eval_dataset=evaluation,
    )
    return trainer, calls


@pytest.mark.parametrize(("kind", "size"), [("grpo", 1), ("grpo", 2), ("grpo", 8), ("rloo", 2), ("rloo", 8)])
def test_evaluation_with_another_group_size(world: Path, tmp_path: Path, kind: str, size: int) -> None:
    """Evaluation comes first; its last batch is short; every prompt is the same, so nothing but the trainer can tell
    where a group ends."""
    reward = MultiResponseReward(world / "rm", 4, num_generations_eval=size)
    options = {"num_generations_eval": size, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer, calls = make_trainer(world, tmp_path, reward, kind, ["so"] * 9, **options)
    trainer.train()
    trainer.evaluate()
    in_a_batch = 8 // size
    evaluation = [[size] * in_a_batch] * (9 // in_a_batch) + [[size] * (9 % in_a_batch)] * (9 % in_a_batch > 0)
    train = [[4, 4]]
    # Before the first update, after each, and once more by hand.
    assert [sizes for _, sizes in calls] == evaluation + train + evaluation + train + evaluation + evaluation
    assert [step for step, sizes in calls if sizes == train[0]] == [0, 1]
    assert sum(len(sizes) for sizes in evaluation) == 9, "every prompt once, none left out"


@pytest.mark.parametrize("configured", [2, 8])
def test_the_first_call_refuses_other_sizes_than_the_trainer_s(world: Path, tmp_path: Path, configured: int) -> None:
    """Groups of 8 could be cut into two of 4 without anyone noticing."""
    reward = MultiResponseReward(world / "rm", 4)
    trainer, calls = make_trainer(world, tmp_path, reward, "grpo", ["so"], num_generations_eval=configured)
    with pytest.raises(ConfigurationError, match=f"num_generations=4, num_generations_eval={configured}\\)"):
        trainer.train()
    assert not calls, "at the first call in training, not hours later in the first evaluation"


class Trainer:
    """What is asked of a trainer."""

    def __init__(self, train: int, evaluation: int, *, training: bool) -> None:
        self.num_generations, self.num_generations_eval = train, evaluation
        self.model = nn.Linear(1, 1).train(training)

    def log_metric(self, name: str, value: float) -> None:
        """As TRL's."""


def test_group_size() -> None:
    assert group_size(Trainer(8, 4, training=True).log_metric, 8, 4) == 8
    assert group_size(Trainer(8, 4, training=False).log_metric, 8, 4) == 4
    assert group_size({}.__setitem__, 8, 8) == group_size(None, 8, 8) == 8  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no GRPOTrainer or RLOOTrainer"):
        group_size({}.__setitem__, 8, 4)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="generates 16 completions per prompt in training and 4"):
        group_size(Trainer(16, 4, training=True).log_metric, 8, 4)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
def test_sizes_that_are_none(world: Path, size: Any) -> None:
    with pytest.raises(ConfigurationError, match="num_generations_eval is"):
        MultiResponseReward(world / "rm", 4, num_generations_eval=size)


def test_different_weights_are_named_by_rank() -> None:
    check_same_weights(["a", "a", "a"])
    check_same_weights(["", ""])
    with pytest.raises(CheckpointError, match="ranks 0, 2: a; rank 1: b.*set_zero3_state") as caught:
        check_same_weights(["a", "b", "a"])
    assert "outside_zero3()" in str(caught.value)


def test_partitioned_models_are_refused_at_once(world: Path) -> None:
    """Both marks of ZeRO-3: the attribute that DeepSpeed sets, and an empty tensor."""
    for mark in ("ds_id", "empty"):
        model = MultiResponseRewardModel.from_pretrained(world / "rm")
        weight = model.get_input_embeddings().weight
        if mark == "empty":
            weight.data = torch.empty(0)
        else:
            weight.ds_id = 0
        with pytest.raises(CheckpointError, match="1 weights of the reward model are partitioned .*embed_tokens"):
            open_scorer(model)


def test_the_digest_tells_models_apart(world: Path) -> None:
    model = MultiResponseRewardModel.from_pretrained(world / "rm")
    first = weights_digest(model)
    assert first == weights_digest(MultiResponseRewardModel.from_pretrained(world / "rm"))
    weight = model.head.dense.weight
    with torch.no_grad():
        for row in (0, weight.shape[0] - 1):  # the last bit of one number
            bits = weight[row, 0].view(torch.int32)
            bits ^= 1
            assert weights_digest(model) != first
            bits ^= 1
        assert weights_digest(model) == first
        weight[[0, 1]] = weight[[1, 0]].clone()  # the same numbers in other places
        assert weights_digest(model) != first
        weight[[0, 1]] = weight[[1, 0]].clone()
    for key, value in (("layout", "isolated"), ("score_scale", 2.0)):
        before = getattr(model.config, key)
        setattr(model.config, key, value)
        assert weights_digest(model) != first, key
        setattr(model.config, key, before)
    model.backbone.to(torch.bfloat16)
    assert weights_digest(model) != first


def test_the_digest_reads_any_dtype_length_and_alignment() -> None:
    """The same numbers at another address, in another order, and of another length."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn):
        for length in (2, 3, 7, 8, 9, 1000):
            values = torch.arange(length + 1).to(dtype)
            digests = [
                weights_digest(holder(numbers))
                for numbers in (
                    values[1:],
                    values[1:].clone(),
                    values[1:].double().flip(0).to(dtype),
                    values[:-1],
                    values,
                )
            ]
            assert digests[0] == digests[1] and len(set(digests)) == 4, (dtype, length)


def holder(numbers: torch.Tensor) -> Any:
    module = nn.Module()
    module.register_buffer("numbers", numbers)
    module.config = SimpleNamespace()
    return module


def test_the_checksum_is_part_of_the_first_call_only(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests: list[str] = []

    def counting(model: Any) -> str:
        digests.append(weights_digest(model))
        return digests[-1]

    monkeypatch.setattr("mr_reward.grpo.reward.weights_digest", counting)
    reward = MultiResponseReward(world / "rm", 2)
    for _ in range(3):
        reward(["p", "p"], ["a", "b"], trainer_state=SimpleNamespace(global_step=0))
    assert len(digests) == 1
