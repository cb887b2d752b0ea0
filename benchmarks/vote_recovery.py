"""How well a builder of benchmarks recovers the truth from noisy votes, at the scale of MR2Bench-Video.

    python benchmarks/vote_recovery.py

A synthetic crowd gives 94,000 votes on 497 questions and 19 models; what a response is truly worth is known. Two
kinds of noise: Bradley-Terry, and a constant share of flipped votes. For each method: `best of 4`, the chance that
the method's best of a random four is truly the best (shared where it has several), and Kendall's tau-b with the
truth. The figure shows what a filter on the gap between the two strongest (Bradley-Terry MAP) keeps, and how many of
the kept labels are right. The last line of stdout is one JSON document.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bands import plot_bands
from crowd import Crowd, draw_strengths, draw_votes
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

from mr_reward.mr2bench.rankings import METHODS, Denoised, rank_votes

NOISE = {"Bradley-Terry": None, "27 % flipped": 0.27}
GAPS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
SUBSETS = 20  # random fours of each question


def quality(found: Denoised, truth: Any, seed: int) -> dict[str, float]:
    """How near the truth a ranking comes."""
    generator = np.random.default_rng(seed)
    taus, hits = [], []
    for ranks, strengths in zip(found.ranks, truth, strict=True):
        own = np.array(ranks)
        taus.append(kendalltau(-own, strengths).statistic)
        for _ in range(SUBSETS):
            four = generator.choice(len(own), 4, replace=False)
            best = own[four] == own[four].min()
            hits.append(best[np.argmax(strengths[four])] / best.sum())
    return {"best_of_4": statistics.fmean(hits), "tau_b": statistics.fmean(taus)}


def trade_off(found: Denoised, truth: Any, seed: int) -> dict[str, list[float]]:
    """Kept share and right labels of random fours, by the gap of the two strongest."""
    generator = np.random.default_rng(seed)
    gaps, right = [], []
    for mean, strengths in zip(found.strengths.mean, truth, strict=True):
        for _ in range(SUBSETS):
            four = generator.choice(len(mean), 4, replace=False)
            top = np.sort(mean[four])[::-1]
            gaps.append(top[0] - top[1])
            right.append(np.argmax(mean[four]) == np.argmax(strengths[four]))
    kept = [np.array(gaps) >= gap for gap in GAPS]
    return {
        "kept": [float(mask.mean()) for mask in kept],
        "right": [float(np.array(right)[mask].mean()) if mask.any() else math.nan for mask in kept],
    }


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    """Draw, rank, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=497)
    parser.add_argument("--models", type=int, default=19)
    parser.add_argument("--votes", type=int, default=94_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--figure", type=Path, default=Path("outputs/vote_recovery.png"))
    options = parser.parse_args()
    found: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    curves: dict[str, list[dict[str, list[float]]]] = defaultdict(list)
    for seed in options.seeds:
        truth = draw_strengths(options.questions, options.models, seed=seed)
        for noise, flip in NOISE.items():
            votes = draw_votes(truth, Crowd(num_votes=options.votes, flip=flip, ties=0.0), seed=seed)
            for method in METHODS:
                started = time.perf_counter()
                ranking = rank_votes(votes, method=method)
                seconds = time.perf_counter() - started
                entry = found[f"{noise}, {method}"]
                for key, value in (*quality(ranking, truth, seed).items(), ("seconds", seconds)):
                    entry[key].append(value)
            curves[noise].append(trade_off(ranking, truth, seed))
    table = Table("noise, method", "best of 4", "tau-b", "seconds", title=f"{len(options.seeds)} seeds")
    for name, entry in found.items():
        table.add_row(name, *(cell(entry[key]) for key in ("best_of_4", "tau_b", "seconds")))
    Console().print(table)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    panels = {
        title: {noise: (GAPS, [curve[key] for curve in runs]) for noise, runs in curves.items()}
        for title, key in (("kept items", "kept"), ("right labels among them", "right"))
    }
    plot_bands(
        panels, options.figure, title="Items whose best is so many logits ahead", x_label="smallest gap, logits"
    )
    settings = {key: str(value) for key, value in vars(options).items()}
    shares = {
        noise: [{key: [None if math.isnan(v) else v for v in values] for key, values in run.items()} for run in runs]
        for noise, runs in curves.items()
    }
    print(json.dumps({"settings": settings, "methods": found, "gaps": GAPS, "filter": shares}))


if __name__ == "__main__":
    main()
