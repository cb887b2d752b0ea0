"""Thousands of reward calls on two processes, and thousands of requests to a server: memory, handles, threads, scores.

    python tests/reliability/soak.py --calls 2000 --requests 10000 --out soak

Writes `soak.json` and `soak.png`. Every group that was scored is in the log of its rank; the log is replayed in a
single process afterwards, and every score has to come out again.
"""

# ruff: noqa: E402  run as a script, it has to find the shared modules of the tests
from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tiny_models import random_image, random_text, reward_model

from mr_reward import GroupScorer, MultiResponseReward
from mr_reward.data.groups_file import read_scored
from mr_reward.grpo.telemetry import GroupLog
from mr_reward.scorers.remote import RemoteScorer

SAME = 1e-5
GENERATIONS = 4
IDLE_SECONDS = 12  # longer than the server's pool (anyio's) keeps a thread without work


def state_of(pid: int) -> dict[str, float]:
    """Resident memory in MB, open handles and threads of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss": int(fields["VmRSS"].split()[0]) / 1024,
        "handles": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


# --- reward calls ---


def draw_call(rng: random.Random) -> tuple[list[Any], list[Any], list[int]]:
    """Rows of both ranks in TRL's shapes, half of them with an image, and how many rows each rank holds."""
    num_groups = 2 * rng.randint(1, 3)
    prompts, completions = [], []
    for _ in range(num_groups):
        blocks: list[dict[str, Any]] = [{"type": "text", "text": random_text(rng, 60, 1)}]
        if rng.random() < 0.5:
            blocks.insert(0, {"type": "image", "image": random_image(rng)})
        for _ in range(GENERATIONS):
            prompts.append([{"role": "user", "content": blocks}])
            completions.append([{"role": "assistant", "content": random_text(rng, rng.choice([0, 5, 40, 200]))}])
    rows = num_groups * GENERATIONS
    first = rows // 2 + rng.choice([-1, 0, 0, 1])  # groups straddle the ranks
    return prompts, completions, [first, rows - first]


def run_rank(folder: Path, calls: int) -> None:
    """One of the two processes."""
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    torch.set_num_threads(1)
    log = GroupLog(folder / "groups", every=1)
    reward = MultiResponseReward(str(folder / "rm"), GENERATIONS, device="cpu", group_log=log)
    rng = random.Random(0)  # the same on both ranks
    samples, rewards = [], []
    for call in range(calls):
        prompts, completions, counts = draw_call(rng)
        start = sum(counts[:rank])
        mine = slice(start, start + counts[rank])
        rewards.append(
            reward(
                prompts=prompts[mine],
                completions=completions[mine],
                trainer_state=SimpleNamespace(global_step=call),
                log_metric=lambda name, value: None,
                log_extra=lambda name, column: None,
            )
        )
        if call % max(1, calls // 40) == 0 or call == calls - 1:
            samples.append({"at": call, **state_of(os.getpid())})
    (folder / f"rank{rank}.json").write_text(json.dumps({"samples": samples, "rewards": rewards}))
    dist.destroy_process_group()


def soak_reward(folder: Path, calls: int) -> dict[str, Any]:
    """Call the reward on two processes, then replay their logs here."""
    reward_model("qwen3_vl").save_pretrained(folder / "rm")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    command = [sys.executable, __file__, "--rank-of", str(folder), "--calls", str(calls)]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    codes = [process.wait() for process in ranks]
    if codes != [0, 0]:
        raise RuntimeError(f"the processes ended with {codes}")
    records = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    scorer, largest, replayed = GroupScorer.from_pretrained(folder / "rm"), 0.0, 0
    rng = random.Random(0)
    for call in range(calls):
        _, completions, counts = draw_call(rng)
        rewards = records[0]["rewards"][call] + records[1]["rewards"][call]
        if [len(record["rewards"][call]) for record in records] != counts:
            raise RuntimeError(f"call {call}: a rank got another number of rewards than it had rows")
        logged = [
            scored
            for path in sorted((folder / "groups").glob(f"step_{call + 1:05d}.rank*.jsonl"))
            for scored in read_scored(path)
        ]
        if len(logged) * GENERATIONS != len(rewards):
            raise RuntimeError(f"call {call}: the log holds {len(logged)} groups, expected {len(rewards) // 4}")
        for scored, scores in zip(logged, scorer.score([one.group for one in logged]), strict=True):
            index = int(str(scored.group.id).split()[-1])
            mine = slice(index * GENERATIONS, (index + 1) * GENERATIONS)
            texts = tuple(turns[0]["content"] for turns in completions[mine])
            if scored.group.responses != texts or scores is None or scored.scores is None or scored.rewards is None:
                raise RuntimeError(f"call {call}, {scored.group.id}: the log holds another group than was drawn")
            pairs = [*zip(scores, scored.scores, strict=True), *zip(rewards[mine], scored.rewards, strict=True)]
            largest = max([largest, *(abs(one - other) for one, other in pairs)])
            replayed += 1
    return {
        "calls": calls, "replayed": replayed, "largest_difference": largest,
        "processes": {f"rank {rank}": record["samples"] for rank, record in enumerate(records)},
    }  # fmt: skip


# --- a server ---


def soak_server(folder: Path, requests: int) -> dict[str, Any]:
    """Ask a server from eight threads; each answer is compared with the score in this process."""
    reward_model("qwen3_vl").save_pretrained(folder / "rm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from mr_reward.cli import main; main()", "serve", str(folder / "rm"), "--port"]
    server = subprocess.Popen([*command, str(port)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    rng = random.Random(1)
    groups = []
    while len(groups) < 40:
        prompts, completions, _ = draw_call(rng)
        groups.append(_group(prompts[:GENERATIONS], completions[:GENERATIONS]))
    expected = GroupScorer.from_pretrained(folder / "rm").score(groups)
    samples: list[dict[str, float]] = []
    differences, done, lock = [0.0], [0], threading.Lock()
    remote = RemoteScorer(f"http://127.0.0.1:{port}", deadline=300.0, max_in_flight=8, groups_per_request=1)
    try:
        remote.connect(deadline=120.0)

        def ask(seed: int) -> None:
            own = random.Random(seed)
            for _ in range(requests // 8):
                index = own.randrange(len(groups))
                (scores,) = remote.score([groups[index]])
                largest = max(abs(a - b) for a, b in zip(scores or [], expected[index] or [], strict=True))
                with lock:
                    differences.append(largest)
                    if done[0] % max(1, requests // 40) == 0:
                        samples.append({"at": done[0], **state_of(server.pid)})
                    done[0] += 1

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Threads that read requests come and go with the load: those that idled go at the next request.
        time.sleep(IDLE_SECONDS)
        remote.score(groups[:1])
        samples.append({"at": done[0], **state_of(server.pid)})
    finally:
        remote.close()
        server.terminate()
        code = server.wait(90)
    return {
        "requests": done[0], "largest_difference": max(differences), "exit_code": code,
        "processes": {"server": samples},
    }  # fmt: skip


def _group(prompts: list[Any], completions: list[Any]) -> Any:
    from mr_reward import ResponseGroup

    return ResponseGroup(prompt=prompts[0], responses=[turns[0]["content"] for turns in completions])


# --- report ---


def summary(samples: list[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Each quantity after the first tenth (caches are full by then), in the middle, and at the end."""
    after = [one for one in samples if one["at"] >= samples[-1]["at"] / 10]
    picked = after[0], after[len(after) // 2], after[-1]
    return {key: tuple(one[key] for one in picked) for key in ("rss", "handles", "threads")}  # type: ignore[misc]


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Table("process", "quantity", "first (of all)", "after a tenth", "middle", "end")
    for result in results.values():
        for name, samples in result["processes"].items():
            for key, values in summary(samples).items():
                table.add_row(name, key, f"{samples[0][key]:.0f}", *(f"{value:.0f}" for value in values))
    console = Console()
    console.print(table)
    for name, result in results.items():
        console.print({name: {key: value for key, value in result.items() if key != "processes"}})


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 3.2), squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for process, samples in result["processes"].items():
            axis.plot([one["at"] for one in samples], [one["rss"] for one in samples], label=process)
        axis.set(xlabel=name, ylabel="resident memory, MB")
        axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="soak the reward and the server")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        run_rank(options.rank_of, options.calls)
        return 0
    results = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        for name, run, count in (
            ("reward calls", soak_reward, options.calls),
            ("requests", soak_server, options.requests),
        ):
            folder = Path(root, name.split()[0])
            folder.mkdir()
            results[name] = run(folder, count)
    show(results)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.json").write_text(json.dumps(results) + "\n")
    plot(results, options.out / "soak.png")
    Console().print(f"{time.perf_counter() - started:.0f} s")
    return 0 if all(result["largest_difference"] <= SAME for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
