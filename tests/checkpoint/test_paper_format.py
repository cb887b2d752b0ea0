"""The paper's public format: what an independent script writes and scores, we load and score the same."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from public_format import ACTIVATIONS, TOLERANCE, PublicModel, plain_groups, write_public_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import family, random_group, score

from mr_reward import GroupScorer, MultiResponseReward, MultiResponseRewardModel, ResponseGroup
from mr_reward.errors import CheckpointError, ConfigurationError, GroupError
from mr_reward.evaluation.evaluator import evaluate_groups
from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments
from mr_reward.worlds import tiny

TEMPLATES = ("mr2rm-assistant", "mr2rm-user")
NAMES = ("qwen3_vl", "molmo2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A public checkpoint for each family. Read only."""
    root = tmp_path_factory.mktemp("public")
    for name in (*NAMES, "llama"):
        write_public_checkpoint(name, root / name)
    return {name: root / name for name in (*NAMES, "llama")}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    """The text-only checkpoint, to damage."""
    write_public_checkpoint("llama", tmp_path / "copy")
    return tmp_path / "copy"


def edit_settings(folder: Path, **changes: Any) -> None:
    path = folder / "reward_model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refuses(folder: Path, message: str, error: type[Exception] = CheckpointError, **options: Any) -> None:
    with pytest.raises(error, match=message):
        MultiResponseRewardModel.from_pretrained(folder, **options)


# --- import ---


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("name", "images"), [*itertools.product(NAMES, (0, 1, 2)), ("llama", 0)])
def test_scores_are_those_of_the_independent_script(
    folders: dict[str, Path], name: str, template: str, images: int
) -> None:
    public = PublicModel(folders[name])
    model = MultiResponseRewardModel.from_pretrained(folders[name], template=template)
    data = plain_groups(1, images, (3, 1, 2, 5, 4, 2))
    expected = [public.scores(template, *fields) for fields in data]
    groups = [ResponseGroup(prompt=prompt, responses=texts, images=pictures) for prompt, texts, pictures in data]
    one_by_one = [GroupScorer(model).score([group])[0] for group in groups]
    # Rows of one forward pass have different lengths: the last response is not read at padding.
    three_at_once = [row for i in range(0, 6, 3) for row in GroupScorer(model).score(groups[i : i + 3])]
    padded_left = [row.tolist() for row in score(model, groups, "left")]
    for found in (one_by_one, three_at_once, padded_left):
        for row, scores in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(row), scores, rtol=0, atol=TOLERANCE)
    spread = torch.cat(expected).std()
    assert spread > 1000 * TOLERANCE, "scores that hardly differ would hide a wrong site"


def test_templates_differ(folders: dict[str, Path]) -> None:
    group = ResponseGroup(prompt="2 + 2?", responses=["4", "5"])
    scores = [
        GroupScorer(MultiResponseRewardModel.from_pretrained(folders["qwen3_vl"], **options)).score([group])
        for options in ({}, {"template": "mr2rm-assistant"}, {"template": "mr2rm-user"})
    ]
    assert scores[0] == scores[1] != scores[2], "the default is the template of the training"
    direct = GroupScorer.from_pretrained(folders["qwen3_vl"], template="mr2rm-user")
    assert direct.score([group]) == scores[2]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_the_format(activation: str, tmp_path: Path) -> None:
    write_public_checkpoint("llama", tmp_path, activation=activation, width=7)
    ((prompt, texts, _),) = plain_groups(2, 0, (4,))
    expected = PublicModel(tmp_path).scores("mr2rm-assistant", prompt, texts)
    found = GroupScorer.from_pretrained(tmp_path).score([ResponseGroup(prompt=prompt, responses=texts)])
    torch.testing.assert_close(torch.tensor(found[0]), expected, rtol=0, atol=TOLERANCE)


def test_a_linear_head(tmp_path: Path) -> None:
    write_public_checkpoint("llama", tmp_path, kind="linear")
    ((prompt, texts, _),) = plain_groups(3, 0, (4,))
    expected = PublicModel(tmp_path).scores("mr2rm-user", prompt, texts)
    model = MultiResponseRewardModel.from_pretrained(tmp_path, template="mr2rm-user")
    found = GroupScorer(model).score([ResponseGroup(prompt=prompt, responses=texts)])
    torch.testing.assert_close(torch.tensor(found[0]), expected, rtol=0, atol=TOLERANCE)


def test_a_head_saved_in_bf16_computes_in_float32(copied: Path) -> None:
    head = torch.load(copied / "value_head.pt", weights_only=True)
    torch.save({key: value.bfloat16() for key, value in head.items()}, copied / "value_head.pt")
    model = MultiResponseRewardModel.from_pretrained(copied)
    assert {weight.dtype for weight in model.head.parameters()} == {torch.float32}
    assert torch.equal(model.head.dense.weight, head["0.weight"].bfloat16().float())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", NAMES)
def test_our_own_format_keeps_the_scores_bit_for_bit(
    folders: dict[str, Path], name: str, template: str, tmp_path: Path
) -> None:
    model = MultiResponseRewardModel.from_pretrained(folders[name], template=template)
    assert model.config.layout == "causal" and model.readouts is None
    model.save_pretrained(tmp_path)
    again, info = MultiResponseRewardModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.template == template and again.config.template_hash == model.config.template_hash
    rng = random.Random(4)
    groups = [random_group(rng, n, images=1) for n in (3, 2, 4)]
    assert GroupScorer(again).score(groups) == GroupScorer(model).score(groups)
    refuses(tmp_path, "the checkpoint says which one it has; leave it out", ConfigurationError, template=template)


def test_orders_and_twins(folders: dict[str, Path]) -> None:
    """Other orders are read as if the group had been given in them; equal responses share a score."""
    public = PublicModel(folders["qwen3_vl"])
    model = MultiResponseRewardModel.from_pretrained(folders["qwen3_vl"])
    texts = ["user", "\n\nthink", "Answer\n"]  # what stands beside them changes their tokens
    scorer = GroupScorer(model, num_orders=20)
    group = ResponseGroup(prompt="Sum", responses=[*texts, texts[0]])
    (found,) = scorer.score_detailed([group])
    orders = [tuple(order) for order in scorer._orders(group, 3)]
    assert set(orders) == set(itertools.permutations(range(3))), "20 orders of 3 meet all 6"
    by_order = {}
    for order in set(orders):
        scores = public.scores("mr2rm-assistant", "Sum", [texts[i] for i in order])
        by_order[order] = dict(zip(order, scores.tolist(), strict=True))
    assert found.scores is not None and found.scores[3] == found.scores[0] and found.order_spread > 1e-3
    means = [sum(by_order[order][i] for order in orders) / len(orders) for i in range(3)]
    torch.testing.assert_close(torch.tensor(found.scores[:3]), torch.tensor(means), rtol=0, atol=TOLERANCE)


def test_the_separator_may_be_missing_from_the_tokenizer_if_it_is_the_last_row(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The paper's merge script writes the base model's tokenizer last; its README adds the token again."""
    group = ResponseGroup(prompt="2 + 2?", responses=["4", "5"])
    write_public_checkpoint("molmo2", tmp_path)
    family("molmo2").processor.save_pretrained(tmp_path)
    assert "<|resp_sep|>" not in (tmp_path / "tokenizer.json").read_text()
    found = GroupScorer.from_pretrained(tmp_path)
    assert found.score([group]) == GroupScorer.from_pretrained(folders["molmo2"]).score([group])


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """The public ones name code of their own for every part; transformers knows these families by itself."""
    write_public_checkpoint("molmo2", tmp_path)
    (tmp_path / "own_code.py").write_text("raise SystemExit('code of the checkpoint was run')")
    code = {"AutoConfig": "own_code.A", "AutoModelForImageTextToText": "own_code.B", "AutoModel": "own_code.C"}
    processor = {"AutoProcessor": "own_code.D", "AutoImageProcessor": "own_code.E"}
    for file, auto_map in (("config.json", code), ("processor_config.json", processor)):
        content = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps({**content, "auto_map": auto_map}))
    group = ResponseGroup(prompt="2 + 2?", responses=["4", "5"])
    assert GroupScorer.from_pretrained(tmp_path).score([group])


def test_reward_function_and_evaluation_take_it(folders: dict[str, Path]) -> None:
    model = MultiResponseRewardModel.from_pretrained(folders["llama"])
    groups = [ResponseGroup(prompt="2 + 2?", responses=["4", "5"], rankings=[1, 2])]
    scores = GroupScorer(model).score(groups)
    reward = MultiResponseReward(str(folders["llama"]), 2, reward="raw")
    assert reward(["2 + 2?"] * 2, ["4", "5"]) == scores[0]
    best = float(scores[0][0] > scores[0][1])
    assert evaluate_groups(GroupScorer(model), groups)["best_of_n_accuracy"] == best


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_model_with_such_a_template_learns(template: str, tmp_path: Path) -> None:
    model = MultiResponseRewardModel.from_backbone(
        tiny.build_llama(), layout="causal", template=template, processor=tiny.build_tokenizer()
    )
    rng = random.Random(0)
    groups = []
    for _ in range(64):
        words = rng.sample(["a", "b", "c"], 3)
        rankings = [1 if word == "b" else 2 for word in words]
        groups.append(ResponseGroup(prompt="p", responses=words, rankings=rankings))
    arguments = RewardTrainingArguments(
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    RewardTrainer(model, arguments, groups).train()
    for row, group in zip(GroupScorer(model).score(groups), groups, strict=True):
        assert row is not None and row.index(max(row)) == group.responses.index("b")


# --- what is not whole is refused ---


@pytest.mark.parametrize("mode", ["first", "first_last_concat", "response_mean", None])
def test_other_representations_are_refused(copied: Path, mode: str | None) -> None:
    edit_settings(copied, resp_repr_mode=mode)
    refuses(copied, f"resp_repr_mode is {mode!r}, only 'last' can be loaded")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_head_type": "attention"}, "value_head_type is 'attention', expected 'mlp' or 'linear'"),
        ({"value_head_activation": "mish"}, "value_head_activation is 'mish', expected one of selu, gelu"),
        ({"value_head_hidden_dim": 8}, "value_head.pt holds .*0.weight.*24, 64.* has .*8, 64"),
        ({"value_head_input_dim": 128}, "value_head_input_dim is 128, but the backbone's width is 64"),
        ({"value_head_type": "linear"}, "value_head.pt holds .* linear head .* has .*'weight'"),
        ({"scale_dot": False}, r"unknown keys \['scale_dot'\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(copied: Path, changes: dict[str, Any], message: str) -> None:
    edit_settings(copied, **changes)
    refuses(copied, message)


def test_missing_settings_are_refused(copied: Path) -> None:
    (copied / "reward_model_config.json").write_text('{"value_head_type": "mlp"}')
    refuses(copied, "lacks .*resp_repr_mode.*value_head_activation")
    (copied / "reward_model_config.json").write_text("[]")
    refuses(copied, "reward_model_config.json lacks")
    (copied / "reward_model_config.json").write_text("{")
    refuses(copied, "reward_model_config.json cannot be read")


class Payload:
    """Runs a command when a careless program unpickles it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_pickled_code_is_never_run(copied: Path, tmp_path: Path) -> None:
    torch.save({"0.weight": Payload(tmp_path / "ran")}, copied / "value_head.pt")
    refuses(copied, "cannot be read as plain tensors")
    assert not (tmp_path / "ran").exists()


def test_missing_or_broken_head_is_refused(copied: Path) -> None:
    content = (copied / "value_head.pt").read_bytes()
    (copied / "value_head.pt").write_bytes(content[: len(content) // 2])
    refuses(copied, "value_head.pt cannot be read")
    (copied / "value_head.pt").unlink()
    refuses(copied, "value_head.pt cannot be read")
    torch.save([torch.zeros(1)], copied / "value_head.pt")
    refuses(copied, "value_head.pt holds list, expected a dictionary of tensors")


def test_missing_backbone_weights_are_refused(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    refuses(copied, "missing weights .*norm.weight")
    (copied / "model.safetensors").unlink()
    refuses(copied, "no backbone with safetensors weights")


def test_tokenizer_without_the_separator_is_refused(copied: Path) -> None:
    family("llama").processor.save_pretrained(copied)
    refuses(copied, r"the tokenizer has no token <\|resp_sep\|>.* rows of the embedding do not end with one for it")


def test_embedding_without_a_row_for_the_separator_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    write_public_checkpoint("molmo2", tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    (key,) = [key for key in tensors if key.endswith("new_embedding")]
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["text_config"]["additional_vocab_size"] -= 1
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    refuses(tmp_path / "copy", r"<\|resp_sep\|> is token \d+, but the embedding has \d+ rows")


def test_an_adapter_that_is_not_merged_is_refused(copied: Path) -> None:
    (copied / "adapter_config.json").write_text("{}")
    refuses(copied, "holds an adapter, expected a whole backbone")


def test_other_templates_are_refused(copied: Path) -> None:
    refuses(copied, "template='chat', expected mr2rm-assistant or mr2rm-user", ConfigurationError, template="chat")


@pytest.mark.parametrize(
    ("role", "expected"),
    [("assistant", "no prompt that ends in an assistant turn"), ("system", "last turn is of 'system'")],
)
def test_user_template_wants_a_user_turn_at_the_end(folders: dict[str, Path], role: str, expected: str) -> None:
    model = MultiResponseRewardModel.from_pretrained(folders["llama"], template="mr2rm-user")
    turns = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
    with pytest.raises(GroupError, match=f"'odd'.*{expected}"):
        GroupScorer(model).score([ResponseGroup(prompt=turns, responses=["c"], id="odd")])
