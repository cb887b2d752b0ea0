"""The handwriting world as benchmarks of each type: to try `mr-reward evaluate` with nothing downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mr_reward.data.jsonl import write_json_lines
from mr_reward.data.media_files import write_image
from mr_reward.groups import ResponseGroup
from mr_reward.worlds.handwriting import make_groups

__all__ = ["HANDWRITING_BENCHMARKS", "write_handwriting_benchmarks"]

HANDWRITING_BENCHMARKS: Mapping[str, str] = {  # folder -> the benchmark as which it is read
    "pairs": "vl_rewardbench",
    "best_of_4": "mr2bench_image",
    "n_way": "mr2bench_image",
    "video": "mr2bench_video",
}


def write_handwriting_benchmarks(
    folder: str | Path, num_items: int = 256, *, num_digits: int = 2, seed: int = 0
) -> dict[str, int]:
    """Write four benchmarks of unseen scans in published schemas.

    `pairs`: a right and a wrong answer, as VL-RewardBench; `best_of_4`: one best of four, as MR2Bench-Image; `n_way`:
    eight answers with ties, the same; `video`: four answers to a video of one digit a second, as MR2Bench-Video. At
    least two digits are shown. Returns the number of items by folder.
    """
    folder = Path(folder)
    # More groups than needed: not every one has a single best answer.
    four = make_groups("test", 4 * num_items, num_responses=4, num_digits=num_digits, seed=seed)
    single_best = [group for group in four if list(group.rankings or ()).count(1) == 1][:num_items]
    eight = make_groups("test", num_items, num_responses=8, num_digits=num_digits, seed=seed)
    videos = make_groups("test", num_items, num_responses=4, num_digits=num_digits, media="video", seed=seed)
    rows = {
        "pairs": [_pair(group, folder / "pairs", i) for i, group in enumerate(single_best)],
        "best_of_4": [_ranked(group, folder / "best_of_4") for group in single_best],
        "n_way": [_ranked(group, folder / "n_way") for group in eight],
        "video": [_ranked(group, folder / "video") for group in videos],
    }
    for name, content in rows.items():
        write_json_lines(folder / name / "test.jsonl", content)
    return {name: len(content) for name, content in rows.items()}


def _pair(group: ResponseGroup, folder: Path, number: int) -> dict[str, Any]:
    """The best answer and the worst; the best comes first in every second pair."""
    ranks = list(group.rankings or ())
    pair = group.select([ranks.index(1), ranks.index(max(ranks))][:: 1 if number % 2 else -1])
    return {
        "id": f"wildvision-{group.id}",
        "query": _text(group),
        "response": list(pair.responses),
        "human_ranking": [rank - 1 for rank in pair.rankings or ()],
        **_media(group, folder),
    }


def _ranked(group: ResponseGroup, folder: Path) -> dict[str, Any]:
    row = {"id": group.id, "prompt": _text(group), "responses": list(group.responses), "rankings": group.rankings}
    return {**row, **_media(group, folder)}


def _text(group: ResponseGroup) -> str:
    return "".join(block.get("text", "") for turn in group.messages for block in turn["content"])


def _media(group: ResponseGroup, folder: Path) -> dict[str, str]:
    if group.videos:
        frames = folder / "frames" / str(group.id)
        frames.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(group.videos[0]):
            frame.save(frames / f"{number}.png")
        return {"video": str(frames.relative_to(folder))}
    return {"image": str(write_image(group.images[0], folder / "images").relative_to(folder))}
