"""`mr-reward data ...` through its entry point, on real files."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from published_schemas import WRITERS, picture
from test_converters import ROWS
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.data.groups_file import load_preferences
from mr_reward.errors import ConfigurationError, GroupError, MRRewardError
from mr_reward.groups import ResponseGroup


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def best(group: ResponseGroup) -> str:
    """The response with rank 1."""
    return group.responses[list(group.rankings or ()).index(1)]


def run(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
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
    assert [sorted(group.responses) for group in groups] == [["a", "c"], ["b", "d"]]
    assert [best(group) for group in groups] == ["a", "b"]
    assert [group.source for group in groups] == ["rlaif_v"] * 2
    assert [group.id for group in groups] == ["RLAIF-V-1", "RLAIF-V-2"]
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
    with pytest.raises(GroupError, match="sky.jsonl, line 2: field 'chosen'"):
        run("data", "convert", "skywork", source, out)
    assert list(tmp_path.iterdir()) == [source], "nothing is left of what was begun"
    output = run("data", "convert", "skywork", source, out, "--skip-bad", exit_code=3)
    assert f"bad: {source}, line 2: field 'chosen'" in output
    assert len(load_preferences(out)) == 2


def test_bad_rows_of_every_kind_are_listed(tmp_path: Path) -> None:
    """Each line is read by itself: one of other types, or that is no JSON, does not take the file with it."""
    good = json.dumps(ROWS["tulu"])
    lines = [good, json.dumps({**ROWS["tulu"], "chosen": 3}), "{", "[1]", json.dumps({"chosen": {}}), good]
    source = tmp_path / "t.jsonl"
    source.write_text("\n".join(lines) + "\n" + "{}\n" * 30)
    output = run("data", "convert", "tulu", source, tmp_path / "out.jsonl", "--skip-bad", exit_code=3)
    for number, words in ((2, "'chosen' is int"), (3, "no JSON"), (4, "the row is [1]"), (5, "'chosen' is dict")):
        assert any(f"line {number}: " in line and words in line for line in output.splitlines()), (number, output)
    assert "... and 14 more" in output
    assert len(load_preferences(tmp_path / "out.jsonl")) == 2


def test_a_missing_picture_is_a_bad_row(tmp_path: Path) -> None:
    Image.new("RGB", (6, 5)).save(tmp_path / "here.png")
    rows = [{**ROWS["rlaif_v"], "image": name} for name in ("here.png", "gone.png")]
    source = write_jsonl(tmp_path / "r.jsonl", rows)
    with pytest.raises(GroupError, match=r"r.jsonl, line 2: images\[0\]: .*gone.png"):
        run("data", "convert", "rlaif_v", source, tmp_path / "out.jsonl")
    run("data", "convert", "rlaif_v", source, tmp_path / "out" / "t.jsonl", "--skip-bad", exit_code=3)
    assert len(load_preferences(tmp_path / "out" / "t.jsonl", media_within=tmp_path)) == 1
    assert "../here.png" in (tmp_path / "out" / "t.jsonl").read_text()


@pytest.mark.parametrize("embedded", [False, True])
def test_an_image_that_cannot_be_shown_is_a_bad_row(tmp_path: Path, embedded: bool) -> None:
    """A file cut off, a web page and a strip that processors refuse went through as 0 bad, and ended the training."""
    images = {"good": Image.new("RGB", (9, 9), "red"), "long": Image.new("RGB", (2400, 12))}
    images |= {"strip": Image.new("RGB", (4000, 12)), "column": Image.new("RGB", (3, 700))}
    files = {}
    for name, image in images.items():
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        files[name] = buffer.getvalue()
    files |= {"cut": files["long"][:-30], "page": b"<!DOCTYPE html><title>404</title>"}
    rows = []
    for name, content in files.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        rows.append({**ROWS["rlaif_v"], "image": f"{name}.png"})
        if embedded:
            rows[-1]["image"] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    source, out = write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(GroupError, match=r"r.jsonl, line 3: images\[0\]: .*4000 x 12"):
        run("data", "convert", "rlaif_v", source, out)
    output = run("data", "convert", "rlaif_v", source, out, "--skip-bad", exit_code=3)
    assert len(load_preferences(out)) == 2
    bad = [line for line in output.splitlines() if line.startswith("bad: ")]
    words = ("4000 x 12", "3 x 700", "cannot be read", "no known type|are no image")
    for number, (line, word) in enumerate(zip(bad, words, strict=True), start=3):
        assert re.match(rf"bad: {source}, line {number}: images\[0\]: .*({word})", line) and len(line) < 400, line


def test_a_folder_of_files_by_split_and_config(tmp_path: Path) -> None:
    for config in ("a", "b"):
        (tmp_path / "data" / config).mkdir(parents=True)
        for split in ("train", "test"):
            row = {**ROWS["pku_saferlhf"], "prompt": f"{config} {split}"}
            write_jsonl(tmp_path / "data" / config / f"{split}.jsonl", [row])
    out = tmp_path / "out.jsonl"

    def prompts(*options: str) -> list[str]:
        run("data", "convert", "pku_saferlhf", tmp_path / "data", out, *options)
        return [group.messages[0]["content"][0]["text"] for group in load_preferences(out)]

    assert prompts() == ["a test", "a train", "b test", "b train"]
    assert prompts("--split", "train") == ["a train", "b train"]
    assert prompts("--split", "test", "--config", "b") == ["b test"]
    with pytest.raises(ConfigurationError, match="holds no .* file for split dev"):
        prompts("--split", "dev")


def test_a_json_list_and_a_column_wise_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "povid.json").write_text(json.dumps([ROWS["povid"], ROWS["povid"]]))
    picture = tmp_path / ROWS["povid"]["image"]
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(picture)
    run("data", "convert", "povid", tmp_path / "povid.json", tmp_path / "povid.jsonl")
    assert len(load_preferences(tmp_path / "povid.jsonl")) == 2
    completions = [{key: c[key] for key in ("response", "annotations")} for c in ROWS["vlfeedback"]["completions"]]
    columns = {key: [completion[key] for completion in completions] for key in completions[0]}
    row = {"prompt": "What?", "completions": columns, "img_path": ROWS["povid"]["image"]}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "vlfeedback.parquet")
    run("data", "convert", "vlfeedback", tmp_path / "vlfeedback.parquet", tmp_path / "vl.jsonl", "--media", tmp_path)
    assert sorted(load_preferences(tmp_path / "vl.jsonl")[0].rankings or ()) == [1, 1, 2]


def test_a_hub_id_is_loaded_with_its_default_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*arguments: object, **options: object) -> datasets.Dataset:
        calls.append((arguments, options))
        features = datasets.Features({key: datasets.Value("string") for key in ("question", "chosen", "rejected")})
        features["image"] = datasets.Image()
        row = {"question": "Q?", "chosen": "a", "rejected": "b", "image": Image.new("RGB", (3, 3))}
        return datasets.Dataset.from_list([row] * 70, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("mr_reward.data.sources.why_missing", lambda name, kind: None)  # tests reach no hub
    run("data", "convert", "rlaif_v", "openbmb/RLAIF-V-Dataset", tmp_path / "out.jsonl", "--limit", 66)
    assert calls == [(("openbmb/RLAIF-V-Dataset", None), {"split": "train"})]
    groups = load_preferences(tmp_path / "out.jsonl")
    assert len(groups) == 66 and groups[65].id == "rlaif_v-66"
    assert len(list((tmp_path / "out_media").iterdir())) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nobody/nothing", "is no file, no folder and no hub id within reach"),
        ("no.jsonl", "is no file, no folder and no hub id"),
    ],
)
def test_a_source_that_is_not_there_is_refused(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        run("data", "convert", "nectar", source, tmp_path / "out.jsonl")
    with pytest.raises(GroupError, match="cannot be read as parquet"):
        (tmp_path / "bad.parquet").write_text("text")
        run("data", "convert", "nectar", tmp_path / "bad.parquet", tmp_path / "out.jsonl")


def test_responses_are_shuffled_and_the_same_at_every_run(tmp_path: Path) -> None:
    """Public pairs store the better response first; the file must not."""
    source = write_jsonl(tmp_path / "s.jsonl", [ROWS["skywork"]] * 200)
    for name in ("a", "b"):
        run("data", "convert", "skywork", source, tmp_path / f"{name}.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    groups = load_preferences(tmp_path / "a.jsonl")
    assert {best(group) for group in groups} == {"Good"}
    assert 70 < sum(group.responses[0] == "Good" for group in groups) < 130
    assert len({group.id for group in groups}) == 200
    assert "order gives it away" in (output := run("data", "stats", tmp_path / "a.jsonl")) and "yes" not in output
    run("data", "convert", "skywork", source, tmp_path / "c.jsonl", "--keep-order")
    assert {group.responses[0] for group in load_preferences(tmp_path / "c.jsonl")} == {"Good"}


def test_limit_and_axis(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pku.jsonl", [{**ROWS["pku_saferlhf"], "safer_response_id": 0}] * 5)
    run("data", "convert", "pku_saferlhf", source, tmp_path / "a.jsonl", "--axis", "safer", "--limit", 3)
    groups = load_preferences(tmp_path / "a.jsonl")
    assert [best(group) for group in groups] == ["Like this."] * 3


def test_inspect_shows_sources_and_leaks(tmp_path: Path) -> None:
    rows = [
        {"prompt": str(i), "responses": ["a", "bb"], "rankings": [1, 2], "source": ("x", "y")[i % 2]}
        for i in range(80)
    ]
    output = run("data", "stats", write_jsonl(tmp_path / "t.jsonl", rows))
    assert "t.jsonl" in output and "yes, place 1" in output and "80" in output and "40" in output


def test_inspect_splits_wide_tables(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "responses": ["a", "b"], "rankings": [1, 2], "source": f"set{i}"} for i in range(6)]
    output = run("data", "stats", write_jsonl(tmp_path / "t.jsonl", rows))
    assert all(f"set{i}" in output for i in range(6)) and output.count("modality") == 2


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
        "--report",
        tmp_path / "removed.json",
    )
    assert json.loads((tmp_path / "removed.json").read_text()) == [
        {"id": "train.jsonl:1", "source": "s", "matches": [["bench", "bench.jsonl:1", "prompt"]]}
    ]
    assert "1 of 2 kept" in output and "prompt" in output and "bench" in output
    assert load_preferences(tmp_path / "clean.jsonl")[0].id == "train.jsonl:2"
    assert len(load_preferences(tmp_path / "clean.jsonl")) == 1


def test_bad_rows_of_either_side_are_left_out_when_asked(tmp_path: Path) -> None:
    good = [{"prompt": p, "responses": ["a", "b"], "rankings": [1, 2]} for p in ("One?", "Two?")]
    files = {"good": write_jsonl(tmp_path / "good.jsonl", good)}
    files["bad"] = write_jsonl(tmp_path / "bad.jsonl", [*good, {"prompt": "?"}])
    files["one"] = write_jsonl(tmp_path / "one.jsonl", good[:1])
    files["bad one"] = write_jsonl(tmp_path / "bad_one.jsonl", [good[0], {"prompt": "?"}])
    for train, benchmark in (("good", "bad one"), ("bad", "one"), ("bad", "bad one")):
        command = [
            "data",
            "decontaminate",
            files[train],
            "--benchmark",
            files[benchmark],
            "--out",
            tmp_path / "c.jsonl",
        ]
        with pytest.raises(GroupError, match=r"bad(\.jsonl, line 3|_one\.jsonl, line 2)"):
            run(*command)
        assert "1 of 2 kept" in run(*command, "--skip-bad")


def test_auto_reads_the_split_and_the_configuration_that_are_asked_for(tmp_path: Path) -> None:
    """Also where it looks for the format: the other files have another one."""
    for config, split, row in (
        ("a", "train", {"question": "not this", "answer": 1}),
        ("b", "test", {"question": "nor this", "answer": 1}),
        ("b", "train", {"prompt": "Q?", "chosen": "x", "rejected": "y"}),
    ):
        (tmp_path / "data" / config).mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "data" / config / f"{split}.jsonl", [row])
    out = tmp_path / "out.jsonl"
    run("data", "convert", "auto", tmp_path / "data", out, "--config", "b", "--split", "train")
    assert [best(group) for group in load_preferences(out)] == ["x"]


def test_decontaminate_with_published_benchmarks(tmp_path: Path) -> None:
    """By id and picture of VL-RewardBench, by the path of the medium of MM-RLHF-RewardBench."""
    vl = WRITERS["vl_rewardbench"](tmp_path / "vl", random.Random(0))
    WRITERS["mm_rlhf_rewardbench"](tmp_path / "mm", random.Random(0))
    (tmp_path / "own.png").write_bytes(picture(250))
    (tmp_path / "theirs.png").write_bytes(vl[5]["image"]["bytes"])
    shutil.copytree(tmp_path / "mm" / "mcq", tmp_path / "mcq")
    media = sorted((tmp_path / "mcq").iterdir())[0]
    rows = [
        {"id": "RLAIF-V-1", "images": ["own.png"]},
        {"id": "a", "images": [str(media.relative_to(tmp_path))]},
        {"id": "b", "images": ["own.png"]},
    ]
    train = [{"prompt": f"Something else, {i}?", "responses": ["a", "b"], "rankings": [1, 2], **row}
             for i, row in enumerate(rows)]  # fmt: skip
    arguments = ["data", "decontaminate", write_jsonl(tmp_path / "train.jsonl", train), "--out", tmp_path / "c.jsonl"]
    arguments += ["--report", tmp_path / "removed.json"]
    arguments += ["--benchmark", f"vl_rewardbench={tmp_path / 'vl'}"]
    arguments += ["--benchmark", f"mm_rlhf_rewardbench={tmp_path / 'mm'}"]
    output = run(*arguments)
    assert "1 of 3 kept" in output
    assert [group.id for group in load_preferences(tmp_path / "c.jsonl")] == ["b"]
    found = json.loads((tmp_path / "removed.json").read_text())
    assert [(entry["id"], entry["matches"][0][0]) for entry in found] == [
        ("RLAIF-V-1", "vl_rewardbench"),
        ("a", "mm_rlhf_rewardbench"),
    ]
    with pytest.raises(ConfigurationError, match="expected different names"):
        run(*arguments, "--benchmark", f"vl_rewardbench={tmp_path / 'vl'}")


@pytest.mark.parametrize("command", ["convert", "stats", "decontaminate"])
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: mr-reward data {command}" in " ".join(run("data", command, "--help").split())


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from mr_reward.cli import main; main()",
            "data",
            "stats",
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


def test_the_old_name_of_stats_works_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2]}])
    expected = run("data", "stats", path)
    assert not caplog.messages
    assert run("data", "inspect", path) == expected
    assert caplog.messages == [
        "`mr-reward data inspect` is `mr-reward data stats` now; the old name goes with the next version"
    ]
    assert "inspect" not in run("data", "--help")
