"""One rank of the distributed reward tests, and the fake scorer that they share.

Run as `python reward_worker.py SCENARIO RENDEZVOUS_FILE RESULT_FOLDER [REWARD_MODEL_FOLDER]` with RANK and WORLD_SIZE
set. Without a reward model folder the scorer is a fake one. Writes `rank{RANK}.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

import mr_reward.grpo.reward as reward_module
from mr_reward.errors import MRRewardError
from mr_reward.groups import GroupScores, ResponseGroup
from mr_reward.grpo.reward import MultiResponseReward
from mr_reward.grpo.truth import Truth
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.scorer import memory_advice
from mr_reward.worlds.tiny import build_llama, build_tokenizer

ROWS_PER_RANK = (2, 3, 4, 6)
GROUP_SIZES = (4, 6)


class WholeGroupScorer:
    """Deterministic scores that change if any response, their order, the prompt or an image changes."""

    def __init__(self) -> None:
        self.calls: list[list[ResponseGroup]] = []

    def score_detailed(self, groups: list[ResponseGroup]) -> list[GroupScores]:
        self.calls.append(list(groups))
        return [self._score(group) for group in groups]

    def _score(self, group: ResponseGroup) -> GroupScores:
        flags = tuple(response.endswith("cut") for response in group.responses)
        if "drop" in group.responses:
            return GroupScores(scores=None, truncated=flags, drop_reason="too long")
        images = [(image.mode, image.size, image.tobytes()) for image in group.images]
        context = repr((group.messages, images, group.responses))
        scores = tuple(_unit(context + response) + i for i, response in enumerate(group.responses))
        return GroupScores(scores=scores, truncated=flags)


STALL_SECONDS = 12.0
DEADLINE_SECONDS = 3.0


class FailingScorer(WholeGroupScorer):
    """On one rank: raises, runs out of memory, ends its process without a word, or does not come back in time."""

    def __init__(self, rank: int, fault: str) -> None:
        super().__init__()
        self.rank, self.fault = rank, fault

    def score_detailed(self, groups: list[ResponseGroup]) -> list[GroupScores]:
        if int(os.environ["RANK"]) == self.rank:
            if self.fault == "die":
                os._exit(7)
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "stall":
                time.sleep(STALL_SECONDS)
            if self.fault == "memory":
                with memory_advice("lower it"):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            if self.fault == "raise":
                raise ZeroDivisionError("the scorer broke")
        return super().score_detailed(groups)


def _unit(text: str) -> float:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def make_rows(num_rows: int, group_size: int) -> tuple[list[Any], list[Any]]:
    """A global batch in TRL's shapes: groups 0 and 1 share the prompt, later ones have others."""
    prompts, completions = [], []
    for row in range(num_rows):
        index = max(row // group_size - 1, 0)
        image = Image.new("RGB", (28, 28), (index, 0, 0))  # equal content, another object in every row
        blocks = [{"type": "image", "image": image}, {"type": "text", "text": f"Which digit? ({index})"}]
        prompts.append([{"role": "user", "content": blocks}])
        text = "the same" if row % group_size in (1, 2) else f"row {row} " + "\ud800" * (row % 3)
        completions.append([{"role": "assistant", "content": text}])
    return prompts, completions


def references(num_rows: int, group_size: int) -> list[str | None]:
    """A column `reference_response` for `make_rows`; every third group has none."""
    return [None if row // group_size % 3 == 2 else f"reference {row // group_size}" for row in range(num_rows)]


def third(completions: list[Any], **_: Any) -> list[float | None]:
    """A truth of three grades that follows from the text alone; None for some texts."""
    units = [_unit(completion[-1]["content"]) for completion in completions]
    return [None if unit < 0.1 else float(int(3 * unit)) for unit in units]


def call(
    reward: MultiResponseReward, prompts: list[Any], completions: list[Any], *, truth: Any = None, **columns: Any
) -> dict[str, Any]:
    """Call a reward as TRL does, and a truth behind it; the rewards, or the error, and everything that was logged."""
    metrics: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    started = time.monotonic()
    record: dict[str, Any] = {"metrics": metrics, "extra": extra}
    try:
        record["rewards"] = reward(
            prompts=prompts,
            completions=completions,
            completion_ids=[[0]] * len(prompts),
            trainer_state=SimpleNamespace(global_step=12),
            log_metric=metrics.__setitem__,
            log_extra=extra.__setitem__,
            **columns,
        )
        if truth is not None:
            given = {"prompts": prompts, "completions": completions, "log_metric": metrics.__setitem__}
            record["truth"] = Truth(truth, reward)(**given)
    except (MRRewardError, ZeroDivisionError, torch.OutOfMemoryError) as error:
        record["error"] = type(error).__name__
        record["message"] = "\n".join([str(error), *getattr(error, "__notes__", [])])
    record["seconds"] = time.monotonic() - started
    return record


def use_scorer(scorer: WholeGroupScorer) -> None:
    """Make every reward built from now on use this scorer."""
    reward_module.open_scorer = lambda model, **options: scorer


def run(scenario: str, model: str | None) -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    records = {}
    if scenario in ("die", "kill", "stall", "stall the first"):
        fault, _, first = scenario.partition(" the ")
        use_scorer(FailingScorer(0 if first else 1, fault))
        cases = [(4, 4)]
    elif scenario == "weights":
        torch.manual_seed(rank)  # a value head of its own on each rank
        own = MultiResponseRewardModel.from_backbone(build_llama(), processor=build_tokenizer())
        prompts, completions = ["p"] * 2, ["a", "b"]
        return {"first": call(MultiResponseReward(own, 2, device="cpu"), prompts, completions)}
    elif scenario in ("fail", "memory"):
        use_scorer(FailingScorer(1, "raise" if scenario == "fail" else scenario))
        cases = [(4, 4)]
    elif scenario.startswith("only "):  # as in "only 4x16"
        use_scorer(WholeGroupScorer())
        rows, size = scenario.removeprefix("only ").split("x")
        cases = [(int(rows), int(size))]
    else:
        if model is None:
            use_scorer(WholeGroupScorer())
        cases = [(rows, size) for rows in ROWS_PER_RANK for size in GROUP_SIZES]
    for rows, size in cases:
        prompts, completions = make_rows(rows * world_size, size)
        mine = slice(rank * rows, (rank + 1) * rows)
        timeout = DEADLINE_SECONDS if scenario.startswith("stall") else 120.0
        reward = MultiResponseReward(model or "fake", size, device="cpu", timeout=timeout)
        column: dict[str, Any] = {}
        if scenario == "equal":
            column = {"reference_response": references(rows * world_size, size)[mine], "truth": third}
        records[f"{rows}x{size}"] = call(reward, prompts[mine], completions[mine], **column)
        if scenario in ("fail", "memory"):
            # a rollout that cannot be read, on the last rank only; and after two failures a call that works
            broken = [[{"role": "assistant", "content": [{"type": "image"}]}]] * rows
            last = rank == world_size - 1
            use_scorer(WholeGroupScorer())
            reward = MultiResponseReward("fake", size)
            records["unreadable"] = call(reward, prompts[mine], broken if last else completions[mine])
            records["recovered"] = call(reward, prompts[mine], completions[mine])
    return records


def main() -> None:
    scenario, rendezvous, folder, *model = sys.argv[1:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    records = run(scenario, model[0] if model else None)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(records))
    if not scenario.startswith(("die", "kill", "stall")):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
