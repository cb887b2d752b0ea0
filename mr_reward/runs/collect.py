"""Rollouts of a policy as groups that nobody has ranked yet: newly written ones, or those that a run has logged.

The prompts are cut into batches of neighbours, each with a seed of its own and always done whole, so that a run that
was killed, or that had another number of processes, gives the same file. Every process writes its share to a part
beside the file, and the first one puts the parts together; no process waits inside a collective for another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, cast

from tqdm.auto import tqdm
from trl.data_utils import prepare_multimodal_messages

from mr_reward.data.groups_file import ScoredGroup, read_scored, row_from_group
from mr_reward.data.jsonl import ResumableJsonLines, write_json_lines
from mr_reward.data.media_files import resolve_media
from mr_reward.data.sources import RowSource, dataset_rows, read_rows
from mr_reward.errors import ConfigurationError, GroupError, MRRewardError, shown
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.groups import prompt_fingerprint
from mr_reward.messages.prompts import short_messages, tools_of
from mr_reward.runs.policy import Answer, PromptToAnswer, open_policy
from mr_reward.runs.recipe import PolicyArguments, PromptSource
from mr_reward.scorers.opening import DTYPES
from mr_reward.templates.images import DecodedImages, image_source

logger = logging.getLogger(__name__)

# Of a row of prompts: what becomes the group, and what an earlier collection or labelling has put there.
_READ = {"prompt", "image", "images", "video", "videos", "tools", "id", "source", "columns"}
_RESULTS = {"responses", "rankings", "ratings", "counts", "cut_off", "collected_with"}
_LOGGED = "step_*.jsonl"
_POLL_SECONDS = 0.5


@dataclass
class CollectArguments:
    """What is collected: the policy, the prompts, and how it is sampled (names and defaults of `GRPOConfig`).

    A recipe with prompts of its own is a subclass that adds the fields and names them in `sources`; see
    `mr_reward.worlds.world_policy.WorldCollectArguments`.
    """

    sources: ClassVar[Mapping[str, PromptSource]] = {}

    policy: str | None = field(default=None, metadata={"help": "Folder or hub id of the policy"})
    # As for GRPO: `prompt` (text or messages), `image(s)`, `video(s)`, `tools`, and what a verifier needs.
    dataset: str | None = field(default=None, metadata={"help": "File, folder, hub id, or a name in sources"})
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the data set"})
    out: str = field(default="rollouts.jsonl", metadata={"help": "The .jsonl file to write"})
    num_generations: int = field(default=8, metadata={"help": "Rollouts of a prompt"})
    limit: int | None = field(default=None, metadata={"help": "Only the first prompts"})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling"})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 for greedy, with one rollout"})
    top_p: float = field(default=1.0, metadata={"help": "Of the sampling"})
    top_k: int = field(default=0, metadata={"help": "Of the sampling; 0 for all tokens"})
    min_p: float | None = field(default=None, metadata={"help": "Of the sampling"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Of the sampling"})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens of a rollout"})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'For the chat template, as JSON: {"enable_thinking": false}'}
    )
    prompts_per_batch: int = field(default=8, metadata={"help": "Prompts that are answered at a time"})
    dtype: str | None = field(default=None, metadata={"help": "Of the policy's weights; None for the checkpoint's"})
    use_vllm: bool = field(default=False, metadata={"help": "By vLLM, one for each process"})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of the GPU's memory for vLLM"})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Context of vLLM"})

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except ValueError as error:
                raise ConfigurationError(
                    f"chat_template_kwargs is {self.chat_template_kwargs!r}, which is no JSON ({error})"
                ) from error
        least = {"num_generations": 1, "limit": 1, "max_completion_length": 1, "prompts_per_batch": 1, "top_k": 0}
        problems = [
            f"{name} is {getattr(self, name)}, expected at least {number}"
            for name, number in least.items()
            if getattr(self, name) is not None and getattr(self, name) < number
        ]
        if self.dtype not in (None, *DTYPES):
            problems.append(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}, expected a share above 0")
        if self.temperature < 0 or (self.temperature == 0 and self.num_generations > 1):
            problems.append(
                f"temperature is {self.temperature} with {self.num_generations} rollouts of a prompt, expected more "
                "than 0: they would all be equal"
            )
        if problems:
            raise ConfigurationError("; ".join(problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a file of rollouts holds."""

    groups: int
    responses: int  # that differ from all earlier ones of their group
    duplicates: int  # dropped; `counts` of a row says how often each of its responses came
    cut_off: int  # responses that had not come to their end
    single: int  # groups with one response only, so without anything to compare
    repeated_groups: int = 0  # of a run's log: dropped, with prompt and responses of an earlier one


def collect(arguments: CollectArguments, rows: RowSource | None = None) -> Collected | None:
    """Write a file of rollouts, or the rest of it; what it holds, None in the processes that only wrote a part.

    `rows`: the prompts, if they are not all those of the arguments.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if arguments.policy is None or arguments.dataset is None:
        name = "policy" if arguments.policy is None else "dataset"
        raise ConfigurationError(f"{name} is missing; give its file, folder or hub id")
    out = Path(arguments.out)
    rows = prompt_rows(arguments) if rows is None else rows
    settings, total = _settings(arguments, rows)
    digest = _digest(settings)
    if out.exists():
        return _finished(out, digest) if rank == 0 else None
    done: set[int] = set()
    with suppress(FileNotFoundError):  # the first process puts the parts together while this one reads them
        done = {index for index, _ in _part_rows(out, settings)}
    batches = range(rank, -(-total // arguments.prompts_per_batch), world)
    left = {number for number in batches if not done.issuperset(_indices(number, arguments, total))}
    if done and rank == 0:
        logger.info("%s: %d of %d prompts are there already", out, len(done), total)
    if left and not out.exists():
        _answer(arguments, rows, total, settings, left, _part(out, rank))
    return _put_together(out, settings, total) if rank == 0 else None


def _answer(
    arguments: CollectArguments, rows: RowSource, total: int, settings: Mapping[str, Any], left: set[int], path: Path
) -> None:
    """Write the rollouts of the batches that are left to the part of this process."""
    policy = open_policy(arguments)
    out, digest = Path(arguments.out), _digest(settings)
    with ResumableJsonLines(path) as part, tqdm(total=len(left), desc="collecting", unit=" batches") as bar:
        if not any(True for _ in part.rows()):
            part.write([{"collected_with": settings}])
        for number, batch in _batches(rows, arguments, total):
            if number not in left:
                continue
            prompts = [prompt_to_answer(row, place, rows.folder) for place, row in batch]
            answers = policy.answer(prompts, int(_digest([arguments.seed, number])[:15], 16))
            lines = []
            for index, (_, row), one, given in zip(
                _indices(number, arguments, total), batch, prompts, answers, strict=True
            ):
                name, source = row.get("id"), row.get("source") or arguments.policy
                group = _with(one.group, id=f"prompt {index}" if name is None else str(name), source=str(source))
                lines.append({"index": index, "row": _row(one.prompt, group, given, row, out, digest)})
            part.write(lines)
            bar.update()


def collect_logged(run: str | Path, out: str | Path, prompts: RowSource | None = None) -> Collected:
    """Write the groups that a GRPO run has logged (`log_groups_steps`) as a file of rollouts.

    `prompts`: the run's data set, whose further columns (what a verifier needs) go to the groups of equal prompts.
    """
    run, out = Path(run), Path(out)
    folder = run / "groups" if (run / "groups").is_dir() else run
    files = sorted(folder.glob(_LOGGED))
    if not files:
        raise ConfigurationError(f"{run} holds no groups/{_LOGGED}; train with log_groups_steps: 20")
    columns = None if prompts is None else _columns_by_prompt(prompts)
    seen: set[str] = set()
    repeated = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal repeated
        for file in files:
            for number, logged in enumerate(read_scored(file)):
                group, prompt = logged.group, prompt_fingerprint(logged.group)
                key = _digest([prompt, sorted(map(repr, group.responses))])
                if key in seen:
                    repeated += 1
                    continue
                seen.add(key)
                if columns is not None and prompt not in columns:
                    raise GroupError(
                        f"{file}, group {number}: no row of {prompts.name if prompts else ''} has its prompt; give "
                        "the data set that the run was trained on"
                    )
                yield _logged_row(logged, f"{file.stem} {number}", run, out, (columns or {}).get(prompt, {}))

    write_json_lines(out, rows())
    return _count(out, repeated)


def prompt_rows(arguments: CollectArguments) -> RowSource:
    """The rows of the prompts, from wherever they come."""
    name = str(arguments.dataset)
    if name not in arguments.sources:
        return read_rows(name, split=arguments.dataset_split)
    data = arguments.sources[name].load(
        cast(PolicyArguments, arguments),
        split=arguments.dataset_split or "train",
        evaluation=False,
        seed=arguments.seed,
        limit=arguments.limit,
    )
    return dataset_rows(data, name, Path())


def prompt_to_answer(row: Any, place: str, folder: Path) -> PromptToAnswer:
    """The prompt of a row, with its media opened by name only, as TRL's trainers read such a row."""
    try:
        if isinstance(row, GroupError):
            raise row
        if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str | list) or not row["prompt"]:
            found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise GroupError(f"found {found}, expected a prompt, which is a text or a list of messages")
        prompt: Any = row["prompt"]
        media = {kind: _media(row, kind) for kind in ("image", "video")}
        if isinstance(prompt, str):
            if media["image"] or media["video"]:
                raise GroupError(
                    "the prompt is text beside images or videos, where TRL's trainers expect chat messages; write "
                    '[{"role": "user", "content": ...}]'
                )
        else:
            prompt = [_without_nothing(turn) for turn in prompt]
        # TRL's own placing of images: text stays text, whatever stands in it.
        shown_prompt = prepare_multimodal_messages(prompt, media["image"]) if media["image"] else prompt
        videos = [[video] if isinstance(video, str) else video for video in media["video"]]
        tools = tools_of(row.get("tools"))
        group = ResponseGroup(prompt=shown_prompt, responses=[""], videos=videos, tools=tools, id=place)
        return PromptToAnswer(prompt=prompt, group=resolve_media(group, folder))
    except MRRewardError as error:
        raise GroupError(f"{place}: {error}") from error
    except (ValueError, TypeError, KeyError) as error:  # of TRL's placing
        raise GroupError(f"{place}: the prompt is no chat that TRL takes ({error!r}); fix it") from error


def _without_nothing(turn: Any) -> Any:
    """A turn without what parquet and Arrow fill in: keys that other rows have."""
    if not isinstance(turn, Mapping):
        return turn
    kept = {key: value for key, value in turn.items() if value is not None or key == "content"}
    content = kept.get("content")
    if isinstance(content, list):
        kept["content"] = [
            {key: value for key, value in block.items() if value is not None} if isinstance(block, Mapping) else block
            for block in content
        ]
    return kept


def _media(row: Mapping[str, Any], kind: str) -> list[Any]:
    one, many = row.get(kind), row.get(f"{kind}s")
    if many is not None:  # wins over the single one, as in TRL
        if not isinstance(many, list):
            raise GroupError(f"{kind}s is {shown(many, 60)}, expected a list; a single one goes under {kind!r}")
        return many
    return [] if one is None else [one]


def _with(group: ResponseGroup, **fields: Any) -> ResponseGroup:
    return replace(group, prompt=group.messages, **fields)


def _row(
    prompt: str | Sequence[Any],
    group: ResponseGroup,
    answers: Sequence[Answer],
    given: Mapping[str, Any],
    out: Path,
    digest: str,
) -> dict[str, Any]:
    """The line of a group: each response once, how often it came, and the columns of the prompt's row.

    In an order that is drawn: what a policy writes often comes first, and is right more often.
    """
    answers = random.Random(f"{digest} {group.id}").sample(answers, len(answers))
    whole = _with(group, responses=[answer.completion for answer in answers])
    counts = Counter(whole.responses)
    first = {response: whole.responses.index(response) for response in counts}
    columns = {key: value for key, value in given.items() if key not in _READ | _RESULTS and _is_json(value)}
    columns |= given.get("columns") or {}
    row = row_from_group(_with(whole, responses=list(counts)), out)
    if not isinstance(prompt, str):  # a verifier gets messages for messages
        row["prompt"] = short_messages(group.messages)
    row |= {"counts": list(counts.values()), "cut_off": [answers[i].cut_off for i in first.values()]}
    return {**row, **({"columns": columns} if columns else {}), "collected_with": digest}


def _logged_row(logged: ScoredGroup, name: str, run: Path, out: Path, columns: Mapping[str, Any]) -> dict[str, Any]:
    group = _with(logged.group, id=name, source=str(run), rankings=None)
    answers = [
        Answer(short_messages(turns) if (turns := getattr(response, "turns", None)) else response, False)
        for response in group.responses
    ]
    row = _row(group.messages, group, answers, {"columns": dict(columns)}, out, f"logged by {run.name}")
    del row["cut_off"]  # a run does not log it
    return row


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _columns_by_prompt(prompts: RowSource) -> dict[str, dict[str, Any]]:
    """Fingerprint of a prompt -> the further columns of its row; of equal prompts the first."""
    images = DecodedImages()
    found: dict[str, dict[str, Any]] = {}
    for place, row in prompts:
        group = prompt_to_answer(row, place, prompts.folder).group
        own = {key: value for key, value in row.items() if key not in _READ | _RESULTS and _is_json(value)}
        found.setdefault(prompt_fingerprint(group, images.digest), own | (row.get("columns") or {}))
    return found


def _settings(arguments: CollectArguments, rows: RowSource) -> tuple[dict[str, Any], int]:
    """What decides the rollouts, and the number of prompts; every prompt is looked at before anything is loaded."""
    names = "num_generations seed temperature top_p top_k min_p repetition_penalty max_completion_length"
    names += " chat_template_kwargs prompts_per_batch dtype use_vllm limit"
    found = hashlib.blake2b(digest_size=8)
    total = 0
    lost: set[str] = set()
    for place, row in rows:
        if total == arguments.limit:
            break
        one = prompt_to_answer(row, place, rows.folder)
        known = {key: value for key, value in row.items() if _is_json(value)}
        found.update(json.dumps([one.group.messages, known], sort_keys=True).encode())
        for medium in chain(one.group.images, *one.group.videos):
            if isinstance(source := image_source(medium), bytes):  # what is a path stands in the row
                found.update(source)
        lost |= set(row) - set(known) - _READ - _RESULTS
        total += 1
    if not total:
        raise ConfigurationError(f"{rows.name}: holds no prompt; give a data set with the column prompt")
    if lost:
        logger.warning("%s: the columns %s hold no JSON and are left out", rows.name, ", ".join(sorted(lost)))
    settings = {name: getattr(arguments, name) for name in names.split()}
    return {"policy": arguments.policy, "weights": _weights(str(arguments.policy)), **settings} | {
        "prompts": f"{total} {found.hexdigest()}"
    }, total


def _weights(policy: str) -> str | None:
    """What tells two saves to one folder apart; None of a hub id."""
    stats = [(file.name, file.stat()) for file in sorted(Path(policy).glob("*.safetensors"))]
    return _digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]) if stats else None


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _indices(number: int, arguments: CollectArguments, total: int) -> range:
    size = arguments.prompts_per_batch
    return range(number * size, min((number + 1) * size, total))


def _batches(
    rows: RowSource, arguments: CollectArguments, total: int
) -> Iterator[tuple[int, list[tuple[str, Mapping[str, Any]]]]]:
    batch: list[tuple[str, Mapping[str, Any]]] = []
    for index, row in enumerate(rows):
        if index == total:
            break
        batch.append(row)
        if len(batch) == arguments.prompts_per_batch or index == total - 1:
            yield index // arguments.prompts_per_batch, batch
            batch = []


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.part{rank}")


def _parts(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}.part*"))


def _part_rows(out: Path, settings: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index and line of all prompts that are answered; parts of other settings are refused."""
    for path in _parts(out):
        for number, line in ResumableJsonLines(path).rows():
            if number > 1:
                yield line["index"], line["row"]
                continue
            made = line.get("collected_with") if isinstance(line, dict) else None
            if made != json.loads(json.dumps(settings)):
                other = [key for key in settings if not isinstance(made, dict) or made.get(key) != settings[key]]
                raise ConfigurationError(
                    f"{path} was begun with other settings ({', '.join(other)}), so it cannot be resumed; name "
                    "another --out, give the settings that began it, or delete the part"
                )


def _put_together(out: Path, settings: Mapping[str, Any], total: int) -> Collected:
    """The whole file, once the other processes have written their parts; a launcher ends this one if one fails."""
    started = time.monotonic()
    while len(found := dict(_part_rows(out, settings))) < total:
        time.sleep(max(_POLL_SECONDS, 10 * (time.monotonic() - started)))  # of large files a look takes long
        started = time.monotonic()
    write_json_lines(out, (found[index] for index in range(total)))
    for path in _parts(out):
        path.unlink()
    return _count(out)


def _finished(out: Path, digest: str) -> Collected:
    _, first = next(ResumableJsonLines(out).rows(), (0, None))
    if not isinstance(first, dict) or first.get("collected_with") != digest:
        raise ConfigurationError(
            f"{out} is there already, from other settings, another policy or other prompts; name another --out"
        )
    logger.info("%s is complete", out)
    for path in _parts(out):  # a kill came between the two
        path.unlink()
    return _count(out)


def _count(out: Path, repeated_groups: int = 0) -> Collected:
    sums: Counter[str] = Counter()
    for _, row in ResumableJsonLines(out).rows():
        number = len(row["responses"])
        sums["groups"] += 1
        sums["responses"] += number
        sums["duplicates"] += sum(row["counts"]) - number
        sums["cut_off"] += sum(row.get("cut_off", ()))
        sums["single"] += number == 1
    names = ("groups", "responses", "duplicates", "cut_off", "single")
    return Collected(**{name: sums[name] for name in names}, repeated_groups=repeated_groups)
