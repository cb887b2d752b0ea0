"""Evaluating four-response items in one pass each, against scoring each response alone; and the memory it takes.

    python benchmarks/evaluation_speed.py

A random Llama of ten million parameters scores text items (prompts of some 200 tokens, four responses of some 60)
through `score_benchmark`, as `mr-reward evaluate` does: with layout `set`, and each response alone. Each run is a
process of its own, in turn, `--repeats` times; what is timed is the scoring, not the loading. Memory is the largest
resident set of the process, for all items and for a quarter of them. The last line of stdout is one JSON document.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.evaluation.evaluator import score_benchmark
from mr_reward.evaluation.items import EvaluationItem
from mr_reward.evaluation.judges import Alone, RewardModel
from mr_reward.worlds import tiny


def make_items(count: int, seed: int = 0) -> list[EvaluationItem]:
    """Items of random letters; the tokenizer has one token a byte."""
    rng = random.Random(seed)

    def text(tokens: int) -> str:
        return "".join(rng.choice("abcdefgh ijklm") for _ in range(rng.randint(tokens // 2, tokens * 3 // 2)))

    return [
        EvaluationItem(
            uid=str(i),
            category="",
            group=ResponseGroup(prompt=text(200), responses=[text(60) for _ in range(4)], rankings=[1, 2, 3, 4]),
        )
        for i in range(count)
    ]


def worker(how: str, count: int) -> None:
    """One run; prints seconds, parameters and memory."""
    torch.set_num_threads(2)
    backbone = tiny.build_llama(0, hidden_size=320, num_layers=8)
    # Alone in `causal`: groups of one read the same in every layout, and in this one they do not share their prompt.
    layout = "set" if how == "together" else "causal"
    model = MultiResponseRewardModel.from_backbone(backbone, layout=layout, processor=tiny.build_tokenizer())
    scorer: Any = RewardModel(GroupScorer(model, max_tokens_per_batch=8192), how)
    if how == "alone":
        scorer = Alone(scorer)
    items = make_items(count)
    scorer.score_detailed([item.group for item in items[:8]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        score_benchmark(scorer, items, Path(folder) / "items.jsonl", settings={})
        seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"seconds": seconds, "parameters": size, "kib_before": before, "kib_after": after}))


def run(how: str, count: int) -> dict[str, float]:
    """A run in a process of its own."""
    command = [sys.executable, __file__, "--worker", how, "--items", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=["together", "alone"])
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.items)
        return
    runs: dict[str, list[dict[str, float]]] = {"together": [], "alone": [], "a quarter together": []}
    for _ in range(options.repeats):
        runs["together"].append(run("together", options.items))
        runs["alone"].append(run("alone", options.items))
        runs["a quarter together"].append(run("together", options.items // 4))
    ratios = [a["seconds"] / t["seconds"] for a, t in zip(runs["alone"], runs["together"], strict=True)]
    table = Table("", "median", "smallest", "largest", title=f"{options.items} items of four responses")
    rows = {"time alone / together": ratios}
    for name in ("together", "a quarter together"):
        rows[f"peak memory, {name}, MB"] = [found["kib_after"] / 1024 for found in runs[name]]
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in (statistics.median(values), min(values), max(values))))
    Console().print(table)
    print(json.dumps({"settings": {"items": options.items, "repeats": options.repeats}, "runs": runs}))


if __name__ == "__main__":
    main()
