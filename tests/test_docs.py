"""The documentation: its blocks are run, its links lead somewhere, its messages are in the source, its site builds."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import random
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import typer
import yaml
from tiny_models import random_image, reward_model
from trl import GRPOConfig, ModelConfig
from typer.testing import CliRunner

from mr_reward.cli.app import app
from mr_reward.training.trainer import RewardTrainingArguments
from mr_reward.worlds import tiny
from mr_reward.worlds.handwriting import make_policy_rows, make_tasks
from mr_reward.worlds.world_policy import WorldCollectArguments, WorldPolicyArguments
from mr_reward.worlds.world_pretraining import WorldRewardArguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
REASONS = ("needs a hub", "needs vLLM", "needs a running server", "needs verl", "needs ms-swift")
MOST_NOT_EXECUTED = 7
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "grpo_recipes")]


class Block(NamedTuple):
    page: Path
    language: str
    reason: str | None
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.code.strip().splitlines()[0][:40]}"


def blocks() -> Iterator[Block]:
    pattern = re.compile(r"(?:<!-- not executed: ([^>]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    for page in PAGES:
        for reason, language, code in pattern.findall(page.read_text()):
            yield Block(page, language, reason or None, code)


BLOCKS = list(blocks())


def of(*languages: str) -> list[Any]:
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.language in languages]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages talk about, where they say it is."""
    place = tmp_path_factory.mktemp("docs")
    model = reward_model("qwen3_vl", "set")
    for name in ("rm", "outputs/rm", "outputs/quickstart/rm"):
        model.save_pretrained(place / name)
    for name in ("policy", "outputs/quickstart/sft"):
        tiny.build_qwen3_vl(0, hidden_size=64, num_layers=2).save_pretrained(place / name)
        tiny.build_qwen3_vl_processor().save_pretrained(place / name)
    random_image(random.Random(0)).save(place / "digits.png")
    group = {"id": "7", "prompt": "Number?", "images": ["digits.png"], "responses": ["47", "It is 47.", "74"]}
    for name in ("groups", "train", "val"):
        (place / f"{name}.jsonl").write_text(json.dumps({**group, "rankings": [1, 2, 3]}) + "\n")
    (place / "metrics.json").write_text("{}")
    return place


def test_few_blocks_are_not_executed() -> None:
    left_out = [block for block in BLOCKS if block.reason is not None]
    assert all(block.reason in REASONS for block in left_out)
    assert len(left_out) <= MOST_NOT_EXECUTED, [block.name for block in left_out]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top to bottom in one namespace; trainings for one step."""
    monkeypatch.chdir(place)
    prompts = datasets.Dataset.from_list(make_policy_rows(make_tasks("train", 8, num_digits=2)))
    namespace: dict[str, Any] = {"dataset": prompts, "prompts": prompts}
    for block in BLOCKS:
        if block.page != page or block.language != "python" or block.reason is not None:
            continue
        short = 'Config("out", max_steps=1, use_cpu=True, bf16=False, report_to="none", max_completion_length=4, '
        short += "gradient_checkpointing=False, disable_tqdm=True, "
        exec(compile(block.code.replace('Config("out", ', short), block.name, "exec"), namespace)


@pytest.mark.parametrize("block", of("json"))
def test_json_blocks_are_json(block: Block) -> None:
    try:
        assert json.loads(block.code)
    except ValueError:  # or lines of JSON
        assert all(json.loads(line) for line in block.code.splitlines())


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_blocks_name_fields(block: Block) -> None:
    keys = yaml.safe_load(block.code)
    if block.page.name == "other-trainers.md":  # those trainers' own
        assert set(keys) == {"reward"}
        return
    fields = {
        field.name for kind in (WorldPolicyArguments, GRPOConfig, ModelConfig) for field in dataclasses.fields(kind)
    }
    assert set(keys) <= fields


def commands() -> Iterator[tuple[str, str]]:
    for block in BLOCKS:
        if block.language == "bash":
            lines = re.sub(r"\\\n\s*", " ", block.code)
            for line in lines.splitlines():
                line = line.partition(" #")[0].strip()
                if line and not line.startswith("#"):
                    yield block.page.name, line


FIELDS = {
    "train_policy.py": (WorldPolicyArguments, GRPOConfig, ModelConfig),
    "collect.py": (WorldCollectArguments,),
    "pretrain_rm.py": (WorldRewardArguments, RewardTrainingArguments, ModelConfig),
}
OTHERS = ("pip ", "export ", "curl ", "trl ", '"messages"', "pytest ", "git ", ".ci/run")


@pytest.mark.parametrize(("page", "line"), list(commands()), ids=lambda value: value[:60])
def test_commands_are_understood(page: str, line: str, place: Path) -> None:
    """Options exist, files of the repository exist, `make` has the target."""
    if line.startswith(OTHERS):
        return
    if line.startswith("make"):
        assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    for part in re.split(r"[|&]", line):
        words = shlex.split(part)
        for word in words:
            if word.startswith(("grpo_recipes/", "configs/", "benchmarks/", "tests/")):
                assert (ROOT / word).exists(), word
        if "mr-reward" in words:
            check_command(words[words.index("mr-reward") + 1 :])
        for script, kinds in FIELDS.items():
            if f"grpo_recipes/{script}" in words:
                recipe = module_fields(script) | {field.name for kind in kinds for field in dataclasses.fields(kind)}
                given = words[words.index(f"grpo_recipes/{script}") + 1 :]
                names = {word[2:] for word in given if word.startswith("--")} - {"config", "dry_run"}
                assert names <= recipe, names - recipe


def module_fields(script: str) -> set[str]:
    """Fields of the dataclasses that a recipe defines itself."""
    tree = ast.parse((ROOT / "grpo_recipes" / script).read_text())
    return {
        node.target.id
        for kind in ast.walk(tree)
        if isinstance(kind, ast.ClassDef)
        for node in kind.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def check_command(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("mr-reward", words)


def test_commands_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that take seconds, in the order of their pages."""
    monkeypatch.chdir(place)
    ran = 0
    for page, line in commands():
        if page in ("score.md", "inspect.md", "checkpoints.md", "README.md") and line.startswith("mr-reward"):
            words = shlex.split(line)
            if words[1] in ("score", "card") or (words[1] == "inspect" and "quickstart" not in line):
                result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
                assert result.exit_code == 0, (line, result.output)
                ran += 1
    assert ran >= 6


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./#%~+-]*)?", target), target
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_relative_to(ROOT) and path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_files_named_as_proof_exist() -> None:
    text = (ROOT / "docs" / "how-the-tests-prove-it.md").read_text()
    names = re.findall(r"`(tests/[\w/.]+)`", text)
    assert len(names) > 25
    for name in names:
        assert (ROOT / name).is_file(), name


def literals() -> str:
    """All strings of the package, one after the other; what varies in them is `…`."""
    found = []
    for path in sorted((ROOT / "mr_reward").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_failure_messages_are_those_of_the_code() -> None:
    messages = re.findall(r"^\| `(.+?)` \| ", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
    assert len(messages) >= 30
    source = literals()
    for message in messages:
        pattern = r".{0,200}?".join(re.escape(part.strip()) for part in message.split("…"))
        assert re.search(pattern, source), message


def test_tables_are_drawn_from_the_results() -> None:
    """`python benchmarks/draw_results.py` changes nothing; a number that was typed in would be changed."""
    from draw_results import drawn

    pages = [page for page in sorted((ROOT / "docs").glob("*.md")) if "<!-- table: " in page.read_text()]
    assert pages
    for page in pages:
        assert drawn(page.read_text()) == page.read_text(), page.name


def test_readme_has_the_numbers_of_the_quickstart() -> None:
    from draw_results import quickstart

    readme = (ROOT / "README.md").read_text()
    rows = {row[0]: row[-1] for row in quickstart("0-2")}
    shown = [
        value for label, value in rows.items() if "best of 4" in label or "right" in label and "backbone" not in label
    ]
    assert len(shown) == 5 and all(value in readme for value in shown), shown


def test_drawings_are_made_by_the_code() -> None:
    from layout_figures import draw

    for layout in ("causal", "isolated", "set"):
        assert (ROOT / "docs" / "figures" / f"layout_{layout}.svg").read_text() == draw(layout), layout


class Assets(HTMLParser):
    """What a page loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.loaded.append(values.get("src") or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(values.get("href") or "")


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra docs: make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for asset in Assets(page.read_text()).loaded:
            assert not asset.startswith(("http", "//")), (page, asset)
    assert typing.cast(str, (tmp_path / "api" / "public.html").read_text()).count("MultiResponseReward") > 10
