"""How tests start two processes under DeepSpeed on the CPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

DEEPSPEED_CONFIGS = Path(__file__).parents[1] / "configs" / "deepspeed"

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="deepspeed (pip install --no-build-isolation -c constraints.txt -e '.[deepspeed]') is missing, or the C++ "
    "compiler with which it builds its CPU communication at the first run",
)


def environment() -> dict[str, str]:
    """The environment of a launched run."""
    # DeepSpeed calls the ninja that was installed beside this interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def two_processes(*options: str) -> list[str]:
    """Arguments of the interpreter that start what follows through accelerate, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ["-m", "accelerate.commands.launch", "--main_process_port", str(port), *options]
