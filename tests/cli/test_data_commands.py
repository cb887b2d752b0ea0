"""`mr-reward data ...` through its entry point, on real files."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from test_converters import ROWS
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.data.preferences import load_preferences
from mr_reward.errors import GroupError, MRRewardError


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_convert_parquet_with_embedded_images(tmp_path: Path) -> None:
    """As the hub has it: an image column. Two rows share a picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), "red").save(buffer, format="PNG")
    rows = {
        "question": ["<image>\nWhat?", "Where?"],
        "chosen": ["a", "b"],
        "rejected": ["c", "d"],
        "image": [{"bytes": buffer.getvalue(), "path": None}] * 2,
        "idx": [1, 2],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "rlaif.parquet")
    output = run("data", "convert", "rlaif_v", tmp_path / "rlaif.parquet", tmp_path / "out" / "train.jsonl")
    assert "groups written" in output and "cc-by-nc-4.0" in output
    groups = load_preferences(tmp_path / "out" / "train.jsonl")
    assert [group.responses for group in groups] == [("a", "c"), ("b", "d")]
    assert groups[0].source == "rlaif_v"
    with Image.open(groups[0].images[0]) as image:
        assert image.size == (6, 5)
    assert groups[0].images == groups[1].images


def test_convert_counts_ties_and_reads_frame_folders(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "video" / "1").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "video" / "1" / f"{i}.png")
    row = {**ROWS["mm_rlhf"], "image": None, "video": "video/1"}
    tied = {**row, "final_ranking": [1, 1, 1, 1]}
    source = write_jsonl(tmp_path / "data.jsonl", [row, tied, row])
    output = run("data", "convert", "mm_rlhf", source, tmp_path / "train.jsonl")
    assert "all responses tie" in output
    groups = load_preferences(tmp_path / "train.jsonl")
    assert len(groups) == 2 and len(groups[0].videos[0]) == 3


def test_a_bad_row_is_an_error_with_file_and_row_or_listed(tmp_path: Path) -> None:
    rows = [ROWS["skywork"], {**ROWS["skywork"], "chosen": []}, ROWS["skywork"]]
    source = write_jsonl(tmp_path / "sky.jsonl", rows)
    out = tmp_path / "train.jsonl"
    with pytest.raises(GroupError, match="sky.jsonl, row 2: field 'chosen'"):
        run("data", "convert", "skywork", source, out)
    assert not out.exists()
    output = run("data", "convert", "skywork", source, out, "--skip-bad")
    assert "bad: row 2: field 'chosen'" in output
    assert len(load_preferences(out)) == 2
    assert len(load_preferences(out)) != len(rows)


def test_limit_and_axis(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pku.jsonl", [{**ROWS["pku_saferlhf"], "safer_response_id": 0}] * 5)
    run("data", "convert", "pku_saferlhf", source, tmp_path / "a.jsonl", "--axis", "safer", "--limit", 3)
    groups = load_preferences(tmp_path / "a.jsonl")
    assert [group.rankings for group in groups] == [(1, 2)] * 3


def test_inspect_shows_sources_and_leaks(tmp_path: Path) -> None:
    rows = [
        {"prompt": str(i), "responses": ["a", "bb"], "rankings": [1, 2], "source": ("x", "y")[i % 2]}
        for i in range(80)
    ]
    output = run("data", "inspect", write_jsonl(tmp_path / "t.jsonl", rows))
    assert "t.jsonl" in output and "yes, place 1" in output and "80" in output and "40" in output


def test_decontaminate_reports_and_writes(tmp_path: Path) -> None:
    train = [{"prompt": p, "responses": ["a", "b"], "rankings": [1, 2], "source": "s"} for p in ("One?", "Two?")]
    bench = [{"prompt": "one?", "responses": ["c", "d"], "rankings": [1, 2]}]
    output = run(
        "data",
        "decontaminate",
        write_jsonl(tmp_path / "train.jsonl", train),
        "--benchmark",
        write_jsonl(tmp_path / "bench.jsonl", bench),
        "--out",
        tmp_path / "clean.jsonl",
    )
    assert "1 of 2 kept" in output and "prompt" in output and "bench" in output
    assert len(load_preferences(tmp_path / "clean.jsonl")) == 1


@pytest.mark.parametrize("command", ["convert", "inspect", "decontaminate"])
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: mr-reward data {command}" in " ".join(run("data", command, "--help").split())


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from mr_reward.cli import main; main()",
            "data",
            "inspect",
            str(tmp_path / "no.jsonl"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().startswith("error:") and "no.jsonl" in result.stderr
    assert issubclass(GroupError, MRRewardError)
