"""Where modules and names have gone: the old places work for one version more, and say once where the new one is.

Every import of this kind that README, the documentation or the recipes of 0.1.0 showed is in `MOVED`, and the modules
that the pickles of its trainers name (`training_args.bin`).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pkgutil import resolve_name
from types import MappingProxyType, ModuleType
from typing import Any

# Old -> new, both below `mr_reward`: a module, or (with a colon) one name that went elsewhere than its module did.
MOVED = MappingProxyType(
    {
        "attention:BACKENDS": "attention.backends:BACKENDS",
        "attention:attention_mask": "attention.backends:attention_mask",
        "attention:check_backend": "attention.backends:check_backend",
        "checkpoint:export_paper_format": "model.export:export_paper_format",
        "checkpoint:merge": "model.export:merge",
        "configuration": "model.configuration",
        "data.handwriting": "worlds.handwriting",
        "data.preferences": "data.groups_file",
        "data.scored": "data.groups_file",
        "data.tiny": "worlds.tiny",
        "evaluation.figures": "evaluation.plots",
        "evaluation.handwriting": "worlds.world_policy",
        "evaluation.ranking": "evaluation.evaluator",
        "evaluation.ranking:evaluate_ranking": "evaluation.evaluator:evaluate_groups",
        "evaluation.run": "evaluation.evaluator",
        "evaluation.scorers": "evaluation.judges",
        "grpo.arguments": "runs.recipe",
        "grpo.doctor": "doctor.examine",
        "grpo.findings": "doctor.findings",
        "grpo.group_log": "grpo.telemetry",
        "grpo.recipe": "runs.recipe",
        "grpo.resume": "runs.resume",
        "grpo.run_figure": "runs.callbacks",
        "grpo.validation": "runs.callbacks",
        "grpo.vllm_cpu": "runs.vllm",
        "grpo.vllm_images": "runs.vllm",
        "grpo.vllm_server": "runs.vllm",
        "grpo.warning_signs": "runs.callbacks",
        "losses": "training.losses",
        "model_card": "checkpoint.card",
        "modeling": "model.model",
        "modeling:MultiResponseRewardConfig": "model.configuration:MultiResponseRewardConfig",
        "scoring": "model.scorer",
        "scoring:GroupScores": "groups:GroupScores",
        "scoring:Scorer": "groups:Scorer",
        "serving.client": "scorers.remote",
        "training.arguments": "training.trainer",
        "zero3": "checkpoint.zero3",
    }
)

_ROOT = "mr_reward."


def _warn(old: str, stacklevel: int) -> None:
    message = f"{_ROOT}{old} is {_ROOT}{MOVED[old]} now; the old place goes with the next version".replace(":", ".")
    warnings.warn(message, FutureWarning, stacklevel=stacklevel + 1)


def moved_name(package: str, name: str) -> Any:
    """A name of the table that a folder no longer has, from its new place; the folder has it from then on.

    Raises AttributeError where the table does not know it.
    """
    old = f"{package}:{name}".removeprefix(_ROOT)
    if old not in MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    _warn(old, stacklevel=3)
    value = resolve_name(_ROOT + MOVED[old])
    setattr(sys.modules[package], name, value)
    return value


class _OldModule(ModuleType):
    """Hands on what it is asked for. Not the new module itself: importing would write the old place into that."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # those who walk through all modules load nothing by it
            raise AttributeError(name)
        old = self.__name__.removeprefix(_ROOT)
        return resolve_name(_ROOT + MOVED.get(f"{old}:{name}", f"{MOVED[old]}:{name}"))


class Finder(MetaPathFinder, Loader):
    """Asked by Python's import when nobody else knows a module."""

    @classmethod
    def install(cls) -> None:
        """Append one to those that Python asks, unless there is one."""
        if not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.append(cls())

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for a module of the table."""
        known = fullname.startswith(_ROOT) and fullname.removeprefix(_ROOT) in MOVED
        return ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that hands on what it is asked for."""
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Warn, in the name of the line that imports."""
        _warn(module.__name__.removeprefix(_ROOT), stacklevel=2)
