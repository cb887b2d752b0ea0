"""The lean loop of the benchmarks has the arithmetic of the trainers: TRL's step, the packer's rows, naive metrics."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig, GRPOTrainer

from mr_reward import MultiResponseRewardModel
from mr_reward.model.rows import Packer, collate
from mr_reward.worlds.handwriting import make_groups, make_policy_rows
from mr_reward.worlds.named import WORLDS
from mr_reward.worlds.tiny import build_qwen3_vl, build_qwen3_vl_processor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import judge_lab
import lean_loop

SIZE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("policy")
    build_qwen3_vl(0).save_pretrained(place)
    build_qwen3_vl_processor().save_pretrained(place)
    return place


@pytest.fixture
def reader(folder: Path) -> lean_loop.Reader:
    return lean_loop.Reader(lean_loop.LeanWorld("handwriting"), folder)


def moved_policy(folder: Path) -> Any:
    """Not the reference any more, where the KL term has no gradient."""
    policy = AutoModelForImageTextToText.from_pretrained(folder)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=rng))
    return policy


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_step_is_that_of_trl(reader: lean_loop.Reader, folder: Path, tmp_path: Path, beta: float) -> None:
    """Plain gradient descent with rate 1: the weights after a step show TRL's gradient."""
    tasks = reader.world.tasks("train", 3, seed=5)
    seen: dict[str, Any] = {}

    def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rng = torch.Generator().manual_seed(1)
        seen["ids"] = [tuple(ids) for ids in completion_ids]
        seen["rewards"] = torch.randint(0, 3, (len(completions),), generator=rng).float()
        return seen["rewards"].tolist()

    policy = moved_policy(folder)
    args = GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=len(tasks) * SIZE,
        num_generations=SIZE,
        max_completion_length=WORLDS["handwriting"].answer_tokens,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        beta=beta,
        loss_type="dapo",
        max_grad_norm=lean_loop.CLIP,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list(make_policy_rows(tasks))
    processor = build_qwen3_vl_processor()
    GRPOTrainer(policy, reward, args=args, train_dataset=rows, processing_class=processor).train()

    ours, start = moved_policy(folder), moved_policy(folder)
    reference = AutoModelForImageTextToText.from_pretrained(folder)
    completions = [seen["ids"][i : i + SIZE] for i in range(0, len(seen["ids"]), SIZE)]
    advantages = [lean_loop.advantages(own) for own in seen["rewards"].view(-1, SIZE).tolist()]
    ours.train()
    loss = lean_loop.policy_loss(reader, ours, tasks, completions, advantages, reference, beta)
    assert loss is not None
    loss.backward()
    torch.nn.utils.clip_grad_norm_(ours.parameters(), lean_loop.CLIP)
    moved = 0.0
    trained = dict(policy.named_parameters())
    for (name, weight), before in zip(ours.named_parameters(), start.parameters(), strict=True):
        if weight.grad is None:
            continue
        change = trained[name].detach() - before.detach()
        torch.testing.assert_close(change, -weight.grad, atol=2e-5, rtol=2e-3, msg=lambda text: f"{name}: {text}")  # noqa: B023
        moved += float(change.norm())
    assert moved > 0.1


@pytest.mark.parametrize("layout", ["set", "isolated"])
def test_rows_are_those_of_the_packer(reader: lean_loop.Reader, folder: Path, layout: str) -> None:
    model = MultiResponseRewardModel.from_backbone(str(folder), layout=layout)
    options = {"num_digits": 3, "questions": ("read", "largest", "even")}
    groups = make_groups("train", 6, num_responses=3, seed=2, **options)
    packer = Packer.of(model, max_tokens=4096)
    expected = collate([row for group in groups if (row := packer.pack(group)) is not None], model.adapter)
    made_up = reader.world.made_up("train", 6, 3, 2)
    assert [ranks for _, _, ranks in made_up] == [list(group.rankings or ()) for group in groups]
    found = reader.rows(model, [(task, texts) for task, texts, _ in made_up])
    for name in ("input_ids", "segments", "kinds", "offsets", "score_sites", "response_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.media.keys() == expected.media.keys()
    for name, tensor in expected.media.items():
        assert torch.equal(found.media[name], tensor), name


def test_a_residual_starts_as_the_single_response_model(reader: lean_loop.Reader, folder: Path) -> None:
    """Before training nothing that another response says changes a score; after it, it does."""
    torch.manual_seed(0)
    model = judge_lab.SinglePlusComparison(MultiResponseRewardModel.from_backbone(str(folder), layout="set"))
    made_up = reader.world.made_up("train", 32, 4, 0)
    tasks, texts = [group[0] for group in made_up], [group[1] for group in made_up]
    alone = [
        [lean_loop.score(reader, model, [task], [[text]])[0][0] for text in own]
        for task, own in zip(tasks, texts, strict=True)
    ]
    together = lean_loop.score(reader, model, tasks, texts)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=2e-5, rtol=1e-4)
    lean_loop.train_reward_model(reader, model, made_up, lean_loop.Fit(warmup=0, batch=8), seed=0)
    assert (torch.tensor(lean_loop.score(reader, model, tasks, texts)) - torch.tensor(alone)).abs().max() > 1e-3


def test_ties_below_the_floor() -> None:
    assert judge_lab.with_ties([0.0, 0.05, 1.0], 0.1) == [0.025, 0.025, 1.0]
    assert judge_lab.with_ties([1.0, 0.3, 0.25], 0.1) == [1.0, 0.275, 0.275]
    assert judge_lab.with_ties([0.0, 0.09, 0.17], 0.1) == [None] * 3, "a chain of near ones is one tie"
    assert lean_loop.advantages([None, None]) == [0.0, 0.0]
    found = lean_loop.advantages([1.0, None, 3.0])
    assert found[1] == 0.0 and found[0] == -found[2] < 0


def test_two_epochs_see_each_group_twice(
    reader: lean_loop.Reader, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = reader.world.made_up("train", 4, SIZE, 0)
    seen: list[str] = []
    rows = reader.rows

    def counted(model: Any, batch: Any) -> Any:
        seen.extend(task.id for task, _ in batch)
        return rows(model, batch)

    monkeypatch.setattr(reader, "rows", counted)
    model = MultiResponseRewardModel.from_backbone(str(folder), layout="set")
    log = lean_loop.train_reward_model(reader, model, groups, lean_loop.Fit(batch=2, epochs=2, warmup=1), 0)
    assert len(log["loss"]) == 4
    for epoch in (seen[:4], seen[4:]):
        assert sorted(epoch) == sorted(task.id for task, *_ in groups)


def test_a_policy_that_does_not_move_is_level_with_its_start(reader: lean_loop.Reader, folder: Path) -> None:
    """Its answers and those of the start are the same texts, which is half a win each."""
    policy = AutoModelForImageTextToText.from_pretrained(folder)
    model = MultiResponseRewardModel.from_backbone(str(folder), layout="set").eval()
    run = lean_loop.Run(steps=1, eval_steps=1, prompts=2, count=2, rate=0.0)
    tasks = reader.world.tasks("validation", 3, 0)

    def reward(_: Any, texts: Any) -> Any:
        return [[float(i) for i in range(len(own))] for own in texts]

    log, _ = lean_loop.grpo(reader, policy, reward, run, 0, tasks, model)
    assert [entry["win_rate"] for entry in log] == [0.5, 0.5] and log[0]["score_mean"] == log[1]["score_mean"]
    bare, _ = lean_loop.grpo(reader, policy, reward, run, 0, tasks)
    assert all("win_rate" not in entry for entry in bare)


def test_pairs_count_a_seed_once_and_limits_cut_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import draw_results

    place = tmp_path / "judge_lab" / "w"
    place.mkdir(parents=True)
    ends = {"a": {0: 0.6, 1: 0.7}, "b": {0: 0.5, 1: 0.4}, "c": {0: 0.8}, "d": {0: 0.5}}
    for arm, seeds in ends.items():
        for seed, end in seeds.items():
            (place / f"policy-{arm}-seed{seed}.json").write_text(json.dumps({"start": 0.5, "end": end}))
    for arm, right in (("a", 0.91), ("b", 0.9)):  # a limit belongs to the row above it
        for seed in (0, 1):
            judged = {"rollouts": {"right_above_wrong": right}}
            (place / f"rm-{arm}-seed{seed}.json").write_text(json.dumps(judged))
    monkeypatch.setattr(draw_results, "RESULTS", tmp_path)
    _, first, second, every = draw_results.pairs("w", "0-1", "a/b", "c/d")
    assert first[0] == "`a` minus `b`" and first[1] == "2" and first[3] == "+.100 +.300"
    assert second[1:] == ["1", "+0.300", "+.300"]
    assert every[1] == "2" and every[3] == "+.200 +.300"
    assert draw_results.limits("w", "0-1", "0.91")[1:] == [
        ["0 to 0.91", "2", "-0.050 (-0.100 to +0.000)", "1"],
        ["0.91 to 1", "2", "+0.150 (+0.100 to +0.200)", "0"],
    ]
