"""`mr-reward score` through its entry point: pipes, files, interruptions, bad lines."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from http_server import running, serving_files
from PIL import Image
from tiny_models import ROUNDING, random_image, random_text, reward_model
from typer.testing import CliRunner

from mr_reward import GroupScorer, ResponseGroup
from mr_reward.checkpoint import weights_digest
from mr_reward.cli.app import app
from mr_reward.data.groups_file import read_scored
from mr_reward.data.jsonl import write_json_lines
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.serving import build_app
from mr_reward.viewer.page import render_page
from mr_reward.viewer.views import make_view

COMMAND = [sys.executable, "-c", "from mr_reward.cli import main; main()", "score"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model, another one, and groups with images below the folder `data`."""
    folder = tmp_path_factory.mktemp("score")
    reward_model("qwen3_vl", "set").save_pretrained(folder / "rm")
    reward_model("qwen3_vl", "isolated").save_pretrained(folder / "other")
    rng = random.Random(5)
    (folder / "data" / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for i in range(12):
        row: dict[str, Any] = {"id": f"g{i}", "prompt": random_text(rng), "mine": {"nested": [i, None]}}
        row["responses"] = [random_text(rng) for _ in range(rng.randint(1, 4))]
        for j in range(i % 3):
            random_image(rng).save(folder / "data" / "images" / f"{i}_{j}.png")
            row.setdefault("images", []).append(f"images/{i}_{j}.png")
        rows.append(row)
    rows[3]["prompt"] = [
        {"role": "user", "content": [{"type": "image", "image": "images/4_0.png"}, {"type": "text", "text": "?"}]}
    ]
    rows[6]["videos"] = [["images/1_0.png", "images/2_0.png"]]
    (folder / "data" / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[float]]:
    """Scores by the scorer, on groups that are put together here."""
    groups = []
    for row in read_rows(folder / "data" / "groups.jsonl"):
        prompt, images = row["prompt"], row.get("images", [])
        if isinstance(prompt, list):
            prompt, images = "?", ["images/4_0.png"]
        groups.append(
            ResponseGroup(
                prompt=prompt,
                responses=row["responses"],
                images=[folder / "data" / image for image in images],
                videos=[[folder / "data" / frame for frame in video] for video in row.get("videos", [])],
            )
        )
    scores = [GroupScorer.from_pretrained(folder / "rm").score([group])[0] for group in groups]
    return [found for found in scores if found is not None]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: object, stdin: bytes | None = None, exit_code: int = 0) -> bytes:
    result = CliRunner().invoke(app, ["score", *map(str, arguments)], input=stdin, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.stdout_bytes


def close(found: list[list[float]], expected: list[list[float]]) -> bool:
    return [len(scores) for scores in found] == [len(scores) for scores in expected] and all(
        torch.allclose(torch.tensor(a), torch.tensor(b), atol=ROUNDING, rtol=0)
        for a, b in zip(found, expected, strict=True)
    )


def test_a_pipe_gives_back_its_lines_with_scores(folder: Path, expected: list[list[float]]) -> None:
    """In a process of its own: nothing but the lines goes to standard output."""
    source = (folder / "data" / "groups.jsonl").read_bytes()
    done = subprocess.run(
        [*COMMAND, folder / "rm", "--chunk", "5"], input=source, cwd=folder / "data", capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert close([row["scores"] for row in rows], expected)
    results = ("scores", "truncated", "order_spread", "order_flip_rate", "drop_reason", "scored_with")
    assert [{key: row[key] for key in row if key not in results} for row in rows] == [
        json.loads(line) for line in source.splitlines()
    ]
    assert all(len(row["truncated"]) == len(row["responses"]) for row in rows)


def test_the_output_is_read_back_from_its_own_folder(
    folder: Path, expected: list[list[float]], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "scores.jsonl"
    run(folder / "rm", folder / "data" / "groups.jsonl", "--out", out)
    found = read_scored(out, media_within=out.anchor)
    assert [scored.group.id for scored in found] == [f"g{i}" for i in range(12)]
    assert close([list(scored.scores or ()) for scored in found], expected)
    # The paths count from there: the groups score the same from there.
    again = [scores for scores in GroupScorer.from_pretrained(folder / "rm").score([s.group for s in found]) if scores]
    assert close(again, expected)


@pytest.mark.parametrize(
    "how", [signal.SIGINT, *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGTERM, signal.SIGKILL))]
)
def test_interrupted_and_resumed(
    how: signal.Signals, folder: Path, expected: list[list[float]], tmp_path: Path
) -> None:
    """The pipe gives one line at a time and stays open, so the signal meets a run that is under way."""
    source, out = (folder / "data" / "groups.jsonl").read_bytes(), tmp_path / "scores.jsonl"
    command = [*COMMAND, str(folder / "rm"), "--media", str(folder / "data"), "--out", str(out), "--chunk", "1"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # Where the tests run in the background of a shell, an interrupt is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin is not None
    process.stdin.write(b"".join(line + b"\n" for line in source.splitlines()[:4]))
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert b"the same command resumes it" in stderr
    before = out.read_bytes()
    assert 2 <= before.count(b"\n") <= 4
    run(*command[4:], stdin=source)
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "what was scored is not scored again"
    rows = read_rows(out)
    assert [row["id"] for row in rows] == [f"g{i}" for i in range(12)]
    assert close([row["scores"] for row in rows], expected)


def test_a_torn_file_is_resumed(folder: Path, expected: list[list[float]], tmp_path: Path) -> None:
    """Cut anywhere, as a full disk or a kill in the middle of a write leaves it."""
    out = tmp_path / "scores.jsonl"
    command = (folder / "rm", folder / "data" / "groups.jsonl", "--out", out, "--chunk", "4")
    run(*command)
    whole = out.read_bytes()
    for size in random.Random(1).sample(range(len(whole)), 3) + [0, len(whole)]:
        out.write_bytes(whole[:size])
        run(*command)
        rows = read_rows(out)
        assert [row["id"] for row in rows] == [f"g{i}" for i in range(12)]
        assert close([row["scores"] for row in rows], expected)


def test_resuming_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "scores.jsonl", folder / "data" / "groups.jsonl"
    run(folder / "rm", source, "--out", out)
    before = out.read_bytes()
    shorter, edited = folder / "data" / "shorter.jsonl", folder / "data" / "edited.jsonl"
    shorter.write_text("".join(source.read_text().splitlines(keepends=True)[:5]))
    edited.write_text(source.read_text().replace('"id": "g3"', '"id": "G3"'))
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"a": 1}\n')
    for arguments, message in (
        ((folder / "other", source, "--out", out), r"line 1: was scored with another model or other options"),
        (
            (folder / "rm", source, "--out", out, "--max-tokens", 999),
            r"line 1: was scored with another model or other",
        ),
        ((folder / "rm", shorter, "--out", out), r"line 6: the input has 5 lines only"),
        ((folder / "rm", edited, "--out", out), r"line 4: is not .*edited.jsonl, line 4 with its scores"),
        ((folder / "rm", source, "--out", foreign), r"line 1: was not written by this command"),
    ):
        with pytest.raises(GroupError, match=message):
            run(*arguments)
    assert out.read_bytes() == before and foreign.read_text() == '{"a": 1}\n'
    with pytest.raises(ConfigurationError, match="is the file that is read"):
        run(folder / "rm", source, "--out", source)
    with pytest.raises(GroupError, match=r"none.jsonl: is not a file"):
        run(folder / "rm", "none.jsonl")


def test_a_file_of_the_version_before_is_resumed(folder: Path, expected: list[list[float]], tmp_path: Path) -> None:
    """Version 0.1.0 wrote a checksum of the orders asked for, which a layout other than `causal` does not use."""
    out, source = tmp_path / "scores.jsonl", folder / "data" / "groups.jsonl"
    run(folder / "rm", source, "--out", out)
    digest = weights_digest(GroupScorer.from_pretrained(folder / "rm").model)
    settings = {"max_tokens_per_batch": 16384, "num_orders": 3, "over_length": "drop_group"}
    content = json.dumps([digest, settings], sort_keys=True).encode()
    written = [
        {**row, "scored_with": hashlib.blake2b(content, digest_size=8).hexdigest()} for row in read_rows(out)[:5]
    ]
    write_json_lines(out, written)
    with pytest.raises(GroupError, match="line 1: was scored with another model or other options"):
        run(folder / "rm", source, "--out", out, "--num-orders", 4)
    for _ in range(2):  # the second time the file holds lines of both versions
        run(folder / "rm", source, "--out", out, "--num-orders", 3)
        rows = read_rows(out)
        assert rows[:5] == written, "nothing was scored again"
        assert close([row["scores"] for row in rows], expected)


def test_the_orders_that_another_response_wins_reach_the_page(folder: Path, tmp_path: Path) -> None:
    """From the scorer to the file to the viewer, and with it for a file that an earlier version wrote without it."""
    reward_model("qwen3_vl", "causal").save_pretrained(tmp_path / "rm")
    source, out = folder / "data" / "groups.jsonl", tmp_path / "scores.jsonl"
    run(tmp_path / "rm", source, "--num-orders", 4, "--out", out)
    rows = read_rows(out)
    found = read_scored(out, media_within=out.anchor)
    assert [one.result.order_flip_rate for one in found] == [row["order_flip_rate"] for row in rows]
    flipped = [one for one in found if one.result.order_flip_rate]
    assert flipped, "an untrained model picks another winner under some order"
    percent = f"{100 * (flipped[0].result.order_flip_rate or 0):.0f} % of the orders"
    assert percent in render_page([make_view(flipped[0], None, None)], "one")
    for row in rows:
        del row["order_flip_rate"]
    write_json_lines(out, rows)
    run(tmp_path / "rm", source, "--num-orders", 4, "--out", out)
    assert read_rows(out) == rows, "resumed, nothing was scored again"
    old = read_scored(out, media_within=out.anchor)
    assert all(one.result.order_flip_rate is None for one in old)
    assert "% of the orders" not in render_page([make_view(old[0], None, None)], "one")


BAD = [
    (b"{no json", "the line is no JSON"),
    (b'"text"', "the row is no object"),
    (b'{"prompt": "?"}', r"keys \['responses'\] are missing"),
    (b'{"prompt": "?", "responses": []}', "got 0 responses"),
    (b'{"prompt": "?", "responses": ["a"], "images": ["gone.png"]}', "'gone.png' is not a file"),
    (b'{"prompt": "?", "responses": ["a"], "image": "http://x/a.png"}', "is a URL and nothing is fetched"),
    (b"[" * 100_000, "the line is no JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines(line: bytes, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = b'{"prompt": "?", "responses": ["a", "b"]}'
    source, out = b"\n".join((good, b"", line, good)) + b"\n", tmp_path / "scores.jsonl"
    with pytest.raises(GroupError, match=rf"standard input, line 3: .*{message}.*Fix it, or give --skip-bad"):
        run(folder / "rm", "--out", out, stdin=source)
    assert len(read_rows(out)) == 1, "what came before is kept"
    run(folder / "rm", "--out", out, "--skip-bad", stdin=source, exit_code=3)
    first, bad, last = read_rows(out)
    assert first["scores"] == pytest.approx(last["scores"], abs=ROUNDING)
    assert bad["scores"] is None and bad["error"].startswith("standard input, line 3: ")
    run(folder / "rm", "--out", out, "--skip-bad", stdin=source, exit_code=3)
    assert len(read_rows(out)) == 3, "a bad line is known again"


def write_bad_images(folder: Path) -> dict[str, str]:
    """Files that a model or a decoder refuses, and what is said of them."""
    Image.new("RGB", (4000, 12)).save(folder / "strip.png")
    (folder / "page.png").write_text("<!DOCTYPE html><title>404</title>")
    buffer = BytesIO()
    random_image(random.Random(0)).save(buffer, "PNG")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:-2000])
    return {"strip.png": "aspect ratio", "page.png": "no known type of image", "cut.png": "truncated|cannot be read"}


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("server", [False, True])
def test_a_bad_image_is_an_error_in_its_line_and_the_others_are_scored(
    folder: Path, tmp_path: Path, chunk: int, server: bool
) -> None:
    """A picture that the processor refuses, a file cut off and a web page: one of them ended everything."""
    messages = write_bad_images(tmp_path)
    random_image(random.Random(1)).save(tmp_path / "good.png")
    order = ["good.png", "strip.png", "good.png", "good.png", "page.png", "cut.png", "good.png"]
    rows = [{"prompt": f"What is {i}?", "responses": ["a", "b"], "images": [name]} for i, name in enumerate(order)]
    source, out = tmp_path / "groups.jsonl", tmp_path / "scores.jsonl"
    write_json_lines(source, rows)
    good = [ResponseGroup(prompt=r["prompt"], responses=["a", "b"], images=[tmp_path / "good.png"]) for r in rows]
    scorer = GroupScorer.from_pretrained(folder / "rm")
    with ExitStack() as stack:
        rm = stack.enter_context(running(build_app(scorer))) if server else folder / "rm"
        with pytest.raises(GroupError, match=f"{source}, line 2: .*aspect ratio.*Fix it, or give --skip-bad"):
            run(rm, source, "--out", out, "--chunk", chunk)
        assert len(read_rows(out)) == 1, "what came before is kept"
        run(rm, source, "--out", out, "--chunk", chunk, "--skip-bad", exit_code=3)
        found = read_rows(out)
        run(rm, source, "--out", out, "--chunk", chunk, "--skip-bad", exit_code=3)
    assert read_rows(out) == found
    for number, (name, row, group) in enumerate(zip(order, found, good, strict=True), start=1):
        if name == "good.png":
            assert row["scores"] == pytest.approx(scorer.score([group])[0], abs=ROUNDING)
        else:
            assert row["scores"] is None
            assert re.match(rf"{source}, line {number}: .*({messages[name]})", row["error"]), row["error"]


def test_images_in_every_form_are_one_picture(folder: Path, tmp_path: Path) -> None:
    """Also from the file of scores, which lies in another folder: what names a file there still does."""
    path = tmp_path / "data" / "a b.png"
    path.parent.mkdir()
    random_image(random.Random(7)).save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    uri = f"data:image/png;base64,{encoded}"
    blocks = [{"type": "image", key: value} for key in ("image", "path", "url") for value in ("a b.png", uri)]
    blocks += [{"type": "image", "base64": encoded}, {"type": "image", "image": {"path": "a b.png", "bytes": None}}]
    for value in ("a b.png", path.as_uri(), uri):
        blocks += [{"type": "image_url", "image_url": {"url": value, "detail": "auto"}}]
        blocks += [{"type": "input_image", "image_url": value}]
    chats = [[{"role": "user", "content": [block, {"type": "text", "text": "?"}]}] for block in blocks]
    rows: list[dict[str, Any]] = [{"prompt": chat, "responses": ["a", "bb"]} for chat in chats]
    for image in ("a b.png", uri, path.as_uri(), {"path": "a b.png"}):
        rows += [{"prompt": "?", "responses": ["a", "bb"], "images": [image]}]
        rows += [{"prompt": "?", "responses": ["a", "bb"], "image": image}]
    source, out = path.with_name("groups.jsonl"), tmp_path / "out" / "scores.jsonl"
    write_json_lines(source, rows)
    run(folder / "rm", source, "--out", out)
    group = ResponseGroup(prompt="?", responses=["a", "bb"], images=[path])
    scorer = GroupScorer.from_pretrained(folder / "rm")
    (expected,) = scorer.score([group])
    found = read_rows(out)
    assert close([row["scores"] for row in found], [expected or []] * len(rows))
    again = scorer.score([one.group for one in read_scored(out, media_within=tmp_path)])
    assert close([scores or [] for scores in again], [expected or []] * len(rows))
    details = [row["prompt"][0]["content"][0].get("image_url") for row in found if isinstance(row["prompt"], list)]
    assert {image["detail"] for image in details if isinstance(image, dict)} == {"auto"}


def test_keys_of_the_users_own_are_kept(folder: Path, tmp_path: Path) -> None:
    """`scores` of a person, `error` of a log: they come back, beside the results, and resuming knows them."""
    mine = {"prompt": "?", "responses": ["a", "b"], "scores": [5, 1], "error": "none", "truncated": "no"}
    source, out = tmp_path / "groups.jsonl", tmp_path / "scores.jsonl"
    write_json_lines(source, [mine, {"prompt": "?", "responses": ["a", "b"]}])
    for _ in range(2):
        run(folder / "rm", source, "--out", out)
        first, second = read_rows(out)
        assert (first["input_scores"], first["input_error"], first["input_truncated"]) == ([5, 1], "none", "no")
        assert first["scores"] == pytest.approx(second["scores"], abs=ROUNDING) and "error" not in first
    # What this command or a run has written is scored anew, and what was the user's stays.
    again = tmp_path / "again.jsonl"
    run(folder / "other", out, "--out", again)
    assert [set(row) for row in read_rows(again)] == [set(first), set(second)]
    assert read_rows(again)[0]["input_scores"] == [5, 1]
    logged = {key: value for key, value in second.items() if key != "scored_with"}
    (row,) = map(json.loads, run(folder / "rm", stdin=json.dumps(logged).encode() + b"\n").splitlines())
    assert set(row) == set(second), "no result of the run comes back as the user's own"
    with pytest.raises(
        GroupError, match="line 1: the keys scores would come back as input_..., which the row has too"
    ):
        run(folder / "rm", stdin=json.dumps({**mine, "input_scores": 1}).encode())


def test_a_list_in_a_json_file_is_read(folder: Path, expected: list[list[float]], tmp_path: Path) -> None:
    """And lines in a file that is called so, as before."""
    rows = read_rows(folder / "data" / "groups.jsonl")
    for content in (json.dumps(rows), "\n " + json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        source, out = folder / "data" / "groups.json", tmp_path / "scores.jsonl"
        source.write_text(content)
        for _ in range(2):  # the second time nothing is scored again
            run(folder / "rm", source, "--out", out, "--chunk", 5)
            assert close([row["scores"] for row in read_rows(out)], expected)
        out.unlink()
    packed = folder / "data" / "groups.jsonl.gz"
    packed.write_bytes(gzip.compress((folder / "data" / "groups.jsonl").read_bytes()))
    assert close([json.loads(line)["scores"] for line in run(folder / "rm", packed).splitlines()], expected)
    source.write_text(json.dumps([*rows[:2], {"prompt": "?"}]))
    with pytest.raises(GroupError, match=r"groups.json, item 3: keys \['responses'\] are missing"):
        run(folder / "rm", source)
    assert run(folder / "rm", source, "--skip-bad", exit_code=3).count(b"\n") == 3


def test_urls_are_fetched_when_asked_for(folder: Path, tmp_path: Path) -> None:
    """From a server of its own; without the option nothing is asked of it, with it what is no image is a bad line."""
    (tmp_path / "served").mkdir()
    random_image(random.Random(7)).save(tmp_path / "served" / "a.png")
    (tmp_path / "served" / "page.png").write_text("<!DOCTYPE html>")
    with serving_files(tmp_path / "served") as (base, asked):
        block = {"type": "image_url", "image_url": {"url": f"{base}/a.png"}}
        rows: list[dict[str, Any]] = [
            {"prompt": "?", "images": [f"{base}/{name}.png"]} for name in ("a", "page", "no")
        ]
        rows.append({"prompt": [{"role": "user", "content": [block, {"type": "text", "text": "?"}]}]})
        stdin = b"".join(json.dumps({**row, "responses": ["a", "bb"]}).encode() + b"\n" for row in rows)
        refused = run(folder / "rm", "--skip-bad", stdin=stdin, exit_code=3)
        assert not asked and refused.count(b"nothing is fetched") == 4
        found = [
            json.loads(line)
            for line in run(folder / "rm", "--skip-bad", "--fetch-urls", stdin=stdin, exit_code=3).splitlines()
        ]
    group = ResponseGroup(prompt="?", responses=["a", "bb"], images=[tmp_path / "served" / "a.png"])
    (expected,) = GroupScorer.from_pretrained(folder / "rm").score([group])
    assert close([found[0]["scores"], found[3]["scores"]], [expected or []] * 2)
    assert "no known type" in found[1]["error"] and "404" in found[2]["error"]
    assert found[0]["images"] == [f"{base}/a.png"]


def test_dropped_groups_stay_in_their_place(folder: Path) -> None:
    long = json.dumps({"prompt": "?", "responses": ["a" * 500, "b"]}).encode()
    short = json.dumps({"prompt": "?", "responses": ["a", "b"]}).encode()
    output = run(folder / "rm", "--max-tokens", 200, stdin=b"\n".join((short, long, short)))
    rows = [json.loads(line) for line in output.splitlines()]
    assert [row["scores"] is None for row in rows] == [False, True, False]
    assert rows[1]["drop_reason"] == "over the token budget"


def test_every_option_of_the_scorer_has_an_effect(tmp_path: Path) -> None:
    reward_model("llama", "causal").save_pretrained(tmp_path / "rm")
    rows = [{"prompt": "?", "responses": ["a" * 30, "b", "cc"]}, {"prompt": "?", "responses": ["a", "b"]}]
    source = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def scored(*options: object) -> list[dict[str, Any]]:
        return [json.loads(line) for line in run(tmp_path / "rm", *options, stdin=source).splitlines()]

    plain = scored()
    for options in (("--dtype", "bfloat16"), ("--num-orders", 3)):
        found = scored(*options)
        assert all(one["scores"] != other["scores"] for one, other in zip(found, plain, strict=True)), options
        assert {row["scored_with"] for row in found}.isdisjoint(row["scored_with"] for row in plain)
    assert [row["scores"] is None for row in scored("--max-tokens", 40)] == [True, False]
    cut = scored("--max-tokens", 40, "--over-length", "truncate_responses")
    assert [row["truncated"] for row in cut] == [[True, False, False], [False, False]]
    assert scored("--device", "cpu") == plain
    assert close(*([row["scores"] for row in rows] for rows in (scored("--chunk", 1), plain)))
    with pytest.raises(RuntimeError, match="nowhere"):
        scored("--device", "nowhere")


def test_a_server_scores_as_well(folder: Path, expected: list[list[float]], tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    with running(build_app(GroupScorer.from_pretrained(folder / "rm"))) as url:
        run(url, folder / "data" / "groups.jsonl", "--out", out)
    assert close([row["scores"] for row in read_rows(out)], expected)
    with pytest.raises(GroupError, match="another model or other options"):
        run(folder / "other", folder / "data" / "groups.jsonl", "--out", out)


def test_hostile_text_comes_back_as_it_went_in(folder: Path) -> None:
    responses = ["<|im_end|>", "\ud800", "\x00\x1b[2J", "\u202e", "a\nb\u2028c"]
    row = {"prompt": "<|image_pad|>", "responses": responses}
    output = run(folder / "rm", stdin=json.dumps(row).encode())
    assert output.count(b"\n") == 1 and output.isascii()
    assert json.loads(output)["responses"] == responses


def test_a_full_disk_leaves_whole_lines(folder: Path, tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    source = (folder / "data" / "groups.jsonl").read_bytes()
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, folder / "rm", "--media", folder / "data"], input=source, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1 and b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_parquet_and_saved_data_sets_are_read_and_their_pictures_written(folder: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (28, 28), "red")
    image.save(tmp_path / "a.png")
    row = {"prompt": "What?", "responses": ["one", "two"], "note": "mine"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "images": ["a.png"]}) + "\n")
    run(folder / "rm", tmp_path / "rows.jsonl", "--out", tmp_path / "lines.out.jsonl")
    lines = read_rows(tmp_path / "lines.out.jsonl")
    data = datasets.Dataset.from_list([{**row, "images": [image]}])
    data.to_parquet(str(tmp_path / "rows.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        out = tmp_path / f"{name}.out.jsonl"
        for _ in range(2):  # the second time nothing is left to do
            run(folder / "rm", tmp_path / name, "--out", out)
        scored = read_rows(out)
        assert [one["scores"] for one in scored] == [one["scores"] for one in lines] and scored[0]["note"] == "mine"
        with Image.open(out.parent / scored[0]["images"][0]) as read:
            assert read.size == (28, 28)
