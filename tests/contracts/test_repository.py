"""What holds for the repository as a whole: file length, names, imports, and what no file may contain."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import mr_reward

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "mr_reward").rglob("*.py"))
SOURCES = LIBRARY + sorted((ROOT / "grpo_recipes").rglob("*.py"))
MAX_LINES = 500
MAX_IMPORT_SECONDS = 2.0
COLLECTIVES = "mr_reward/grpo/exchange.py"
MAX_ROOT_MODULES = 8
# mr_reward.groups has the records, mr_reward.grpo.groups makes them of rollouts. No other two share a name.
SHARED_NAMES = {"groups"}
# Built from parts, so that no line of this file is itself such a path.
MACHINE_ROOTS = ("root", "home", "Users", "work", "workspace", "mnt", "scratch")
MACHINE_PATH = re.compile(r"(?:file:/|(?<![\w.~/\-]))/+(?:" + "|".join(MACHINE_ROOTS) + r")/|(?<!\w)[A-Z]:\\+Users\\")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))


def imported_names(node: ast.AST) -> list[str]:
    """The modules an import statement may load: `from a import b` names both `a` and `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def dotted_name(node: ast.AST) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def uses_collectives(node: ast.AST) -> bool:
    """Whether a node imports `torch.distributed` or reaches it as an attribute of torch."""
    names = [*imported_names(node), dotted_name(node)]
    return any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in names)


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Whether a handler is bare or names Exception or BaseException, alone or in a tuple."""
    if handler.type is None:
        return True
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(dotted_name(name).split(".")[-1] in {"Exception", "BaseException"} for name in types)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def tracked_files() -> list[Path]:
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("git is not installed, so no file is known to be tracked")
    if listing.returncode != 0:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    paths = (ROOT / name for name in listing.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_import_is_light() -> None:
    """A bare import loads no framework; fastest of three, since the machine may be busy."""
    code = (
        "import json, sys, time; start = time.perf_counter(); import mr_reward; "
        "print(json.dumps([time.perf_counter() - start, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    seconds = []
    for _ in range(3):
        result = run_python(code)
        assert result.returncode == 0, result.stderr
        elapsed, loaded = json.loads(result.stdout)
        heavy = {"accelerate", "datasets", "deepspeed", "peft", "torch", "transformers", "trl", "vllm"}
        assert not heavy.intersection(loaded)
        seconds.append(elapsed)
        if elapsed < MAX_IMPORT_SECONDS:
            break
    assert min(seconds) < MAX_IMPORT_SECONDS


def test_version_is_the_same_everywhere() -> None:
    """It is written down in `mr_reward/__init__.py`; the changelog names it, everything else takes it from there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    assert importlib.metadata.version("mr-reward") == mr_reward.__version__
    assert f"\n## {mr_reward.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_is_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines: a file of this length is usually two concepts"


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_library_file_keeps_the_rules(path: Path) -> None:
    """One file calls collectives, the library logs instead of printing, no handler swallows what it does not know."""
    broken = []
    for node in nodes(path):
        line = getattr(node, "lineno", 0)
        if uses_collectives(node) and relative(path) != COLLECTIVES:
            broken.append(f"line {line}: torch.distributed belongs into {COLLECTIVES}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            broken.append(f"line {line}: log instead of printing")
        if isinstance(node, ast.ExceptHandler) and is_broad(node):
            broken.append(f"line {line}: name the exceptions that are expected here")
    assert not broken


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed",
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_gather",
        "from torch.distributed.nn import functional",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_collectives_are_recognised(code: str) -> None:
    assert any(uses_collectives(node) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize(
    ("clause", "broad"),
    [
        ("except:", True),
        ("except Exception:", True),
        ("except (ValueError, BaseException) as error:", True),
        ("except builtins.Exception:", True),
        ("except (ValueError, OSError):", False),
    ],
)
def test_broad_handlers_are_recognised(clause: str, broad: bool) -> None:
    handlers = [
        node
        for node in ast.walk(ast.parse(f"try:\n    ...\n{clause}\n    ..."))
        if isinstance(node, ast.ExceptHandler)
    ]
    assert [is_broad(handler) for handler in handlers] == [broad]


def test_import_contracts_are_kept() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = run_python(code)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_linter_knows_every_folder() -> None:
    """Each folder and module of the root has its floor, and no floor is for what is not there."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (floors,) = (contract for contract in contracts if contract["type"] == "layers")
    assert floors["exhaustive"] is True
    listed = [name.strip() for floor in floors["layers"] for name in floor.split("|")]
    package = ROOT / "mr_reward"  # the path: a clone's own folder may have this name too
    there = {path.parent.name for path in LIBRARY if path.name == "__init__.py" and path.parents[1] == package}
    there |= {path.stem for path in LIBRARY if path.parent == package and path.stem != "__init__"}
    assert sorted(listed) == sorted(there)


def test_few_modules_lie_in_the_root() -> None:
    there = [path.name for path in LIBRARY if path.parent == ROOT / "mr_reward"]
    assert len(there) <= MAX_ROOT_MODULES, there


def module_names() -> Iterator[str]:
    """Names of folders and modules; the main module of a folder may have its name, a command that of what it calls."""
    for path in LIBRARY:
        if path.name == "__init__.py":
            yield path.parent.name
        elif path.parent.name not in ("cli", path.stem):
            yield path.stem


def test_no_two_modules_have_one_name() -> None:
    twice = {name for name, count in Counter(module_names()).items() if count > 1}
    assert twice <= SHARED_NAMES, twice - SHARED_NAMES


def test_no_two_classes_have_one_name() -> None:
    names = Counter(node.name for path in LIBRARY for node in nodes(path) if isinstance(node, ast.ClassDef))
    assert not {name for name, count in names.items() if count > 1}


def test_licence_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{relative(path)}:{number}: {line.strip()[:120]}")
    assert not found


@pytest.mark.parametrize("name", MACHINE_ROOTS)
def test_machine_paths_are_recognised(name: str) -> None:
    path = "/".join(["", name, "someone", "model"])
    for text in (path, f'folder = "{path}"', f"--folder={path}", f"file://{path}"):
        assert MACHINE_PATH.search(text), text
    for text in (f"https://example.org{path}", f"./outputs{path}", f"~{path}"):
        assert not MACHINE_PATH.search(text), text


@pytest.mark.skipif(os.name == "nt", reason="needs an executable bit")
def test_ci_script_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
