"""A reward model on a given backbone: shared and unchanged, from memory or a folder, with a new head."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, checkpoint_groups, family, random_group, reward_model, score

from mr_reward import GroupScorer, MultiResponseRewardConfig, MultiResponseRewardModel
from mr_reward.checkpoint.verify import load_processor
from mr_reward.errors import ConfigurationError, MediaError
from mr_reward.model.model import ValueHead, _evaluation_mode


@pytest.mark.parametrize("name", FAMILIES)
def test_from_backbone_does_not_change_the_backbone(name: str) -> None:
    full = copy.deepcopy(family(name).full_model)
    weights = {key: value.clone() for key, value in full.state_dict().items()}
    full.set_attn_implementation("sdpa")
    config, ids = full.config.to_dict(), torch.arange(20)[None]
    with torch.no_grad():
        logits = full(input_ids=ids).logits
    model = MultiResponseRewardModel.from_backbone(full, layout="set", processor=family(name).processor)
    score(model, [random_group(random.Random(0), 2, images=int(family(name).sees_images))])
    for key, value in full.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert full.config.to_dict() == config
    # Attention is another, which is the old one for whoever does not hand it a plan.
    assert full.config.get_text_config()._attn_implementation == "mr_group"
    with torch.no_grad():
        assert torch.equal(full(input_ids=ids).logits, logits)
    generated = full.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    full.set_attn_implementation("sdpa")
    assert torch.equal(full.generate(input_ids=ids, max_new_tokens=4, do_sample=False), generated)
    assert model.backbone is full.base_model, "shared, not copied"
    assert model.get_input_embeddings() is full.get_input_embeddings()
    assert len(full.get_input_embeddings().weight) == len(weights[next(iter(k for k in weights if "embed_tok" in k))])


@pytest.mark.parametrize("name", ("qwen3_vl", "molmo2", "llama"))
def test_from_backbone_folder_equals_loaded_model(name: str, tmp_path: Path) -> None:
    members = family(name)
    members.full_model.save_pretrained(tmp_path)
    members.processor.save_pretrained(tmp_path)
    torch.manual_seed(3)
    from_model = MultiResponseRewardModel.from_backbone(
        members.full_model, layout="isolated", processor=members.processor
    )
    torch.manual_seed(3)
    from_folder = MultiResponseRewardModel.from_backbone(tmp_path, layout="isolated")
    torch.manual_seed(4)
    other_seed = MultiResponseRewardModel.from_backbone(str(tmp_path), layout="isolated")
    assert from_folder.config.template_hash == from_model.config.template_hash
    assert from_folder.config.backbone_name_or_path == str(tmp_path)
    assert not from_folder.training and not from_model.training
    found = {key: value for key, value in from_folder.state_dict().items()}
    assert found.keys() == from_model.state_dict().keys()
    for key, value in from_model.state_dict().items():
        assert torch.equal(found[key], value), key
    assert not torch.equal(other_seed.head.out.weight, from_model.head.out.weight)
    groups = checkpoint_groups(name)
    for one, other in zip(score(from_folder, groups), score(from_model, groups), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("activation", ["silu", "selu", "gelu"])
def test_the_head_computes_in_float32_whatever_is_around_it(activation: str) -> None:
    """Under autocast, on hidden states in half precision, and with weights that an engine has cast."""
    torch.manual_seed(0)
    for bias in (False, True):
        head = ValueHead(16, 8, activation, bias=bias)
        hidden = torch.randn(2, 3, 16).bfloat16()
        expected = head(hidden.float())
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert torch.equal(head(hidden), expected) and torch.equal(head(hidden.float()), expected)
        cast = copy.deepcopy(head).bfloat16()
        wide = copy.deepcopy(cast).float()
        assert torch.equal(cast(hidden), wide(hidden.float())) and cast(hidden).dtype == torch.float32


def test_the_self_check_leaves_the_mode_of_every_part() -> None:
    model = reward_model("llama", "set", fresh=True)
    model.train()
    frozen = model.backbone.layers[1]
    frozen.eval()
    before = {name: part.training for name, part in model.named_modules()}
    assert {*before.values()} == {True, False}
    assert model.reads_flat()
    assert {name: part.training for name, part in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="stop"), _evaluation_mode(model):
        assert not any(part.training for part in model.modules())
        raise RuntimeError("stop")
    assert {name: part.training for name, part in model.named_modules()} == before


def test_the_processor_is_of_the_same_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub id; of a folder the revision means nothing, so what is asked for is looked at."""
    family("llama").full_model.save_pretrained(tmp_path)
    family("llama").processor.save_pretrained(tmp_path)
    asked = []

    def load(name: str, revision: str | None) -> Any:
        asked.append((name, revision))
        return load_processor(name, revision)

    monkeypatch.setattr("mr_reward.model.loading.load_processor", load)
    MultiResponseRewardModel.from_backbone(tmp_path, revision="v2")
    MultiResponseRewardModel.from_backbone(tmp_path)
    assert asked == [(str(tmp_path), "v2"), (str(tmp_path), None)]


@pytest.mark.parametrize("name", ["qwen3_vl", "llama"])
def test_readout_vectors_start_as_the_end_of_a_turn(name: str) -> None:
    model = reward_model(name)
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    embedding = model.get_input_embeddings().weight
    start = embedding[tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for vector in (model.readouts.summary, model.readouts.comparison):
        assert torch.equal(vector, start)
        assert vector.data_ptr() != start.data_ptr(), "a vector of its own: the token is not trained with it"


def test_readout_vectors_without_a_token_that_ends_a_turn_start_near_the_embeddings() -> None:
    members = family("llama")
    tokenizer = copy.deepcopy(members.processor)
    tokenizer.eos_token = None
    model = MultiResponseRewardModel.from_backbone(members.full_model, processor=tokenizer)
    embedding = model.get_input_embeddings().weight
    for vector in (model.readouts.summary, model.readouts.comparison):
        # The mean embedding plus noise of half its spread.
        assert 0.2 < (vector - embedding.mean(0)).std() / embedding.std() < 0.8
    assert not torch.equal(model.readouts.summary, model.readouts.comparison)


def test_wrong_options_of_from_backbone_are_refused() -> None:
    members = family("llama")
    with pytest.raises(ConfigurationError, match="unknown layout 'ring', expected one of causal, isolated, set"):
        MultiResponseRewardModel.from_backbone(members.full_model, layout="ring", processor=members.processor)
    with pytest.raises(ConfigurationError, match="pass processor"):
        MultiResponseRewardModel.from_backbone(members.full_model)
    with pytest.raises(ConfigurationError, match="unknown head activation 'sine'"):
        MultiResponseRewardModel.from_backbone(members.full_model, processor=members.processor, head_activation="sine")
    with pytest.raises(ConfigurationError, match="backbone_config is missing"):
        MultiResponseRewardModel(MultiResponseRewardConfig())
    # A copy: transformers resets the attention backend in a sub-configuration that a new configuration takes in.
    config = MultiResponseRewardConfig(backbone_config=copy.deepcopy(members.full_model.config), template="alpaca")
    with pytest.raises(ConfigurationError, match="unknown template 'alpaca'"):
        MultiResponseRewardModel(config)


def test_images_for_a_text_only_backbone_are_refused() -> None:
    group = random_group(random.Random(0), 2, images=1, id="seen")
    with pytest.raises(MediaError, match="'seen'.*text-only"):
        GroupScorer(reward_model("llama")).score([group])
