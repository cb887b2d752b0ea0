"""How the speed benchmarks measure: options, alternating rounds, memory in a process of its own."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from speed_competitors import Competitor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Quartiles = dict[str, float]
"""`median`, `lower` and `upper` quartile."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that both benchmarks have.

    Args:
        parser: gets them.
    """
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=positive, help="of torch on a CPU; default: torch's own")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds that count")
    parser.add_argument("--warmup", type=positive, default=1, help="rounds before, in which the scores are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", choices=("equal", "ragged"), default="equal", help="of the responses")
    parser.add_argument(
        "--time_limit", type=float, default=600.0, help="seconds of a cell; what exceeds it is skipped"
    )
    parser.add_argument("--matmul_size", type=positive, help="of the square matrices that measure the peak")
    parser.add_argument("--no_memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"), help="folder of the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one measurement of memory


def positive(text: str) -> int:
    """A number of the command line that is at least 1.

    Args:
        text: the argument.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def set_up(options: argparse.Namespace) -> torch.device:
    """Apply the options that hold for the whole process.

    Args:
        options: of `add_options`.

    Returns:
        The device.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cpu":
        # A cell that is too large then fails with an error that is reported, before the machine runs out of memory.
        available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        limit = int(available.split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return device


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on beside the settings.

    Args:
        options: of `add_options`.

    Returns:
        Date, versions, threads, names of the processors.
    """
    names = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    cpu = next((line.split(":")[1].strip() for line in names if line.startswith("model name")), platform.processor())
    packages = ("torch", "transformers", "trl", "peft", "mr-reward")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else None,
    }


class Matmul:
    """A large product of matrices: what the machine can do at best, measured beside the competitors.

    Args:
        device: where.
        dtype: of the run.
        size: of the square matrices; None for one that fills the device.
    """

    name = "matmul"

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int | None) -> None:
        size = size or (8192 if device.type == "cuda" else 2048)
        self.factors = [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]
        self.flops = 2.0 * size**3

    def run(self) -> None:
        """Once."""
        self.factors[0] @ self.factors[1]


@dataclass(slots=True)
class Timing:
    """What `time_rounds` found.

    Args:
        seconds: of each competitor in each round.
        matmul: seconds of the matmul in each round.
        matmul_flops: its operations.
        skipped: why a competitor has no times.
        outputs: of each competitor's first run.
    """

    matmul_flops: float
    seconds: dict[str, list[float]] = field(default_factory=dict)
    matmul: list[float] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)

    def peak_shares(self, name: str, flops: float) -> list[float]:
        """Share of the matmul's operations per second, in each round.

        Args:
            name: of a competitor.
            flops: its operations.

        Returns:
            A share for each round.
        """
        return [
            flops / own / (self.matmul_flops / peak) for own, peak in zip(self.seconds[name], self.matmul, strict=True)
        ]

    def ratios(self, name: str, reference: str) -> list[float]:
        """Times of one over those of another, in each round.

        Args:
            name: of a competitor.
            reference: of another.

        Returns:
            A ratio for each round.
        """
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return [own / other for own, other in pairs]


def time_rounds(
    competitors: Mapping[str, Competitor],
    run: Callable[[Competitor], Any],
    check: Callable[[dict[str, Any]], None],
    options: argparse.Namespace,
    flops_factor: float = 1.0,
) -> Timing:
    """Time competitors in turn, A B C A B C ..., so that whatever else the machine does meets all of them.

    Args:
        competitors: by name.
        run: what is timed.
        check: refuses outputs of the first runs, before anything is timed.
        options: of `add_options`.
        flops_factor: operations of a run over those of a forward pass.

    Returns:
        The times, and what was skipped because of `--time_limit` or for want of memory.
    """
    device = torch.device(options.device)
    matmul = Matmul(device, DTYPES[options.dtype], options.matmul_size)
    timing = Timing(matmul.flops)
    rate = matmul.flops / min(_seconds(matmul.run, device)[0] for _ in range(3))
    runs, left = options.warmup + options.repeats, options.time_limit
    kept: dict[str, Competitor] = {}
    for name, competitor in competitors.items():
        least = flops_factor * competitor.work.computed_flops(competitor.shared.full.config) / rate * runs
        if least > left:
            timing.skipped[name] = f"{runs} runs take at least {least:.0f} s, {left:.0f} s of --time_limit are left"
            continue
        competitor.prepare()
        try:
            took, timing.outputs[name] = _seconds(functools.partial(run, competitor), device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            timing.skipped[name] = "out of memory"
            continue
        if took * runs > left:
            timing.skipped[name] = f"a run took {took:.0f} s, {left:.0f} s of --time_limit are left for {runs}"
            continue
        left -= took * runs
        kept[name] = competitor
    check(timing.outputs)
    timing.seconds = {name: [] for name in kept}
    for index in range(1, runs):  # the first round was above
        took, _ = _seconds(matmul.run, device)
        counts = index >= options.warmup
        timing.matmul += [took] * counts
        for name, competitor in kept.items():
            competitor.prepare()
            took, _ = _seconds(functools.partial(run, competitor), device)
            timing.seconds[name] += [took] * counts
    return timing


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate; on a CPU it has no error type for that.

    Args:
        error: what it raised.

    Returns:
        True if so.
    """
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    synchronise(device)
    started = time.perf_counter()
    output = run()
    synchronise(device)
    return time.perf_counter() - started, output


def synchronise(device: torch.device) -> None:
    """Wait for the GPU.

    Args:
        device: a GPU, or a CPU, where there is nothing to wait for.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def added_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Memory that a run adds at its peak to what is in use before: torch's count on a GPU, else the resident set.

    Args:
        run: what to run.
        device: where.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def in_own_process(what: str) -> dict[str, Any]:
    """Run this benchmark again, with the same options, for one measurement.

    Args:
        what: to measure; the value of `--child`.

    Returns:
        What the process printed, or `{"skipped": why}` if it failed.
    """
    command = [sys.executable, *sys.argv, "--child", what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    return {"skipped": f"exit status {done.returncode}: {lines[-1] if lines else 'killed'}"}


def quartiles(values: Sequence[float]) -> Quartiles:
    """Middle and spread.

    Args:
        values: at least one.

    Returns:
        Median and quartiles.
    """
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "lower": lower, "upper": upper}


def finish(document: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the last line: everything as one JSON document.

    Args:
        document: what was measured.
        options: of the command line.
    """
    hidden = ("child", "output", "tokenizer", "groups")  # folders are nobody's business
    settings = {key: value for key, value in vars(options).items() if key not in hidden}
    print(json.dumps({"machine": machine(options), "settings": settings, **document}, default=str))
