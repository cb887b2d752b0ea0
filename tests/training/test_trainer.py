"""RewardTrainer: the real Trainer on tiny models. It learns, reports, merges LoRA, refuses bad data before step 1."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from PIL import Image

import mr_reward.training.trainer as trainer_module
from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.data.groups_file import load_preferences
from mr_reward.errors import ConfigurationError, GroupError, MediaError, OverLengthError
from mr_reward.groups import dense_ranks
from mr_reward.model.rows import Packer
from mr_reward.templates.rendering import Renderer
from mr_reward.training.batches import GroupCollator
from mr_reward.training.losses import get_loss
from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments
from mr_reward.worlds import tiny
from mr_reward.worlds.handwriting import make_groups


def reward_model(layout: str = "set", family: str = "qwen3_vl") -> MultiResponseRewardModel:
    if family == "llama":
        return MultiResponseRewardModel.from_backbone(
            tiny.build_llama(0), layout=layout, processor=tiny.build_tokenizer()
        )
    backbone = tiny.build_qwen3_vl(0, hidden_size=64, num_layers=2)
    return MultiResponseRewardModel.from_backbone(backbone, layout=layout, processor=tiny.build_qwen3_vl_processor())


def arguments(folder: Path, **overrides: object) -> RewardTrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_tokens": 4096,
    }
    return RewardTrainingArguments(**{**options, **overrides})  # type: ignore[arg-type]


def easy_groups(count: int, seed: int) -> list[ResponseGroup]:
    """Of random strings of 4 digits the one with more 9s is better: learnable in a few steps, without an image."""
    generator = random.Random(seed)
    groups = []
    for i in range(count):
        nines = generator.sample(range(5), 4)
        texts = [["9"] * n + generator.choices("12345678", k=4 - n) for n in nines]
        responses = ["".join(generator.sample(text, 4)) for text in texts]
        groups.append(
            ResponseGroup(prompt="Sum?", responses=responses, rankings=dense_ranks([-n for n in nines]), id=str(i))
        )
    return groups


@pytest.mark.parametrize("loss", ["best_of_n", "plackett_luce", "bradley_terry"])
def test_learns_and_reports(tmp_path: Path, loss: str) -> None:
    """From guessing to nearly perfect in what the loss is about, with evaluation during training."""
    model = reward_model("set", "llama")
    args = arguments(
        tmp_path, max_steps=40, loss=loss, eval_strategy="steps", eval_steps=40, learning_rate=3e-3, logging_steps=10
    )
    trainer = RewardTrainer(model, args, easy_groups(320, 0), easy_groups(64, 1))
    before = trainer.evaluate()["eval_best_of_n_accuracy"]
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "eval_best_of_n_accuracy" in entry]
    assert before < 0.7
    assert log[-1]["eval_best_of_n_accuracy"] > 0.9
    if loss != "best_of_n":  # which asks for the best alone: the order of the others is not taught
        assert log[-1]["eval_pairwise_accuracy"] > 0.9
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_lora_trains_little_and_merges_exactly(tmp_path: Path, family: str) -> None:
    model = reward_model("set", family)
    groups = make_groups("train", 24) if family == "qwen3_vl" else easy_groups(24, 0)
    frozen = {name: weight.clone() for name, weight in model.backbone.state_dict().items()}
    trainer = RewardTrainer(model, arguments(tmp_path), groups, peft_config=LoraConfig(r=4, lora_alpha=8))
    trainable = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trainable
    assert all("lora_" in name or ".head." in name or ".readouts." in name for name in trainable), trainable
    assert not any("visual" in name for name in trainable), trainable
    for part in ("lora_", "head.", "readouts."):
        assert any(part in name for name in trainable), part
    trainer.train()

    adapted = trainer.model.eval()
    batch = GroupCollator(Packer.of(model, max_tokens=4096))(groups[:2])
    batch.pop("rankings")
    with torch.no_grad():
        expected = adapted(**batch).scores
    trainer.save_reward_model(tmp_path / "rm")
    merged = MultiResponseRewardModel.from_pretrained(tmp_path / "rm")
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).scores, expected, atol=1e-5, rtol=0)
    changed = [n for n, w in merged.backbone.state_dict().items() if not torch.equal(w, frozen[n])]
    assert changed and not any("visual" in name for name in changed)


def test_full_training_changes_everything_but_nothing_else_is_saved(tmp_path: Path) -> None:
    model = reward_model()
    head = model.head.dense.weight.clone()
    trainer = RewardTrainer(model, arguments(tmp_path), make_groups("train", 24))
    trainer.train()
    trainer.save_reward_model(tmp_path / "rm")
    assert not torch.equal(head, model.head.dense.weight)
    groups = make_groups("test", 3)
    assert GroupScorer.from_pretrained(tmp_path / "rm").score(groups) == GroupScorer(model).score(groups)


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """The loss is a mean over groups: 4 x 2 groups and 1 x 8 groups give the same first step (to rounding)."""
    weights = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = reward_model("isolated", "llama")
        args = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0.0,
        )
        torch.manual_seed(0)
        model.head.load_state_dict(reward_model("isolated", "llama").head.state_dict())
        model.head.dense.weight.data.fill_(0.01)
        model.head.out.weight.data.copy_(torch.linspace(-1, 1, model.head.out.weight.numel())[None])
        model.readouts.summary.data.fill_(0.02)
        trainer = RewardTrainer(model, args, easy_groups(8, 0))
        trainer.train()
        weights.append(model.head.dense.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-4)


def test_a_dropped_group_takes_its_rankings_with_it() -> None:
    """One group in the middle is dropped: the labels of those after it must not shift."""
    groups = [ResponseGroup(prompt="a", responses=["b", "c", "d"], rankings=[1, 1, 1]) for _ in range(3)]
    groups[1] = ResponseGroup(prompt="a", responses=["b" * 999, "c", "d"], rankings=[1, 2, 3])
    groups.append(ResponseGroup(prompt="a", responses=["b", "c"], rankings=[1, 1]))
    renderer = Renderer(tiny.build_tokenizer())
    collator = GroupCollator(Packer(renderer, layout="set", max_tokens=256, over_length="drop_group"))
    batch = collator(groups)
    assert batch["rankings"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert torch.equal(batch["rankings"] > 0, batch["rows"].response_mask)
    with pytest.raises(OverLengthError, match="all 1 groups"):
        collator(groups[1:2])


def test_bad_groups_are_refused_before_the_first_step(tmp_path: Path) -> None:
    model = reward_model()
    good = make_groups("train", 2)
    for bad, error, words in (
        (ResponseGroup(prompt="a", responses=["b", "c"], id="bad"), GroupError, "rankings"),
        (ResponseGroup(prompt="a", responses=["b"], rankings=[1], id="bad"), GroupError, "at least 2"),
        (
            ResponseGroup(prompt="a", responses=["b", "c"], rankings=[1, 2], images=["no.png"], id="bad"),
            MediaError,
            "no.png",
        ),
        (
            ResponseGroup(prompt="a", responses=["b" * 9999, "c"], rankings=[1, 2], id="bad"),
            OverLengthError,
            "max_tokens",
        ),
    ):
        with pytest.raises(error, match=words) as caught:
            RewardTrainer(model, arguments(tmp_path), [*good, bad])
        assert "bad" in str(caught.value)


def test_over_length_groups_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = reward_model()
    long = ResponseGroup(prompt="a", responses=["b" * 9999, "c"], rankings=[1, 2])
    trainer = RewardTrainer(model, arguments(tmp_path, over_length="drop_group"), [*make_groups("train", 8), long])
    assert len(trainer.train_dataset) == 8
    assert "dropped 1 of 9 groups" in caplog.text
    caplog.clear()
    args = arguments(tmp_path, over_length="truncate_responses", max_steps=1)
    trainer = RewardTrainer(model, args, [*make_groups("train", 7), long])
    assert len(trainer.train_dataset) == 8
    assert "truncated 1 responses" in caplog.text
    with pytest.raises(GroupError, match="no group is left"):
        RewardTrainer(model, arguments(tmp_path, over_length="drop_group"), [long])


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="best_of_n"):
        arguments(tmp_path, loss="hinge")
    with pytest.raises(ConfigurationError, match="drop_group"):
        arguments(tmp_path, over_length="ignore")


def test_every_argument_reaches_what_it_is_for(tmp_path: Path) -> None:
    model, groups = reward_model("set", "llama"), easy_groups(20, 0)

    def trainer(**options: object) -> RewardTrainer:
        return RewardTrainer(model, arguments(tmp_path, **options), groups, groups)

    plain = trainer()
    data: Any = plain.train_dataset
    for options, seed in (({"seed": 3}, 3), ({"seed": 3, "data_seed": 0}, 0), ({"data_seed": 5}, 5)):
        found = trainer(**options)
        assert found.train_dataset.seed == seed
        responses = [one.responses for one in found.train_dataset]
        assert (responses == [one.responses for one in data]) is (seed == data.seed)
    orders = [trainer(seed=seed).eval_dataset.orders for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len(trainer(eval_orders=1).eval_dataset) == 20 and len(plain.eval_dataset) == 40
    assert {one.num_responses for one in trainer(max_responses=2).train_dataset} == {2}
    assert {one.num_responses for one in trainer(degenerate_negatives=1.0).train_dataset} == {5}
    # The rows are measured as they can become.
    whole = data.num_tokens
    assert all(a > b for a, b in zip(trainer(degenerate_negatives=0.01).train_dataset.num_tokens, whole, strict=True))
    assert all(a < b for a, b in zip(trainer(max_responses=2).train_dataset.num_tokens, whole, strict=True))
    sets = {"a": groups[:4], "b": groups[4:]}
    mixed = RewardTrainer(model, arguments(tmp_path, mixture_weights=[1.0, 1.0]), sets)
    assert len(mixed.train_dataset) == 32
    rebalanced = [
        list(trainer(train_sampling_strategy="batch_rebalance", **options)._get_train_sampler())
        for options in ({"data_seed": 0}, {"data_seed": 0}, {"data_seed": 1}, {"dataloader_drop_last": True})
    ]
    assert rebalanced[0] == rebalanced[1] != rebalanced[2]
    assert [len(one) for one in rebalanced[1:]] == [3, 3, 2], "whole batches of 8"


@pytest.mark.parametrize("name", ["best_of_n", "plackett_luce", "bradley_terry"])
def test_the_loss_is_the_one_of_the_arguments(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    scores = torch.tensor([[rng.uniform(-2, 2) for _ in range(4)] for _ in range(3)])
    rankings = torch.tensor([[1, 2, 3, 4], [2, 1, 1, 3], [1, 2, 2, 0]])
    found = set()
    for fields, options in (
        ({}, {}),
        ({"label_smoothing_factor": 0.2}, {"label_smoothing": 0.2}),
        ({"center_rewards_coefficient": 0.3}, {"centring_coefficient": 0.3}),
        *([({"margin": 0.7}, {"margin": 0.7})] if name == "bradley_terry" else []),
    ):
        loss = arguments(tmp_path, loss=name, **fields).group_loss()(scores, rankings, rankings > 0)
        assert loss == get_loss(name, **options)(scores, rankings, rankings > 0)
        found.add(round(loss.item(), 6))
    assert len(found) == (4 if name == "bradley_terry" else 3), "each option changes the loss"


def test_evaluation_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    """Its rows have a budget of their own; also after an evaluation that could not begin."""
    args = arguments(tmp_path, max_tokens=300, eval_max_tokens=900)
    trainer = RewardTrainer(reward_model("set", "llama"), args, easy_groups(8, 0), easy_groups(4, 1))

    def budgets() -> list[int]:
        loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader(), trainer.get_train_dataloader()
        return [loader.collate_fn.packer.max_tokens for loader in loaders]

    assert budgets() == [300, 900, 300]
    with pytest.raises(TypeError):
        trainer.get_eval_dataloader("nowhere")
    assert trainer.data_collator.packer.max_tokens == 300 and budgets() == [300, 900, 300]


def test_a_resumed_run_needs_the_state_of_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = RewardTrainer(reward_model("set", "llama"), arguments(tmp_path / "out"), easy_groups(8, 0))
    asked: list[Any] = []

    def which(*given: Any) -> None:
        asked.append(given)
        raise InterruptedError

    monkeypatch.setattr(trainer_module, "which_checkpoint", which)
    monkeypatch.setattr(RewardTrainingArguments, "world_size", 3)
    with pytest.raises(InterruptedError):
        trainer.train("true")
    assert asked == [("true", str(tmp_path / "out"), 3)]


def test_every_group_of_a_step_weighs_the_same_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks average their gradients; one of them has 2 of the 12 groups of a step in this micro-batch."""
    groups = easy_groups(2, 0)
    trainer = RewardTrainer(reward_model("set", "llama"), arguments(tmp_path), groups)
    batch = GroupCollator(Packer.of(trainer.model, max_tokens=4096))(groups)
    plain = trainer.compute_loss(trainer.model, batch).item()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 3)
    monkeypatch.setattr(
        trainer.accelerator, "gather", lambda count: torch.stack([count, torch.tensor(6), torch.tensor(2)])
    )
    total = trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))
    assert total == 4 + 6 + 2
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=total)
    assert loss.item() == pytest.approx(plain * 2 * 3 / 12) and outputs["scores"].shape == (2, 4)


def test_json_lines_with_images(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    rows = [
        {"prompt": "Number?", "responses": ["1", "2", "3"], "rankings": [1, 2, 2], "image": "a.png", "id": 7},
        {"prompt": "Number?", "responses": ["1", "2"], "rankings": [2, 1], "video": ["a.png", "a.png"], "other": 1},
        {"prompt": [{"role": "user", "content": "Sum?"}], "responses": ["1", "2"], "rankings": [2, 1], "image": None},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = load_preferences(path)
    assert [group.id for group in groups] == ["7", "train.jsonl:2", "train.jsonl:3"]
    assert groups[0].rankings == (1, 2, 2)
    assert [len(group.images) for group in groups] == [1, 0, 0]
    assert len(groups[1].videos[0]) == 2
    RewardTrainer(reward_model(), arguments(tmp_path, max_steps=1, per_device_train_batch_size=3), groups).train()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ('{"prompt": "a", "responses": ["b", "c"]}', "rankings"),
        ('{"prompt": "a", "responses": ["b", "c"], "rankings": [1]}', "1 rankings for 2 responses"),
        ('{"prompt": "a", "responses": ["b", "c"], "rankings": [5, 3]}', "not ranks"),
        ("[1]", "list"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "responses": ["b", "c"], "rankings": [1, 2]}\n' + line + "\n")
    with pytest.raises(GroupError, match="bad.jsonl, line 2") as caught:
        load_preferences(path)
    assert words in str(caught.value)


def test_takes_a_dataset_in_the_preference_format_of_trl(tmp_path: Path) -> None:
    """The same steps as on groups made by hand: standard, and conversational with pictures inside the rows."""
    random_texts = random.Random(3)
    texts = ["".join(random_texts.choices("abcdef ", k=12)) for _ in range(24)]
    rows = [{"prompt": f"Q{i}?", "chosen": texts[2 * i], "rejected": texts[2 * i + 1]} for i in range(12)]
    groups = [
        ResponseGroup(prompt=row["prompt"], responses=[row["chosen"], row["rejected"]], rankings=[1, 2])
        for row in rows
    ]
    images = [Image.new("RGB", (28, 28), (20 * i, 0, 0)) for i in range(12)]
    chats = {
        "prompt": [[{"role": "user", "content": row["prompt"]}] for row in rows],
        **{key: [[{"role": "assistant", "content": row[key]}] for row in rows] for key in ("chosen", "rejected")},
        "images": [[image] for image in images],
    }
    features = {"images": datasets.Sequence(datasets.Image())}
    conversational = datasets.Dataset.from_dict(chats).cast_column("images", features["images"])
    with_images = [
        ResponseGroup(prompt=group.messages, responses=group.responses, rankings=[1, 2], images=[image])
        for group, image in zip(groups, images, strict=True)
    ]
    for family, dataset, expected in (
        ("llama", datasets.Dataset.from_list(rows), groups),
        ("qwen3_vl", conversational, with_images),
    ):
        losses = []
        for data in (dataset, expected):
            torch.manual_seed(0)  # of the head
            trainer = RewardTrainer(reward_model("set", family), arguments(tmp_path), data, data)
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
            assert trainer.evaluate()["eval_loss"] > 0
        assert losses[0] == losses[1] and len(losses[0]) == 3


def test_other_data_are_refused_by_name(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "Q", "chosen": "a", "rejected": "b"}])
    splits = datasets.DatasetDict({"train": rows, "test": rows})
    with pytest.raises(ConfigurationError, match="DatasetDict with .*train.*test.*give one split"):
        RewardTrainer(reward_model("set", "llama"), arguments(tmp_path), splits)
    with pytest.raises(ConfigurationError, match="IterableDataset, expected a list of groups or a Dataset"):
        RewardTrainer(reward_model("set", "llama"), arguments(tmp_path), rows.to_iterable_dataset())
