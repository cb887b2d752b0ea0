"""JSON Lines of ranked groups: what is written is read back, and a bad line names itself."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from mr_reward import ResponseGroup
from mr_reward.data.preferences import load_preferences, save_preferences
from mr_reward.errors import GroupError, MediaError
from mr_reward.media import load_image

RED, BLUE = Image.new("RGB", (9, 7), "red"), Image.new("RGB", (5, 4), "blue")


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
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
