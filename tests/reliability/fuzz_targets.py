"""Inputs that come from outside, damaged at random: JSON Lines, checkpoint folders, images, server requests.

Each target tries one input and says what became of it, "taken" or "refused"; anything else is raised.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from guard import SECRET, guarded
from PIL import Image
from random_groups import ALL_CONTROL_STRINGS
from tiny_models import checkpoint_groups, random_group, random_image, reward_model

from mr_reward import GroupScorer
from mr_reward.data.groups_file import ScoredGroup, load_preferences, read_scored, save_preferences, write_scored
from mr_reward.errors import MediaError, MRRewardError
from mr_reward.evaluation.benchmarks import open_benchmark
from mr_reward.groups import GroupScores
from mr_reward.scorers.wire import ScoreRequest, dump, to_wire
from mr_reward.serving.server import ServerLimits, build_app
from mr_reward.templates.images import load_image

Target = Callable[[random.Random, Path], str]
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F")
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX")


def damage(rng: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat, insert or overwrite bytes, a few times."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randint(0, len(data)), rng.randint(0, len(data))
        what = rng.randrange(6)
        if what == 0 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at:]
        elif what == 2:
            data[at:at] = data[min(at, other) : max(at, other)][:1000]
        elif what == 3:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif what == 4:
            del data[min(at, other) : min(at, other) + rng.randint(1, 40)]
        elif data:
            data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b'"}]{'])
    return bytes(data)


def odd_value(rng: random.Random, folder: Path) -> Any:
    """A JSON value that some reader did not expect."""
    secret = folder.parent / SECRET
    return rng.choice(
        [None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**40, "", "x" * 3000, "\ud800", "\0", [], {}, [[]]]
        + [f"../{SECRET}/a.png", str(secret / "a.png"), str(secret), "/etc/passwd", "file:///etc/passwd", "~", "."]
        + ["http://127.0.0.1:9/a.png", "https://example.org/a.png", {"bytes": "AAAA", "path": "/etc/passwd"}]
        + [[f"../{SECRET}/a.png"], {"type": "image", "image": str(secret / "a.png")}, [1] * 50, {"a": {"b": {}}}]
    )


def odd_json(rng: random.Random, value: Any, folder: Path) -> Any:
    """The value with one place of it changed, dropped, or doubled."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return odd_value(rng, folder)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        changed = {**value, key: odd_json(rng, value[key], folder)}
        if rng.random() < 0.1:
            del changed[key]
        return changed
    index = rng.randrange(len(value))
    changed_list = [*value]
    changed_list[index] = odd_json(rng, value[index], folder)
    return changed_list if rng.random() < 0.9 else changed_list * 2


def prepare(folder: Path) -> None:
    """What the targets start from, and beside it the files that nobody may open."""
    (folder.parent / SECRET).mkdir(exist_ok=True)
    random_image(random.Random(0)).save(folder.parent / SECRET / "a.png")
    rng = random.Random(1)
    groups = [
        random_group(rng, 3, images=1, id="a"),
        random_group(rng, 2, videos=1, id="b"),
        random_group(rng, 4, id="c"),
    ]
    ranked = [group.select(range(group.num_responses)) for group in groups]
    for group in ranked:
        object.__setattr__(group, "rankings", tuple(range(1, group.num_responses + 1)))
    save_preferences(ranked, folder / "ranked.jsonl")
    write_scored(
        [
            ScoredGroup(
                group=g,
                result=GroupScores(scores=(0.5,) * g.num_responses, truncated=(False,) * g.num_responses),
                step=3,
            )
            for g in groups
        ],
        folder / "scored.jsonl",
    )
    for name in ("llama", "qwen3_vl"):
        for kind, layout in (("", "set"), ("-other", "isolated")):
            reward_model(name, layout).save_pretrained(folder / f"{name}{kind}")
    shutil.copytree(folder / "llama", folder.parent / SECRET / "llama")


# --- JSON Lines ---


def fuzz_jsonl(rng: random.Random, folder: Path) -> str:
    """A file of groups, ranked or scored, with bytes or values of one line changed."""
    name = rng.choice(["ranked.jsonl", "scored.jsonl"])
    lines = (folder / name).read_bytes().splitlines()
    at = rng.randrange(len(lines))
    if rng.random() < 0.4:
        lines[at] = damage(rng, lines[at])
    else:
        lines[at] = json.dumps(odd_json(rng, json.loads(lines[at]), folder)).encode()
    path = folder / f"damaged-{name}"
    path.write_bytes(b"\n".join(lines))
    read: Callable[[], list[Any]] = {
        "ranked.jsonl": lambda: [*load_preferences(path, skip_bad=rng.random() < 0.3)],
        "scored.jsonl": lambda: [scored.group for scored in read_scored(path)],
    }[name]
    if name == "ranked.jsonl" and rng.random() < 0.3:
        read = lambda: [item.group for item in open_benchmark("groups", path)]  # noqa: E731
    with guarded():
        try:
            groups = read()
            for group in groups:
                for image in (*group.images, *(frame for video in group.videos for frame in video)):
                    load_image(image)
        except MRRewardError:
            return "refused"
    return "taken"


# --- checkpoints ---


def fuzz_checkpoint(rng: random.Random, folder: Path) -> str:
    """A folder with a file cut, flipped, exchanged, dropped, led elsewhere: it scores as before, or is refused."""
    name = rng.choice(["llama", "llama", "qwen3_vl"])
    copy = folder / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / name, copy)
    known = rng.random() < 0.2  # whether the checksums are still there
    if not known:
        (copy / "SHA256SUMS").unlink()
    files = sorted(path for path in copy.iterdir() if path.name != "README.md")
    path = rng.choice(files)
    kind = rng.choice(["damage", "damage", "json", "json", "json", "exchange", "drop", "empty", "lead out", "code"])
    if kind == "damage":
        path.write_bytes(damage(rng, path.read_bytes()))
    elif kind == "json":
        path = rng.choice([path for path in files if path.suffix == ".json"])
        path.write_text(json.dumps(odd_json(rng, json.loads(path.read_text()), folder)))
    elif kind == "exchange":
        shutil.copy(rng.choice([folder / f"{name}-other" / path.name, rng.choice(files)]), path.with_name("new"))
        path.with_name("new").replace(path)
    elif kind == "drop":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "lead out":
        _lead_out(rng, copy, folder.parent / SECRET / "llama")
    else:
        _bring_code(rng, copy)
    groups = checkpoint_groups(name)
    with guarded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is odd in a configuration
        try:
            scorer = GroupScorer.from_pretrained(copy)
        except MRRewardError:
            return "refused"
        try:
            scores = scorer.score(groups)
        except Exception:
            # Settings of a vision tower, say, that make no sense; with the checksums there it would not get so far.
            if known:
                raise
            return "refused"
    if kind == "lead out":
        raise AssertionError(f"{path.name}: weights outside of the folder were loaded")
    if known and not same(scores, GroupScorer(reward_model(name, "set")).score(groups)):
        raise AssertionError(f"{kind} of {path.name}: other scores, and nothing was said")
    return "taken"


def same(scores: list[list[float] | None], others: list[list[float] | None]) -> bool:
    return all(np.allclose(a or [], b or [], atol=1e-6) for a, b in zip(scores, others, strict=True))


def _lead_out(rng: random.Random, copy: Path, secret: Path) -> None:
    """Weights that are said to be somewhere else."""
    (copy / "model.safetensors").unlink()
    (copy / "SHA256SUMS").unlink(missing_ok=True)
    from safetensors import safe_open

    with safe_open(secret / "model.safetensors", "pt") as weights:
        keys = list(weights.keys())
    target = rng.choice([f"../../{SECRET}/llama/model.safetensors", str(secret / "model.safetensors")])
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, target)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))


def _bring_code(rng: random.Random, copy: Path) -> None:
    """Code and pickles, which must not be run; the guard notices."""
    config = json.loads((copy / "config.json").read_text())
    where = rng.choice([config, config["backbone_config"]])
    where["auto_map"] = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoProcessor": "own.Own"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("import os\nos.system('true')\n")
    payload = b"cos\nsystem\n(S'true'\ntR."
    for name in rng.sample(["pytorch_model.bin", "head.pt", "optimizer.pt", "tokenizer.pkl"], 2):
        (copy / name).write_bytes(payload)
    if rng.random() < 0.5:
        (copy / "model.safetensors").unlink()


# --- images ---


def fuzz_image(rng: random.Random, folder: Path) -> str:
    """A file of any kind, mode and orientation, damaged, or one that claims to be huge."""
    if rng.random() < 0.1:
        content = _bomb(rng)
    else:
        size = rng.choice([(1, 1), (1, 900), (33, 17), (64, 64)])
        image = Image.new(rng.choice(MODES), size)
        exif = Image.Exif()
        exif[0x0112] = rng.choice([1, 3, 6, 8, 0, 9, 65535])
        buffer = BytesIO()
        kind = rng.choice(FORMATS)
        options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        try:
            image.save(buffer, kind, **options)
        except (OSError, ValueError, SystemError, KeyError):  # this kind has no such mode or size
            image.convert("RGB").resize((16, 16)).save(buffer, kind, **options)
        content = buffer.getvalue()
        if rng.random() < 0.9:
            content = damage(rng, content)
    with guarded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata and large sizes
        try:
            loaded = load_image(content)
        except MediaError:
            return "refused"
    if loaded.mode != "RGB" or not loaded.width or not loaded.height:
        raise AssertionError(f"{loaded.mode}, {loaded.size}")
    return "taken"


def _bomb(rng: random.Random) -> bytes:
    """A PNG that says it has more pixels than it could hold, or unpacks to far more than it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = rng.choice([(2**31 - 1, 2**31 - 1), (60_000, 60_000), (2**31 - 1, 1), (0, 5)])
    header = struct.pack(">IIBBBBB", width, height, 8, rng.choice([0, 2, 3, 6]), 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1_000_000))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 30_000_000)) if rng.random() < 0.3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + body + chunk(b"IEND", b"")


# --- requests ---


def _other_texts(rng: random.Random, body: dict[str, Any]) -> None:
    """A request of the right form with other texts and other numbers of responses: what a policy can write."""
    group = rng.choice(body["groups"])
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(group["responses"]))
        group["responses"][at] = rng.choice(
            [*ALL_CONTROL_STRINGS, "", " ", "\0", "\ud800", "\u202e", '"}]{', "<|", "x" * rng.randint(1, 3000)]
        )
        group["responses"] *= rng.choice([1, 1, 2, 5])
    group["messages"][-1]["content"].append({"type": "text", "text": rng.choice(ALL_CONTROL_STRINGS)})


class RequestTarget:
    """Requests to one server; after each it is alive and scores as before."""

    def __init__(self) -> None:
        scorer = GroupScorer(reward_model("qwen3_vl"), max_tokens_per_batch=4096, over_length="drop_group")
        limits = ServerLimits(max_groups=8, max_request_bytes=300_000, max_pixels=100_000)
        self._app = build_app(scorer, token="right", limits=limits)
        rng = random.Random(5)
        self._groups = [random_group(rng, 3, images=1, id="a"), random_group(rng, 2, id="b")]
        self._expected = scorer.score(self._groups)
        self._count = 0
        self._loop = asyncio.new_event_loop()
        self._running = self._app.router.lifespan_context(self._app)
        self._loop.run_until_complete(self._running.__aenter__())

    def close(self) -> None:
        self._loop.run_until_complete(self._running.__aexit__(None, None, None))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def __call__(self, rng: random.Random, folder: Path) -> str:
        return self._loop.run_until_complete(asyncio.wait_for(self._one(rng, folder), 60))

    async def _one(self, rng: random.Random, folder: Path) -> str:
        body = json.loads(self._valid())
        kind = rng.choice(["texts", "texts", "value", "value", "bytes", "bomb", "envelope"])
        if kind == "texts":
            _other_texts(rng, body)
        elif kind == "value":
            body = odd_json(rng, body, folder)
        elif kind == "bomb":
            body["groups"][0]["images"] = [base64.b64encode(_bomb(rng)).decode()]
        content = json.dumps(body).encode()
        if kind == "bytes":
            content = damage(rng, content)
        method, path = "POST", "/v1/score"
        headers = {"content-type": "application/json", "authorization": "Bearer right"}
        if kind == "envelope":
            method = rng.choice(["POST"] * 3 + ["GET", "PUT", "DELETE", "HEAD"])
            path = rng.choice([path] * 3 + ["/health", "/", "/v1/score/../../etc/passwd", "/docs", "/%00"])
            headers = {
                "content-type": rng.choice(["application/json", "text/plain", "application/json; x=\xff", ""]),
                "authorization": rng.choice(["Bearer right", "Bearer wrong", "", "Basic \xff", "Bearer"]),
                "content-length": rng.choice([str(len(content)), "-1", "9" * 30, "x", "0"]),
            }
        with guarded():
            status, answer = await self._send(method, path, headers, content)
        if status >= 500 or (path == "/v1/score" and method == "POST" and not isinstance(answer, dict)):
            raise AssertionError(f"{method} {path} {headers} {content[:300]!r}: {status} {answer!r:.500}")
        if status == 200 and path == "/v1/score":
            for group, result in zip(json.loads(content)["groups"], answer["results"], strict=True):
                if result["scores"] is not None and len(result["scores"]) != len(group["responses"]):
                    raise AssertionError(f"{content[:300]!r}: {len(result['scores'])} scores")
                if result["scores"] is not None and not np.isfinite(result["scores"]).all():
                    raise AssertionError(f"{content[:300]!r}: {result}")
        valid = self._valid()
        good = {"content-type": "application/json", "authorization": "Bearer right"}
        alive, scored = await self._send("POST", "/v1/score", good, valid)
        if alive != 200 or not same([result["scores"] for result in scored["results"]], self._expected):
            raise AssertionError(f"after {content[:300]!r} the server answers {alive} {scored!r:.300}")
        return "taken" if status == 200 else "refused"

    def _valid(self) -> bytes:
        self._count += 1
        groups = [to_wire(group, str(i)) for i, group in enumerate(self._groups)]
        return dump(ScoreRequest(request_id=f"request-{self._count:08d}", groups=groups))

    async def _send(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        sent: list[dict[str, Any]] = []
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return waiting.pop() if waiting else await asyncio.Future()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode("latin-1"), "query_string": b"", "root_path": "",
            "headers": [(key.encode(), value.encode("latin-1")) for key, value in headers.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await self._app(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in sent[1:])
        try:
            return sent[0]["status"], json.loads(content)
        except ValueError:
            return sent[0]["status"], content


def targets() -> dict[str, Target]:
    """Each input by name."""
    return {
        "jsonl": fuzz_jsonl,
        "checkpoint": fuzz_checkpoint,
        "image": fuzz_image,
        "request": RequestTarget(),
    }
