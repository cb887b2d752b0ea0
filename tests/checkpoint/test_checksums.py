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

import pytest
import torch
from tiny_models import checkpoint_groups, reward_model

from mr_reward import GroupScorer
from mr_reward.checkpoint.checksums import CHECKSUM_FILE, changed_file, written_whole, written_whole_file
from mr_reward.checkpoint.verify import check_checksums
from mr_reward.errors import CheckpointError
from mr_reward.training.resume import incomplete_reason

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
    listed = {line.split("  ")[1] for line in (folders[0] / CHECKSUM_FILE).read_text().splitlines()}
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
        GroupScorer.from_pretrained(copy)


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
        else:
            assert scores(target) in either
    assert torn <= 1
    reward_model("llama", "set").save_pretrained(target)
    assert not list(target.glob(".partial-*")), "what a kill left is removed by the next save"
