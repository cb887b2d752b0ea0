"""Any image becomes an upright RGB one or a `MediaError` that says which and why."""

from __future__ import annotations

import base64
import random
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_models import family, random_image, reward_model

from mr_reward import GroupScorer, ResponseGroup
from mr_reward.errors import MediaError
from mr_reward.templates.images import DecodedImages, load_image

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


# --- forms ---


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_and_gets_a_score(mode: str) -> None:
    image = Image.new(mode, (40, 33))
    loaded = load_image(image)
    assert loaded.mode == "RGB" and loaded.size == (40, 33)
    assert image.mode == mode, "the caller's image is left alone"
    group = ResponseGroup(prompt="p", responses=["a", "b"], images=[image])
    scores = GroupScorer(reward_model("qwen3_vl")).score([group])[0]
    assert scores is not None and torch.tensor(scores).isfinite().all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_colours_are_kept(mode: str) -> None:
    image = random_image(random.Random(0)).convert(mode)
    assert np.array_equal(pixels(load_image(image)), pixels(image.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    """Above 255 everything would be white: a medical image or a depth map, silently lost."""
    values = np.array([[0, 256, 30_000, 65_535]], dtype=np.uint16)
    for source in (
        Image.fromarray(values),
        encoded(Image.fromarray(values)),
        encoded(Image.fromarray(values), "TIFF"),
    ):
        assert pixels(load_image(source))[0, :, 0].tolist() == [0, 1, 117, 255]


@pytest.mark.parametrize("seed", range(5))
def test_numbers_of_every_range_look_like_their_picture(seed: int) -> None:
    """Floats in 0 to 1 came out black, whole numbers above 255 white, both without a word."""
    shape = np.random.default_rng(seed).integers(1, 9, size=2)
    picture = np.random.default_rng(seed + 99).integers(0, 256, size=shape).astype(np.uint8)
    picture.flat[0] = 7  # neither all 0 nor all 1
    floats, sixteen = (picture / 255).astype(np.float32), picture.astype(np.int32) * 256 + 130
    if seed % 2:  # 255.5 and 256 are cut off at 255, and 1.0 is still white
        floats.flat[-1], sixteen.flat[-1], picture.flat[-1] = 1.0, 65535, 255
    sources = [Image.fromarray(values) for values in (floats, picture.astype(np.float32), picture.astype(np.int32))]
    sources += [
        Image.fromarray(sixteen),
        floats,
        floats.astype(np.float16),
        sixteen,
        sixteen.astype(np.uint16),
        picture,
    ]
    sources += [encoded(Image.fromarray(floats), "TIFF"), encoded(Image.fromarray(sixteen), "TIFF")]
    sources += [encoded(Image.fromarray(sixteen.astype(np.uint16)), "PPM")]
    for source in sources:
        assert np.array_equal(pixels(load_image(source))[..., 0], picture)


def test_a_dark_file_of_sixteen_bits_stays_dark() -> None:
    """By its values it could be one of 8 bits; the file says how many it has."""
    values = np.full((3, 3), 200, dtype=np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        assert pixels(load_image(encoded(Image.fromarray(values), kind))).max() == 0


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([[-1.0, 1.0]], "from -1 to 1"),
        ([[0.0, 1.5, 300.0]], "from 0 to 300"),
        ([[0, 65536]], "from 0 to 65536"),
        ([[-1, 255]], "from -1 to 255"),
        ([[0.5, np.nan]], "from nan"),
        ([[0.5, np.inf]], "to inf"),
    ],
)
def test_numbers_of_no_known_range_are_refused(values: Any, found: str) -> None:
    array = np.asarray(values)
    image = Image.fromarray(array.astype(np.float32 if array.dtype.kind == "f" else np.int32))
    for source in (array, image, encoded(image, "TIFF")):
        with pytest.raises(MediaError, match=f"{found}.*expected 0 to 1, 0 to 255 or whole ones up to 65535"):
            load_image(source)


def test_arrays_of_every_layout() -> None:
    picture = np.random.default_rng(0).integers(0, 256, size=(5, 6, 3)).astype(np.uint8)
    tensor = torch.from_numpy(picture)
    for source in (picture, picture.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1), picture / 255, tensor / 255):
        assert np.array_equal(pixels(load_image(source)), picture)
    assert np.array_equal(pixels(load_image(picture[..., :1])), picture[..., :1].repeat(3, -1))
    mask = picture[..., 0] > 127
    assert np.array_equal(pixels(load_image(mask))[..., 0], mask * 255)
    clear = np.dstack([picture, np.zeros((5, 6), dtype=np.uint8)])
    assert (pixels(load_image(clear)) == 255).all()
    for wrong in (np.zeros(4), np.zeros((2, 4, 4, 3)), np.zeros((5, 4, 2)), np.zeros((0, 4)), np.array([["a"]])):
        with pytest.raises(MediaError, match="an image is an array of shape|expected numbers"):
            load_image(wrong)


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_low_array_is_read_with_its_channels_last(rows: int, channels: int) -> None:
    """Where the shape would fit both ways: rows, columns, channels is what PIL and OpenCV have."""
    values = np.random.default_rng(rows).integers(0, 256, size=(rows, 7, channels)).astype(np.uint8)
    values[..., 3:] = 255
    loaded = load_image(values)
    assert loaded.size == (7, rows)
    assert np.array_equal(pixels(loaded), values[..., :3] if channels > 1 else values.repeat(3, -1))


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    assert pixels(load_image(image)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    data = encoded(palette, transparency=0)
    assert pixels(load_image(data)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    upright = random_image(random.Random(orientation)).resize((32, 64), Image.Resampling.NEAREST)
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = upright.transpose(stored[orientation]) if orientation in stored else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(encoded(turned, exif=exif))
    assert loaded.size == (32, 64)
    assert np.array_equal(pixels(loaded), pixels(upright))


def test_paths_bytes_and_rows_of_datasets(tmp_path: Path) -> None:
    image = random_image(random.Random(1))
    data = encoded(image)
    path = tmp_path / "a b ü.png"
    path.write_bytes(data)
    sources = [
        image,
        data,
        bytearray(data),
        path,
        str(path),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": data, "path": "/nowhere.png"},
        {"path": str(path)},
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
        "DATA:image/png;charset=x;base64," + base64.encodebytes(data).decode(),
        f"data:image/png,{quote_from_bytes(data)}",
        path.as_uri(),
        f"file://localhost{quote(str(path))}",
        {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "image": image},
        {"type": "image", "base64": base64.b64encode(data).decode()},
        {
            "type": "image_url",
            "image_url": {"url": f"data:;base64,{base64.b64encode(data).decode()}", "detail": "low"},
        },
        {"type": "input_image", "image_url": str(path)},
        BytesIO(data),
        memoryview(data),
    ]
    with path.open("rb") as file:
        file.read(9)
        assert np.array_equal(pixels(load_image(file)), pixels(image)), "from its start, wherever it was read to"
    for source in sources:
        assert np.array_equal(pixels(load_image(source)), pixels(image))


def test_a_picture_is_decoded_once_and_no_other_is_taken_for_it(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (4, 6), "red"), Image.new("RGB", (4, 6), "blue")
    for folder, image in (("a", red), ("b", blue)):
        (tmp_path / folder).mkdir()
        image.save(tmp_path / folder / "0.png")
    sources: list[Any] = [red, tmp_path / "a" / "0.png", str(tmp_path / "a" / "0.png"), encoded(red)]
    sources += [blue, tmp_path / "b" / "0.png", {"path": str(tmp_path / "b" / "0.png")}, {"bytes": encoded(blue)}]
    load = DecodedImages()
    first = [load(source) for source in sources]
    assert [pixels(image)[0, 0, 0] for image in first] == [255] * 4 + [0] * 4
    assert [load(source) for source in sources] == first
    assert all(load(source) is image for source, image in zip(sources, first, strict=True))
    digests = [load.digest(source) for source in sources]
    assert digests == [digests[0]] * 4 + [digests[4]] * 4 and digests[0] != digests[4]


@pytest.mark.parametrize("apart", [False, True])
def test_equal_pixels_in_another_shape_have_another_digest(apart: bool) -> None:
    """One after the other, and asked one by one."""
    load = DecodedImages()
    pictures = [Image.new("RGB", size, "red") for size in ((2, 8), (8, 2), (4, 4), (16, 1), (2, 8))]
    found = [(DecodedImages() if apart else load).digest(picture) for picture in pictures]
    assert len(set(found)) == 4 and found[0] == found[-1]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PNG"])
def test_formats(kind: str) -> None:
    assert load_image(encoded(random_image(random.Random(2)), kind)).mode == "RGB"


def test_the_first_frame_of_an_animation_is_shown() -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert pixels(load_image(data))[0, 0].tolist() == [255, 0, 0]


# --- sizes, through the processor ---


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (31, 33), (1600, 8), (8, 1600), (1024, 1024), (3000, 2000)])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_small_long_and_large_images_get_tokens(name: str, size: tuple[int, int]) -> None:
    renderer = family(name).renderer()
    rendered = renderer.render(ResponseGroup(prompt="p", responses=["a"], images=[Image.new("RGB", size, "red")]))
    tokens = int((rendered.prompt_ids == renderer.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum())
    assert 1 <= tokens <= 256
    assert tokens * 4 == rendered.media["image_grid_thw"].prod(-1).sum() == len(rendered.media["pixel_values"])


@pytest.mark.parametrize("size", [(2000, 8), (8, 2000), (1, 1000)])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_an_image_that_the_processor_refuses_names_the_group(name: str, size: tuple[int, int]) -> None:
    """Qwen's processors take no image more than 200 times as long as it is wide."""
    group = ResponseGroup(prompt="p", responses=["a"], images=[Image.new("RGB", size)], id="strip")
    with pytest.raises(MediaError, match="group 'strip': .*aspect ratio"):
        family(name).renderer().render(group)


# --- what is refused ---


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/four.png", "'/nowhere/four.png' does not exist or is not a file; check the path"),
        (Path("/nowhere/four.png"), "does not exist"),
        ("/", "is not a file"),
        ("", "is not a file"),
        ("a\0b.png", "does not exist"),
        ("iVBORw0KGgo" * 1000, "does not exist"),
        ("http://localhost/four.png", "is a URL and nothing is fetched; download it"),
        ("https://localhost/four.png", "is a URL"),
        (b"", "0 bytes cannot be opened"),
        (b"not an image", "12 bytes cannot be opened.*replace or remove"),
        (None, "an image is NoneType, expected a PIL image, a path or encoded bytes"),
        (4, "an image is int"),
        ({}, "an image is dict"),
        ({"bytes": None, "path": None}, "an image is dict"),
        (np.zeros((4, 4, 3, 1), dtype=np.uint8), "an array of shape"),
        (Image.new("RGB", (0, 3)), "has no pixels"),
    ],
    ids=lambda value: str(value)[:30].replace("\0", "NUL") if isinstance(value, (str, bytes, Path)) else None,
)
def test_not_an_image(source: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_image(source)


def test_messages_hold_no_base64() -> None:
    image = base64.b64encode(encoded(random_image(random.Random(0)))).decode()
    for source in (image, f"data:image/png;base64,{image}!", f"data:image/png,{image}", {"base64": image + "!"}):
        with pytest.raises(MediaError) as error:
            load_image(source)
        assert image[:40] not in str(error.value) and image[-40:-8] not in str(error.value)
        assert len(str(error.value)) < 300


def test_text_with_an_image_name(tmp_path: Path) -> None:
    path = tmp_path / "four.png"
    path.write_text("This is not an image.")
    with pytest.raises(MediaError, match="four.png' cannot be opened"):
        load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_truncated_file(tmp_path: Path, kind: str, share: float) -> None:
    data = encoded(random_image(random.Random(3)), kind)
    cut = data[: int(len(data) * share)]
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(cut)
    for source in (cut, path):
        with warnings.catch_warnings(), pytest.raises(MediaError, match="cannot be (opened|read)"):
            warnings.simplefilter("ignore", UserWarning)  # Pillow warns of TIFF tags that it then refuses
            load_image(source)


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MediaError, match="cannot be opened .*decompression bomb"):
        load_image(data)


def test_text_chunk_bomb() -> None:
    """A few kilobytes of PNG text that unpack to many megabytes: Pillow's own limit, as our error."""
    info = PngInfo()
    info.add_text("bomb", "x" * 3_000_000, zip=True)
    with pytest.raises(MediaError, match="cannot be opened .*too large"):
        load_image(encoded(Image.new("L", (4, 4)), pnginfo=info))


@settings(max_examples=400, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO"]))
def test_damaged_files_give_an_image_or_a_media_error(data: st.DataObject, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
    content = bytearray(encoded(Image.new("RGB", (16, 16), "red"), kind, **options))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata and large sizes
        try:
            assert load_image(bytes(content)).mode == "RGB"
        except MediaError:
            pass
