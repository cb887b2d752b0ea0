"""Which judge keeps a policy right? Many arms of reward-model training and GRPO in the lean loop, one JSON file each.

    python benchmarks/judge_lab.py rm set,mix isolated,bradley_terry --seeds 0 1 2
    python benchmarks/judge_lab.py policy truth set,mix set,mix@beta=0.1 --seeds 0 1 2

Per seed: a tiny Qwen3-VL is trained by supervised training; a checkpoint on the way is the weak policy, its end
the backbone of the reward models. A reward model sees 19,200 groups of four in 600 steps, a policy 200 steps of 16
prompts x 8 rollouts; greedy accuracy is measured on 1,024 unseen pictures. This is `benchmarks/policy_comparison.py`
without the trainers, see benchmarks/lean_loop.py.

An arm of reward-model training is a list of words, `set,mix,rate=3e-4`: the layout; the loss (`best_of_n` unless
named); `mix` for a share of the weak policy's own rollouts among the groups; `binary` for labels that only say best or
rest; `flip=0.1` for labels that are wrong with that chance; `repeats` to keep equal texts; `residual` for single plus
comparison; `noise` for readout vectors that start as the mean embedding plus noise; `zero` for a head whose last layer
starts at 0; `init=1` for another seed of its own; `size=8` for groups of that size; and fields of `lean_loop.Fit`.

Behind each `@` stands a field of `lean_loop.Run`, or how scores become rewards: `floor=0.1`, closer scores are ties;
`reference=logistic` or `capped`, against the start policy's greedy answer; `also=ARM`, the mean of two judges, with
`@how=doubt` less their standard deviation. What is finished is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from comparison_setups import SETUPS, train_backbone
from lean_loop import (
    Fit,
    Group,
    LeanWorld,
    Reader,
    Run,
    generate,
    greedy_accuracy,
    grpo,
    measure,
    ranked,
    sample_texts,
    score,
    train_reward_model,
)
from transformers import AutoModelForImageTextToText

from mr_reward import MultiResponseRewardModel
from mr_reward.checkpoint.checksums import written_whole_file
from mr_reward.groups import dense_ranks
from mr_reward.model.model import RewardOutput

LAYOUTS = ("set", "isolated", "causal")
LOSSES = ("best_of_n", "bradley_terry", "plackett_luce")
GROUPS, SIZE = 19_200, 4
TEST, VALIDATION = 1024, 256
HELD_OUT = 512


@dataclasses.dataclass(frozen=True)
class Judge:
    """An arm of reward-model training."""

    layout: str
    fit: Fit
    words: frozenset[str] = frozenset()  # mix, binary, repeats, residual
    flip: float = 0.0
    init: int = 0
    size: int = SIZE

    @classmethod
    def parse(cls, text: str) -> Judge:
        """Read `set,mix,rate=3e-4`."""
        words, fit, own = set(), {}, {}
        layout = ""
        fields = {field.name: field.type for field in dataclasses.fields(Fit)}
        for word in text.split(","):
            key, _, value = word.partition("=")
            if word in LAYOUTS:
                layout = word
            elif word in LOSSES:
                fit["loss"] = word
            elif key in ("flip", "init", "size"):
                own[key] = float(value) if key == "flip" else int(value)
            elif key in fields:
                fit[key] = value if fields[key] == "str" else (int if fields[key] == "int" else float)(value)
            elif word in ("mix", "binary", "repeats", "residual", "noise", "zero"):
                words.add(word)
            else:
                raise SystemExit(f"got {word!r} in the arm {text!r}, expected words of --help")
        if not layout:
            raise SystemExit(f"got the arm {text!r} without a layout, expected one of {LAYOUTS}")
        return cls(layout, Fit(**fit), frozenset(words), **own)


class SinglePlusComparison(torch.nn.Module):
    """Layout `set` as the score of each response alone plus what comparing adds, which starts at zero."""

    def __init__(self, model: MultiResponseRewardModel) -> None:
        super().__init__()
        self.model = model
        self.single = copy.deepcopy(model.head)
        torch.nn.init.zeros_(model.head.out.weight)
        self.config, self.adapter = model.config, model.adapter

    def forward(self, rows: Any) -> Any:
        """As `MultiResponseRewardModel`; the summary stands in front of the comparison."""
        model, count = self.model, rows.score_sites.shape[1]
        sites = torch.cat([rows.score_sites, (rows.score_sites - 1).clamp(min=0)], 1)
        hidden = model._read_flat(dataclasses.replace(rows, score_sites=sites))
        scores = model.head(hidden[:, :count]) + self.single(hidden[:, count:])
        return RewardOutput(scores=scores.masked_fill(~rows.response_mask, 0.0))


class Seed:
    """What all arms of a seed share, made on first use and kept in the output folder."""

    def __init__(self, world: Any, seed: int, output: Path, results: Path) -> None:
        self.world, self.seed = world, seed
        self.folder = output / world.name / f"seed{seed}"
        self.results = results / world.name
        self.judges: dict[str, Any] = {}

    @cached_property
    def backbone(self) -> Path:
        """The end of supervised training; the weak policy lies in it."""
        return train_backbone(self.world.name, self.world.setup, self.folder / "sft", self.seed)

    @property
    def weak(self) -> Path:
        """The checkpoint that GRPO starts from."""
        return self.backbone / f"checkpoint-{self.world.setup.start_step}"

    @cached_property
    def reader(self) -> Reader:
        """Tensors of prompts and pictures."""
        return Reader(self.world, self.backbone)

    def policy(self, folder: Path) -> Any:
        """A policy in float32."""
        return AutoModelForImageTextToText.from_pretrained(folder)

    @cached_property
    def start(self) -> dict[str, float]:
        """Greedy accuracy of the weak policy and of the backbone."""
        found = self.folder / "start.json"
        if not found.is_file():
            tasks = self.world.tasks("test", TEST, 0)
            accuracy = {
                name: greedy_accuracy(self.reader, self.policy(folder), tasks)
                for name, folder in (("policy", self.weak), ("backbone", self.backbone))
            }
            found.write_text(json.dumps(accuracy))
        return json.loads(found.read_text())

    @cached_property
    def made_up(self) -> list[Group]:
        """The training groups of the recipes."""
        return self.world.made_up("train", GROUPS, SIZE, self.seed)

    def rollouts(self, name: str, tasks: Sequence[Any], size: int = 8) -> list[list[str]]:
        """Texts of the weak policy."""
        found = self.folder / f"rollouts-{name}.json"
        if not found.is_file():
            torch.manual_seed(self.seed + 7)
            found.write_text(json.dumps(sample_texts(self.reader, self.policy(self.weak), tasks, size)))
        return json.loads(found.read_text())

    @cached_property
    def held_out(self) -> list[Group]:
        """Groups of the weak policy's rollouts on unseen pictures."""
        tasks = self.world.tasks("validation", HELD_OUT, 0)
        return ranked(tasks, self.rollouts("held", tasks))

    def groups(self, judge: Judge) -> tuple[list[Group], float]:
        """Training groups of an arm, and the share of them that are rollouts.

        In a mix every second question gets the weak policy's rollouts, where these do not all tie.
        """
        data = list(self.made_up)
        if judge.size != SIZE:
            data = self.world.made_up("train", GROUPS * SIZE // judge.size, judge.size, self.seed)
        rng = random.Random(self.seed + 11)
        used = 0
        if "mix" in judge.words:
            texts = self.rollouts("odd", [task for task, _, _ in self.made_up[1::2]])
            for i in range(1, len(data), 2):
                task, rollouts = data[i][0], texts[i // 2]
                own = ranked([task], [rollouts], judge.flip, rng)
                if "repeats" in judge.words and own:
                    own = [(task, rollouts, list(dense_ranks([-task.grade(text) for text in rollouts])))]
                if own:
                    data[i], used = own[0], used + 1
        if judge.flip:
            data = [self._noisy(group, judge.flip, rng) if i % 2 == 0 else group for i, group in enumerate(data)]
        if "binary" in judge.words:
            data = [(task, texts, [min(rank, 2) for rank in ranks]) for task, texts, ranks in data]
        return data, used / len(data)

    def _noisy(self, group: Group, flip: float, rng: random.Random) -> Group:
        task, texts, ranks = group
        changed = [rng.choice(ranks) if rng.random() < flip else rank for rank in ranks]
        return (task, texts, list(dense_ranks(changed))) if len(set(changed)) > 1 else group

    def build(self, judge: Judge) -> Any:
        """A reward model with new parts, before training."""
        torch.manual_seed(self.seed + 1000 * judge.init)
        model = MultiResponseRewardModel.from_backbone(str(self.backbone), layout=judge.layout)
        with torch.no_grad():
            if "noise" in judge.words:
                torch.manual_seed(self.seed + 1000 * judge.init)
                model.readouts.initialise_from(model.get_input_embeddings(), None)
            if "zero" in judge.words:
                model.head.out.weight.zero_()
        return SinglePlusComparison(model) if "residual" in judge.words else model

    def judge(self, name: str) -> Any:
        """The trained reward model of an arm; trained, measured and written down on first use."""
        if name not in self.judges:
            judge = Judge.parse(name)
            model = self.build(judge)
            weights, result = self.folder / f"rm-{name}.pt", self.results / f"rm-{name}-seed{self.seed}.json"
            if weights.is_file() and result.is_file():
                model.load_state_dict(torch.load(weights))
                model.eval()
            else:
                data, share = self.groups(judge)
                started = time.perf_counter()
                log = train_reward_model(self.reader, model, data, judge.fit, self.seed + 1000 * judge.init)
                seconds = time.perf_counter() - started
                record = {
                    "world": self.world.name,
                    "seed": self.seed,
                    "arm": name,
                    "fit": dataclasses.asdict(judge.fit),
                    "share_of_rollouts": round(share, 3),
                    "seconds": round(seconds),
                    "made_up": measure(self.reader, model, self.world.made_up("test", 512, SIZE, 0)),
                    "rollouts": measure(self.reader, model, self.held_out),
                    "backbone": self.start["backbone"],
                    "loss": [
                        round(statistics.fmean(log["loss"][i : i + 20]), 4) for i in range(0, len(log["loss"]), 20)
                    ],
                    "largest_gradient": [max(log["gradient"][i : i + 20]) for i in range(0, len(log["gradient"]), 20)],
                }
                torch.save(model.state_dict(), weights)
                write(result, record)
                say(self.world.name, self.seed, name, record["made_up"], record["rollouts"], f"{seconds:.0f} s")
            self.judges = {name: model}  # one at a time is enough
        return self.judges[name]

    def run(self, arm: str) -> None:
        """GRPO with an arm's judge."""
        result = self.results / f"policy-{arm}-seed{self.seed}.json"
        if result.is_file():
            return
        name, *rest = arm.split("@")
        options = dict(word.split("=", 1) for word in rest)
        fields = {field.name: field.type for field in dataclasses.fields(Run)}
        run = Run(
            **{
                key: value if fields[key] == "str" else (int if fields[key] == "int" else float)(value)
                for key, value in options.items()
                if key in fields
            }
        )
        others = {key: value for key, value in options.items() if key not in fields}
        model = None if name == "truth" else self.judge(name)
        reward = self.reward(model, others)
        policy = self.policy(self.weak)
        started = time.perf_counter()
        log, averaged = grpo(
            self.reader, policy, reward, run, self.seed, self.world.tasks("validation", VALIDATION, 0), model
        )
        seconds = time.perf_counter() - started
        tasks = self.world.tasks("test", TEST, 0)
        record: dict[str, Any] = {
            "world": self.world.name,
            "seed": self.seed,
            "arm": arm,
            "start": self.start["policy"],
            "end": greedy_accuracy(self.reader, policy, tasks),
            "seconds": round(seconds),
            "validation": log,
        }
        if model is not None:
            questions = self.world.tasks("validation", 256, 0)
            final = ranked(questions, sample_texts(self.reader, policy, questions, 8))
            record["final_rollouts"] = measure(self.reader, model, final) if final else None
        policy.load_state_dict(averaged)
        record["end_of_average"] = greedy_accuracy(self.reader, policy, tasks)
        write(result, record)
        say(self.world.name, self.seed, arm, record["start"], "->", record["end"], record["end_of_average"])

    def reward(self, model: Any, options: dict[str, str]) -> Any:
        """How the scores of a group become rewards: as they are, or one of the candidates."""
        if model is None:
            return lambda tasks, texts: [
                [float(task.is_correct(text)) for text in own] for task, own in zip(tasks, texts, strict=True)
            ]
        floor = float(options.get("floor", 0.0))
        also = [self.load(name) for name in options.get("also", "").split("+") if name]
        weak = self.policy(self.weak).eval() if "reference" in options else None

        def rewards(tasks: Sequence[Any], texts: Sequence[Sequence[str]]) -> list[list[float | None]]:
            asked = texts
            if weak is not None:  # the start policy's greedy answer is one more response, never rewarded
                greedy = generate(self.reader, weak, tasks, sample=False)[1]
                asked = [[*own, *one] for own, one in zip(texts, greedy, strict=True)]
            scores = score(self.reader, model, tasks, asked)
            if also:
                every = [scores, *(score(self.reader, other, tasks, asked) for other in also)]
                scores = [_joined([own[g] for own in every], options.get("how", "mean")) for g in range(len(tasks))]
            if weak is not None:
                kind = options["reference"]
                scores = [[_against(value, own[-1], kind) for value in own[:-1]] for own in scores]
            return [with_ties(own, floor) if floor else list(own) for own in scores]

        return rewards

    def load(self, name: str) -> Any:
        """A second judge beside the first."""
        kept = self.judges
        model = self.judge(name)
        self.judges = kept
        return model


def _joined(scores: Sequence[Sequence[float]], how: str) -> list[float]:
    """Scores of several judges as one: each standardised within the group, then mean, or less their deviation."""
    table = torch.tensor(scores)
    table = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
    joined = table.mean(0)
    if how == "doubt":
        joined = joined - table.std(0)
    return joined.tolist()


def _against(value: float, reference: float, kind: str) -> float:
    """A score against that of the reference answer: logistic, or what is above it does not count further."""
    gap = value - reference
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, gap)))) if kind == "logistic" else min(gap, 0.0)


def with_ties(scores: Sequence[float], floor: float) -> list[float | None]:
    """Scores closer than the floor to the next one are ties, at their mean; None where all are."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    runs = [[order[0]]]
    for i in order[1:]:
        if scores[i] - scores[runs[-1][-1]] < floor:
            runs[-1].append(i)
        else:
            runs.append([i])
    if len(runs) == 1:
        return [None] * len(scores)
    result: list[float | None] = [None] * len(scores)
    for one in runs:
        for i in one:
            result[i] = statistics.fmean(scores[j] for j in one)
    return result


def write(path: Path, record: dict[str, Any]) -> None:
    """One JSON file, whole or not at all."""
    with written_whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(record, indent=1) + "\n")


def say(*words: Any) -> None:
    """A line for whoever waits."""
    print(*words, file=sys.stderr, flush=True)


def main() -> None:
    """Run the cells that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rm", "policy"])
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--world", choices=list(SETUPS), default="handwriting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("outputs/judge_lab"), help="models and rollouts")
    parser.add_argument("--results", type=Path, default=Path("docs/results/judge_lab"), help="one JSON file a cell")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        cells = Seed(LeanWorld(options.world), seed, options.output, options.results)
        for arm in options.arms:
            cells.judge(arm) if options.what == "rm" else cells.run(arm)


if __name__ == "__main__":
    main()
