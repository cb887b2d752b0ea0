"""A checkpoint folder is written whole or stays as it was, and a file that changed afterwards is noticed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import checkpoint_groups, reward_model

from mr_reward import GroupScorer, MultiResponseRewardModel
from mr_reward.checkpoint.checksums import (
    CHECKSUM_FILE,
    changed_file,
    write_checksums,
    written_whole,
    written_whole_file,
)
from mr_reward.checkpoint.verify import check_checksums
from mr_reward.doctor.reward_model import check_reward_folder
from mr_reward.errors import CheckpointError
from mr_reward.training.saving import incomplete_reason

# Saves the second model over the first one, again and again, or once with room for `limit` bytes a file.
SAVE = """
import resource, sys
from mr_reward import MultiResponseRewardModel
first, second, target, limit = sys.argv[1:]
models = [MultiResponseRewardModel.from_pretrained(folder) for folder in (second, first)]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    models[0].save_pretrained(target)
print("saving", flush=True)
while True:
    for model in models:
        model.save_pretrained(target)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two reward models of equal shapes that score differently."""
    root = tmp_path_factory.mktemp("models")
    for name in ("0", "1"):
        model = reward_model("llama", "set", fresh=True)
        with torch.no_grad():
            model.head.out.weight.add_(float(name))
        model.save_pretrained(root / name)
    assert scores(root / "0") != scores(root / "1")
    return root / "0", root / "1"


def scores(folder: Path) -> list[list[float] | None]:
    return GroupScorer.from_pretrained(folder).score(checkpoint_groups("llama"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_file_is_what_the_usual_tool_reads(folders: tuple[Path, Path]) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    done = subprocess.run(["sha256sum", "--check", "--strict", CHECKSUM_FILE], cwd=folders[0], capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = (folders[0] / CHECKSUM_FILE).read_text().splitlines()
    listed = {line.split("  ")[1] for line in lines}
    assert listed == content(folders[0]).keys() - {"README.md", CHECKSUM_FILE}


@pytest.mark.parametrize("seed", range(20))
def test_one_flipped_bit_is_noticed(folders: tuple[Path, Path], tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    listed = [line.split("  ")[1] for line in (copy / CHECKSUM_FILE).read_text().splitlines()]
    path = copy / ("model.safetensors" if seed % 2 else rng.choice(sorted(listed)))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    assert changed_file(copy) == path.name
    with pytest.raises(CheckpointError):
        GroupScorer.from_pretrained(copy, verify=True)
    with pytest.raises(CheckpointError):
        MultiResponseRewardModel.from_pretrained(copy, verify=True)
    if path.suffix != ".safetensors":  # read whole at every load
        with pytest.raises(CheckpointError, match=f"{path.name} is missing or not the file that was saved"):
            GroupScorer.from_pretrained(copy)


def bytes_read() -> int:
    """By this process so far, as the system counts; mapped files, as weights are loaded, do not count."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(io["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
def test_a_load_does_not_read_the_weights_to_check_them(tmp_path: Path) -> None:
    reward_model("llama", head_hidden_size=100_000).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 25_000_000
    MultiResponseRewardModel.from_pretrained(tmp_path)  # loads modules
    counts = []
    for options in ({}, {"verify": False}, {"verify": True}):
        before = bytes_read()
        MultiResponseRewardModel.from_pretrained(tmp_path, **options)
        counts.append(bytes_read() - before)
    assert max(counts[:2]) < size / 10, counts
    assert counts[2] >= size


def edit_weights(path: Path, how: str) -> None:
    """Damage that keeps a part of the file as it was."""
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    if how == "cut off":
        data = data[:-64]
    elif how == "longer":
        data += bytes(64)
    elif how == "another header":  # of the same length: two weights of one shape change places
        first, second = b"layers.0.mlp.up_proj", b"layers.1.mlp.up_proj"
        assert first in data[8:end] and second in data[8:end]
        data[8:end] = data[8:end].replace(first, b"swapped").replace(second, first).replace(b"swapped", second)
    elif how == "no header":
        data[:8] = bytes(8)
    elif how == "last weights":  # a run that trained only the last ones
        data[-4096:] = bytes(4096)
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut off", "longer", "another header", "no header", "last weights"])
def test_another_file_is_refused_at_every_load(folders: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    edit_weights(copy / "model.safetensors", how)
    with pytest.raises(CheckpointError, match="model.safetensors is missing or not the file that was saved"):
        MultiResponseRewardModel.from_pretrained(copy)


def test_one_wrong_bit_of_the_weights_is_found_by_verify(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    first = load_file(path)["head.dense.weight"].numpy().tobytes()
    data[data.index(first) + 200] ^= 1  # past what a load looks at
    path.write_bytes(data)
    assert changed_file(copy, verify=False) is None and changed_file(copy) == path.name
    MultiResponseRewardModel.from_pretrained(copy)
    assert [finding.what for finding in check_reward_folder(str(copy)) if finding.level == "red"] == ["weights"]
    with pytest.raises(CheckpointError, match="model.safetensors is missing or not the file that was saved"):
        MultiResponseRewardModel.from_pretrained(copy, verify=True)


def without_sketches(folder: Path) -> None:
    """The list as the release before wrote it."""
    lines = (folder / CHECKSUM_FILE).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("#")]
    assert len(kept) < len(lines)
    (folder / CHECKSUM_FILE).write_text("".join(kept))


def test_lists_without_sizes_still_load(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    without_sketches(copy)
    assert scores(copy) == scores(folders[0]) and changed_file(copy) is None
    for how in ("cut off", "longer", "no header"):
        edit_weights(copy / "model.safetensors", how)
        assert changed_file(copy) == "model.safetensors"
        with pytest.raises(CheckpointError):
            MultiResponseRewardModel.from_pretrained(copy)
        shutil.copy(folders[0] / "model.safetensors", copy)


def test_other_large_files_are_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bytes(3_000_000))
    write_checksums(tmp_path)
    assert changed_file(tmp_path, verify=False) is None
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"x")
    assert changed_file(tmp_path, verify=False) is None and changed_file(tmp_path) == "tokenizer.json"
    os.truncate(tmp_path / "tokenizer.json", 2_999_999)
    assert changed_file(tmp_path, verify=False) == "tokenizer.json"


def test_a_hub_repository_is_fetched_to_be_checked(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the files that were asked for lie on this machine; the others are not missing."""

    def download(name: str, file: str, **options: Any) -> str | None:
        assert name == "someone/rm"
        if not (folders[0] / file).is_file():
            return None
        if not (tmp_path / file).exists():
            shutil.copy(folders[0] / file, tmp_path / file)
        return str(tmp_path / file)

    monkeypatch.setattr("mr_reward.checkpoint.verify.cached_file", download)
    check_checksums("someone/rm", verify=True)
    assert (tmp_path / "model.safetensors").exists()
    edit_weights(tmp_path / "model.safetensors", "cut off")
    with pytest.raises(CheckpointError, match="model.safetensors is missing or not the file that was saved"):
        check_checksums("someone/rm")


def test_weights_of_another_run_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    shutil.copy(folders[1] / "model.safetensors", copy)
    with pytest.raises(CheckpointError, match="model.safetensors is missing or not the file that was saved"):
        GroupScorer.from_pretrained(copy)
    (copy / CHECKSUM_FILE).unlink()  # as the message says, for who did it on purpose
    assert scores(copy) == scores(folders[1])


def test_files_that_are_edited_by_hand_are_left_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    (copy / "README.md").write_text("mine")
    (copy / "notes.txt").write_text("mine")
    assert changed_file(copy) is None
    assert scores(copy) == scores(folders[0])


@pytest.mark.parametrize("line", ["0  ../secret", "0  /etc/passwd", "0  missing", "nonsense", "\x00  x"])
def test_a_broken_list_is_refused_and_leads_nowhere(folders: tuple[Path, Path], tmp_path: Path, line: str) -> None:
    (tmp_path / "secret").write_text("x")
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    (copy / CHECKSUM_FILE).write_text(line + "\n")
    with pytest.raises(CheckpointError, match="is missing or not the file that was saved"):
        check_checksums(str(copy))


def test_no_list_no_check(tmp_path: Path) -> None:
    assert changed_file(tmp_path) is None
    check_checksums(str(tmp_path))


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path) as unfinished:
        (unfinished / "a").write_text("new")
        raise ZeroDivisionError
    assert content(tmp_path) == {"a": b"old"}


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    with written_whole_file(path) as unfinished:
        unfinished.write_text("old")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), written_whole_file(path) as unfinished:
        unfinished.write_text("new")
        raise ZeroDivisionError
    assert content(tmp_path) == {"new/a": b"old"}


def test_weights_of_an_earlier_save_do_not_stay_beside_the_new_ones(tmp_path: Path) -> None:
    model = reward_model("llama", "set")
    model.save_pretrained(tmp_path / "rm", max_shard_size="50KB")
    assert len(list((tmp_path / "rm").glob("model-*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "rm")
    assert [path.name for path in (tmp_path / "rm").glob("model*")] == ["model.safetensors"]
    assert changed_file(tmp_path / "rm") is None


def test_the_list_of_checksums_is_the_last_file_that_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in between leaves files of two saves, which must not agree with the list."""
    moved: list[str] = []
    replace = os.replace

    def recorded(source: Path, target: Path) -> None:
        moved.append(target.relative_to(tmp_path).as_posix())
        replace(source, target)

    monkeypatch.setattr(os, "replace", recorded)
    names = ["A.json", "config.json", "model.safetensors", "zz/SHA1", "zz/tokenizer.json"]
    with written_whole(tmp_path) as unfinished:
        for name in names:
            (unfinished / name).parent.mkdir(exist_ok=True)
            (unfinished / name).write_text(name)
    assert sorted(moved[:-1]) == names and moved[-1] == CHECKSUM_FILE


def test_a_sketch_is_of_the_size_the_header_and_the_first_bytes_of_each_tensor(tmp_path: Path) -> None:
    save_file({name: torch.zeros(300, dtype=torch.uint8) for name in "abc"}, tmp_path / "model.safetensors")
    write_checksums(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    start = len(whole) - 900

    def noticed(changed: bytes) -> bool:
        path.write_bytes(changed)
        return changed_file(tmp_path, verify=False) is not None

    assert not noticed(whole) and noticed(whole[:-1]) and noticed(whole + b"\0")
    for tensor in range(3):
        for place in (0, 1, 7, 8, 55, 56, 63, 64, 299):
            changed = bytearray(whole)
            changed[start + 300 * tensor + place] ^= 1
            assert noticed(bytes(changed)) == (place < 64), (tensor, place)
            assert changed_file(tmp_path) == path.name, "every byte with verify"


def test_a_changed_checkpoint_is_not_resumed_from(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[0], tmp_path / "checkpoint-7"))
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    torch.save({}, folder / "rng_state.pth")
    assert incomplete_reason(folder) is None
    shutil.copy(folders[1] / "model.safetensors", folder)
    assert incomplete_reason(folder) == "model.safetensors is missing or not the file that was saved"


def test_a_full_disk_leaves_the_earlier_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """No file may be larger than half of the weights: what a disk without room does to the write."""
    target = Path(shutil.copytree(folders[0], tmp_path / "rm"))
    before, limit = content(target), (target / "model.safetensors").stat().st_size // 2
    done = subprocess.run([sys.executable, "-c", SAVE, *map(str, (*folders, target, limit))], capture_output=True)
    assert done.returncode == 1 and b"File too large" in done.stderr, done.stderr[-2000:]
    assert content(target) == before
    assert not list(target.glob(".partial-*"))


def test_a_kill_while_saving_leaves_a_whole_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Five kills at random moments of a save: the folder holds one of the two models, or says that it does not."""
    target = Path(shutil.copytree(folders[0], tmp_path / "rm"))
    command = [sys.executable, "-c", SAVE, *map(str, (*folders, target, 0))]
    rng, torn = random.Random(0), 0
    either = [scores(folder) for folder in folders]
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.stdout is not None and process.stdout.readline() == b"saving\n"
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if changed_file(target) is not None:  # killed between two renames
            torn += 1
            with pytest.raises(CheckpointError, match="is missing or not the file that was saved"):
                GroupScorer.from_pretrained(target)
            shutil.copytree(folders[0], target, dirs_exist_ok=True)  # else a later kill is counted for this one
        else:
            assert scores(target) in either
    assert torn <= 1
    reward_model("llama", "set").save_pretrained(target)
    assert not list(target.glob(".partial-*")), "what a kill left is removed by the next save"
