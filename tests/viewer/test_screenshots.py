"""The pages in a real browser: they look like something, nothing hostile runs, filters work.

The pictures go to the folder MR_REWARD_ARTEFACTS if it is set. Where MR_REWARD_NEEDS_CHROMIUM is 1, a missing browser
is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from pages import every_kind
from PIL import Image
from tiny_models import reward_model

from mr_reward.templates.rendering import Renderer
from mr_reward.viewer.page import render_page
from mr_reward.viewer.views import Lengths, make_view

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = os.environ.get("MR_REWARD_NEEDS_CHROMIUM") == "1"
pytestmark = pytest.mark.skipif(
    BROWSER is None and not NEEDED, reason="no chromium, chromium-browser or google-chrome"
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]


def browse(tmp_path: Path, *arguments: str) -> str:
    assert BROWSER is not None, "MR_REWARD_NEEDS_CHROMIUM is 1 and there is no browser"
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def write(name: str, folder: Path) -> Path:
    model = reward_model("qwen3_vl", "set")
    renderer = Renderer(model.processor, model.config.template, adapter=model.adapter)
    views = [make_view(one, None, Lengths.of(one, renderer, "set")) for one in every_kind()[name]]
    path = folder / f"{name}.html"
    path.write_text(render_page(views, name.replace("_", " ")), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [*every_kind(), "step dark"])
def test_screenshots(name: str, tmp_path: Path) -> None:
    name, _, dark = name.partition(" ")
    page = write(name, tmp_path)
    folder = Path(os.environ.get("MR_REWARD_ARTEFACTS") or tmp_path)
    picture = folder / f"{name}{'_dark' if dark else ''}.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(tmp_path, *scheme, f"--screenshot={picture}", "--window-size=1280,1000", page.as_uri())
    with Image.open(picture) as image:
        assert image.size == (1280, 1000)
        colours = image.convert("RGB").getcolors(1 << 22) or []
    assert len(colours) > 50, "a blank page"
    background = max(colours)[1]
    assert (sum(background) < 200) == bool(dark)  # type: ignore[arg-type]


def test_nothing_hostile_runs(tmp_path: Path) -> None:
    page = write("hostile", tmp_path)
    found = browse(tmp_path, "--dump-dom", page.as_uri())
    assert "<title>hostile</title>" in found
    assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in found
    assert found.count("<script") == 1 and "<h1>owned" not in found and "<img" not in found


def test_a_filter_is_an_address(tmp_path: Path) -> None:
    page = write("step", tmp_path)
    for fragment, shown in (("", 8), ("#zero-spread", 1), ("#dropped", 1), ("#suspicious", 1), ("#truncated", 0)):
        found = browse(tmp_path, "--dump-dom", page.as_uri() + fragment)
        groups = [tag for tag in found.split("<details")[1:] if 'class="group"' in tag.partition(">")[0]]
        visible = [tag for tag in groups if "hidden" not in tag.partition(">")[0]]
        assert (len(groups), len(visible)) == (8, shown), fragment
