"""Small folders in the published schemas of the benchmarks, with random content."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

Row = dict[str, Any]


def picture(seed: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (32, 32), (seed % 256, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def text(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefg hij") for _ in range(rng.randint(1, 30)))


def vl_rewardbench(folder: Path, rng: random.Random) -> list[Row]:
    """Ids of all sources; one of them twice, as in the published file."""
    names = ["RLAIF-V-1", "RLHF-V-2", "hallucination_pair-3", "mathverse_4", "mmmu_5", "wildvision-battle-6", "svit-7"]
    rows = []
    for i in range(30):
        rows.append(
            {
                "id": names[i % len(names)] if i < 9 else f"{rng.choice(names)}{i}",
                "query": f"Question {i}?",
                "response": [text(rng), text(rng)],
                "image": {"bytes": picture(i), "path": f"{i}.png"},
                "human_ranking": rng.choice([[0, 1], [1, 0]]),
                "models": ["a", "b"],
                "judge": "",
            }
        )
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return rows


def multimodal_rewardbench(folder: Path, rng: random.Random) -> list[Row]:
    kinds = [
        ("correctness", "nocaps"),
        ("preference", "llava"),
        ("knowledge", "mmmu"),
        ("reasoning", "math"),
        ("reasoning", "emma-coding"),
        ("safety", "pairs"),
        ("safety", "toxic"),
        ("vqa", "realworldqa"),
    ]
    rows = []
    for i in range(40):
        category, source = kinds[i % len(kinds)]
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / f"{i}.png").write_bytes(picture(i))
        rows.append(
            {
                "ID": f"{source}_{i}",
                "Text": f"<image>Question {i}?",
                "Image": f"images/{i}.png",
                "Output1": text(rng),
                "Output2": text(rng),
                "Better": rng.choice(["Output1", "Output2"]),
                "Category": category,
            }
        )
    (folder / "all_data.json").write_text(json.dumps(rows))
    return rows


def mm_rlhf_rewardbench(folder: Path, rng: random.Random) -> list[Row]:
    """Several pairs of an id; the video is a folder of frames."""
    rows = []
    for i in range(36):
        kind = ["mcq", "long", "short", "safety", "video"][i // 2 % 5]
        path = f"{kind}/{i:06d}"
        if kind == "video":
            (folder / path).mkdir(parents=True)
            for frame in range(2):
                (folder / path / f"{frame}.png").write_bytes(picture(frame))
        else:
            path += ".png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(picture(i))
        row = {"id": str(i // 4), "prompt": f"Question {i}?", "chosen": text(rng), "rejected": text(rng)}
        rows.append({**row, "video" if kind == "video" else "image": path, "chosen_reason": ""})
    write_jsonl(folder / "mm_reward_bench.jsonl", rows)
    return rows


def video_rewardbench(folder: Path, rng: random.Random) -> list[Row]:
    kinds = ["Long-form Perception", "Short-form Perception", "Knowledge", "Reasoning", "Safety"]
    rows = []
    for i in range(30):
        (folder / "videos" / str(i)).mkdir(parents=True)
        for frame in range(2):
            (folder / "videos" / str(i) / f"{frame}.png").write_bytes(picture(frame))
        row = {"question": f"Question {i}?", "chosen": text(rng), "rejected": text(rng)}
        rows.append({**row, "video": f"videos/{i}", "dimension": rng.choice(kinds)})
    write_jsonl(folder / "test.jsonl", rows)
    return rows


def mr2bench(folder: Path, rng: random.Random) -> list[Row]:
    """Both of them in one file; ranks with ties, from 1."""
    rows = []
    for i in range(40):
        (folder / "frames" / str(i)).mkdir(parents=True)
        (folder / "frames" / str(i) / "0.png").write_bytes(picture(i))
        (folder / "frames" / str(i) / "1.png").write_bytes(picture(i))
        media = {"image": f"frames/{i}/0.png"} if i % 2 else {"video": f"frames/{i}"}
        ranking = rng.choice([[1, 2, 3, 4], [4, 1, 2, 3], [2, 1, 1, 3], [1, 1, 2, 2]])
        rows.append({"id": f"q{i}", "prompt": f"Question {i}?", "responses": [text(rng) for _ in range(4)],
                     "ranking": ranking, **media})  # fmt: skip
    write_jsonl(folder / "test.jsonl", rows)
    return rows


def rewardbench_2(folder: Path, rng: random.Random) -> list[Row]:
    rows = []
    for i in range(30):
        domain = ["Factuality", "Precise IF", "Math", "Safety", "Focus"][i % 5]
        rows.append({"id": str(i), "subset": domain, "chosen": [text(rng)], "rejected": [text(rng) for _ in range(3)]})
    for i in range(8):
        rows.append({"id": f"ref:{i}", "subset": "Ties", "chosen": [text(rng)], "rejected": [text(rng), text(rng)]})
        chosen = [text(rng) for _ in range(3)]
        rows.append({"id": f"tied:{i}", "subset": "Ties", "chosen": chosen, "rejected": [text(rng) for _ in range(9)]})
    for i, row in enumerate(rows):
        row.update(prompt=f"Question {i}?", num_correct=len(row["chosen"]), total_completions=4, models=["a"])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return rows


WRITERS: dict[str, Callable[[Path, random.Random], list[Row]]] = {
    "vl_rewardbench": vl_rewardbench,
    "multimodal_rewardbench": multimodal_rewardbench,
    "mm_rlhf_rewardbench": mm_rlhf_rewardbench,
    "video_rewardbench": video_rewardbench,
    "mr2bench_image": mr2bench,
    "mr2bench_video": mr2bench,
    "rewardbench_2": rewardbench_2,
}
