"""Speed and memory of scoring, against the usual ways to score the responses of a prompt.

    python benchmarks/scoring_speed.py --preset issue              # time ratios, memory, share of the matmul peak
    python benchmarks/scoring_speed.py --cell 135M:1024:128:16:1 --cell 135M:1024:128:8:1:image
    python benchmarks/scoring_speed.py --what memory               # peak memory with a vocabulary of 150,000
    python benchmarks/scoring_speed.py --what linear               # cost against tokens and visible pairs
    python benchmarks/scoring_speed.py --what padding --groups train.jsonl
    python benchmarks/scoring_speed.py --what peak                 # beside a bare forward pass
    python benchmarks/scoring_speed.py --preset issue --against ../other   # this checkout beside another one

Random weights, nothing is downloaded. A cell is MODEL:PROMPT:RESPONSE:N:GROUPS (numbers of tokens, of responses, of
groups in a batch), with `:image` if a quarter of the prompt is an image. `speed_competitors.py` says what is compared.
In one process, all competitors of a cell run in turn, `--repeats` times; reported are medians and quartiles of the
times, and of the ratios within a round. Before, their scores are compared, and the benchmark fails if they differ.
Memory is what one run adds to the loaded model, measured in a process of its own: on a GPU torch's count, on a CPU the
resident set (Linux). A competitor that would take longer than what is left of `--time_limit` is reported as skipped.
The share of the peak is that of a large matmul in the same dtype and round; counted are the layers' weights for tokens
that are not padding, and pairs that see each other. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_cells import Cell, Shared, draw_groups
from speed_competitors import REFERENCES, Competitor, build, check_scores, make_competitor
from speed_harness import (
    DTYPES,
    add_options,
    added_bytes,
    finish,
    in_own_process,
    in_turn,
    megabytes,
    plot_bars,
    plot_lines,
    positive,
    print_table,
    quartiles,
    run_json,
    set_up,
    spread,
    time_rounds,
)
from speed_padding import run_padding
from torch import Tensor

from mr_reward.layouts import LAYOUTS

TEXT_COMPETITORS = ("isolated", "set", "set, dense mask", "shared cache", "full LM", "TRL classifier", "separate")
# The other two have no images.
IMAGE_COMPETITORS = ("isolated", "set", "set, dense mask", "shared cache", "separate")

BASE = Cell()
SWEEP: dict[str, tuple[Any, ...]] = {
    "num_responses": (2, 4, 8, 16, 32, 64),
    "prompt_tokens": (64, 256, 1024, 4096),
    "response_tokens": (32, 128, 512),
    "model": ("10M", "135M", "0.5B"),
    "num_groups": (1, 4, 8),
    "image": (False, True),
}
PRESETS = {
    "quick": [Cell("10M", 256, 32, 4), Cell("10M", 256, 32, 8), Cell("10M", 256, 32, 4, image=True)],
    "issue": [replace(BASE, num_responses=number) for number in (4, 8, 16)],
    "full": list(dict.fromkeys(replace(BASE, **{axis: value}) for axis, values in SWEEP.items() for value in values)),
}
MEMORY_CELL = Cell("vocabulary", 1024, 895, 8)  # 8,192 tokens in `isolated` and `causal`
PEAK_CELL = Cell("135M", 512, 191, 8)  # 2,048 tokens
# At one prompt and one length, tokens and pairs grow together; two more tell their costs apart.
LINEAR_CELLS = [Cell("10M", 256, 32), Cell("10M", 1024, 32), Cell("10M", 256, 128)]


def memory_in_this_process(what: str, options: argparse.Namespace) -> dict[str, int]:
    """Bytes that one run adds."""
    text, name = what.split("|")
    cell = Cell.parse(text)
    competitor = build(cell, [name], options)[name]
    # A small run first: libraries set themselves up, and the model tests its attention.
    small = replace(cell, prompt_tokens=16, response_tokens=4, num_responses=2, num_groups=1)
    config = competitor.shared.full.config
    make_competitor(name, competitor.shared, draw_groups(small, config, ragged=False, seed=0)).scores()
    competitor.prepare()
    return {"bytes": added_bytes(competitor.scores, torch.device(options.device))}


def _score(competitor: Competitor) -> Tensor:
    return competitor.scores()


def measure(cell: Cell, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Times, work and memory of a cell."""
    competitors = build(cell, names, options)
    config = competitors[names[0]].shared.full.config
    checked: dict[str, float] = {}

    def check(outputs: dict[str, Tensor]) -> None:
        checked.update(check_scores(outputs, DTYPES[options.dtype]))

    timing = time_rounds(competitors, _score, check, options)
    needed = competitors["isolated"].work.tokens
    found: dict[str, dict[str, Any]] = {}
    for name in timing.seconds:
        work = competitors[name].work
        found[name] = {
            **timing.entry(name, REFERENCES),
            "tokens": asdict(work),
            "computed_over_needed": work.computed_tokens / needed,
            "gflop": work.flops(config) / 1e9,
            # The vision tower's work is not counted, so with an image there is no share.
            "peak_share": None if cell.image else quartiles(timing.peak_shares(name, work.flops(config))),
        }
        if not options.no_memory:
            found[name] |= in_own_process(f"{cell}|{name}")
    return {
        "cell": asdict(cell),
        "scores_differ_by": checked,
        "scores_std": float(timing.outputs["isolated"].std()) if "isolated" in timing.outputs else None,
        "needed_tokens": needed,
        "matmul": {"gflop": timing.matmul_flops / 1e9, "seconds": timing.matmul},
        "competitors": found,
        "skipped": timing.skipped,
    }


def print_cell(cell: Cell, result: dict[str, Any]) -> None:
    """A table of a cell."""
    rows = []
    for name, found in result["competitors"].items():
        ratios = [spread(found["ratios"].get(reference)) for reference in REFERENCES]
        share = spread(found["peak_share"], 0, 100)
        tokens = f"{found['computed_over_needed']:.2f}"
        memory = megabytes(found.get("bytes")) or found.get("skipped", "")
        rows.append([name, spread(found["seconds"], 3), *ratios, memory, tokens, f"{found['gflop']:,.0f}", share])
    rows += [[name, "skipped: " + why] for name, why in result["skipped"].items()]
    columns = [
        "",
        "seconds",
        *(f"time / {name}" for name in REFERENCES),
        "MB",
        "tokens / needed",
        "GFLOP",
        "% of peak",
    ]
    checks = ", ".join(f"{pair} {value:.0e}" for pair, value in result["scores_differ_by"].items())
    print_table(f"{cell}, median (quartiles); scores differ by: {checks or 'nothing to compare'}", columns, rows)


def run_speed(options: argparse.Namespace) -> dict[str, Any]:
    """The sweep."""
    cells = options.cell or PRESETS[options.preset]
    wanted = options.competitors or TEXT_COMPETITORS
    results = []
    for cell in cells:
        names = [name for name in (IMAGE_COMPETITORS if cell.image else TEXT_COMPETITORS) if name in wanted]
        results.append(measure(cell, names, options))
        if cell.image:
            results[-1]["skipped"] |= {
                name: "not measured with images" for name in wanted if name not in IMAGE_COMPETITORS
            }
        print_cell(cell, results[-1])
    panels = {axis: _lines(axis, cells, results) for axis in SWEEP}
    panels = {axis: lines for axis, lines in panels.items() if any(len(places) > 1 for places, _ in lines.values())}
    if panels:
        plot_lines(panels, options.output / "scoring_speed.png", "time / time of isolated")
    return {"cells": results}


def run_against(options: argparse.Namespace) -> dict[str, Any]:
    """This checkout and another one in turn, each by its own `scoring_speed.py` in a process of its own."""
    here, there = Path(__file__).resolve().parents[1], options.against.resolve()
    names = options.competitors or list(REFERENCES)
    passed = ["--warmup", "--seed", "--lengths", "--dtype", "--device", "--time_limit", "--threads", "--matmul_size"]
    found: dict[str, dict[str, list[float]]] = {}
    rows = []
    for cell in options.cell or PRESETS[options.preset]:
        command = ["--cell", str(cell), "--no_memory", "--repeats", "3", "--competitors", *names]
        for name in passed:
            if (value := getattr(options, name.removeprefix("--"))) is not None:
                command += [name, str(value)]

        def run(folder: Path, command: list[str] = command) -> dict[str, float]:
            with tempfile.TemporaryDirectory() as output:
                script = str(folder / "benchmarks" / "scoring_speed.py")
                document = run_json([script, *command, "--output", output], PYTHONPATH=str(folder))
            return {name: each["seconds"]["median"] for name, each in document["cells"][0]["competitors"].items()}

        runs = in_turn({"here": lambda: run(here), "there": lambda: run(there)}, options.repeats)
        found[str(cell)] = {
            name: [own[name] / other[name] for own, other in zip(runs["here"], runs["there"], strict=True)]
            for name in runs["here"][0]
        }
        rows += [[str(cell), name, spread(quartiles(ratios))] for name, ratios in found[str(cell)].items()]
    print_table("time here / time there, median (quartiles)", ["cell", "", "ratio"], rows)
    return {"ratios": found}


def _lines(axis: str, cells: Sequence[Cell], results: Sequence[dict[str, Any]]) -> dict[str, tuple[list, list]]:
    """Ratios along an axis, of the cells that are like the base, or like the first cell, on all other axes."""
    base = BASE if BASE in cells else cells[0]
    lines: dict[str, tuple[list, list]] = {}
    for cell, result in zip(cells, results, strict=True):
        if replace(cell, **{axis: getattr(base, axis)}) != base:
            continue
        place = getattr(cell, axis)
        for name, found in result["competitors"].items():
            if "isolated" in found["ratios"]:
                places, values = lines.setdefault(name, ([], []))
                places.append(place if type(place) is int else str(place))
                values.append(found["ratios"]["isolated"])
    return lines


def run_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of ours and of the full language model with a large vocabulary."""
    (cell,) = options.cell or [MEMORY_CELL]
    found = {name: in_own_process(f"{cell}|{name}") for name in ("isolated", "set", "set, dense mask", "full LM")}
    ratios = {
        name: found["full LM"]["bytes"] / found[name]["bytes"]
        for name in found
        if name != "full LM" and "bytes" in found[name] and "bytes" in found["full LM"]
    }
    rows = [
        [name, megabytes(each.get("bytes")) or each["skipped"], f"{ratios[name]:.2f}" if name in ratios else ""]
        for name, each in found.items()
    ]
    print_table(f"{cell}: memory that a pass adds", ["", "MB", "full LM / this"], rows)
    bars = {name: quartiles([each["bytes"] / 2**20]) for name, each in found.items() if "bytes" in each}
    plot_bars(bars, options.output / "scoring_memory.png", "MB that a pass adds")
    return {"cell": asdict(cell), "competitors": found, "full_over_ours": ratios}


def run_linear(options: argparse.Namespace) -> dict[str, Any]:
    """Time as a linear function of tokens and visible pairs, N growing at fixed P and R."""
    shapes = options.cell or LINEAR_CELLS
    (model,) = {cell.model for cell in shapes}
    sizes = [2**power for power in range(1, options.largest.bit_length())]
    cells = {str(cell): cell for shape in shapes for cell in [replace(shape, num_responses=size) for size in sizes]}
    device, ragged = torch.device(options.device), options.lengths == "ragged"
    shared = Shared.make(shapes[0], device, DTYPES[options.dtype], options.seed)
    competitors = {
        name: make_competitor(
            options.layout, shared, draw_groups(cell, shared.full.config, ragged=ragged, seed=options.seed)
        )
        for name, cell in cells.items()
    }
    timing = time_rounds(competitors, _score, lambda outputs: None, options)
    seconds = {name: quartiles(found) for name, found in timing.seconds.items()}
    if len(seconds) < 4:
        raise SystemExit(f"only {len(seconds)} sizes could be timed, too few for a fit; raise --time_limit")
    works = [competitors[name].work for name in seconds]
    terms = np.array([[1.0, work.tokens, work.pairs] for work in works])
    times = np.array([found["median"] for found in seconds.values()])
    solution = np.linalg.lstsq(terms / terms.max(0), times, rcond=None)[0] / terms.max(0)
    fitted = terms @ solution
    r_squared = 1 - ((times - fitted) ** 2).sum() / ((times - times.mean()) ** 2).sum()
    fit = dict(zip(("seconds", "seconds_per_token", "seconds_per_pair"), solution.tolist(), strict=True))
    formula = f"{solution[0]:.2e} + {solution[1]:.2e} tokens + {solution[2]:.2e} pairs"
    rows = [
        [name, str(work.tokens), f"{work.pairs:,}", spread(found, 4), f"{guess:.4f}"]
        for (name, found), work, guess in zip(seconds.items(), works, fitted, strict=True)
    ]
    rows += [[name, "skipped: " + why] for name, why in timing.skipped.items()]
    columns = ["", "tokens", "visible pairs", "seconds", "fit"]
    print_table(f"{model}, {options.layout}: seconds = {formula}, R² = {r_squared:.5f}", columns, rows)
    lines: dict[str, tuple[list, list]] = {}
    for (name, found), work, guess in zip(seconds.items(), works, fitted.tolist(), strict=True):
        label = f"P = {cells[name].prompt_tokens}, R = {cells[name].response_tokens}"
        for legend, value in ((label, found), (f"{label}, fit", quartiles([guess]))):
            places, values = lines.setdefault(legend, ([], []))
            places.append(work.tokens)
            values.append(value)
    plot_lines({"tokens": lines}, options.output / "scoring_linear.png", "seconds", logarithmic=False)
    points = {
        name: {"tokens": work.tokens, "pairs": work.pairs, "seconds": seconds[name]}
        for name, work in zip(seconds, works, strict=True)
    }
    return {"points": points, "fit": {**fit, "r_squared": float(r_squared)}, "skipped": timing.skipped}


def run_peak(options: argparse.Namespace) -> dict[str, Any]:
    """Ours beside a bare forward pass over as many tokens."""
    (cell,) = options.cell or [PEAK_CELL]
    result = measure(cell, ("isolated", "set", "bare backbone"), options)
    print_cell(cell, result)
    shares = {name: found["peak_share"] for name, found in result["competitors"].items()}
    plot_bars(shares, options.output / "scoring_peak.png", "share of the matmul peak")
    return result


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "speed": run_speed,
    "memory": run_memory,
    "linear": run_linear,
    "padding": run_padding,
    "peak": run_peak,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=MEASUREMENTS, default="speed")
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="cells of `speed`")
    parser.add_argument("--cell", type=Cell.parse, action="append", help="instead of the preset; may be repeated")
    parser.add_argument("--competitors", nargs="+", choices=TEXT_COMPETITORS, help="of `speed`; default: all")
    parser.add_argument("--layout", choices=LAYOUTS, default="set", help="of `linear` and `padding`")
    parser.add_argument("--largest", type=positive, default=256, help="N of `linear`")
    parser.add_argument("--groups", type=Path, help="of `padding`: JSON Lines with `prompt` and `responses`")
    parser.add_argument("--tokenizer", help="of `padding`; without it a token is four bytes")
    parser.add_argument("--max_tokens", type=positive, default=16_384, help="of `padding`: budget of a batch")
    parser.add_argument("--against", type=Path, help="folder of another checkout; ratios of `speed` to its times")
    add_options(parser)
    options = parser.parse_args(arguments)
    if options.what == "padding" and options.groups is None:
        parser.error("--what padding needs --groups, a JSON Lines file")
    if options.what in ("memory", "peak") and options.cell and len(options.cell) > 1:
        parser.error(f"--what {options.what} takes one --cell")
    if options.against and (options.what != "speed" or not (options.against / "benchmarks").is_dir()):
        parser.error("--against takes the folder of a checkout, and --what speed")
    if options.what == "linear" and len({(cell.model, cell.image) for cell in options.cell or LINEAR_CELLS}) > 1:
        parser.error("--what linear takes cells of one model")
    return options


@torch.inference_mode()
def main() -> None:
    """Measure, print."""
    options = parse()
    set_up(options)
    if options.child:
        print(json.dumps(memory_in_this_process(options.child, options)))
        return
    if options.against:
        finish({"what": "against", **run_against(options)}, options)
        return
    finish({"what": options.what, **MEASUREMENTS[options.what](options)}, options)


if __name__ == "__main__":
    main()
