"""The one harness of the speed benchmarks: options, ways timed in turn, memory, versions, tables, figures, JSON.

What is compared meets the machine in alternating rounds, A B C A B C ..., so that whatever else the machine does meets
all of them; reported are medians and quartiles. Memory is what one run adds, in a process of its own. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
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
from typing import Any, Protocol, TypeVar

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECIPES = Path(__file__).resolve().parents[1] / "grpo_recipes"
_COLOURS = ("#2563eb", "#16a34a", "#d97706", "#9333ea", "#dc2626", "#0891b2", "#6b7280")
_WIDTH = 150

Quartiles = dict[str, float]
"""`median`, `lower` and `upper` quartile."""
Result = TypeVar("Result")


class Way(Protocol):
    """What is timed beside others."""

    @property
    def computed_flops(self) -> float:
        """Floating point operations of a forward pass, to skip what cannot end in time."""

    def prepare(self) -> None:
        """Before each run, not timed."""


AnyWay = TypeVar("AnyWay", bound=Way)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of scoring and training speed."""
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
    """A number of the command line that is at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def set_up(options: argparse.Namespace) -> torch.device:
    """Apply the options that hold for the whole process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cpu":
        # A cell that is too large then fails with an error that is reported, before the machine runs out of memory.
        available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        limit = int(available.split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return device


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on beside the settings."""
    names = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    cpu = next((line.split(":")[1].strip() for line in names if line.startswith("model name")), platform.processor())
    packages = ("torch", "transformers", "trl", "peft", "mr-reward")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


class Matmul:
    """A large product of matrices: what the machine can do at best, measured beside the ways."""

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
    """What `time_rounds` found."""

    matmul_flops: float  # its operations
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each way in each round
    matmul: list[float] = field(default_factory=list)  # seconds of the matmul in each round
    skipped: dict[str, str] = field(default_factory=dict)  # why a way has no times
    outputs: dict[str, Any] = field(default_factory=dict)  # of each way's first run

    def peak_shares(self, name: str, flops: float) -> list[float]:
        """Share of the matmul's operations per second, in each round."""
        return [
            flops / own / (self.matmul_flops / peak) for own, peak in zip(self.seconds[name], self.matmul, strict=True)
        ]

    def ratios(self, name: str, reference: str) -> list[float]:
        """Times of one over those of another, in each round."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return [own / other for own, other in pairs]

    def entry(self, name: str, references: Sequence[str]) -> dict[str, Any]:
        """Seconds of a way, and its ratios to those that it is compared with, for the JSON document."""
        ratios = {other: quartiles(self.ratios(name, other)) for other in references if other in self.seconds}
        return {"seconds": quartiles(self.seconds[name]), "runs": self.seconds[name], "ratios": ratios}


def time_rounds(
    ways: Mapping[str, AnyWay],
    run: Callable[[AnyWay], Any],
    check: Callable[[dict[str, Any]], None],
    options: argparse.Namespace,
    flops_factor: float = 1.0,
) -> Timing:
    """Time ways in turn, A B C A B C ..., so that whatever else the machine does meets all of them."""
    device = torch.device(options.device)
    matmul = Matmul(device, DTYPES[options.dtype], options.matmul_size)
    timing = Timing(matmul.flops)
    rate = matmul.flops / min(_seconds(matmul.run, device)[0] for _ in range(3))
    runs, left = options.warmup + options.repeats, options.time_limit
    kept: dict[str, AnyWay] = {}
    for name, way in ways.items():
        least = flops_factor * way.computed_flops / rate * runs
        if least > left:
            timing.skipped[name] = f"{runs} runs take at least {least:.0f} s, {left:.0f} s of --time_limit are left"
            continue
        way.prepare()
        try:
            took, timing.outputs[name] = _seconds(functools.partial(run, way), device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            timing.skipped[name] = "out of memory"
            continue
        if took * runs > left:
            timing.skipped[name] = f"a run took {took:.0f} s, {left:.0f} s of --time_limit are left for {runs}"
            continue
        left -= took * runs
        kept[name] = way
    check(timing.outputs)
    timing.seconds = {name: [] for name in kept}
    for index in range(1, runs):  # the first round was above
        took, _ = _seconds(matmul.run, device)
        counts = index >= options.warmup
        timing.matmul += [took] * counts
        for name, way in kept.items():
            way.prepare()
            took, _ = _seconds(functools.partial(run, way), device)
            timing.seconds[name] += [took] * counts
    return timing


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate; on a CPU it has no error type for that."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    synchronise(device)
    started = time.perf_counter()
    output = run()
    synchronise(device)
    return time.perf_counter() - started, output


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def added_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Memory that a run adds at its peak to what is in use before: torch's count on a GPU, else the resident set."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def in_own_process(what: str) -> dict[str, Any]:
    """Run this benchmark again with the same options and `--child what`; `{"skipped": why}` if that failed."""
    try:
        return run_json([*sys.argv, "--child", what])
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return {"skipped": f"exit status {error.returncode}: {lines[-1] if lines else 'killed'}"}


def run_json(command: Sequence[str], **environment: str) -> dict[str, Any]:
    """Run a Python program; the JSON document in the last line that it prints."""
    done = subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(ways: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """Results of ways that are measured by themselves, A B C A B C ..."""
    found: dict[str, list[Result]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    return found


def quartiles(values: Sequence[float]) -> Quartiles:
    """Middle and spread."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "lower": lower, "upper": upper}


def spread(found: Quartiles | None, digits: int = 2, factor: float = 1.0) -> str:
    """Quartiles for a table."""
    if found is None:
        return ""
    median, lower, upper = (f"{found[key] * factor:.{digits}f}" for key in ("median", "lower", "upper"))
    return f"{median} ({lower}-{upper})"


def megabytes(size: int | None) -> str:
    """Bytes for a table."""
    return "" if size is None else f"{size / 2**20:,.0f}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    # The tables are wider than what rich takes a pipe for.
    Console(width=max(_WIDTH, Console().width)).print(table)


def plot_lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence[Any], Sequence[Quartiles]]]],
    path: Path,
    y_label: str,
    *,
    logarithmic: bool = True,
) -> None:
    """Panels of lines with their spread."""
    figure = Figure(figsize=(4.8 * len(panels), 3.8))
    axes = figure.subplots(1, len(panels), squeeze=False)
    scale = {"value": "log", "base": 2} if logarithmic else {"value": "linear"}
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
        for colour, (label, (places, values)) in zip(_COLOURS, lines.items(), strict=False):
            middle = [value["median"] for value in values]
            axis.plot(places, middle, "o-", color=colour, label=label, markersize=4)
            if all(isinstance(place, int | float) for place in places):
                bounds = [[value[key] for value in values] for key in ("lower", "upper")]
                axis.fill_between(places, *bounds, color=colour, alpha=0.2, linewidth=0)
                axis.set_xscale(**scale)
        axis.set_yscale(**scale)
        axis.set(xlabel=name, ylabel=y_label)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    _save(figure, path)


def plot_bars(bars: Mapping[str, Quartiles], path: Path, label: str) -> None:
    """Horizontal bars with their spread."""
    figure = Figure(figsize=(7, 0.8 + 0.5 * len(bars)))
    axis = figure.subplots()
    middle = [value["median"] for value in bars.values()]
    errors = [
        [value["median"] - value["lower"] for value in bars.values()],
        [value["upper"] - value["median"] for value in bars.values()],
    ]
    axis.barh(list(bars), middle, xerr=errors, color=_COLOURS[0], alpha=0.8)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.grid(alpha=0.3, axis="x")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"figure: {path}")


def recipe_options(description: str | None, steps: int) -> argparse.ArgumentParser:
    """The options of benchmarks that run the handwriting recipe on the quickstart's models."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("outputs/quickstart/sft/checkpoint-50"))
    parser.add_argument("--reward_model", type=Path, default=Path("outputs/quickstart/rm"))
    parser.add_argument("--steps", type=positive, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run_recipe(options: argparse.Namespace, folder: str, *more: str) -> Any:
    """A short GRPO run of `grpo_recipes/train_policy.py`; gives its trainer."""
    sys.path.insert(0, str(RECIPES))
    import train_policy
    from trl import GRPOConfig, ModelConfig, TrlParser

    command = ["--config", str(RECIPES / "policy_tiny_handwriting_cpu.yaml"), "--output_dir", folder]
    command += ["--model_name_or_path", str(options.policy), "--reward_model", str(options.reward_model)]
    command += ["--max_steps", str(options.steps), "--disable_tqdm", "true", "--seed", str(options.seed), *more]
    parser = TrlParser((train_policy.WorldPolicyArguments, GRPOConfig, ModelConfig))
    return train_policy.train_policy(*parser.parse_args_and_config(args=command))


def finish(document: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the last line: everything as one JSON document."""
    hidden = ("child", "output", "tokenizer", "groups", "policy", "reward_model", "against")  # no folders
    settings = {key: value for key, value in vars(options).items() if key not in hidden}
    facts = {"machine": machine(getattr(options, "device", "cpu")), "settings": settings}
    print(json.dumps({**facts, **document}, default=str))
