"""Models trained with the paper's templates, written in its format; a new model gets a separator of its own."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from public_format import SEPARATOR, TOLERANCE, PublicModel, plain_groups, write_public_checkpoint
from tiny_models import family, random_group

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.errors import CheckpointError, ConfigurationError
from mr_reward.model.export import export_paper_format

NAMES = ("qwen3_vl", "molmo2")


@pytest.mark.parametrize("name", [*NAMES, "llama"])
def test_a_new_model_scores_the_same_after_export(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = MultiResponseRewardModel.from_backbone(
        copy.deepcopy(family(name).full_model),
        layout="causal",
        template="mr2rm-assistant",
        processor=family(name).processor,
        head_hidden_size=16,
        head_activation="gelu",
    )
    with torch.no_grad():
        model.head.out.weight *= 20
        model.head.out.bias.fill_(0.3)
    export_paper_format(model, tmp_path)
    assert SEPARATOR not in getattr(family(name).processor, "tokenizer", family(name).processor).get_vocab()
    images = int(name != "llama")
    data = plain_groups(6, images, (3, 1, 4))
    groups = [ResponseGroup(prompt=prompt, responses=texts, images=pictures) for prompt, texts, pictures in data]
    scores = GroupScorer(model).score(groups)
    imported = GroupScorer.from_pretrained(tmp_path)
    assert imported.score(groups) == scores
    public = PublicModel(tmp_path)
    for fields, row in zip(data, scores, strict=True):
        torch.testing.assert_close(
            torch.tensor(row), public.scores("mr2rm-assistant", *fields), rtol=0, atol=TOLERANCE
        )


def test_import_export_import(tmp_path: Path) -> None:
    for name in NAMES:
        write_public_checkpoint(name, tmp_path / name)
    write_public_checkpoint("llama", tmp_path / "linear", kind="linear")
    groups = [random_group(random.Random(7), 4)]
    for source in (tmp_path / "qwen3_vl", tmp_path / "molmo2", tmp_path / "linear"):
        model = MultiResponseRewardModel.from_pretrained(source)
        export_paper_format(model, tmp_path / f"{source.name}-again")
        again = MultiResponseRewardModel.from_pretrained(tmp_path / f"{source.name}-again")
        assert GroupScorer(again).score(groups) == GroupScorer(model).score(groups)


def test_readout_vectors_cannot_be_exported(tmp_path: Path) -> None:
    model = MultiResponseRewardModel.from_backbone(family("llama").full_model, processor=family("llama").processor)
    with pytest.raises(CheckpointError, match="'chat' and layout 'set'; its readout vectors have no place"):
        export_paper_format(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layouts_that_hide_responses_do_not_go_with_the_templates() -> None:
    for layout in ("isolated", "set"):
        with pytest.raises(ConfigurationError, match=f"layout '{layout}' needs; use layout='causal'"):
            MultiResponseRewardModel.from_backbone(
                family("llama").full_model, layout=layout, template="mr2rm-user", processor=family("llama").processor
            )


@pytest.mark.parametrize("name", [*NAMES, "llama"])
def test_the_new_separator_row_is_the_mean_of_the_others(name: str) -> None:
    """In a spare row of the embedding, and in one that has to be added."""
    for spare in (True, False):
        full = copy.deepcopy(family(name).full_model)
        tokenizer = getattr(family(name).processor, "tokenizer", family(name).processor)
        if not spare:
            text = full.config.get_text_config()
            rows = text.vocab_size
            full.base_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            if name == "molmo2":
                text.vocab_size, text.additional_vocab_size = rows, len(tokenizer) - rows
        model = MultiResponseRewardModel.from_backbone(
            full, layout="causal", template="mr2rm-user", processor=family(name).processor
        )
        index = model.processor if name == "llama" else model.processor.tokenizer
        index = index.convert_tokens_to_ids(SEPARATOR)
        weight = model.get_input_embeddings().weight
        torch.testing.assert_close(weight[index], weight[:index].mean(0))
        text = model.config.get_text_config()
        assert len(weight) == text.vocab_size + getattr(text, "additional_vocab_size", 0) > index
