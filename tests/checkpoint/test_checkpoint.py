"""A checkpoint folder is whole: what is saved scores the same in another process, and what is not whole is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LAYOUTS, assert_close, checkpoint_groups, family, reward_model, score

from mr_reward import GroupScorer, MultiResponseRewardModel
from mr_reward.checkpoint import weights_digest
from mr_reward.checkpoint.checksums import CHECKSUM_FILE
from mr_reward.checkpoint.verify import non_finite_cause
from mr_reward.errors import BackendError, CheckpointError, ConfigurationError

NAMES = ("qwen3_vl", "molmo2", "llama")
WEIGHTS = "model.safetensors"

SCORE_IN_A_NEW_PROCESS = """
import json, pickle, sys
import torch
torch.set_num_threads(1)
from mr_reward import GroupScorer, ResponseGroup
folders, groups, results = sys.argv[1:]
groups = {name: [ResponseGroup(**fields) for fields in many] for name, many in pickle.load(open(groups, "rb")).items()}
scores = {}
for key, folder in json.loads(folders).items():
    scorer = GroupScorer.from_pretrained(folder)
    scores[key] = [[value.hex() for value in row] for row in scorer.score(groups[key.split()[0]])]
json.dump(scores, open(results, "w"))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A saved reward model for each family and layout. Read only; see `copied`."""
    root = tmp_path_factory.mktemp("checkpoints")
    saved = {}
    for name in NAMES:
        for layout in LAYOUTS:
            saved[name, layout] = root / f"{name}-{layout}"
            reward_model(name, layout).save_pretrained(saved[name, layout])
    return saved


@pytest.fixture
def copied(folders: dict[tuple[str, str], Path], tmp_path: Path) -> Path:
    """A Llama checkpoint to damage, without the checksums, which would say no more than that it is."""
    shutil.copytree(folders["llama", "set"], tmp_path / "copy", ignore=shutil.ignore_patterns(CHECKSUM_FILE))
    return tmp_path / "copy"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# --- save, new process, load ---


def test_scores_of_a_new_process_are_equal_bit_for_bit(folders: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    groups = {name: checkpoint_groups(name) for name in NAMES}
    fields = {
        name: [{"prompt": g.messages, "responses": g.responses, "images": g.images} for g in many]
        for name, many in groups.items()
    }
    (tmp_path / "groups").write_bytes(pickle.dumps(fields))
    arguments = [
        json.dumps({" ".join(key): str(folder) for key, folder in folders.items()}),
        str(tmp_path / "groups"),
        str(tmp_path / "scores"),
    ]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", SCORE_IN_A_NEW_PROCESS, *arguments],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads((tmp_path / "scores").read_text())
    assert len(found) == len(folders) == len(NAMES) * len(LAYOUTS)
    seen = []
    for name, layout in folders:
        expected = GroupScorer(reward_model(name, layout)).score(groups[name])
        assert found[f"{name} {layout}"] == [[value.hex() for value in row or ()] for row in expected]
        seen.append(str(expected))
    assert len(set(seen)) == len(seen), "the layouts must differ, or a lost layout would not show"


@pytest.mark.parametrize("name", NAMES)
def test_loading_gives_back_everything(folders: dict[tuple[str, str], Path], name: str) -> None:
    saved = reward_model(name, "set")
    loaded, info = MultiResponseRewardModel.from_pretrained(folders[name, "set"], output_loading_info=True)
    assert not any(info.values())
    assert not loaded.training
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    for key in ("layout", "template", "template_hash", "score_scale", "head_activation", "schema_version"):
        assert getattr(loaded.config, key) == getattr(saved.config, key)
    assert loaded.processor.chat_template == saved.processor.chat_template
    # CPU kernels sum in another order over weights that are not aligned, as those of a mapped file are not.
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())
    # Buffers that are not saved (rotary frequencies) have to be computed again, not left empty.
    buffers = dict(loaded.named_buffers())
    for key, value in saved.named_buffers():
        assert torch.equal(buffers[key], value), key


def test_options_of_the_head_survive(tmp_path: Path) -> None:
    model = reward_model("llama", head_hidden_size=24, head_activation="gelu", score_scale=0.25)
    model.save_pretrained(tmp_path)
    loaded = MultiResponseRewardModel.from_pretrained(tmp_path)
    assert loaded.head.dense.weight.shape == (24, 64)
    groups = checkpoint_groups("llama")
    for found, expected in zip(score(loaded, groups), score(model, groups), strict=True):
        assert torch.equal(found, expected)
    # The scale is a factor of the score and not of something before the activation.
    model.config.score_scale = 1.0
    for found, expected in zip(score(loaded, groups), score(model, groups), strict=True):
        torch.testing.assert_close(found * 4, expected)


def test_sharded_weights_load(tmp_path: Path) -> None:
    model = reward_model("llama", "isolated")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MultiResponseRewardModel.from_pretrained(tmp_path)
    groups = checkpoint_groups("llama")
    for found, expected in zip(score(loaded, groups), score(model, groups), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_bf16_keeps_the_head_in_float32(folders: dict[tuple[str, str], Path], name: str, layout: str) -> None:
    loaded = MultiResponseRewardModel.from_pretrained(folders[name, layout], dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.head.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.backbone.parameters()} == {torch.bfloat16}
    exact = reward_model(name, layout)
    for key, value in exact.head.state_dict().items():
        assert torch.equal(loaded.head.state_dict()[key], value), f"{key} went through bfloat16"
    groups = checkpoint_groups(name)
    for found, expected in zip(score(loaded, groups), score(exact, groups), strict=True):
        assert found.dtype == torch.float32 and found.isfinite().all()
        # 8 bits of mantissa, a few layers: the scores (spread 0.1 to 1) stay in the neighbourhood.
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


def test_a_bf16_backbone_is_saved_and_loaded_as_such(tmp_path: Path) -> None:
    model = reward_model("llama", "set", fresh=True)
    model.backbone.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = GroupScorer.from_pretrained(tmp_path, dtype=torch.bfloat16).model
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[key], value)
    for key, value in model.head.state_dict().items():
        assert torch.equal(loaded.head.state_dict()[key], value)
    assert GroupScorer(loaded).score(checkpoint_groups("llama")) == GroupScorer(
        MultiResponseRewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ).score(checkpoint_groups("llama"))


@pytest.mark.parametrize("name", NAMES)
def test_attention_backend_is_chosen_at_loading(folders: dict[tuple[str, str], Path], name: str) -> None:
    loaded = MultiResponseRewardModel.from_pretrained(folders[name, "set"], attn_implementation="eager")
    assert loaded.attention_backend == "eager"
    groups = checkpoint_groups(name)
    for found, expected in zip(score(loaded, groups), score(reward_model(name, "set"), groups), strict=True):
        assert_close(found, expected, 1e-5)  # rounding, see test_invariances


def test_a_backend_that_cannot_is_refused_at_loading(folders: dict[tuple[str, str], Path]) -> None:
    for layout in ("isolated", "set"):
        with pytest.raises(BackendError, match="paged.eager.*'mr_group' or 'sdpa'"):
            MultiResponseRewardModel.from_pretrained(folders["llama", layout], attn_implementation="paged|eager")


# --- state dict keys ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_names_of_our_own_weights(
    folders: dict[tuple[str, str], Path], name: str, layout: str, tmp_path: Path
) -> None:
    """Golden: a renamed weight makes every saved checkpoint unreadable."""
    tensors = load_file(folders[name, layout] / WEIGHTS)
    own = {key: tuple(value.shape) for key, value in tensors.items() if not key.startswith("backbone.")}
    assert own == {
        "head.dense.bias": (64,),
        "head.dense.weight": (64, 64),
        "head.out.weight": (1, 64),
        "readouts.comparison": (64,),
        "readouts.summary": (64,),
    }
    backbone = {key.removeprefix("backbone.") for key in tensors if key.startswith("backbone.")}
    # What transformers calls them on disk: for Molmo2 those are the names of the public checkpoints.
    family(name).full_model.base_model.save_pretrained(tmp_path)
    assert backbone == load_file(tmp_path / WEIGHTS).keys()
    assert {value.dtype for key, value in tensors.items() if key in own} == {torch.float32}


def test_the_folder_is_self_contained(folders: dict[tuple[str, str], Path]) -> None:
    for (name, layout), folder in folders.items():
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "multi_response_reward"
        assert config["layout"] == layout
        assert config["template"] == "chat" and len(config["template_hash"]) == 16
        assert config["schema_version"] == 1
        assert config["backbone_config"]["model_type"] == name
        assert (folder / "tokenizer.json").exists()
        assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


# --- what is not whole is refused ---


def refuses(folder: Path | str, message: str, error: type[Exception] = CheckpointError, **options: Any) -> None:
    with pytest.raises(error, match=message):
        MultiResponseRewardModel.from_pretrained(folder, **options)


def test_the_copy_loads_before_it_is_damaged(copied: Path) -> None:
    MultiResponseRewardModel.from_pretrained(copied)


@pytest.mark.parametrize(
    "missing",
    ["head.dense.bias", "head.dense.weight", "head.out.weight", "readouts.summary", "backbone.norm.weight"],
)
def test_missing_weight_is_refused(copied: Path, missing: str) -> None:
    edit_weights(copied, lambda tensors: tensors.pop(missing))
    refuses(copied, f"missing weights .*{missing}.*save it again")


def test_missing_head_is_refused(copied: Path) -> None:
    edit_weights(copied, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("head.")])
    refuses(copied, "missing weights .*head.dense.bias.*head.dense.weight.*head.out.weight")


@pytest.mark.parametrize("extra", ["head.out.bias", "backbone.extra.weight", "value_head.weight"])
def test_unexpected_weight_is_refused(copied: Path, extra: str) -> None:
    edit_weights(copied, lambda tensors: tensors.update({extra: torch.zeros(3)}))
    refuses(copied, f"unexpected weights .*{extra}")


@pytest.mark.parametrize("key", ["head.dense.weight", "readouts.summary", "backbone.embed_tokens.weight"])
def test_weight_of_another_shape_is_refused(copied: Path, key: str) -> None:
    edit_weights(copied, lambda tensors: tensors.update({key: torch.zeros(7, 3)}))
    refuses(copied, f"weights of another shape .*{key}")
    refuses(copied, f"weights of another shape .*{key}", ignore_mismatched_sizes=True)


def test_weights_of_another_backbone_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    edit_config(copied, backbone_config={**config["backbone_config"], "num_hidden_layers": 1})
    refuses(copied, "unexpected weights .*backbone.layers.1")


def test_unreadable_weights_are_refused(copied: Path) -> None:
    content = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(content[: len(content) // 2])
    refuses(copied, "no safetensors weights could be read")


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    reward_model("llama", "isolated").save_pretrained(tmp_path, max_shard_size="100KB")
    min(tmp_path.glob("*.safetensors")).unlink()
    refuses(tmp_path, r"model-00001-of-000..\.safetensors is missing or not the file that was saved")
    (tmp_path / CHECKSUM_FILE).unlink()
    refuses(tmp_path, "no safetensors weights could be read")


@pytest.mark.parametrize("where", ["../elsewhere/model.safetensors", "{absolute}/model.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(copied: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    keys = list(load_file(copied / WEIGHTS))
    shutil.move(copied / WEIGHTS, tmp_path / "elsewhere")
    target = where.format(absolute=tmp_path / "elsewhere")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, target)}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(copied, "looks for weights in .*elsewhere.*expected files of the folder itself")


def test_missing_safetensors_are_refused_even_beside_a_pickle(copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS)
    (copied / WEIGHTS).unlink()
    refuses(copied, "no safetensors weights")
    torch.save(tensors, copied / "pytorch_model.bin")
    refuses(copied, "no safetensors weights")


def test_unknown_configuration_key_is_refused(copied: Path) -> None:
    edit_config(copied, readout_dropout=0.1)
    refuses(copied, r"unknown configuration keys \['readout_dropout'\].*release of mr_reward")


def test_newer_schema_is_refused(copied: Path) -> None:
    edit_config(copied, schema_version=2)
    refuses(copied, "schema version 2, this release reads up to 1; upgrade mr_reward")


@pytest.mark.parametrize(("key", "value"), [("layout", "ring"), ("template", "alpaca"), ("head_activation", "sine")])
def test_unknown_option_is_refused(copied: Path, key: str, value: str) -> None:
    edit_config(copied, **{key: value})
    refuses(copied, f"unknown .*'{value}'", ConfigurationError)


def test_changed_chat_template_is_refused(copied: Path) -> None:
    path = copied / "chat_template.jinja"
    path.write_text(path.read_text() + "\n{{ 'Think first.' }}")
    refuses(copied, "trained with template hash [0-9a-f]{16}.*restore the chat template")


def test_missing_template_hash_is_refused(copied: Path) -> None:
    edit_config(copied, template_hash=None)
    refuses(copied, "trained with template hash None")


def test_plain_backbone_is_refused(tmp_path: Path) -> None:
    family("llama").full_model.save_pretrained(tmp_path)
    family("llama").processor.save_pretrained(tmp_path)
    refuses(tmp_path, "holds a 'llama' model, expected 'multi_response_reward'.*from_backbone")


def test_missing_files_are_refused(copied: Path, tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "nowhere")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "no config.json")
    for path in copied.glob("tokenizer*"):
        path.unlink()
    refuses(copied, "no processor or tokenizer")


def test_broken_configuration_is_refused(copied: Path) -> None:
    (copied / "config.json").write_text('{"model_type": "multi_response')
    refuses(copied, "config.json")


# --- the digest of a model, by which a run knows its reward model again ---


class _Tensors(torch.nn.Module):
    """Weights whose bytes fill no whole number of 64-bit words, and the settings of a reward model."""

    def __init__(self, dtype: torch.dtype, **weights: torch.Tensor) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, torch.nn.Parameter(weight.to(dtype)))
        self.config = reward_model("llama").config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_a_model_counts_in_its_digest(dtype: torch.dtype) -> None:
    weights = {"a": torch.arange(1.0, 4.0), "b": torch.arange(1.0, 14.0), "c": torch.ones(1), "d": torch.ones(2, 3)}
    digest: Any = weights_digest
    plain = digest(_Tensors(dtype, **weights))
    assert digest(_Tensors(dtype, **dict(reversed(weights.items())))) == plain, "the order of making says nothing"
    seen = {plain}
    for name, weight in weights.items():
        for i in range(weight.numel()):
            other = weight.clone()
            other.view(-1)[i] += 0.5
            seen.add(digest(_Tensors(dtype, **{**weights, name: other})))
    assert len(seen) == 1 + sum(weight.numel() for weight in weights.values())
    swapped = weights["b"][[1, 0, *range(2, 13)]]
    far = weights["b"][[12, *range(1, 12), 0]]
    for other in (
        {**weights, "b": swapped},
        {**weights, "b": far},
        {**weights, "d": weights["d"].view(3, 2)},
        {"a" if name == "c" else "c" if name == "a" else name: weight for name, weight in weights.items()},
        {"e" if name == "d" else name: weight for name, weight in weights.items()},
    ):
        found = digest(_Tensors(dtype, **other))
        assert found not in seen
        seen.add(found)
    other_dtype = torch.bfloat16 if dtype == torch.float32 else torch.float32
    assert digest(_Tensors(other_dtype, **weights)) not in seen
    with pytest.raises(CheckpointError, match="the weight b is empty"):
        digest(_Tensors(dtype, **{**weights, "b": torch.ones(0)}))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("layout", "isolated"),
        ("template", "mr2rm-user"),
        ("template_hash", "0" * 16),
        ("score_scale", 0.5),
        ("head_activation", "gelu"),
        ("head_bias", True),
    ],
)
def test_every_setting_that_changes_scores_counts_in_the_digest(setting: str, value: Any) -> None:
    model = reward_model("llama", "set", fresh=True)
    before = weights_digest(model)
    kept = getattr(model.config, setting)
    setattr(model.config, setting, value)
    assert weights_digest(model) != before
    setattr(model.config, setting, kept)
    model.config.backbone_name_or_path = "elsewhere"
    assert weights_digest(model) == before, "where it came from changes no score"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ((1,), "the weights b are not finite"),
        ((0, 2), "the weights a, c are not finite"),
        ((0, 1, 2), "the weights a, b, c are not finite"),
        ((0, 1, 2, 4), "the weights a, b, c and 1 more are not finite"),
        ((0, 1, 2, 3, 4), "the weights a, b, c and 2 more are not finite"),
        ((), "all weights are finite, so activations overflow in float32"),
    ],
)
def test_the_cause_names_the_weights_and_counts_the_others(bad: tuple[int, ...], told: str) -> None:
    weights = {name: torch.full((2,), float("nan") if i in bad else 1.0) for i, name in enumerate("abcde")}
    assert non_finite_cause(_Tensors(torch.float32, **weights)).startswith(told)
