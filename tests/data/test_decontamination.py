"""Training rows that meet a benchmark go; others stay."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mr_reward import ResponseGroup
from mr_reward.data.decontamination import (
    MIN_PROMPT,
    MIN_RESPONSE,
    STOCK_LIMIT,
    ImageIndex,
    decontaminate,
    fingerprint,
    normalised_prompt,
    same_picture,
)
from mr_reward.worlds.handwriting import make_groups

LONG = "What is written on the wooden sign to the left of the door, and in which language is it written?"


def photo(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Smooth random colours with an edge, like a photograph more than like noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(small).copy()
    pixels[:, size[0] // 3 :] = 255 - pixels[:, size[0] // 3 :]
    return Image.fromarray(pixels)


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def group(prompt: str, responses: tuple[str, str] = ("a", "b"), **options: object) -> ResponseGroup:
    return ResponseGroup(prompt=prompt, responses=responses, rankings=[1, 2], **options)  # type: ignore[arg-type]


def reason(train: ResponseGroup, *benchmark: ResponseGroup) -> str | None:
    result = decontaminate([train], {"bench": list(benchmark)})
    assert len(result.kept) + len(result.removed) == 1
    reasons = {reason for removal in result.removed for _, reason in removal.matches}
    assert len(reasons) <= 1, reasons
    return next(iter(reasons), None)


@pytest.mark.parametrize("seed", range(10))
def test_the_same_picture_is_found_re_encoded_and_resized(seed: int) -> None:
    picture = photo(seed)
    bench = group("bench", images=[picture])
    for version in (
        picture,
        jpeg(picture, 60),
        jpeg(picture.resize((320, 240), Image.Resampling.LANCZOS), 85),
        picture.resize((100, 75), Image.Resampling.LANCZOS),
        picture.convert("RGBA"),
    ):
        assert reason(group("other", images=[version]), bench) == "image"
    assert reason(group("other", images=[photo(seed + 100)]), bench) is None


def test_different_pictures_are_far_apart() -> None:
    hashes = [fingerprint(photo(seed)).phash or 0 for seed in range(60)]
    distances = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 4 and 28 < sum(distances) / len(distances) < 36


def test_the_index_finds_what_comparing_with_all_finds() -> None:
    """Hashes of one picture with flipped bits: the bands must lose none that is at most four bits away."""
    rng = random.Random(0)
    base = fingerprint(photo(0))
    assert base.phash is not None
    variants = [
        replace(
            base, digest=bytes([flips, i]), phash=base.phash ^ sum(1 << bit for bit in rng.sample(range(64), flips))
        )
        for flips in (0, 1, 3, 4, 5, 12)
        for i in range(40)
    ]
    index = ImageIndex()
    for i, variant in enumerate(variants):
        index.add(variant, i)
    assert index.find(base) == set(range(160))
    for query in variants[::7]:
        assert index.find(query) == {i for i, variant in enumerate(variants) if same_picture(query, variant)}


def drawing(seed: int) -> Image.Image:
    """A triangle with a number, as in a book of exercises: the same frame, other words."""
    rng = random.Random(seed)
    image = Image.new("RGB", (400, 400), "white")
    draw = ImageDraw.Draw(image)
    corners = [(x + rng.randint(-6, 6), y) for x, y in ((60, 340), (340, 340), (200, 60))]
    draw.polygon(corners, outline="black", width=2)
    draw.text((100, 200), str(rng.randint(1, 99)), fill="black")
    return image


def test_drawings_of_one_kind_are_different_pictures() -> None:
    prints = [fingerprint(drawing(seed)) for seed in range(40)]
    pairs = [(a, b) for i, a in enumerate(prints) for b in prints[:i]]
    alike = [(a, b) for a, b in pairs if ((a.phash or 0) ^ (b.phash or 0)).bit_count() <= 4]
    assert len(alike) > 20, "else this tests nothing"
    assert sum(same_picture(a, b) for a, b in alike) <= len(alike) / 10
    again = [jpeg(drawing(seed).resize((280, 280), Image.Resampling.LANCZOS), 60) for seed in range(40)]
    # Drawings have few low frequencies, so that some hashes turn in more than four bits.
    assert sum(same_picture(fingerprint(a), b) for a, b in zip(again, prints, strict=True)) >= 36


def test_flat_pictures_match_only_themselves() -> None:
    """White pages and black frames have no low frequencies to compare."""
    white, grey = Image.new("RGB", (30, 30), "white"), Image.new("RGB", (30, 30), (250, 250, 250))
    assert reason(group("x", images=[white]), group("y", images=[grey])) is None
    assert reason(group("x", images=[white]), group("y", images=[white.copy()])) == "image"


def test_another_shape_is_another_picture() -> None:
    picture = photo(0)
    assert reason(group("x", images=[picture.resize((160, 60))]), group("y", images=[picture])) is None


def test_prompts() -> None:
    assert reason(group("What  is\nTHIS?"), group("what is this?")) == "prompt"
    assert reason(group("What is that?"), group("what is this?")) is None
    # Beside other pictures a short prompt says nothing, a long one does.
    with_picture = {"images": [photo(1)]}
    assert reason(group("Describe this image.", **with_picture), group("Describe this image.")) is None
    assert reason(group(LONG, **with_picture), group(LONG, images=[photo(2)])) == "prompt"


def test_responses() -> None:
    long = "The answer is forty-two, because the question was never asked."
    assert reason(group("x", (long, "b")), group("y", ("c", long.upper()))) == "response"
    assert reason(group("x", ("Yes.", "b")), group("y", ("c", "Yes."))) is None, "short answers are everyone's"


def test_a_template_beside_pictures_says_nothing() -> None:
    template = "Answer the question about the picture with a single word or phrase, and give no explanation for it."
    train = [group(f"{template}", images=[photo(i)], id=str(i)) for i in range(12)]
    bench = {"bench": [group(template, images=[photo(100)])]}
    assert len(decontaminate(train, bench).kept) == 12
    assert len(decontaminate(train[:10], bench).kept) == 0, "few share it: it may be one question"
    assert len(decontaminate(train, bench, strict=True).kept) == 0


def test_a_stock_phrase_says_nothing() -> None:
    refusal = "I'm sorry, but I can't assist with that request, it may hurt people."
    train = [group(f"how to {i}", (refusal, "like this")) for i in range(12)]
    bench = {"bench": [group("another", (refusal, "so"))]}
    assert len(decontaminate(train, bench).kept) == 12
    assert decontaminate(train, bench, strict=True).counts == {("unknown", "bench", "response"): 12}
    assert len(decontaminate(train[:10], bench).kept) == 0


def test_a_short_prompt_with_a_picture_on_one_side_only() -> None:
    assert reason(group("Why?", images=[photo(1)]), group("why?")) is None
    assert reason(group("Why?"), group("why?", images=[photo(1)])) is None


@pytest.mark.parametrize(
    ("train", "bench", "found"),
    [
        ("RLAIF-V-12", "rlaif-v-12", "id"),
        ("svit-000123", "svit-000123", "id"),
        ("RLAIF-V-12", "RLAIF-V-13", None),
        ("12", "12", None),
        ("train.jsonl:3", "train.jsonl:3", None),
    ],
)
def test_only_ids_of_known_data_sets_count(train: str, bench: str, found: str | None) -> None:
    assert reason(group("x", id=train), group("y", id=bench)) == found


def test_media_paths_of_mm_rlhf_count(tmp_path: Path) -> None:
    for folder, seed in (("train/mcq", 1), ("bench/images/mcq", 2), ("other/pictures", 3)):
        (tmp_path / folder).mkdir(parents=True)
        photo(seed).save(tmp_path / folder / "073712.png")
    bench = group("y", images=[tmp_path / "bench/images/mcq/073712.png"])
    assert reason(group("x", images=[tmp_path / "train/mcq/073712.png"]), bench) == "id"
    assert reason(group("x", images=[tmp_path / "other/pictures/073712.png"]), bench) is None


def test_videos_by_half_of_their_frames() -> None:
    bench = group("b", videos=[[photo(i) for i in range(4)]])
    assert reason(group("x", videos=[[jpeg(photo(0), 70), photo(1), photo(8), photo(9)]]), bench) == "video"
    assert reason(group("x", videos=[[photo(0), photo(7), photo(8), photo(9)]]), bench) is None
    # Films open with a black frame.
    black = Image.new("RGB", (160, 120))
    films = [[black, *(photo(i) for i in range(start, start + 3))] for start in (10, 20)]
    assert reason(group("x", videos=[films[0]]), group("b", videos=[films[1]])) is None


@pytest.mark.parametrize(("size", "found"), [(MIN_PROMPT - 1, None), (MIN_PROMPT, "prompt")])
def test_the_shortest_prompt_that_tells_something_beside_a_picture(size: int, found: str | None) -> None:
    words = "x" * size
    assert reason(group(words, images=[photo(1)]), group(words, images=[photo(2)])) == found


@pytest.mark.parametrize(("size", "found"), [(MIN_RESPONSE, None), (MIN_RESPONSE + 1, "response")])
def test_the_shortest_response_that_tells_something(size: int, found: str | None) -> None:
    assert reason(group("p", ("x" * size, "b")), group("q", ("c", f" {'X' * size}\n"))) == found


@pytest.mark.parametrize("side", ["training", "benchmark", "prompts of a response"])
def test_what_as_many_share_as_the_limit_allows_is_a_trace(side: str) -> None:
    """Exactly the limit, and one more."""
    answer = "x" * (MIN_RESPONSE + 1)
    for more in (0, 1):
        count = STOCK_LIMIT + more
        train, bench = 1 if side == "benchmark" else count, count if side == "benchmark" else 1
        if side == "prompts of a response":
            trained = [group(f"how to {i}", (answer, "b")) for i in range(train)]
            trained += [replace(trained[0], prompt=trained[0].messages)] * 3  # no more prompts
            items = [group("another", (answer, "c"))]
        else:
            trained = [group(LONG, images=[photo(i)]) for i in range(train)]
            items = [group(LONG, images=[photo(100 + i)], id=str(i)) for i in range(bench)]
        removed = decontaminate(trained, {"bench": items}).removed
        assert len(removed) == (0 if more else len(trained)), more


def test_one_name_in_two_folders_is_two_pictures(tmp_path: Path) -> None:
    """What was looked up is remembered by path; data sets number their files alike."""
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        photo(seed).save(tmp_path / folder / "0.png")
    train = [group(f"p{name}", images=[tmp_path / name / "0.png"]) for name in "abab"]
    for seed, kept in ((1, ["pb", "pb"]), (2, ["pa", "pa"])):
        result = decontaminate(train, {"bench": [group("q", images=[photo(seed)])]})
        assert [normalised_prompt(one) for one in result.kept] == kept


def test_frames_of_two_videos_do_not_add_up() -> None:
    """Of each of the item's videos less than half is there."""
    bench = group("b", videos=[[photo(i) for i in range(4)], [photo(i) for i in range(10, 14)]])
    train = [photo(0), photo(10), photo(30), photo(31)]
    assert reason(group("x", videos=[train]), bench) is None
    assert reason(group("x", videos=[[*train[:1], photo(1), *train[2:]]]), bench) == "video"


def test_a_system_turn_changes_no_question_and_an_answer_before_it_does() -> None:
    def asked(*turns: tuple[str, str]) -> ResponseGroup:
        messages = [{"role": role, "content": text} for role, text in turns]
        return ResponseGroup(prompt=messages, responses=["a", "b"])

    question = ("user", "What is this?")
    first, other = ("assistant", "A cat."), ("assistant", "A dog.")
    more = ("user", "Why?")
    assert reason(asked(("system", "Be kind."), question), asked(question)) == "prompt"
    assert reason(asked(question, first, more), asked(question, first, more)) == "prompt"
    assert reason(asked(question, other, more), asked(question, first, more)) is None
    assert reason(asked(question, more), asked(question, first, more)) is None


def test_counts_by_source_benchmark_and_reason() -> None:
    benchmarks = {"one": [group("p1")], "two": [group("p2", images=[photo(3)]), group("p1", id="i")]}
    train = [
        group("P1", source="s"),
        group("clean", source="s"),
        group("z", images=[photo(3)], source="t"),
        group("p1", source="t"),
    ]
    result = decontaminate(train, benchmarks)
    assert [item.messages[0]["content"][0]["text"] for item in result.kept] == ["clean"]
    assert result.counts == {
        ("s", "one", "prompt"): 1,
        ("s", "two", "prompt"): 1,
        ("t", "one", "prompt"): 1,
        ("t", "two", "image"): 1,
        ("t", "two", "prompt"): 1,
    }, "below each benchmark that they meet"
    assert result.removed[0].matches == [(("one", "1"), "prompt"), (("two", "i"), "prompt")]


def test_unrelated_real_pictures_stay() -> None:
    """Handwriting: many pictures that look alike to a coarse eye. Those of other scans must not all go."""
    train, bench = make_groups("train", 60), make_groups("test", 60)
    images = [ResponseGroup(prompt=str(i), responses=["a", "b"], images=g.images) for i, g in enumerate(train)]
    result = decontaminate(images, {"bench": bench})
    assert len(result.kept) == 60


def test_paths_are_read(tmp_path: Path) -> None:
    photo(5).save(tmp_path / "a.png")
    assert reason(group("x", images=[tmp_path / "a.png"]), group("y", images=[photo(5)])) == "image"
