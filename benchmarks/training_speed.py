"""Speed and memory of a training step: forward, loss over the group, backward.

    python benchmarks/training_speed.py                                   # LoRA, random weights, nothing downloaded
    python benchmarks/training_speed.py --preset issue --train full
    python benchmarks/training_speed.py --cell 10M:256:128:4:2 --gradient_checkpointing off on

Ours against separate passes and against the full language model with logits and all hidden states, as the public code
of the paper calls it; `speed_competitors.py` says what each one does. All train the same weights with the same loss.
As in `scoring_speed.py` they run in turn in one process, scores and gradients are compared before, and memory is what
a step adds to the loaded model in a process of its own. Tokens per second are those of the packed row, so the repeated
prompts of separate passes do not count. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from speed_cells import Cell, Shared, draw_groups
from speed_competitors import REFERENCES, Competitor, build, check_scores, make_competitor
from speed_harness import (
    DTYPES,
    add_options,
    added_bytes,
    finish,
    in_own_process,
    megabytes,
    plot_bars,
    print_table,
    quartiles,
    set_up,
    spread,
    time_rounds,
)
from torch import Tensor

from mr_reward.training.losses import best_of_n_cross_entropy

COMPETITORS = ("isolated", "set", "set, dense mask", "full LM", "separate")
PRESETS = {
    "quick": [Cell("10M", 256, 32, 4)],
    "issue": [Cell(num_responses=number) for number in (4, 8)],
}
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A backward pass through weights and activations costs two forward passes; frozen weights need half of it.
_FORWARD_PASSES = {"lora": 2.0, "full": 3.0}
# Gradients of two ways differ by what their orders of summing do, relative to their size.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}


def make_trainable(shared: Shared, train: str, checkpointing: bool) -> None:
    """Choose the weights that are trained; head and readout vectors always are."""
    if train == "lora":
        inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=_PROJECTIONS), shared.backbone)
    if checkpointing:
        shared.full.activation_checkpointing_enable()
    shared.full.train()


def step(competitor: Competitor) -> tuple[Tensor, Tensor]:
    """What is timed."""
    for weight in competitor.shared.parameters():
        weight.grad = None
    scores = competitor.scores()
    rankings = torch.arange(1, scores.shape[1] + 1, device=scores.device).expand_as(scores)
    best_of_n_cross_entropy(scores, rankings, torch.ones_like(scores, dtype=torch.bool)).backward()
    return scores.detach(), competitor.shared.readouts.summary.grad.clone()


def build_trainable(
    cell: Cell, names: Sequence[str], checkpointing: str, options: argparse.Namespace
) -> dict[str, Competitor]:
    """Competitors in training mode."""
    change = functools.partial(make_trainable, train=options.train, checkpointing=checkpointing == "on")
    competitors = build(cell, names, options, change)
    competitors[names[0]].shared.full.train()  # a new reward model is in evaluation mode
    return competitors


def memory_in_this_process(what: str, options: argparse.Namespace) -> dict[str, int]:
    """Bytes that one step adds, gradients included."""
    text, name, checkpointing = what.split("|")
    cell = Cell.parse(text)
    competitor = build_trainable(cell, [name], checkpointing, options)[name]
    shared = competitor.shared
    # A small step first: libraries set themselves up, and the model tests its attention.
    small = replace(cell, prompt_tokens=16, response_tokens=4, num_responses=2, num_groups=1)
    step(make_competitor(name, shared, draw_groups(small, shared.full.config, ragged=False, seed=0)))
    for weight in shared.parameters():
        weight.grad = None
    shared.full.train()
    competitor.prepare()
    return {"bytes": added_bytes(functools.partial(step, competitor), torch.device(options.device))}


def measure(cell: Cell, checkpointing: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of a cell."""
    competitors = build_trainable(cell, COMPETITORS, checkpointing, options)
    dtype, checked = DTYPES[options.dtype], {}

    def check(outputs: dict[str, tuple[Tensor, Tensor]]) -> None:
        checked["scores"] = check_scores({name: scores for name, (scores, _) in outputs.items()}, dtype)
        gradients = {name: gradient / gradient.norm() for name, (_, gradient) in outputs.items()}
        checked["gradients"] = check_scores(gradients, dtype, _TOLERANCES[dtype])

    factor = _FORWARD_PASSES[options.train] + (checkpointing == "on")
    timing = time_rounds(competitors, step, check, options, factor)
    needed = competitors["isolated"].work.tokens
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in timing.seconds.items():
        found[name] = {
            **timing.entry(name, REFERENCES),
            "tokens_per_second": quartiles([needed / each for each in seconds]),
            "tokens": asdict(competitors[name].work),
        }
        if not options.no_memory:
            found[name] |= in_own_process(f"{cell}|{name}|{checkpointing}")
    sizes = {name: each["bytes"] for name, each in found.items() if "bytes" in each}
    for name, size in sizes.items():
        found[name]["memory_ratios"] = {
            reference: size / sizes[reference] for reference in REFERENCES if reference in sizes
        }
    return {
        "cell": asdict(cell),
        "gradient_checkpointing": checkpointing,
        "differ_by": checked,
        "needed_tokens": needed,
        "competitors": found,
        "skipped": timing.skipped,
    }


def print_cell(cell: Cell, result: dict[str, Any]) -> None:
    """A table of a cell."""
    rows = []
    for name, found in result["competitors"].items():
        ratios = [spread(found["ratios"].get(reference)) for reference in REFERENCES]
        memory = megabytes(found.get("bytes")) or found.get("skipped", "")
        over = [f"{ratio:.2f}" for ratio in found.get("memory_ratios", {}).values()]
        rows.append([name, spread(found["seconds"], 3), *ratios, spread(found["tokens_per_second"], 0), memory, *over])
    rows += [[name, "skipped: " + why] for name, why in result["skipped"].items()]
    columns = ["", "seconds", *(f"time / {name}" for name in REFERENCES), "tokens/s"]
    columns += ["MB", *(f"MB / {name}" for name in REFERENCES)]
    title = f"{cell}, gradient checkpointing {result['gradient_checkpointing']}, median (quartiles)"
    print_table(title, columns, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--cell", type=Cell.parse, action="append", help="instead of the preset; may be repeated")
    parser.add_argument("--train", choices=_FORWARD_PASSES, default="lora", help="which weights of the backbone")
    parser.add_argument("--gradient_checkpointing", nargs="+", choices=("off", "on"), default=["off"])
    add_options(parser)
    options = parser.parse_args(arguments)
    if any(cell.image for cell in options.cell or []):
        parser.error("training is measured on text; leave out :image")
    return options


def main() -> None:
    """Measure, print."""
    options = parse()
    set_up(options)
    if options.child:
        print(json.dumps(memory_in_this_process(options.child, options)))
        return
    results, bars = [], {}
    for cell in options.cell or PRESETS[options.preset]:
        for checkpointing in options.gradient_checkpointing:
            results.append(measure(cell, checkpointing, options))
            print_cell(cell, results[-1])
            for name, found in results[-1]["competitors"].items():
                if name != "isolated" and "isolated" in found["ratios"]:
                    suffix = ", checkpointing" if checkpointing == "on" else ""
                    bars[f"{cell}{suffix}, {name}"] = found["ratios"]["isolated"]
    if bars:
        plot_bars(bars, options.output / "training_speed.png", "time of a step / time of isolated")
    finish({"cells": results}, options)


if __name__ == "__main__":
    main()
