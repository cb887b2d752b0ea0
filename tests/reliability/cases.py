"""Run the twenty failure cases of tests/README.md, slow ones included, and show what became of each.

python tests/reliability/cases.py          # all
python tests/reliability/cases.py 3 15     # those
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).parents[1]


def read_cases(text: str) -> dict[int, tuple[str, list[str]]]:
    """The rows of the table.

    Args:
        text: of tests/README.md.

    Returns:
        Number to what the case is and its tests, `file.py::test_name` or `file.py::TestClass::test_name`.
    """
    rows = re.findall(r"^\| (\d+) \| (.*?) \| .*? \| (.*) \|$", text, re.MULTILINE)
    return {int(number): (what, re.findall(r"`([\w/]+\.py::[\w:]+)`", tests)) for number, what, tests in rows}


def main(arguments: list[str]) -> int:
    """The command line; 1 if a test of a case failed or none of it ran."""
    cases = read_cases((TESTS / "README.md").read_text())
    chosen = {number: cases[number] for number in map(int, arguments or cases)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        nodes = sorted({f"tests/{test}" for _, tests in chosen.values() for test in tests})
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *nodes]
        subprocess.run(command, cwd=TESTS.parent)
        outcomes: dict[str, Counter[str]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            outcome = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
            module, _, cls = re.sub(r"^.*\.(?=test_)", "", case.get("classname", "")).partition(".")
            name = "::".join(filter(None, [module, cls, case.get("name", "").split("[")[0]]))
            outcomes.setdefault(name, Counter())[outcome] += 1
    table, bad = Table("", "case", "passed", "skipped", "failed"), 0
    for number, (what, tests) in chosen.items():
        found = Counter[str]()
        for test in tests:
            file, _, function = test.partition("::")
            found += outcomes.get(f"{Path(file).stem}::{function}", Counter())
        failed = found["failure"] + found["error"]
        bad += failed > 0 or not found["passed"]
        table.add_row(str(number), what, str(found["passed"]), str(found["skipped"]), str(failed))
    Console().print(table)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
