"""Reward models on ranked text, by source, with 95 % intervals, beside baselines that look at the surface only.

    python benchmarks/preferences.py --train train.jsonl --val val.jsonl set=outputs/set single=outputs/single

Best-of-N (a tied best counts) and pairwise accuracy (over all ordered pairs of all groups, ties left out), intervals
by resampling groups. `longest` and `random` need no training; `shallow` is a logistic regression on differences of
surface features of two responses (lengths, layout, digits, overlap with the prompt and, marked +, with the other
responses), trained on all pairs of the training file. With `--figure`, learning curves are drawn from the
`checkpoint-*` folders beside the models. The last line of stdout is one JSON document.
"""

import argparse
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mr_reward import GroupScorer, ResponseGroup
from mr_reward.data.groups_file import load_preferences
from mr_reward.evaluation.judges import BASELINES
from mr_reward.evaluation.plots import plot_curves

Scores = Sequence[Sequence[float]]
NUM_RESAMPLES = 2000


def outcomes(scores: Scores, groups: Sequence[ResponseGroup]) -> np.ndarray:
    """For each group: 1 if the winner is a best response, right pairs, ordered pairs. (B, 3)."""
    rows = []
    for values, group in zip(scores, groups, strict=True):
        ranks = group.rankings or ()
        winner = int(np.argmax(values))
        pairs = [values[i] > values[j] for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
        rows.append((ranks[winner] == 1, sum(pairs), len(pairs)))
    return np.array(rows, dtype=float)


def summarise(found: np.ndarray) -> dict[str, list[float]]:
    """Top-1 and pairwise accuracy, each with the 95 % interval of a bootstrap over groups."""
    rng = np.random.default_rng(0)
    draws = found[rng.integers(0, len(found), (NUM_RESAMPLES, len(found)))].sum(1)
    estimates = {
        "top1": (found[:, 0].mean(), draws[:, 0] / len(found)),
        "pairwise": (found[:, 1].sum() / found[:, 2].sum(), draws[:, 1] / draws[:, 2]),
    }
    return {
        key: [round(float(value), 4) for value in (mean, *np.percentile(sample, [2.5, 97.5]))]
        for key, (mean, sample) in estimates.items()
    }


def features(group: ResponseGroup, with_others: bool) -> np.ndarray:
    """Surface features of each response: (N, F)."""
    prompt = set(words(" ".join(block.get("text", "") for turn in group.messages for block in turn["content"])))
    bags = [set(words(text)) for text in group.responses]
    rows = []
    for i, text in enumerate(group.responses):
        tokens = words(text)
        count = max(len(tokens), 1)
        row = [
            np.log1p(len(text)),
            np.log1p(len(tokens)),
            len(bags[i]) / count,
            sum(map(len, tokens)) / count,
            np.log1p(len(re.findall(r"[.!?]+", text))),
            np.log1p(text.count("\n")),
            np.log1p(len(re.findall(r"^\s*(?:[-*]|\d+\.)", text, re.MULTILINE))),
            np.log1p(sum(character.isdigit() for character in text)),
            np.log1p(len(re.findall(r"[,;:()\"]", text))),
            np.log1p(text.count("?")),
            sum(character.isupper() for character in text) / max(len(text), 1),
            float("```" in text or "**" in text),
            float(bool(re.search(r"\b(sorry|cannot|can't|as an ai)\b", text.lower()))),
            float(text.rstrip().endswith((".", "!", "?", '"', "`"))),
            len(bags[i] & prompt) / max(len(bags[i]), 1),
        ]
        if with_others:
            others = [len(bags[i] & bag) / max(len(bags[i] | bag), 1) for j, bag in enumerate(bags) if j != i]
            row.append(sum(others) / max(len(others), 1))
        rows.append(row)
    return np.array(rows)


def words(text: str) -> list[str]:
    """Lower-case words."""
    return re.findall(r"\w+", text.lower())


def shallow_scorer(train: Sequence[ResponseGroup], with_others: bool) -> Callable[[ResponseGroup], list[float]]:
    """A logistic regression over pairs; a response's score is the linear part."""
    differences = []
    for group in train:
        table, ranks = features(group, with_others), group.rankings or ()
        differences += [
            table[i] - table[j] for i, j in itertools.combinations(range(len(ranks)), 2) if ranks[i] < ranks[j]
        ]
        differences += [
            table[j] - table[i] for i, j in itertools.combinations(range(len(ranks)), 2) if ranks[i] > ranks[j]
        ]
    wins = np.array(differences)
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(fit_intercept=False, max_iter=1000))
    model.fit(np.concatenate([wins, -wins]), np.repeat([1, 0], len(wins)))
    return lambda group: model.decision_function(features(group, with_others)).tolist()


def main() -> None:
    """Score, summarise, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="name=folder of reward models")
    parser.add_argument("--train", type=Path, required=True, help="for the shallow baselines")
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--max_tokens", type=int, default=8192, help="of a forward pass")
    parser.add_argument("--num_orders", type=int, default=1, help="orders to average over, for layout causal")
    parser.add_argument("--over_length", default="truncate_responses")
    parser.add_argument("--dtype", default=None, help="of the backbone, for example bfloat16")
    parser.add_argument("--output", type=Path, default=Path("outputs/preferences.json"))
    parser.add_argument("--figure", type=Path, help="PNG file for the learning curves")
    options = parser.parse_args()
    train, val = load_preferences(options.train), load_preferences(options.val)
    names = ["all", *sorted({group.source or "unknown" for group in val})]
    scores: dict[str, Scores] = {
        name: [[BASELINES[name](group, text) for text in group.responses] for group in val]
        for name in ("longest", "random")
    }
    for name, with_others in (("shallow", False), ("shallow +", True)):
        scorer = shallow_scorer(train, with_others)
        scores[name] = [scorer(group) for group in val]
    for entry in options.models:
        name, folder = entry.split("=", 1)
        model = GroupScorer.from_pretrained(
            folder,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            max_tokens_per_batch=options.max_tokens,
            num_orders=options.num_orders,
            over_length=options.over_length,
        )
        scores[name] = [list(row or ()) for row in model.score(val)]
    results = {}
    for model_name, rows in scores.items():
        found = outcomes(rows, val)
        chosen = {name: [name in ("all", group.source or "unknown") for group in val] for name in names}
        results[model_name] = {name: summarise(found[np.array(keep)]) for name, keep in chosen.items()}
    document = {"groups": {name: sum(keep) for name, keep in chosen.items()}, "results": results, "scores": scores}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document) + "\n")
    table = Table("model", *(f"{name} ({document['groups'][name]})" for name in names), title="top-1 / pairwise")
    for model_name, by_source in results.items():
        table.add_row(
            model_name, *(" / ".join(cell(by_source[name][key]) for key in by_source[name]) for name in names)
        )
    Console(width=200).print(table)
    if options.figure is not None:
        plot_curves(learning_curves(options.models), options.figure, title="text preferences")
    print(json.dumps({"groups": document["groups"], "results": results}))


def learning_curves(models: Sequence[str]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """What the Trainer logged, by panel and model, from the newest checkpoint of each model folder."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for entry in models:
        name, folder = entry.split("=", 1)
        newest = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
        history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
        for panel, suffix in (("training loss", "loss"), ("validation, pairwise", "_pairwise_accuracy")):
            logged = [
                (record["step"], value)
                for record in history
                for key, value in record.items()
                if key == suffix or (suffix != "loss" and key.endswith(suffix))
            ]
            panels.setdefault(panel, {})[name] = ([step for step, _ in logged], [value for _, value in logged])
    return panels


def cell(estimate: list[float]) -> str:
    """Value and interval."""
    value, low, high = estimate
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
