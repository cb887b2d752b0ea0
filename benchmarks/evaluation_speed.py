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
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from speed_harness import finish, in_turn, positive, print_table, quartiles, run_json, spread

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.evaluation.benchmarks import EvaluationItem
from mr_reward.evaluation.evaluator import score_benchmark
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


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=positive, default=1000)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--child", choices=["together", "alone"], help=argparse.SUPPRESS)  # one run
    options = parser.parse_args()
    if options.child:
        worker(options.child, options.items)
        return

    def run(how: str, count: int) -> dict[str, Any]:
        return run_json([__file__, "--child", how, "--items", str(count)])

    runs = in_turn(
        {
            "together": lambda: run("together", options.items),
            "alone": lambda: run("alone", options.items),
            "a quarter together": lambda: run("together", max(1, options.items // 4)),
        },
        options.repeats,
    )
    ratios = [a["seconds"] / t["seconds"] for a, t in zip(runs["alone"], runs["together"], strict=True)]
    rows = [["time alone / together", spread(quartiles(ratios))]]
    for name in ("together", "a quarter together"):
        sizes = quartiles([found["kib_after"] / 1024 for found in runs[name]])
        rows.append([f"peak memory, {name}, MB", spread(sizes, 0)])
    print_table(f"{options.items} items of four responses", ["", "median (quartiles)"], rows)
    finish({"runs": runs}, options)


if __name__ == "__main__":
    main()
