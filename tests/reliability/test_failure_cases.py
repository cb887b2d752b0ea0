"""Cases of the table in tests/README.md that no other file holds; the number of the case is in the name."""

from __future__ import annotations

import itertools
import math
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import LAYOUTS, ROUNDING, random_group, random_image, reward_model
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from mr_reward import GroupScorer, MultiResponseReward, ResponseGroup
from mr_reward.errors import MediaError
from mr_reward.evaluation.benchmarks import EvaluationItem
from mr_reward.evaluation.evaluator import ALL_ORDERS, score_benchmark
from mr_reward.evaluation.judges import RewardModel
from mr_reward.worlds import tiny

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def train(
    output: Path, rewards: list[Any], steps: int = 2, policy: str | None = None, callbacks: Any = (), **options: Any
) -> GRPOTrainer:
    """A real GRPO run of a tiny policy; the completions of each step are in `completions/`."""
    settings: dict[str, Any] = {
        "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6, "max_steps": steps,
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "gradient_checkpointing": False, "logging_steps": 1, "log_completions": True, "seed": 1,
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=policy or tiny.build_llama(3),
        reward_funcs=rewards,
        args=GRPOConfig(str(output), **{**settings, **options}),
        train_dataset=Dataset.from_list([{"prompt": f"Say {i}"} for i in range(8)]),
        processing_class=tiny.build_tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def table(output: Path, step: int) -> pd.DataFrame:
    return pd.read_parquet(output / "completions" / f"completions_{step:05d}.parquet")


# --- 7 ---


def test_07_a_group_of_equal_completions_gives_no_advantage_and_no_nan(tmp_path: Path) -> None:
    """Greedy sampling: every group is one text; the scores differ in nothing, and nothing is learned from them."""
    trainer = train(tmp_path, [MultiResponseReward(reward_model("llama"), num_generations=4)], top_k=1)
    for step in (1, 2):
        found = table(tmp_path, step)
        assert found.groupby("prompt")["completion"].nunique().max() == 1
        assert (found["advantage"] == 0.0).all() and (found["multi_response_reward"] == 0.0).all()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    log = [entry for entry in trainer.state.log_history if "mr_reward/score_spread" in entry]
    assert all(entry["mr_reward/score_spread"] == 0.0 for entry in log)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_07_two_of_n_equal_and_trailing_white_space(layout: str) -> None:
    """Equal texts share a score bit for bit; a space more is another text, with a score of its own."""
    group = ResponseGroup(prompt="p", responses=["four", "five", "four", "four ", "four\n"])
    (scores,) = GroupScorer(reward_model("llama", layout)).score([group])
    assert scores is not None and scores[0] == scores[2]
    assert len({scores[0], scores[3], scores[4]}) == 3 and all(map(math.isfinite, scores))


# --- 8 ---


@pytest.mark.parametrize("layout", ["isolated", "set"])
@pytest.mark.parametrize("seed", range(3))
def test_08_every_order_of_three_gives_the_same_scores(layout: str, seed: int) -> None:
    group = random_group(random.Random(seed), 3, images=1)
    scorer = GroupScorer(reward_model("qwen3_vl", layout))
    expected = scorer.score([group])[0]
    for order in itertools.permutations(range(3)):
        (scores,) = scorer.score([group.select(order)])
        assert scores == pytest.approx([expected[i] for i in order] if expected else None, abs=ROUNDING)


def test_08_scores_averaged_over_all_orders_do_not_depend_on_the_order_given(tmp_path: Path) -> None:
    """The causal layout, all six orders: what is averaged belongs to the response and not to the place."""
    scorer = RewardModel(GroupScorer(reward_model("llama", "causal")), "rm")
    group = random_group(random.Random(4), 3, longest=30)
    means = []
    for number, order in enumerate(itertools.permutations(range(3))):
        ranked = ResponseGroup(
            prompt=group.messages, responses=[group.responses[i] for i in order], rankings=[1, 2, 3], id="x"
        )
        item = EvaluationItem(uid="x", category="all", group=ranked, facts={})
        (record,) = score_benchmark(
            scorer, [item], tmp_path / f"{number}.jsonl", settings={"benchmark": "groups"}, num_orders=ALL_ORDERS
        )
        assert len(record.scores) == 6 and len({tuple(one) for one in record.orders}) == 6
        mean = [sum(column) / 6 for column in zip(*record.scores, strict=True)]  # type: ignore[arg-type]
        means.append([mean[order.index(i)] for i in range(3)])
    for one in means[1:]:
        assert one == pytest.approx(means[0], abs=ROUNDING)


# --- 13 ---


def test_13_a_batch_of_every_kind_of_image_and_of_none(tmp_path: Path) -> None:
    """One reward call over prompts with images in every form that TRL and data sets have, and prompts without."""
    picture = random_image(random.Random(0))
    picture.save(tmp_path / "a.png")
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(buffer, "JPEG", exif=exif)
    columns: list[Any] = [
        None, [], [picture], [picture, picture.rotate(90)], [picture.convert("RGBA")], [picture.convert("L")],
        [picture.convert("CMYK")], [picture.convert("P")], [Image.new("RGB", (1, 1))], [Image.new("RGB", (2000, 20))],
        [buffer.getvalue()], [str(tmp_path / "a.png")], [{"bytes": buffer.getvalue(), "path": None}],
    ]  # fmt: skip
    prompts = [
        [{"role": "user", "content": [*({"type": "image"} for _ in images or ()), {"type": "text", "text": "What?"}]}]
        for images in columns
        for _ in range(2)
    ]
    reward = MultiResponseReward(reward_model("qwen3_vl"), num_generations=2)
    completions = [f"answer {i}" for i in range(len(prompts))]
    rewards = reward(prompts=prompts, completions=completions, images=[one for one in columns for _ in range(2)])
    assert len(rewards) == 26 and all(value is not None and math.isfinite(value) for value in rewards)
    with pytest.raises(MediaError, match="is a URL and nothing is fetched"):
        reward(prompts=prompts[4:6], completions=["a", "b"], images=[["https://example.org/a.png"]] * 2)


# --- 16 ---


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_16_a_dropped_group_and_other_rewards(tmp_path: Path, scale: str, aggregation: str) -> None:
    """The reward model drops every group that holds the word; the other reward function still teaches there."""

    def some(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if i % 3 == 0 else float(len(text)) for i, text in enumerate(completions)]

    class Dropping(MultiResponseReward):
        def __call__(self, prompts: Any, completions: Any, **kwargs: Any) -> list[float | None]:
            values = super().__call__(prompts, completions, **kwargs)
            return [None if i < 4 else value for i, value in enumerate(values)]  # an all-None group

    trainer = train(
        tmp_path,
        [Dropping(reward_model("llama"), num_generations=4), some],
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
    )
    for step in (1, 2):
        found = table(tmp_path, step)
        assert found["advantage"].map(math.isfinite).all()
        assert found["multi_response_reward"].isna().sum() == 4
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_16_a_group_that_only_the_reward_model_would_judge_and_drops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A budget too small for anything: all rewards are None, counted, and the policy stays as it is."""
    reward = MultiResponseReward(reward_model("llama"), num_generations=4, max_tokens_per_batch=2)
    before = {name: weight.clone() for name, weight in tiny.build_llama(3).named_parameters()}
    trainer = train(tmp_path, [reward], learning_rate=1e-2)
    assert "step 1 group 0 gets no reward: over the token budget" in caplog.text
    log = [entry for entry in trainer.state.log_history if "mr_reward/dropped_groups" in entry]
    assert [entry["mr_reward/dropped_groups"] for entry in log] == [2.0, 2.0]
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]), name


# --- 18 ---


def test_18_groups_of_one_in_evaluation() -> None:
    """N = 1: the centred reward is 0, the raw one is the score of the response alone."""
    scorer = GroupScorer(reward_model("llama"))
    expected = [scorer.score([ResponseGroup(prompt="p", responses=[text])])[0] for text in ("a", "b")]
    arguments: dict[str, Any] = {"prompts": ["p", "p"], "completions": ["a", "b"]}
    centred = MultiResponseReward(reward_model("llama"), num_generations=1)
    assert centred(**arguments) == [0.0, 0.0]
    raw = MultiResponseReward(reward_model("llama"), num_generations=1, reward="raw")
    assert raw(**arguments) == pytest.approx([scores[0] for scores in expected if scores], abs=ROUNDING)


# --- with a GPU ---


@pytest.mark.gpu
@needs_gpu
def test_11_flash_attention_equals_eager_on_a_gpu() -> None:
    pytest.importorskip("flash_attn")
    group = random_group(random.Random(0), 4, longest=40)
    found = [
        GroupScorer(reward_model("llama", "causal", backend=backend, fresh=True), device="cuda", dtype=torch.bfloat16)
        for backend in ("eager", "flash_attention_2")
    ]
    expected, scores = (scorer.score([group])[0] for scorer in found)
    assert scores == pytest.approx(expected, abs=5e-2)


@pytest.mark.gpu
@needs_gpu
def test_16_an_overflow_in_half_precision_is_told_on_a_gpu() -> None:
    model = reward_model("llama", fresh=True)
    with torch.no_grad():
        model.backbone.layers[-1].mlp.down_proj.weight.mul_(1e6)
    scorer = GroupScorer(model, device="cuda", dtype=torch.float16)
    with pytest.raises(Exception, match="activations overflow|weights .* are not finite"):
        scorer.score([ResponseGroup(prompt="p", responses=["a", "b"])])


@pytest.mark.gpu
@needs_gpu
def test_20_device_memory_returns_after_fifty_calls() -> None:
    """Offloaded between calls, as beside a vLLM that sleeps while the policy is trained."""
    reward = MultiResponseReward(reward_model("llama", fresh=True), num_generations=4, placement="offload")
    base = 0
    for call in range(50):
        reward(prompts=["p"] * 8, completions=[f"answer {call} {i}" for i in range(8)])
        torch.cuda.empty_cache()
        base = base or torch.cuda.memory_allocated()
        assert torch.cuda.memory_allocated() <= base


class DeviceMemory(TrainerCallback):
    """Bytes that tensors hold on the device after each step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.empty_cache()
        self.bytes.append(torch.cuda.memory_allocated())


@pytest.mark.gpu
@needs_gpu
def test_20_device_memory_returns_beside_a_vllm_that_sleeps(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    tiny.build_llama(3).save_pretrained(tmp_path / "policy")
    tiny.build_tokenizer().save_pretrained(tmp_path / "policy")
    memory = DeviceMemory()
    train(
        tmp_path,
        [MultiResponseReward(reward_model("llama", fresh=True), num_generations=4, placement="offload")],
        steps=50,
        policy=str(tmp_path / "policy"),
        callbacks=[memory],
        use_cpu=False,
        bf16=True,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=0.2,
    )
    assert len(memory.bytes) == 50 and memory.bytes[-1] <= 1.05 * memory.bytes[2]
