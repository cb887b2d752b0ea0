"""The handwriting world against its definition: splits, grades, rankings, and what a reader without eyes could win."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits

from mr_reward.errors import ConfigurationError
from mr_reward.groups import ResponseGroup
from mr_reward.worlds.handwriting import (
    HANDWRITING_BENCHMARKS,
    QUESTIONS,
    SPLITS,
    TILE_SIZE,
    HandwritingTask,
    correct_answer,
    grade,
    is_correct,
    make_groups,
    make_policy_rows,
    make_sft_rows,
    make_tasks,
    split_scans,
    write_handwriting_benchmarks,
)

LABELS = load_digits().target


def naive_grade(question: str, digits: tuple[int, ...], response: str) -> float:
    """The table in the documentation of `grade`, written down a second time and in another way."""
    answers = {
        "read": "".join(str(digit) for digit in digits),
        "sum": str(sum(digits)),
        "largest": str(sorted(digits)[-1]),
        "even": str(len([digit for digit in digits if digit in (0, 2, 4, 6, 8)])),
    }
    answer = answers[question]
    text = response.strip()
    if text == answer:
        return 1.0
    numbers = "".join(character if character in "0123456789" else " " for character in text).split()
    if not numbers:
        refuses = any(word in text for word in ("cannot", "can't", "Not sure", "No idea"))
        return 0.1 if refuses and len(text) <= 30 else 0.0
    if any(number != numbers[0] for number in numbers):
        return 0.0
    factor = 1.0 if text == numbers[0] else 0.8 if len(text) <= 30 else 0.5
    if numbers[0] == answer:
        return factor
    if question == "read":
        in_place = 0
        for place in range(min(len(answer), len(numbers[0]))):
            in_place += answer[place] == numbers[0][place]
        share = in_place / max(len(answer), len(numbers[0]))
    else:
        distance = abs(int(numbers[0]) - int(answer))
        share = max(0.0, 1 - distance / {"sum": 5, "largest": 4, "even": 2}[question])
    return round(max(0.05, 0.45 * share) * factor, 6)


def naive_ranks(qualities: list[float]) -> list[int]:
    return [1 + len({other for other in qualities if other > quality}) for quality in qualities]


def pick_rate(groups: list[ResponseGroup], key: Callable[[str], float]) -> float:
    """Best-of-N accuracy of taking the response with the largest key, ties by an even chance."""
    rates = []
    for group in groups:
        keys = [key(response) for response in group.responses]
        picked = [rank for rank, value in zip(group.rankings or (), keys, strict=True) if value == max(keys)]
        rates.append(mean(rank == 1 for rank in picked))
    return mean(rates)


def fingerprint(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_splits_share_no_scan_and_leave_none_out() -> None:
    scans = {split: split_scans(split) for split in SPLITS}
    everything = np.concatenate(list(scans.values()))
    assert sorted(everything.tolist()) == list(range(1797))
    for split, share in SPLITS.items():
        for digit in range(10):
            count = int((LABELS == digit).sum())
            assert abs(int((LABELS[scans[split]] == digit).sum()) - share * count) <= 1


def test_the_split_is_a_property_of_the_data() -> None:
    """Changing it would silently change every number that was reported."""
    digest = hashlib.sha256(",".join(map(str, split_scans("test").tolist())).encode()).hexdigest()
    assert digest[:16] == "d8fe833167ca4b97"
    with pytest.raises(ValueError, match="read-only"):
        split_scans("test")[0] = 0


@pytest.mark.parametrize("split", SPLITS)
def test_tasks_use_the_scans_of_their_split_only(split: str) -> None:
    tasks = make_tasks(split, 100, num_digits=4, seed=5)
    used = {scan for task in tasks for scan in task.scans}
    assert used <= set(split_scans(split).tolist())
    for task in tasks:
        assert task.digits == tuple(LABELS[list(task.scans)])
        assert len(set(task.scans)) == 4


def test_images_of_two_splits_are_never_the_same() -> None:
    tiles = {
        split: {fingerprint(frame) for task in make_tasks(split, 300) for frame in task.frames()} for split in SPLITS
    }
    assert not tiles["train"] & tiles["test"]
    assert not tiles["train"] & tiles["validation"]
    assert not tiles["validation"] & tiles["test"]


def test_image_and_frames_show_the_scans() -> None:
    task = make_tasks("test", 1, num_digits=3, seed=1)[0]
    image = task.image()
    assert image.mode == "RGB"
    assert image.size == (3 * TILE_SIZE, TILE_SIZE)
    for place, (scan, frame) in enumerate(zip(task.scans, task.frames(), strict=True)):
        assert frame.size == (TILE_SIZE, TILE_SIZE)
        tile = image.crop((place * TILE_SIZE, 0, (place + 1) * TILE_SIZE, TILE_SIZE))
        assert tile.tobytes() == frame.tobytes()
        blocks = np.asarray(tile)[:, :, 0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
        assert np.corrcoef(blocks.ravel(), load_digits().images[scan].ravel())[0, 1] > 0.95


@pytest.mark.parametrize("media", ["image", "video"])
def test_same_seed_same_groups(media: str) -> None:
    first = make_groups("test", 20, questions=list(QUESTIONS), media=media, seed=3)
    again = make_groups("test", 20, questions=list(QUESTIONS), media=media, seed=3)
    other = make_groups("test", 20, questions=list(QUESTIONS), media=media, seed=4)
    for a, b in zip(first, again, strict=True):
        assert (a.id, a.messages, a.responses, a.rankings) == (b.id, b.messages, b.responses, b.rankings)
        for one, two in zip([*a.images, *sum(a.videos, [])], [*b.images, *sum(b.videos, [])], strict=True):
            assert one.tobytes() == two.tobytes()
    assert [group.responses for group in first] != [group.responses for group in other]


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    assert make_tasks("train", 30, seed=2)[:10] == make_tasks("train", 10, seed=2)
    longer, shorter = make_groups("train", 30, seed=2), make_groups("train", 10, seed=2)
    assert [group.responses for group in longer[:10]] == [group.responses for group in shorter]


def test_group_form() -> None:
    group = make_groups("test", 13, seed=0)[12]
    assert group.id == "handwriting-test-00012"
    assert group.messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Number?"}]}]
    assert len(group.images) == 1
    video = make_groups("test", 1, num_digits=5, media="video", seed=0)[0]
    assert video.messages[0]["content"][0] == {"type": "video"}
    assert [len(frames) for frames in video.videos] == [5]
    assert not video.images


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("num_responses", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("num_digits", [1, 3, 6])
def test_rankings_follow_the_truth(question: str, num_responses: int, num_digits: int) -> None:
    options = {"num_digits": num_digits, "questions": [question], "seed": 7}
    tasks = make_tasks("train", 30, **options)
    groups = make_groups("train", 30, num_responses=num_responses, **options)
    for task, group in zip(tasks, groups, strict=True):
        assert group.id == task.id
        assert group.num_responses == num_responses
        qualities = [naive_grade(question, task.digits, response) for response in group.responses]
        assert [grade(question, task.digits, response) for response in group.responses] == qualities
        assert list(group.rankings or ()) == naive_ranks(qualities)
        assert max(group.rankings or ()) > 1


def test_ties_duplicates_and_groups_without_a_right_answer_occur() -> None:
    tasks = make_tasks("train", 1000, seed=11)
    groups = make_groups("train", 1000, seed=11)
    best = [list(group.rankings or ()).count(1) for group in groups]
    right = [
        any(task.answer in re.findall("[0-9]+", text) for text in group.responses if " or " not in text)
        for task, group in zip(tasks, groups, strict=True)
    ]
    assert 0.86 < mean(right) < 0.94
    assert 0.04 < mean(count > 1 for count in best) < 0.15
    assert mean(len(set(group.rankings or ())) < 4 for group in groups) > 0.2
    assert mean(len(set(group.responses)) < 4 for group in groups) > 0.05


@pytest.mark.parametrize("question", ["read", "sum"])
@pytest.mark.parametrize("num_responses", [4, 8])
def test_baselines_without_eyes_are_near_chance(question: str, num_responses: int) -> None:
    """2000 groups: the standard error of each rate is at most 0.011.

    Chance is a little above 1/N, since some groups have two best responses. The length of a response and agreement
    with the others tell little more than that a response without a number is seldom the best.
    """
    groups = make_groups("train", 2000, num_responses=num_responses, questions=[question], seed=13)
    chance = mean(mean(rank == 1 for rank in group.rankings or ()) for group in groups)
    assert 1.0 / num_responses <= chance < 1.2 / num_responses
    for place in range(num_responses):
        assert abs(mean((group.rankings or ())[place] == 1 for group in groups) - chance) < 0.04
    assert pick_rate(groups, len) < chance
    assert pick_rate(groups, lambda response: -len(response)) < chance + 0.06
    has_number = pick_rate(groups, lambda response: bool(re.search("[0-9]", response)))
    votes = []
    for group in groups:
        claims = [found[0] if len(found := re.findall("[0-9]+", text)) == 1 else "" for text in group.responses]
        agreement = [
            sum(sum(a == b for a, b in zip(claim, other, strict=False)) for other in claims) if claim else -1
            for claim in claims
        ]
        picked = [rank for rank, n in zip(group.rankings or (), agreement, strict=True) if n == max(agreement)]
        votes.append(mean(rank == 1 for rank in picked))
    assert abs(mean(votes) - has_number) < 0.05


@pytest.mark.parametrize(
    ("question", "digits", "answer"),
    [("read", (0, 4, 7), "047"), ("sum", (9, 9, 9), "27"), ("largest", (3, 8, 1), "8"), ("even", (0, 5, 2), "2")],
)
def test_right_answers(question: str, digits: tuple[int, ...], answer: str) -> None:
    assert correct_answer(question, digits) == answer
    assert is_correct(question, digits, f" {answer}\n")
    assert not is_correct(question, digits, f"{answer}.")
    assert grade(question, digits, answer) == 1.0


@pytest.mark.parametrize(
    ("question", "response", "quality"),
    [
        ("read", "It is 472, yes 472.", 0.8),
        ("read", "Let me look at this for a while, it is 472.", 0.5),
        ("read", "402", 0.3),
        ("read", "It is 402.", 0.24),
        ("read", "47", 0.3),
        ("read", "4720", 0.3375),
        ("read", "999", 0.05),
        ("read", "472 or 473", 0.0),
        ("read", "I cannot tell.", 0.1),
        ("read", "I cannot tell, it is all wavy!", 0.1),  # 30 characters
        ("read", "I cannot tell, it is all wavy.!", 0.0),
        ("read", "It is, I would say, 472 or so.", 0.8),
        ("read", "It is, I would say, 472 or so..", 0.5),
        ("read", "I cannot tell, since all of them look the same to me.", 0.0),
        ("read", "abc", 0.0),
        ("read", "", 0.0),
        ("read", "4" * 10_000, 0.05),
        ("sum", "4" * 10_000, 0.05),
        ("sum", "12", 0.36),
        ("sum", "013", 0.8),
        ("largest", "9", 0.225),
        ("even", "1", 0.225),
        ("even", "-2", 0.8),
        ("read", "\u0664\u0667\u0662", 0.0),
    ],
)
def test_grade_of_free_text(question: str, response: str, quality: float) -> None:
    assert grade(question, (4, 7, 2), response) == pytest.approx(quality)


def test_only_the_right_answer_gets_the_full_mark() -> None:
    for question in QUESTIONS:
        for text in ("0", "2", "02", "4", "7", "13", "013", "472", "0472", " 472 ", "472.", "13 13"):
            assert (grade(question, (4, 7, 2), text) == 1.0) == is_correct(question, (4, 7, 2), text)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_best_response_stands_in_any_place(count: int) -> None:
    groups = make_groups("train", 600, num_responses=count, questions=["sum"], seed=5)
    places = [sum((group.rankings or ())[i] == 1 for group in groups) for i in range(count)]
    expected = sum(places) / count
    assert all(abs(place - expected) < 4 * expected**0.5 for place in places), places


def test_every_benchmark_follows_the_seed_and_the_number_of_digits(tmp_path: Path) -> None:
    written = {}
    for name, options in (("a", {}), ("b", {}), ("seed", {"seed": 1}), ("digits", {"num_digits": 3})):
        counts = write_handwriting_benchmarks(tmp_path / name, 6, **options)
        assert set(counts) == set(HANDWRITING_BENCHMARKS) and set(counts.values()) == {6}
        written[name] = {kind: (tmp_path / name / kind / "test.jsonl").read_text() for kind in counts}
    assert written["a"] == written["b"]
    for kind, text in written["a"].items():
        assert text != written["seed"][kind] and text != written["digits"][kind], kind
    rows = [json.loads(line) for line in written["a"]["pairs"].splitlines()]
    assert [row["human_ranking"] for row in rows] == [[1, 0], [0, 1]] * 3, "neither place gives the better away"


def test_policy_rows_survive_a_dataset() -> None:
    tasks = make_tasks("train", 6, questions=list(QUESTIONS), seed=1)
    rows = make_policy_rows(tasks)
    stored = Dataset.from_list(rows)
    assert stored.column_names == ["prompt", "image", "solution", "question", "digits"]
    for task, row in zip(tasks, stored, strict=True):
        assert row["prompt"] == [{"role": "user", "content": task.text}]
        assert row["image"].convert("RGB").tobytes() == task.image().tobytes()
        assert is_correct(row["question"], row["digits"], row["solution"])
    assert make_sft_rows(tasks)[0]["completion"] == [{"role": "assistant", "content": tasks[0].answer}]


@pytest.mark.parametrize(
    "arguments",
    [
        {"split": "dev"},
        {"questions": ("colour",)},
        {"questions": "read"},
        {"questions": ()},
        {"media": "audio"},
        {"num_digits": 0},
        {"num_digits": 17},
        {"num_digits": 1, "media": "video"},
        {"num_responses": 1},
        {"num_responses": 65},
        {"seed": -1},
        {"num_groups": -1},
    ],
)
def test_wrong_arguments_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        make_groups(**({"split": "train", "num_groups": 1} | arguments))


def test_unknown_question_and_video_rows_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="colour"):
        grade("colour", (1, 2), "red")
    task = HandwritingTask("x", "read", (1, 2), (0, 1), "video")
    with pytest.raises(ConfigurationError, match="media='image'"):
        make_policy_rows([task])
