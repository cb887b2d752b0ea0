"""The deliberate bugs are still bugs of this code: each has one place, and what comes out is Python."""

import ast
import re
import shlex

import pytest
from mutation_check import ROOT, pieces, with_bug
from mutations import MUTATIONS, Mutation


def test_no_two_have_one_name() -> None:
    assert len(MUTATIONS) == len({one.name for one in MUTATIONS}) >= 80


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_a_deliberate_bug_has_its_place(mutation: Mutation) -> None:
    path, changed = with_bug(mutation)
    assert changed != (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_the_tests_of_a_deliberate_bug_are_there(mutation: Mutation) -> None:
    """Files and, behind -k, words of names of tests in them."""
    files = [part for part in shlex.split(mutation.tests) if part.startswith("tests/")]
    *_, words = shlex.split(mutation.tests) if " -k " in mutation.tests else ("",)
    sources = [ROOT / file.split("::")[0] for file in files]
    assert files and all(source.exists() for source in sources)
    text = "".join(source.read_text(encoding="utf-8") for source in sources if source.is_file())
    assert all(re.search(rf"def test_\w*{word.removeprefix('test_')}", text) for word in words.split(" or ") if word)


def test_places_are_found_by_syntax() -> None:
    tree = ast.parse("f(a, key='x')\nfor i in b:\n    f(  a,\n      key=\"x\")  # twice\nc = {'key': 2}")
    assert len(pieces(tree, "f(a, key='x')")) == 2
    assert [node.lineno for node in pieces(tree, "key=2")] == [5]
    assert not pieces(tree, "f(a)")
