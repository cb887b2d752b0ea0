"""The public names, in one list, and their docstrings: full ones for what a folder exports, one line for the rest."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import mr_reward

ROOT = Path(__file__).resolve().parents[2]
# Folder below mr_reward ("" is the root) -> what its `__init__` exports. A change here is a change of the public API.
PUBLIC_NAMES: dict[str, list[str]] = {
    "": [
        "GroupScorer",
        "MultiResponseReward",
        "MultiResponseRewardConfig",
        "MultiResponseRewardModel",
        "ResponseGroup",
    ],
    "attention": [],
    "backbones": ["ADAPTERS", "BackboneAdapter", "get_adapter"],
    "checkpoint": ["outside_zero3", "weights_digest", "write_model_card"],
    "cli": ["main"],
    "data": ["ScoredGroup", "load_preferences", "read_scored", "save_preferences", "write_scored"],
    "doctor": ["Finding", "check_before_start", "examine_machine", "examine_recipe"],
    "evaluation": [
        "attack_items",
        "evaluate_benchmark",
        "evaluate_groups",
        "load_scorer",
        "run_attacks",
    ],
    "grpo": ["GroupLog", "MultiResponseReward", "Truth"],
    "integrations": ["compute_score", "compute_score_single", "register"],
    "messages": [],
    "model": ["GroupScorer", "MultiResponseRewardConfig", "MultiResponseRewardModel"],
    "mr2bench": ["build_benchmark", "write_benchmark"],
    "runs": [
        "EMACallback",
        "JudgeGuard",
        "PolicyValidation",
        "RefreshCallback",
        "RunFigure",
        "ShownGroups",
        "WarningSigns",
    ],
    "scorers": ["OffloadedScorer", "RemoteScorer", "open_scorer"],
    "serving": ["ServerLimits", "build_app", "serve"],
    "templates": ["load_image"],
    "training": ["RewardTrainer", "RewardTrainingArguments"],
    "viewer": [],
    "worlds": [],
}
SECTION = re.compile(r"^\s*(Args|Returns|Raises|Yields):$", re.MULTILINE)
# Functions and classes that no folder exports and that have sections all the same. It only goes down.
MOST_INNER_SECTIONS = 2
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT / "mr_reward").parts) for path in (ROOT / "mr_reward").rglob("__init__.py")
)


def exported(folder: str) -> dict[str, Any]:
    """Exported name -> object."""
    package = importlib.import_module(f"mr_reward.{folder}".rstrip("."))
    return {name: getattr(package, name) for name in getattr(package, "__all__", [])}


EXPORTED = [
    pytest.param(value, id=f"{folder}.{name}".lstrip("."))
    for folder in PACKAGES
    for name, value in exported(folder).items()
    # What a constant is stands beside it in the source; `cli` exports the program.
    if folder != "cli" and (inspect.isclass(value) or inspect.isfunction(value))
]


@pytest.mark.parametrize("folder", PACKAGES)
def test_dir_lists_the_public_names(folder: str) -> None:
    """In a process that has asked for none of them: that is what completion in a notebook looks at."""
    package = importlib.import_module(f"mr_reward.{folder}".rstrip("."))
    assert set(PUBLIC_NAMES[folder]) <= set(dir(package))


def test_dir_needs_nothing_loaded() -> None:
    code = (
        "import sys, mr_reward; assert {*mr_reward.__all__, 'errors'} <= {*dir(mr_reward)}; "
        "assert not {'lazy_exports', 'TYPE_CHECKING'} & {*dir(mr_reward)}; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_are_the_promised_ones() -> None:
    assert {folder: sorted(exported(folder)) for folder in PACKAGES} == {
        folder: sorted(names) for folder, names in PUBLIC_NAMES.items()
    }


@pytest.mark.parametrize("name", PUBLIC_NAMES[""])
def test_public_name_resolves(name: str) -> None:
    resolved = getattr(mr_reward, name)
    assert resolved.__name__ == name
    home = importlib.import_module(resolved.__module__)
    assert getattr(home, name) is resolved


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mr_reward.no_such_name


def raises(function: FunctionType) -> bool:
    """Whether a function raises by itself, outside of the functions in it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    inner = [node for node in ast.walk(tree.body[0]) if isinstance(node, ast.FunctionDef | ast.Lambda)][1:]
    hidden = {id(node) for one in inner for node in ast.walk(one)}
    return any(isinstance(node, ast.Raise) and node.exc and id(node) not in hidden for node in ast.walk(tree))


def missing_sections(value: Any) -> list[str]:
    """The sections that a docstring lacks, by signature and body."""
    text = inspect.getdoc(value) or ""
    needed = ["Example"]
    if inspect.isclass(value):
        if issubclass(value, BaseException) or getattr(value, "_is_protocol", False):
            needed = []  # its methods say what they take
        elif set(inspect.signature(value).parameters) - {"args", "kwargs"}:
            needed.append("Args")
    else:
        signature = inspect.signature(value)
        needed += ["Args"] * bool(signature.parameters)
        needed += ["Returns"] * (signature.return_annotation not in (None, "None", typing.NoReturn, "NoReturn"))
        needed += ["Raises"] * raises(value)
    return [name for name in needed if f"\n{name}:\n" not in text.replace("\nYields:", "\nReturns:")]


@pytest.mark.parametrize("value", EXPORTED)
def test_an_exported_name_has_a_full_docstring(value: Any) -> None:
    assert inspect.getdoc(value)
    assert not missing_sections(value)


@pytest.mark.parametrize("value", EXPORTED)
def test_the_example_of_an_exported_name_runs(value: Any) -> None:
    """What needs files or a server says `+SKIP`."""
    names = {**vars(importlib.import_module(value.__module__)), "ResponseGroup": mr_reward.ResponseGroup}
    for example in doctest.DocTestFinder(recurse=False).find(value, value.__name__, globs=names):
        assert not doctest.DocTestRunner(verbose=False).run(example).failed


def inner_names_with_sections() -> list[str]:
    """Functions and classes that no folder exports, nor a class that one exports, whose docstrings have sections."""
    public = {
        (one.__module__, one.__qualname__)
        for param in EXPORTED
        for one in getattr(param.values[0], "__mro__", [param.values[0]])  # inherited methods are exported too
    }
    found = []

    def look(node: ast.AST, module: str, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{outer}.{child.name}".lstrip(".")
                if (module, name) in public:
                    continue  # with its methods
                if SECTION.search(ast.get_docstring(child) or ""):
                    found.append(f"{module}.{name}")
                look(child, module, name)
            else:
                look(child, module, outer)

    for path in sorted((ROOT / "mr_reward").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        look(ast.parse(path.read_text(encoding="utf-8")), module, "")
    return found


def test_inner_names_have_one_line() -> None:
    found = inner_names_with_sections()
    assert len(found) <= MOST_INNER_SECTIONS, found


def test_the_count_of_inner_sections_sees_functions_in_functions_and_methods() -> None:
    names = inner_names_with_sections()
    assert "mr_reward.model.model.MultiResponseRewardModel.from_pretrained" not in names
    assert SECTION.search("One.\n\n    Args:\n        x: y.")
    assert not SECTION.search("Args: are none")


def test_the_reference_shows_every_folder_once() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^::: mr_reward\.?(\S*)$", pages, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {folder for folder in PACKAGES if folder != "cli"} <= set(shown)
