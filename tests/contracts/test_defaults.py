"""Defaults are promises: who leaves an option out gets tomorrow what it was today.

`defaults.json` has them; a new option may be missing there, one that is there may not change without a line in
CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import typer

import mr_reward
from mr_reward.cli.app import app
from mr_reward.runs.recipe import PolicyArguments
from mr_reward.worlds.world_policy import WorldPolicyArguments

GOLDEN = Path(__file__).with_name("defaults.json")


def commands(command: Any, path: str = "mr-reward") -> Iterator[tuple[str, Any]]:
    """The functions behind the commands, with the words that call them."""
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")
    else:
        yield path, inspect.unwrap(command.callback)


def own_defaults(value: Any) -> dict[str, str]:
    """Parameter -> default; of a data class those of its own fields."""
    if is_dataclass(value):
        own = [field for field in fields(value) if field.init and field.name in vars(value).get("__annotations__", {})]
        plain = {field.name: field.default for field in own if field.default is not MISSING}
        made = {field.name: field.default_factory() for field in own if field.default_factory is not MISSING}
        return {name: repr(default) for name, default in {**plain, **made}.items()}
    parameters = inspect.signature(value).parameters.values()
    return {one.name: repr(one.default) for one in parameters if one.default is not inspect.Parameter.empty}


def current() -> dict[str, dict[str, str]]:
    folders = [one.name for one in pkgutil.iter_modules(mr_reward.__path__) if one.ispkg and one.name != "cli"]
    packages = [mr_reward, *(importlib.import_module(f"mr_reward.{folder}") for folder in folders)]
    found = {
        f"{package.__name__}.{name}": getattr(package, name)
        for package in packages
        for name in getattr(package, "__all__", ())
        if callable(getattr(package, name))
    }
    for name, value in list(found.items()):
        methods = inspect.getmembers(value, lambda one: inspect.ismethod(one) or inspect.isfunction(one))
        own = [
            (key, one) for key, one in methods if not key.startswith("_") and one.__module__.startswith("mr_reward")
        ]
        found |= {f"{name}.{key}": one for key, one in own if inspect.isclass(value)}
    found |= {kind.__name__: kind for kind in (PolicyArguments, WorldPolicyArguments)}
    found |= dict(commands(typer.main.get_command(app)))
    return {name: defaults for name, value in sorted(found.items()) if (defaults := own_defaults(value))}


def test_no_default_has_changed() -> None:
    now = current()
    changed = {
        f"{name}({parameter}=...)": (before, now.get(name, {}).get(parameter))
        for name, parameters in json.loads(GOLDEN.read_text()).items()
        for parameter, before in parameters.items()
        if now.get(name, {}).get(parameter) != before
    }
    assert not changed
