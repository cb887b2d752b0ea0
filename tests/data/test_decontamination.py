"""Training rows that meet a benchmark go; others stay."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mr_reward import ResponseGroup
from mr_reward.data.decontamination import decontaminate, perceptual_hash
from mr_reward.data.handwriting import make_groups

LONG = "What is written on the sign to the left of the door?"


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
    return result.removed[0][2] if result.removed else None


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
    hashes = [perceptual_hash(photo(seed)) for seed in range(60)]
    distances = [int((a != b).sum()) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 4 and 28 < sum(distances) / len(distances) < 36


def test_bands_find_every_hash_within_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against comparing with all: any four flipped bits leave one band whole."""
    base = perceptual_hash(photo(0))
    bench = group("bench", images=[photo(0)])
    rng = random.Random(0)
    for flips in (1, 4, 5, 12):
        for _ in range(40):
            found = base.copy()
            found[rng.sample(range(64), flips)] ^= True
            monkeypatch.setattr("mr_reward.data.decontamination.perceptual_hash", lambda image, found=found: found)
            train = group("other", images=[photo(1)])
            monkeypatch.undo()
            index = decontaminate([], {"bench": [bench]})
            assert index.kept == []
            result = _with_hash(monkeypatch, found, train, bench)
            assert (result == "image") == (flips <= 4)


def _with_hash(
    monkeypatch: pytest.MonkeyPatch, found: np.ndarray, train: ResponseGroup, bench: ResponseGroup
) -> str | None:
    import mr_reward.data.decontamination as module

    real = module.perceptual_hash
    hashes = iter([real(photo(0)), found])  # first the benchmark's picture, then the training one's
    monkeypatch.setattr(module, "perceptual_hash", lambda image: next(hashes))
    try:
        return reason(train, bench)
    finally:
        monkeypatch.undo()


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


def test_videos_by_their_first_frame() -> None:
    bench = group("b", videos=[[photo(1), photo(2)]])
    assert reason(group("x", videos=[[jpeg(photo(1), 70), photo(3)]]), bench) == "image"
    assert reason(group("x", videos=[[photo(2), photo(1)]]), bench) is None


def test_counts_by_source_benchmark_and_reason() -> None:
    benchmarks = {"one": [group("p1")], "two": [group("p2", images=[photo(3)])]}
    train = [
        group("P1", source="s"),
        group("clean", source="s"),
        group("z", images=[photo(3)], source="t"),
        group("p1", source="t"),
    ]
    result = decontaminate(train, benchmarks)
    assert [item.messages[0]["content"][0]["text"] for item in result.kept] == ["clean"]
    assert result.counts == {("s", "one", "prompt"): 1, ("t", "two", "image"): 1, ("t", "one", "prompt"): 1}


def test_unrelated_real_pictures_stay() -> None:
    """Handwriting: many pictures that look alike to a coarse eye. Those of other scans must not all go."""
    train, bench = make_groups("train", 60), make_groups("test", 60)
    images = [ResponseGroup(prompt=str(i), responses=["a", "b"], images=g.images) for i, g in enumerate(train)]
    result = decontaminate(images, {"bench": bench})
    assert len(result.kept) >= 54


def test_paths_are_read(tmp_path: Path) -> None:
    photo(5).save(tmp_path / "a.png")
    assert reason(group("x", images=[tmp_path / "a.png"]), group("y", images=[photo(5)])) == "image"
