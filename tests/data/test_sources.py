"""The containers that rows come in: each gives the groups that JSON Lines give."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from mr_reward.data.groups_file import load_preferences
from mr_reward.data.sources import is_hub_id, read_rows
from mr_reward.errors import ConfigurationError, GroupError

Rows = list[dict[str, Any]]


def made(seed: int) -> Rows:
    rng = random.Random(seed)
    rows = []
    for i in range(70):  # more than a batch of the reader
        count = rng.randint(2, 5)
        rows.append(
            {
                "id": f"g{i}",
                "prompt": [{"role": "user", "content": f"Question {i}, \u00e9?"}],
                "responses": [f"answer {i} {j}" for j in range(count)],
                "rankings": [1, *(rng.randint(1, 2) for _ in range(count - 1))],
                "images": ["a.png"] if i % 2 else [],
            }
        )
    return rows


def _saved(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def _splits(path: Path, rows: Rows) -> Path:
    data = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(path))
    return path


def _parquet(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def _written(name: str) -> Callable[[Path, Rows], Path]:
    def write(path: Path, rows: Rows) -> Path:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(lines))
        else:
            path.write_bytes(json.dumps(rows).encode() if name == "list.json" else lines)
        return path

    return write


def _folder(path: Path, rows: Rows) -> Path:
    path.mkdir()
    for start in (0, 35):
        _parquet(path / f"train-{start:05d}.parquet", rows[start : start + 35])
    return path


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {
    "list.json": _written("list.json"),
    "lines.json": _written("lines.json"),
    "rows.jsonl.gz": _written("rows.jsonl.gz"),
    "rows.parquet": _parquet,
    "parts": _folder,
    "saved": _saved,
    "splits": _splits,
}


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize("seed", [0, 1])
def test_every_container_gives_the_groups_of_json_lines(
    name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (6, 6)).save(tmp_path / "a.png")
    rows = made(seed)
    expected = load_preferences(_written("rows.jsonl")(tmp_path / "rows.jsonl", rows))
    folder = name in ("parts", "saved", "splits")  # paths count from the folder
    if folder:
        rows = [{**row, "images": [f"../{path}" for path in row["images"]]} for row in rows]
    groups = load_preferences(WRITERS[name](tmp_path / name, rows), media_within=tmp_path)
    for group, other in zip(groups, expected, strict=True):
        assert group.messages == other.messages and group.id == other.id
        assert (group.responses, group.rankings) == (other.responses, other.rankings)
        assert [Path(image).resolve() for image in group.images] == [Path(image) for image in other.images]


def test_a_dataset_in_memory_keeps_its_pictures(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 5), "red")
    rows = [{"prompt": "Q", "responses": ["a", "b"], "rankings": [2, 1], "images": [image]}]
    groups = load_preferences(datasets.Dataset.from_list(rows))
    with Image.open(io.BytesIO(groups[0].images[0])) as read:
        assert read.size == (6, 5)
    assert groups[0].rankings == (2, 1)


def test_errors_name_the_place_in_every_container(tmp_path: Path) -> None:
    rows = [*made(0)[:2], {**made(0)[2], "rankings": [7]}]
    for row in rows:
        row["images"] = []
    places = {"rows.jsonl.gz": "line 3", "list.json": "item 3", "rows.parquet": "row 3", "saved": "row 3"}
    for name, place in places.items():
        with pytest.raises(GroupError, match=f"{name}, {place}: .* 1 rankings"):
            load_preferences(WRITERS[name](tmp_path / name, rows))
    lines = "".join(json.dumps(row) + "\n" for row in rows[:2]).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(GroupError, match="cut.jsonl.gz cannot be unpacked"):
        load_preferences(tmp_path / "cut.jsonl.gz")


def test_of_saved_splits_one_is_taken_only_where_there_is_no_doubt(tmp_path: Path) -> None:
    def saved(*names: str) -> Path:
        path = tmp_path / "-".join(names)
        rows = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in names}
        datasets.DatasetDict(rows).save_to_disk(str(path))
        return path

    def found(path: Path, split: str | None = None) -> list[str]:
        return [row["prompt"] for _, row in read_rows(path, split=split)]

    assert found(saved("test", "train")) == ["train"]
    assert found(tmp_path / "test-train", "test") == ["test"]
    assert found(saved("validation")) == ["validation"]
    with pytest.raises(ConfigurationError, match=r"has the splits \['a', 'b'\], got None; name one"):
        found(saved("a", "b"))
    with pytest.raises(ConfigurationError, match=r"has the splits \['validation'\], got train"):
        found(tmp_path / "validation", "train")


@pytest.mark.parametrize("beside", ["state.json", "dataset_info.json"])
def test_a_folder_of_rows_beside_another_file_of_such_a_name(beside: str, tmp_path: Path) -> None:
    """A trainer's state, for example."""
    (tmp_path / beside).write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Q"}\n')
    assert [row for _, row in read_rows(tmp_path)] == [{"prompt": "Q"}]


def test_a_split_begins_the_name_and_a_config_is_a_whole_folder(tmp_path: Path) -> None:
    names = ["pair/train-0.jsonl", "pair/test-0.jsonl", "pairwise/train-0.jsonl", "deep/pair/train-1.jsonl"]
    names += ["other/pair.jsonl", "other/retrain-pair.jsonl", "other/train-pair.jsonl"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"name": name}) + "\n")

    def found(split: str | None, config: str | None) -> list[str]:
        return [row["name"] for _, row in read_rows(tmp_path, split=split, config=config)]

    assert found("train", "pair") == ["deep/pair/train-1.jsonl", "pair/train-0.jsonl"]
    assert found(None, "pair") == ["deep/pair/train-1.jsonl", "pair/test-0.jsonl", "pair/train-0.jsonl"]
    assert found("train", None) == sorted(name for name in names if Path(name).name.startswith("train"))
    assert found(None, None) == sorted(names)
    with pytest.raises(ConfigurationError, match=r"for split None and config pair\.jsonl"):
        found(None, "pair.jsonl")


def test_scores_become_ranks_and_ties_stay(tmp_path: Path) -> None:
    row = {"prompt": "Q", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]}
    path = _written("rows.jsonl")(tmp_path / "rows.jsonl", [row, {**row, "rankings": [1, 2, 3]}])
    assert [group.rankings for group in load_preferences(path)] == [(2, 1, 2), (1, 2, 3)]
    for scores in ([1, None, 2], [1, float("nan"), 2], "high", [True, False, True]):
        _written("rows.jsonl")(path, [{**row, "scores": scores}])
        with pytest.raises(GroupError, match="line 1: scores is .* no rankings"):
            load_preferences(path)


def test_files_of_another_format_are_converted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "Q", "chosen": "a", "rejected": "b", "note": "x"},
        {"prompt": "Q", "chosen": "a", "rejected": "a", "note": "x"},
    ]
    groups = load_preferences(_parquet(tmp_path / "pairs.parquet", rows))
    assert [(group.responses, group.rankings) for group in groups] == [(("a", "b"), (1, 2))]
    told = "2 rows in the format preference became 1 groups; left out: 1 fewer than two different responses; "
    assert told + "fields not read: note" in caplog.text


def test_what_looks_like_a_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub_id("owner/name")
    for name in ("data/train", "data", "owner/name.jsonl", "owner/name.jsonl.gz", "/owner/name", "a/b/c", "./name"):
        assert not is_hub_id(name)
        with pytest.raises(ConfigurationError, match=r"no file, no folder and no hub id|holds no"):
            read_rows(name)


def test_a_forgotten_train_file_is_an_error() -> None:
    path = Path(__file__).parents[2] / "grpo_recipes" / "pretrain_rm.py"
    spec = importlib.util.spec_from_file_location("pretrain_rm_of_the_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.ModelConfig(model_name_or_path="nowhere")
    with pytest.raises(ConfigurationError, match="train_file is missing"):
        module.main(module.WorldRewardArguments(), None, model)


def test_prompts_of_a_policy_come_in_every_container(tmp_path: Path) -> None:
    from mr_reward.runs.recipe import PolicyArguments, load_prompts

    rows = [{"prompt": [{"role": "user", "content": f"Q{i}"}], "data_source": "x"} for i in range(3)]
    for name in ("list.json", "lines.json", "rows.jsonl.gz", "rows.parquet", "saved", "splits"):
        path = WRITERS[name](tmp_path / name, rows)
        prompts = load_prompts(PolicyArguments(reward_model="rm", dataset=str(path)))
        assert [prompt[0]["content"] for prompt in prompts["prompt"]] == ["Q0", "Q1", "Q2"]
