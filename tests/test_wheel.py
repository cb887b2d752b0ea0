"""What a user gets: the wheel, alone in an empty environment."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import ROUNDING, random_image, random_text, reward_model

import mr_reward
from mr_reward import GroupScorer, ResponseGroup

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows, so that nothing else of this folder gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(folder / "source")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert [path.suffix for path in sorted((folder / "dist").iterdir())] == [".whl", ".gz"]
    return next((folder / "dist").glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mr_reward").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert f"\nVersion: {mr_reward.__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata


@pytest.mark.slow
@pytest.mark.timeout(1800)  # torch and its libraries are installed again
def test_the_command_line_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    bin_folder = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    install = [bin_folder / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    installed = subprocess.run(install, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(bin_folder), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [bin_folder / "mr-reward", *map(str, arguments)],
            input=stdin,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    assert run("--version").stdout == f"mr-reward {mr_reward.__version__}\n"
    shown = run("--help")
    assert shown.returncode == 0 and all(name in shown.stdout for name in ("score", "doctor", "inspect", "serve"))
    doctor = run("doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr

    # Three groups with images through a pipe, stopped after the first and resumed.
    reward_model("qwen3_vl", "set").save_pretrained(tmp_path / "rm")
    rng, rows, groups = random.Random(3), [], []
    for i in range(3):
        random_image(rng).save(tmp_path / f"{i}.png")
        responses = [random_text(rng) for _ in range(3)]
        rows.append({"id": str(i), "prompt": "Number?", "images": [f"{i}.png"], "responses": responses})
        groups.append(ResponseGroup(prompt="Number?", images=[tmp_path / f"{i}.png"], responses=responses))
    lines = [json.dumps(row) + "\n" for row in rows]
    broken = run("score", "rm", "--out", "scores.jsonl", "--chunk", "1", stdin=lines[0] + "{no json\n")
    assert broken.returncode == 1 and "line 2" in broken.stderr and "Traceback" not in broken.stderr
    scored = run("score", "rm", "--out", "scores.jsonl", "--chunk", "1", stdin="".join(lines))
    assert scored.returncode == 0, scored.stderr
    found = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == ["0", "1", "2"]
    expected = GroupScorer.from_pretrained(tmp_path / "rm").score(groups)
    assert torch.allclose(
        torch.tensor([row["scores"] for row in found]), torch.tensor(expected), atol=ROUNDING, rtol=0
    )
