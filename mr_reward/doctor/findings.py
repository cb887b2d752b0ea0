"""What a check found, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Args:
        level: green is fine, yellow could not be checked or costs something, red would fail.
        what: the part that was looked at.
        text: what was found, and for yellow and red what to do.

    Example:
        >>> Finding("green", "devices", "no GPU; 2 cores").level
        'green'
    """

    level: Literal["green", "yellow", "red"]
    what: str
    text: str


def may_start(findings: Sequence[Finding]) -> bool:
    """Whether nothing is red."""
    return all(finding.level != "red" for finding in findings)


def show_findings(findings: Sequence[Finding], console: Console, *, title: str) -> None:
    """Print the findings as a table."""
    table = Table("", "what", "found", title=escape(title))
    for finding in findings:
        table.add_row(f"[{finding.level}]●[/] {finding.level}", finding.what, escape(finding.text))
    console.print(table)
