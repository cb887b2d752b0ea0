"""What a folder exports, loaded on first use: `import mr_reward` and its folders load no framework."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from mr_reward.errors import ConfigurationError
from mr_reward.moved import moved_name

# Packages that come with an extra of the wheel -> the extra.
_EXTRAS = {"matplotlib": "eval"} | dict.fromkeys(("fastapi", "httpx2", "pydantic", "starlette", "uvicorn"), "serve")


def lazy_exports(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a folder's `__init__`; `names`: module below it -> what that gives to the folder.

    Where a package of an extra is missing the error names the extra.
    """
    homes = {name: module for module, own in names.items() for name in own}

    def load(name: str) -> Any:
        if name not in homes:
            return moved_name(package, name)
        try:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            raise ConfigurationError(
                f"the package {error.name} is not installed, which {package} needs for {name}; "
                f"pip install 'mr-reward[{extra}]'"
            ) from error

    def names_of_all() -> list[str]:
        found = vars(sys.modules[package])
        parts = (name for name in found if name.startswith("__") or f"{package}.{name}" in sys.modules)
        return sorted({*found.get("__all__", homes), *parts})

    return load, names_of_all
