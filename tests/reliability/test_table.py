"""The tables of tests/README.md name tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from cases import read_cases

TESTS = Path(__file__).parents[1]
TEXT = (TESTS / "README.md").read_text()


def test_every_test_in_the_tables_exists() -> None:
    named = [match.groups() for match in re.finditer(r"`([\w/]+\.py)(?:::([\w:]*))?`", TEXT)]
    assert len(named) > 50
    for file, function in named:
        tree = ast.parse((TESTS / file).read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        found |= {
            f"{cls.name}::{node.name}" for cls in classes for node in cls.body if isinstance(node, ast.FunctionDef)
        }
        assert function is None or function in found, f"{file}::{function}"


def test_all_twenty_cases_are_there() -> None:
    cases = read_cases(TEXT)
    assert list(cases) == list(range(1, 21))
    assert all(what and tests for what, tests in cases.values())
