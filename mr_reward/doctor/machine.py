"""Checks of the machine: versions, packages, devices, the output folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement

from mr_reward.doctor.findings import Finding
from mr_reward.training.saving import incomplete_reason, saved_checkpoints

_PACKAGE = "mr-reward"
_MAIN_PACKAGES = (_PACKAGE, "torch", "transformers", "trl", "peft", "accelerate", "datasets")
_EXTRA_PACKAGES = {"deepspeed": "deepspeed", "vllm": "vllm", "matplotlib": "eval", "fastapi": "serve"}
_GB = 1e9
_LITTLE_DISK = 5 * _GB


def check_versions() -> Iterator[Finding]:
    """Compare what is installed with what this package asks for: a line for what it requires, one for the extras."""
    required, extras = [], {}
    for line in importlib.metadata.requires(_PACKAGE) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required.append(requirement)
        else:
            extras[requirement.name] = requirement
    python, wrong = f"Python {platform.python_version()}", _problems(required)
    if wrong:
        yield Finding("red", "versions", f"{python}; {wrong}; install them with pip install -U {_PACKAGE}")
    else:
        yield Finding("green", "versions", f"{python}, {_shown(_MAIN_PACKAGES)}")
    wrong = _problems(extras.get(name, Requirement(name)) for name in _EXTRA_PACKAGES if _version(name) is not None)
    if wrong:
        yield Finding("yellow", "extras", f"{wrong}; other versions have not been tested")
    else:
        yield Finding("green", "extras", _shown(_EXTRA_PACKAGES))


def check_needed(packages: Mapping[str, str], *, here: bool) -> Iterator[Finding]:
    """A line for each module that is missing; `packages` names what needs it, `here` whether the run is to be here."""
    for name, reason in packages.items():
        if find_spec(name) is None:
            extra = _EXTRA_PACKAGES.get(name)
            source = f"{_PACKAGE}[{extra}]" if extra else name
            text = f"{reason} needs {name}, which is not installed; pip install '{source}'"
            yield Finding("red" if here else "yellow", "packages", text)


def check_devices(*, use_cpu: bool | None, bf16: bool, num_local_processes: int = 1) -> Finding:
    """GPUs, cores and memory; `use_cpu` is None without a run.

    Too few GPUs are yellow: the run may be meant for another machine.
    """
    host = f"{os.cpu_count() or 1} cores, {_host_memory() / _GB:.0f} GB of memory"
    if not torch.cuda.is_available():
        if use_cpu is None:
            return Finding("green", "devices", f"no GPU; {host}")
        if use_cpu:
            return Finding("green", "devices", f"the CPU, as the recipe says; {host}")
        return Finding(
            "yellow", "devices", f"no GPU here ({host}); if this is the machine of the run, say use_cpu: true"
        )
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    shown = ", ".join(f"{device.name} {device.total_memory / _GB:.0f} GB" for device in devices)
    if bf16 and not torch.cuda.is_bf16_supported():
        return Finding("red", "devices", f"{shown}: no bfloat16 there; say bf16: false and fp16: true")
    if use_cpu is False and len(devices) < num_local_processes:
        text = f"{shown}: too few for {num_local_processes} processes; lower num_processes if it is to run here"
        return Finding("yellow", "devices", text)
    return Finding("green", "devices", f"{shown}; {host}")


def device_memory(*, use_cpu: bool, num_local_processes: int) -> int | None:
    """Bytes that a process of the run has; None if this is not the machine of the run, or not known.

    Its share of the CPU's memory, or the smallest GPU; all GPUs for a single process: transformers spreads models.
    """
    if use_cpu:
        return _host_memory() // num_local_processes or None
    if not torch.cuda.is_available() or torch.cuda.device_count() < num_local_processes:
        return None
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return sum(sizes) if num_local_processes == 1 else min(sizes)


def check_output_folder(folder: str | Path, *, resume: bool | str, num_processes: int = 1) -> Iterator[Finding]:
    """Whether the folder can be written, what is in it, and how much room there is.

    `resume` is whether the run resumes from the newest checkpoint there, or the folder of the one it resumes from.
    """
    folder, what = Path(folder), "output folder"
    parent = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        yield Finding("red", what, f"{folder} cannot be written ({parent} is no folder that one may write to)")
        return
    tried = [Path(resume)] if isinstance(resume, str) else saved_checkpoints(folder)
    if not tried:
        yield Finding("green", what, f"{folder}: can be written")
    elif not resume:
        text = f"{folder} holds {tried[0].name} of an earlier run, which will be written over; say"
        yield Finding("yellow", what, f"{text} resume_from_checkpoint: true to resume it, or name another folder")
    elif whole := next((path for path in tried if incomplete_reason(path, num_processes) is None), None):
        yield Finding("green", what, f"{whole.parent}: resumes from {whole.name}")
    else:
        problem = f"not whole ({incomplete_reason(tried[0], num_processes)})"
        if isinstance(resume, str):
            text = f"resume_from_checkpoint: {resume} is {problem}; name another, or say true for the newest whole one"
            yield Finding("red", what, text)
        else:
            text = f"{folder} holds {tried[0].name}, which is {problem}; the run starts from the beginning"
            yield Finding("yellow", what, text)
    free = shutil.disk_usage(parent).free
    if free < _LITTLE_DISK:
        yield Finding("yellow", "disk", f"{free / _GB:.1f} GB free at {parent}; a checkpoint may not fit")


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _problems(requirements: Iterable[Requirement]) -> str:
    found = []
    for requirement in requirements:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            state = "is missing" if version is None else f"{version} is installed"
            found.append(f"{requirement.name} {state}, expected {requirement.specifier}")
    return "; ".join(found)


def _shown(names: Iterable[str]) -> str:
    versions = {name: _version(name) for name in names}
    return ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in versions.items())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
