"""LoRA checkpoints load, merged into their backbone, with the scores that the adapter gave; incomplete ones do not."""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import checkpoint_groups, family, pack, random_group
from torch import Tensor

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.errors import CheckpointError
from mr_reward.model.export import merge
from mr_reward.model.rows import collate
from mr_reward.training.trainer import RewardTrainer, RewardTrainingArguments, _with_lora

# The merged weights are rounded sums: scores that are 0.1 to 1 apart differ by some 1e-7.
TOLERANCE = 1e-5
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def save_adapter(
    name: str, root: Path, options: dict[str, Any] | None = None, **from_backbone: Any
) -> tuple[Path, PeftModel]:
    """A LoRA checkpoint as the trainer writes it, whose adapter, head and readout vectors have moved."""
    backbone, folder = root / "backbone", root / "adapter"
    family(name).full_model.save_pretrained(backbone)
    family(name).processor.save_pretrained(backbone)
    torch.manual_seed(2)
    model = MultiResponseRewardModel.from_backbone(backbone, **from_backbone)
    wrapped = _with_lora(model, LoraConfig(r=4, lora_alpha=8, **(options or {}))).eval()
    assert isinstance(wrapped, PeftModel)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    model.config.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder, wrapped


@torch.no_grad()
def adapter_scores(wrapped: PeftModel, groups: list[ResponseGroup]) -> list[Tensor]:
    model = wrapped.get_base_model()
    batch = collate([pack(model, group) for group in groups], model.adapter)
    scores = wrapped(rows=batch).scores
    return [row[: group.num_responses] for row, group in zip(scores, groups, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "layout"), [("llama", "set"), ("qwen3_vl", "set"), ("molmo2", "causal")])
def test_merged_scores_are_those_of_the_adapter(name: str, layout: str, variant: str, tmp_path: Path) -> None:
    folder, wrapped = save_adapter(name, tmp_path, VARIANTS[variant], layout=layout)
    groups = checkpoint_groups(name)
    before = adapter_scores(wrapped, groups)
    with wrapped.disable_adapter():
        without = adapter_scores(wrapped, groups)
    assert (before[0] - without[0]).abs().max() > 100 * TOLERANCE, "an adapter that changes nothing shows nothing"
    loaded = MultiResponseRewardModel.from_pretrained(folder)
    merged = merge(folder, tmp_path / "merged")
    assert not loaded.training and not [key for key in loaded.state_dict() if "lora" in key]
    for model in (loaded, merged, MultiResponseRewardModel.from_pretrained(tmp_path / "merged")):
        for found, expected in zip(GroupScorer(model).score(groups), before, strict=True):
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=TOLERANCE)
    # The merged folder needs neither the adapter nor the backbone.
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "backbone")
    alone = GroupScorer.from_pretrained(tmp_path / "merged").score(groups)
    assert alone == GroupScorer(merged).score(groups)


@pytest.mark.parametrize("name", ["llama", "qwen3_vl"])
def test_separators_survive(name: str, tmp_path: Path) -> None:
    """Its embedding row is not in the adapter: it is made again as it was, or trained by name."""
    for case, options in (("frozen", {}), ("trained", {"trainable_token_indices": None})):
        template = {"layout": "causal", "template": "mr2rm-assistant"}
        if options:
            probe = MultiResponseRewardModel.from_backbone(
                copy.deepcopy(family(name).full_model), processor=family(name).processor, **template
            )
            tokenizer = getattr(probe.processor, "tokenizer", probe.processor)
            options = {"trainable_token_indices": [tokenizer.convert_tokens_to_ids("<|resp_sep|>")]}
        folder, wrapped = save_adapter(name, tmp_path / case, options, **template)
        groups = checkpoint_groups(name)
        before = adapter_scores(wrapped, groups)
        for found, expected in zip(GroupScorer.from_pretrained(folder).score(groups), before, strict=True):
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=TOLERANCE)


def test_a_checkpoint_of_the_trainer_loads(tmp_path: Path) -> None:
    family("llama").full_model.save_pretrained(tmp_path / "backbone")
    family("llama").processor.save_pretrained(tmp_path / "backbone")
    rng = random.Random(3)
    groups = [random_group(rng, 3, rankings=[1, 2, 3]) for _ in range(4)]
    trainer = RewardTrainer(
        MultiResponseRewardModel.from_backbone(tmp_path / "backbone"),
        RewardTrainingArguments(
            str(tmp_path / "run"), max_steps=3, save_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[]
        ),
        groups,
        peft_config=LoraConfig(r=4),
    )
    trainer.train()
    before = adapter_scores(trainer.model.eval(), groups)
    found = GroupScorer.from_pretrained(tmp_path / "run" / "checkpoint-3").score(groups)
    for row, expected in zip(found, before, strict=True):
        torch.testing.assert_close(torch.tensor(row), expected, rtol=0, atol=TOLERANCE)


def test_dtype_and_backend_are_chosen_at_loading(tmp_path: Path) -> None:
    folder, wrapped = save_adapter("llama", tmp_path)
    model = MultiResponseRewardModel.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.attention_backend == "eager"
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    groups = checkpoint_groups("llama")
    for found, expected in zip(GroupScorer(model).score(groups), adapter_scores(wrapped, groups), strict=True):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=0.3)  # 8 bits of mantissa


def test_peft_is_loaded_for_adapters_only(tmp_path: Path) -> None:
    folder, _ = save_adapter("llama", tmp_path)
    merge(folder, tmp_path / "merged")
    code = (
        "import sys, mr_reward; from mr_reward import GroupScorer; "
        "assert 'peft' not in sys.modules; "
        f"GroupScorer.from_pretrained({str(tmp_path / 'merged')!r}); assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- what is not whole is refused ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter("llama", tmp_path_factory.mktemp("lora"))[0]


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A LoRA checkpoint to damage."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        MultiResponseRewardModel.from_pretrained(folder)


def test_unknown_backbone_is_refused(copied: Path) -> None:
    edit_json(copied / "config.json", backbone_name_or_path=None)
    refuses(copied, "does not say which backbone.*backbone_name_or_path")
    edit_json(copied / "config.json", backbone_name_or_path=str(copied / "nowhere"))
    refuses(copied, "nowhere: no backbone with safetensors weights")


def test_another_backbone_is_refused(copied: Path, tmp_path: Path) -> None:
    family("qwen3_vl").full_model.save_pretrained(tmp_path / "other")
    edit_json(copied / "config.json", backbone_name_or_path=str(tmp_path / "other"))
    refuses(copied, "'qwen3_vl'.*trained on.*'llama'")


@pytest.mark.parametrize("part", ["head.dense.weight", "head.out.weight", "readouts.summary", "lora_A", "lora_B"])
def test_missing_weights_are_refused(copied: Path, part: str) -> None:
    edit_weights(copied, lambda tensors: tensors.pop(next(key for key in tensors if part in key)))
    refuses(copied, f"missing weights .*{part}")


def test_unexpected_weights_are_refused(copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.update({"base_model.model.head.out.bias": torch.zeros(1)}))
    refuses(copied, "unexpected weights .*head.out.bias")


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    edit_weights(
        copied, lambda tensors: tensors.update({key: torch.zeros(2, 2) for key in tensors if "lora_A" in key})
    )
    refuses(copied, "weights of another shape .*lora_A")


def test_adapter_without_the_head_is_refused(copied: Path) -> None:
    edit_json(copied / "adapter_config.json", modules_to_save=["readouts"])
    refuses(copied, r"expected \['head', 'readouts'\]; without them scores come from random weights")


def test_missing_files_are_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "adapter_model.safetensors").unlink()
    refuses(copied, "no adapter_model.safetensors could be read")
    (copied / "config.json").unlink()
    refuses(copied, "no config.json")
    with pytest.raises(CheckpointError, match="no adapter_config.json there, so nothing is to be merged"):
        merge(tmp_path, tmp_path / "out")


def test_changed_chat_template_is_refused(copied: Path) -> None:
    path = copied / "chat_template.jinja"
    path.write_text(path.read_text() + "\n{{ 'Think first.' }}")
    refuses(copied, "trained with template hash [0-9a-f]{16}.*restore the chat template")
