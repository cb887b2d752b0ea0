"""JSON Lines of ranked groups: what is written is read back, and a bad line names itself."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import family

from mr_reward import ResponseGroup
from mr_reward.data.groups_file import load_preferences, save_preferences
from mr_reward.data.media_files import check_readable, rebase_path, write_image
from mr_reward.errors import GroupError, MediaError
from mr_reward.templates.images import load_image

RED, BLUE = Image.new("RGB", (9, 7), "red"), Image.new("RGB", (5, 4), "blue")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def same(found: ResponseGroup, expected: ResponseGroup) -> bool:
    def pixels(group: ResponseGroup) -> list[bytes]:
        media = [*group.images, *(frame for video in group.videos for frame in video)]
        return [load_image(item).convert("RGB").tobytes() for item in media]

    return (
        found.messages == expected.messages
        and found.responses == expected.responses
        and found.rankings == expected.rankings
        and (found.id, found.source) == (expected.id, expected.source)
        and [len(video) for video in found.videos] == [len(video) for video in expected.videos]
        and pixels(found) == pixels(expected)
    )


def test_round_trip_of_everything(tmp_path: Path) -> None:
    blocks = [{"type": "text", "text": "left"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "é\n"}]
    groups = [
        ResponseGroup(prompt="plain", responses=["", "b"], rankings=[2, 1], id="1", source="s"),
        ResponseGroup(
            prompt=[{"role": "system", "content": "be kind"}, {"role": "user", "content": blocks}],
            responses=["a", "b", "c"],
            rankings=[1, 1, 2],
            images=[RED, encoded(BLUE)],
            id="2",
        ),
        ResponseGroup(prompt="film", responses=["a", "b"], rankings=[1, 2], videos=[[RED, BLUE], [RED]], id="3"),
    ]
    path = tmp_path / "deep" / "train.jsonl"
    assert save_preferences(groups, path) == 3
    loaded = load_preferences(path)
    assert len(loaded) == 3
    for found, expected in zip(loaded, groups, strict=True):
        assert same(found, expected), expected.id
    # The red picture is used three times and lies there once.
    assert len(list((tmp_path / "deep" / "train_media").iterdir())) == 2
    assert [entry.name for entry in path.parent.iterdir() if "partial" in entry.name] == []
    # A second generation, now with paths, in another folder.
    save_preferences(loaded, tmp_path / "again.jsonl")
    for found, expected in zip(load_preferences(tmp_path / "again.jsonl"), groups, strict=True):
        assert same(found, expected), expected.id
    assert not (tmp_path / "again_media").exists()


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("old")
    good = ResponseGroup(prompt="a", responses=["b", "c"], rankings=[1, 2])
    bad = ResponseGroup(prompt="a", responses=["b", "c"], rankings=[1, 2], images=[3.5])
    with pytest.raises(MediaError, match="float"):
        save_preferences([good, bad], path)
    assert path.read_text() == "old"


def test_the_papers_rows(tmp_path: Path) -> None:
    """`prompt, responses, rankings, image, video`; a video as a folder of frames, as MM-RLHF ships them."""
    (tmp_path / "film").mkdir()
    for name, image in (("0002.png", BLUE), ("0001.png", RED), ("notes.txt", None)):
        if image is None:
            (tmp_path / "film" / name).write_text("no frame")
        else:
            image.save(tmp_path / "film" / name)
    RED.save(tmp_path / "a.png")
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "rankings": [1, 1, 3], "image": "a.png"},
        {"prompt": "p", "responses": ["a", "b"], "rankings": [2, 1], "video": "film", "image": None},
        {"prompt": "p", "responses": ["a", "b"], "rankings": [2, 1], "video": ["film/0001.png", "a.png"]},
    ]
    path = tmp_path / "paper.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = load_preferences(path)
    assert first.images == (tmp_path / "a.png",) and first.id == "paper.jsonl:1"
    assert [list(video) for video in second.videos] == [
        [tmp_path / "film" / "0001.png", tmp_path / "film" / "0002.png"]
    ]
    assert len(third.videos[0]) == 2


@pytest.mark.parametrize(("video", "words"), [("film.mp4", "ffmpeg -i film.mp4"), ("empty", "holds no image")])
def test_a_video_that_is_no_frames_says_what_to_do(tmp_path: Path, video: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    path = tmp_path / "v.jsonl"
    path.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "rankings": [2, 1], "video": video}))
    with pytest.raises(GroupError, match="v.jsonl, line 1") as caught:
        load_preferences(path)
    assert words in str(caught.value)


def test_a_short_prompt_is_written_as_text(tmp_path: Path) -> None:
    groups = [
        ResponseGroup(prompt="plain", responses=["a", "b"], rankings=[2, 1], images=[RED], videos=[[BLUE]]),
        ResponseGroup(prompt=[{"role": "system", "content": "s"}], responses=["\ud800", "b"], rankings=[2, 1]),
    ]
    save_preferences(groups, tmp_path / "t.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"] == "plain"
    assert rows[1]["prompt"] == [{"role": "system", "content": "s"}]
    assert all(same(*pair) for pair in zip(load_with_own_ids(tmp_path / "t.jsonl"), groups, strict=True))


def load_with_own_ids(path: Path) -> list[ResponseGroup]:
    """Groups without an id get one that names their line."""
    loaded = load_preferences(path)
    assert [group.id for group in loaded] == [f"{path.name}:{i + 1}" for i in range(len(loaded))]
    return [replace(group, prompt=group.messages, id=None) for group in loaded]


def test_the_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the file are relative to it, also those of media that lie elsewhere."""
    (tmp_path / "a" / "raw").mkdir(parents=True)
    RED.save(tmp_path / "a" / "raw" / "red.png")
    group = ResponseGroup(
        prompt="p", responses=["a", "b"], rankings=[2, 1], images=[tmp_path / "a" / "raw" / "red.png", encoded(BLUE)]
    )
    save_preferences([group], tmp_path / "a" / "train" / "t.jsonl")
    assert str(tmp_path) not in (tmp_path / "a" / "train" / "t.jsonl").read_text()
    (tmp_path / "a").rename(tmp_path / "b")
    found = load_preferences(tmp_path / "b" / "train" / "t.jsonl", media_within=tmp_path / "b")[0]
    assert [load_image(image).size for image in found.images] == [RED.size, BLUE.size]
    # A row does not decide where files are read from.
    with pytest.raises(GroupError, match=r"'../raw/red.png' leads out of"):
        load_preferences(tmp_path / "b" / "train" / "t.jsonl")
    monkeypatch.chdir(tmp_path / "b")
    assert load_preferences("train/t.jsonl")[0].images[0] == Path("train/../raw/red.png")


@pytest.mark.parametrize("name", ["../red.png", "a/../../red.png", "{outside}/red.png", "train/../../red.png"])
@pytest.mark.parametrize("key", ["image", "video"])
def test_paths_do_not_lead_out_of_the_folder(tmp_path: Path, name: str, key: str) -> None:
    (tmp_path / "in").mkdir()
    RED.save(tmp_path / "red.png")
    value = name.format(outside=tmp_path)
    row = {"prompt": "p", "responses": ["a", "b"], "rankings": [1, 2], key: [value] if key == "video" else value}
    (tmp_path / "in" / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(GroupError, match=rf"{key}s\[0\].*leads out of"):
        load_preferences(tmp_path / "in" / "t.jsonl")


def test_tools_and_calls_come_back(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    prompt = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "easy"},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "1"},
    ]
    group = ResponseGroup(
        prompt=prompt,
        responses=["4", "5"],
        rankings=[1, 2],
        id="1",
        tools=[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    )
    plain = ResponseGroup(prompt="p", responses=["a", "b"], rankings=[1, 2], id="2", tools=group.tools)
    save_preferences([group, plain], tmp_path / "t.jsonl")
    for found, one in zip(load_preferences(tmp_path / "t.jsonl"), (group, plain), strict=True):
        assert same(found, one) and found.tools == one.tools != ()


@pytest.mark.parametrize("suffix", [".mp4", ".MP4", ".Mov", ".webm"])
def test_a_video_file_is_told_by_its_name_in_any_case(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"film{suffix}").write_bytes(b"")
    path = tmp_path / "v.jsonl"
    path.write_text(json.dumps({**ROW, "video": f"film{suffix}"}))
    with pytest.raises(GroupError, match="is a video file and none is decoded here"):
        load_preferences(path)


def test_frames_by_their_suffix_in_any_case_and_a_bad_one_by_its_place(tmp_path: Path) -> None:
    for i, suffix in enumerate((".JPG", ".jpeg", ".PNG", ".Webp", ".txt")):
        path = tmp_path / "film" / f"{i}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(RED, "JPEG" if i < 2 else "PNG" if i == 2 else "WEBP"))
    path = tmp_path / "v.jsonl"
    path.write_text(json.dumps({**ROW, "videos": ["film", "film"]}))
    (group,) = load_preferences(path)
    assert [[frame.stem for frame in video] for video in group.videos] == [["0", "1", "2", "3"]] * 2
    check_readable(group)
    bad = replace(group, prompt=group.messages, videos=[group.videos[0], [*group.videos[1][:2], b"no image"]])
    with pytest.raises(MediaError, match=r"^videos\[1\]\[2\]: "):
        check_readable(bad)


@pytest.mark.parametrize("beside", ["in2", "in.old", "i", "IN"])
def test_a_folder_whose_name_begins_alike_is_another(tmp_path: Path, beside: str) -> None:
    for folder in ("in", beside):
        (tmp_path / folder).mkdir(exist_ok=True)
        RED.save(tmp_path / folder / "red.png")
    row = {"prompt": "p", "responses": ["a", "b"], "rankings": [1, 2]}
    path = tmp_path / "in" / "t.jsonl"
    for image in ("red.png", "./red.png", "../in/red.png", str(tmp_path / "in" / "red.png")):
        path.write_text(json.dumps({**row, "image": image}))
        assert load_preferences(path, media_within=tmp_path / "in")[0].images[0].samefile(tmp_path / "in" / "red.png")
    path.write_text(json.dumps({**row, "image": f"../{beside}/red.png"}))
    with pytest.raises(GroupError, match="leads out of"):
        load_preferences(path, media_within=tmp_path / "in")


@pytest.mark.parametrize(("size", "fits"), [((200, 1), True), ((1, 200), True), ((600, 3), True), ((201, 1), False)])
def test_the_longest_picture_that_the_processors_take(size: tuple[int, int], fits: bool) -> None:
    group = ResponseGroup(prompt="p", responses=["a"], images=[RED, Image.new("RGB", size)])
    renderer = family("qwen3_vl").renderer()
    if fits:
        check_readable(group)
        renderer.render(group)
        return
    with pytest.raises(MediaError, match=r"images\[1\]: .* is 201 x 1, .* more than 200 times"):
        check_readable(group)
    with pytest.raises(MediaError):
        renderer.render(group)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.png", "../in/a.png"),
        ("deep/a.png", "../in/deep/a.png"),
        ("../a.png", "../a.png"),
        ("../out/a.png", "a.png"),
        ("/media/a.png", "/media/a.png"),
        ("https://a.b/c.png", "https://a.b/c.png"),
        ("HTTP://a.b/c.png", "HTTP://a.b/c.png"),
        ("data:image/png;base64,aGk=", "data:image/png;base64,aGk="),
        ("DATA:,", "DATA:,"),
        ("file:///a.png", "file:///a.png"),
        ("database.png", "../in/database.png"),
        ("https.png", "../in/https.png"),
    ],
)
def test_a_path_is_counted_from_another_folder(path: str, expected: str, tmp_path: Path) -> None:
    assert rebase_path(path, tmp_path / "in", tmp_path / "out") == expected


def test_pictures_are_named_by_their_content_and_type(tmp_path: Path) -> None:
    for kind, suffix in (("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp"), ("GIF", ".gif"), ("TIFF", ".tiff")):
        content = encoded(RED, kind)
        path = write_image(content, tmp_path)
        assert path.suffix == suffix and path.read_bytes() == content
        assert write_image(bytearray(content), tmp_path) == path
    assert write_image(RED, tmp_path) == write_image(RED.copy(), tmp_path) != write_image(BLUE, tmp_path)
    lying, standing = (write_image(Image.new("RGB", size, "red"), tmp_path) for size in ((2, 8), (8, 2)))
    assert lying != standing


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with pytest.raises(GroupError, match="group 'x': has no rankings"):
        save_preferences([ResponseGroup(prompt="a", responses=["b", "c"], id="x")], path)
    with pytest.raises(GroupError, match="no group to write"):
        save_preferences([], path)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "film").mkdir()
    for number in (10, 9, 1):
        RED.save(tmp_path / "film" / f"frame{number}.png")
    path = tmp_path / "v.jsonl"
    path.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "rankings": [2, 1], "videos": ["film"]}))
    assert [frame.name for frame in load_preferences(path)[0].videos[0]] == ["frame1.png", "frame9.png", "frame10.png"]


ROW = {"prompt": "p", "responses": ["a", "b"], "rankings": [2, 1]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json.dumps({**ROW, "rankings": None}), "keys ['rankings'] are missing"),
        (json.dumps({**ROW, "image": "no.png"}), "images[0]: "),
        (json.dumps({**ROW, "image": 3}), "images[0]: is 3, expected a path"),
        (json.dumps({**ROW, "image": "https://a.b/c.png"}), "is a URL and nothing is fetched"),
        (json.dumps({**ROW, "images": "a.png"}), "images is str, expected a list"),
        (json.dumps({**ROW, "image": "a.png", "images": ["b.png"]}), "image and images are both given"),
        (json.dumps({**ROW, "video": ["no.png"]}), "videos[0][0]: "),
        (json.dumps({**ROW, "source": {}}), "source is {}, expected a text"),
        (json.dumps({**ROW, "prompt": 3}), "prompt is 3"),
        ("\xff", "the line is no JSON"),
    ],
)
def test_a_bad_line_names_its_field(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n\n" + line.encode("latin-1"))
    with pytest.raises(GroupError, match="t.jsonl, line 3") as caught:
        load_preferences(path)
    assert words in str(caught.value)
    assert len(load_preferences(path, skip_bad=True)) == 1


def test_groups_without_an_id_are_named_by_their_line_whatever_was_left_out(tmp_path: Path) -> None:
    good = json.dumps(ROW)
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([good, "", "{", good, json.dumps({**ROW, "id": "own"}), good]))
    assert [group.id for group in load_preferences(path, skip_bad=True)] == [
        "t.jsonl:1",
        "t.jsonl:4",
        "own",
        "t.jsonl:6",
    ]


def test_bad_lines_can_be_skipped_and_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = json.dumps({"prompt": "p", "responses": ["a", "b"], "rankings": [2, 1]})
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([good, "{", good, '{"prompt": "p", "responses": ["a"], "rankings": [1, 2]}']))
    with caplog.at_level(logging.WARNING):
        assert len(load_preferences(path, skip_bad=True)) == 2
    assert "skipped 2 bad lines" in caplog.text and "line 2:" in caplog.text
    assert "line 4:" in caplog.text and "2 rankings for 1 responses" in caplog.text
    with pytest.raises(GroupError, match="line 2"):
        load_preferences(path)
