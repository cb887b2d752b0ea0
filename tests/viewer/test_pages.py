"""Pages without a browser: what they say, against counts made here, and that nothing hostile gets in."""

from __future__ import annotations

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pages import HOSTILE, every_kind, handwriting, scored
from PIL import Image
from tiny_models import LAYOUTS, reward_model
from typer.testing import CliRunner

from mr_reward import ResponseGroup
from mr_reward.cli.app import app
from mr_reward.data.groups_file import write_scored
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.templates.rendering import Renderer
from mr_reward.viewer.page import _scatter, render_page
from mr_reward.viewer.views import FILTERS, GroupView, Lengths, Matrix, load_source, make_view, visible_text


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def view(one: Any, **options: Any) -> GroupView:
    return make_view(one, options.get("advantages"), options.get("lengths"))


@pytest.mark.parametrize("name", every_kind())
def test_every_page_is_whole_and_needs_nothing(name: str) -> None:
    groups = every_kind()[name]
    page = render_page([view(one) for one in groups], name)
    page.encode("utf-8")
    reader = Reader(page)
    for tag, attributes in reader.tags:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        for key in ("src", "href", "data", "action", "xlink:href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, value)
        assert tag not in ("iframe", "object", "embed", "link", "form", "base")
    assert sum(tag == "script" for tag, _ in reader.tags) == sum(tag == "style" for tag, _ in reader.tags) == 1
    assert "http" not in re.sub(r"http-equiv", "", page.replace("data:image", ""))
    images = sum(len(one.group.images) + sum(map(len, one.group.videos)) for one in groups)
    assert sum(tag == "img" for tag, _ in reader.tags) == images
    for one in groups:
        for response in one.group.responses:
            assert visible_text(response) in reader.text, response[:80]


def test_hostile_text_adds_no_tag() -> None:
    """The same page with harmless responses has the same tags."""
    harmless = [f"response {i} " + "A" * (3000 if len(text) > 1200 else 0) for i, text in enumerate(HOSTILE)]
    groups = [
        scored(ResponseGroup(prompt=texts[0][:300], responses=texts, id=texts[1][:40]), list(range(7)))
        for texts in (HOSTILE, harmless)
    ]
    pages = [Reader(render_page([view(one)], one.group.responses[0])) for one in groups]
    assert [tag for tag, _ in pages[0].tags] == [tag for tag, _ in pages[1].tags]
    assert "49" not in re.sub(r"\d\d+\.\d", "", pages[0].text) and "{{7*7}}" in pages[0].text
    for hidden in ("\x00", "\x1b", "\u202e", "\u200b"):
        assert hidden not in pages[0].text
    assert "⟨U+202E⟩evil⟨U+202C⟩" in pages[0].text and "⟨U+D800⟩" in pages[0].text


def test_numbers_are_those_of_the_group() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        size = int(rng.integers(1, 9))
        texts = ["x" * int(rng.integers(0, 6)) + str(rng.integers(0, 3)) for _ in range(size)]
        scores = [float(value) for value in rng.integers(0, 4, size)]
        flags = tuple(bool(flag) for flag in rng.integers(0, 2, size))
        found = view(scored(ResponseGroup(prompt="?", responses=texts), scores, truncated=flags))
        assert [one.slot for one in found.responses] == sorted(
            range(1, size + 1), key=lambda slot: (-scores[slot - 1], slot)
        )
        for one in found.responses:
            i = one.slot - 1
            assert one.score == scores[i] and one.length == len(texts[i])
            assert one.rank == 1 + len({score for score in scores if score > scores[i]})
            spread = statistics.stdev(scores) if size > 1 else 0.0
            assert one.advantage == pytest.approx((scores[i] - statistics.fmean(scores)) / (spread + 1e-4))
            assert ("cut off" in one.flags) == flags[i]
            assert any(flag.startswith("same as") for flag in one.flags) == (texts[i] in texts[:i])
        lengths = [len(text) for text in texts]
        varies = len(set(scores)) > 1 and len(set(lengths)) > 1
        r = float(np.corrcoef(scores, lengths)[0, 1]) if varies else 0.0
        naive = {
            "zero-spread": size > 1 and len(set(scores)) == 1,
            "dropped": False,
            "truncated": any(flags),
            "suspicious": abs(r) >= 0.9 and len(set(lengths)) >= 4,
            "duplicates": len(set(texts)) < size,
        }
        assert set(found.filters) == {name for name, holds in naive.items() if holds}
        assert set(naive) == set(FILTERS)


@pytest.mark.parametrize(("count", "told"), [(3, False), (4, True), (5, True)])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_follow_the_length_are_suspicious_from_four_lengths_on(count: int, told: bool, sign: int) -> None:
    texts = ["x" * i for i in range(1, count + 1)]
    group = ResponseGroup(prompt="?", responses=[*texts, texts[0]])
    found = view(scored(group, [sign * float(len(text)) for text in group.responses]))
    assert ("suspicious" in found.filters) is told and found.correlation == pytest.approx(sign)


def test_the_figure_has_short_ones_left_and_high_scores_up() -> None:
    views = [view(scored(ResponseGroup(prompt="?", responses=["a", "bbb", "cc"]), [1.0, -2.0, 4.0]))]
    points, ranges = _scatter(views)
    by_length = {row.length: (float(x), float(y)) for row, (x, y) in zip(views[0].responses, points, strict=True)}
    assert by_length[1][0] < by_length[2][0] < by_length[3][0]
    assert by_length[2][1] < by_length[1][1] < by_length[3][1], "up is a small number"
    assert by_length[2][0] - by_length[1][0] == pytest.approx(by_length[3][0] - by_length[2][0])
    assert ranges == ("1", "3", "-2.00", "+4.00")


def test_advantages_of_the_trainer_and_rewards_come_first() -> None:
    one = scored(ResponseGroup(prompt="?", responses=["a", "b"]), [1.0, 2.0], rewards=(0.0, 1.0))
    assert [row.advantage for row in view(one, advantages=(0.25, -0.5)).responses] == [-0.5, 0.25]
    assert view(one, advantages=(0.25, -0.5)).advantage_note == "as the trainer logged it"
    assert view(one).responses[0].advantage == pytest.approx(0.5 / (statistics.stdev([0.0, 1.0]) + 1e-4))
    dropped = view(scored(ResponseGroup(prompt="?", responses=["a"]), None, rewards=(None,), drop_reason="long"))
    assert dropped.responses[0].advantage is None and dropped.filters == ("dropped",)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 16])
def test_the_matrix_is_the_layout(layout: str, size: int) -> None:
    """By the words of the layouts, not by their code."""
    matrix = Matrix.of(layout, size)
    parts = ["P"]
    for i in range(1, size + 1):
        parts += [str(i), "s", "c"] if layout == "set" else [str(i), "s"]
    assert list(matrix.labels) == parts
    width = 3 if layout == "set" else 2
    for q, row in enumerate(matrix.cells):
        for k, seen in enumerate(row):
            own = q and k and (q - 1) // width == (k - 1) // width
            expected = k <= q and (k == 0 or bool(own) or layout == "causal")
            expected = expected or (layout == "set" and parts[q] == "c" and parts[k] == "s")
            assert seen == expected, (layout, q, k)


def test_tokens_are_those_of_the_reward_model() -> None:
    model = reward_model("qwen3_vl", "set")
    renderer = Renderer(model.processor, model.config.template, adapter=model.adapter)
    (one,) = handwriting()
    lengths = Lengths.of(one, renderer, "set")
    found = view(one, lengths=lengths)
    tokenizer = model.processor.tokenizer
    for row in found.responses:
        text = one.group.responses[row.slot - 1]
        assert row.length == len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert found.unit == "tokens" and found.layout == "set" and found.prompt_length == lengths.prompt


def run(*arguments: object) -> None:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_the_command(tmp_path: Path) -> None:
    write_scored(every_kind()["step"], tmp_path / "scores.jsonl")
    run(tmp_path / "scores.jsonl", "--png", tmp_path / "step.png")
    assert "8 groups" in Reader((tmp_path / "scores.html").read_text()).text
    run(
        tmp_path / "scores.jsonl",
        "--group",
        "flat",
        "--out",
        tmp_path / "a" / "flat.html",
        "--png",
        tmp_path / "g.png",
    )
    assert "1 group" in Reader((tmp_path / "a" / "flat.html").read_text()).text
    for name in ("step.png", "g.png"):
        with Image.open(tmp_path / name) as figure:
            assert figure.width > 600 and len(figure.convert("RGB").getcolors(1 << 20) or ()) > 20
    with pytest.raises(ConfigurationError, match="--group nobody: no group has this id"):
        run(tmp_path / "scores.jsonl", "--group", "nobody")
    for option, number in (("--limit", 3), ("--group", 7)):
        run(tmp_path / "scores.jsonl", option, number, "--out", tmp_path / "some.html")
        shown = "1 group" if option == "--group" else "3 groups"
        assert shown in Reader((tmp_path / "some.html").read_text()).text
    with pytest.raises(ConfigurationError, match="--score needs --model"):
        run(tmp_path / "scores.jsonl", "--score")


def test_groups_without_scores_are_scored(tmp_path: Path) -> None:
    reward_model("qwen3_vl", "set").save_pretrained(tmp_path / "rm")
    path = tmp_path / "groups.jsonl"
    path.write_text(json.dumps({"prompt": "?", "responses": ["a", "b", "a"]}) + "\n")
    with pytest.raises(GroupError, match="has no scores"):
        run(path)
    run(path, "--model", tmp_path / "rm", "--score")
    text = Reader((tmp_path / "groups.html").read_text()).text
    assert "layout set" in text and "same as 1" in text and "Who sees whom" in text


def test_a_run_and_its_steps(tmp_path: Path) -> None:
    for step in (0, 20):
        for rank in (0, 1):
            group = ResponseGroup(prompt="?", responses=["a", "b"], id=f"step {step} rank {rank}")
            write_scored(
                [scored(group, [1.0, 2.0], step=step)], tmp_path / "groups" / f"step_{step:05d}.rank{rank}.jsonl"
            )
    write_scored(handwriting(), tmp_path / "groups" / "eval_step_00030.rank0.jsonl")
    title, found = load_source(tmp_path)
    assert title.endswith("step 20") and [one.group.id for one, _ in found] == ["step 20 rank 0", "step 20 rank 1"]
    assert [one.group.id for one, _ in load_source(tmp_path, 0)[1]] == ["step 0 rank 0", "step 0 rank 1"]
    for step in (99_999, 100_000):  # the names no longer sort as the numbers do
        one = scored(ResponseGroup(prompt="?", responses=["a"], id=f"step {step}"), [1.0], step=step)
        write_scored([one], tmp_path / "groups" / f"step_{step:05d}.rank0.jsonl")
        title, found = load_source(tmp_path)
        assert title.endswith(f"step {step}") and [one.group.id for one, _ in found] == [f"step {step}"]
        (tmp_path / "groups" / f"step_{min(step, 99_999):05d}.rank0.jsonl").touch()
    with pytest.raises(ConfigurationError, match="has no step 7; it has 0, 20, 99999, 100000"):
        load_source(tmp_path, 7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="holds neither groups"):
        load_source(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="is neither a file nor a folder"):
        load_source(tmp_path / "nothing")


def test_the_table_of_the_trainer(tmp_path: Path) -> None:
    """Two batches in one table; their groups are numbered alike and stay apart."""
    prompt = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}]
    rows = [
        {
            "step": 3,
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": f"{batch}{index}{i}"}],
            "multi_response_reward": float(i),
            "mr_reward_group": index,
            "mr_reward_score": None if (batch, index) == (1, 1) else float(i),
            "mr_reward_truncated": False,
            "advantage": 0.5 - i,
        }
        for batch in range(2)
        for index in range(2)
        for i in range(2)
    ]
    path = tmp_path / "completions" / "completions_00003.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    _, found = load_source(tmp_path)
    assert [list(one.group.responses) for one, _ in found] == [
        [f"{batch}{index}{i}" for i in range(2)] for batch in range(2) for index in range(2)
    ]
    assert [one.scores for one, _ in found] == [(0.0, 1.0)] * 3 + [None]
    assert {advantages for _, advantages in found} == {(0.5, -0.5)}
    assert "[image]What?" in Reader(render_page([view(found[0][0])], "t")).text
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"step": 1, "prompt": "p"}]), path)
    with pytest.raises(GroupError, match="lacks mr_reward_group, completion, mr_reward_score"):
        load_source(path)
