"""The shapes world. Grades and made-up answers need no package; the pictures are those of `easy-vqa`, where it is
installed, and else of a stand-in with its documented functions."""

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from mr_reward.errors import ConfigurationError
from mr_reward.worlds import shapes
from mr_reward.worlds.handwriting import SPLITS
from mr_reward.worlds.shapes import (
    ANSWERS,
    KINDS,
    draw_answers,
    grade_answer,
    make_shapes_groups,
    make_shapes_rows,
    make_shapes_sft_rows,
    make_shapes_tasks,
    shapes_truth,
)

STAND_IN = """
def _questions(count):
    rows = [(f"what color is shape {i}?", ["red", "teal"][i % 2], i) for i in range(count)]
    rows += [(f"is there a circle in {i}?", ["yes", "no"][i % 2], i) for i in range(count)]
    return tuple(map(list, zip(*rows)))

def get_train_questions(): return _questions(40)
def get_test_questions(): return _questions(10)
def get_train_image_paths(): return {i: f"{FOLDER}/train/{i}.png" for i in range(40)}
def get_test_image_paths(): return {i: f"{FOLDER}/test/{i}.png" for i in range(10)}
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of the same name and functions, 50 pictures of noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        (tmp_path / split).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / split / f"{i}.png")
    (tmp_path / "easy_vqa.py").write_text(f"FOLDER = {str(tmp_path)!r}\n{STAND_IN}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)
    shapes._questions.cache_clear()
    yield
    shapes._questions.cache_clear()
    sys.modules.pop("easy_vqa", None)


def fingerprint(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("answer", "response", "quality"),
    [
        ("red", "red", 1.0),
        ("red", " Red\n", 1.0),
        ("red", "red.", 0.8),
        ("red", "It is red.", 0.8),
        ("red", "Let me have a long look at it: it is red.", 0.5),
        ("red", "blue", 0.05),
        ("red", "It is blue.", 0.04),
        ("red", "red or blue", 0.0),
        ("red", "redder", 0.0),
        ("red", "I cannot tell.", 0.1),
        ("red", "I cannot tell, but how nice all of this is.", 0.0),
        ("no", "no", 1.0),
        ("no", "No idea.", 0.1),
        ("no", "yes", 0.05),
        ("no", "", 0.0),
        ("circle", "a circle", 0.8),
        ("circle", "circle circle", 0.8),
    ],
)
def test_grades(answer: str, response: str, quality: float) -> None:
    assert grade_answer(answer, response) == quality


def test_the_truth_is_the_full_mark() -> None:
    completions = ["red", [{"role": "assistant", "content": "yes"}], "It is red.", "Yes", ""]
    assert shapes_truth(completions, ["red", "yes", "red", "yes", "red"], image=None) == [1.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("answer", [kind[0] for kind in KINDS])
@pytest.mark.parametrize("count", [2, 4, 8, 64])
def test_made_up_answers_do_not_give_the_right_one_away(answer: str, count: int) -> None:
    """Ranked, nine groups in ten have a right one, and no word of the kind is said oftener than the right one."""
    kind = next(kind for kind in KINDS if answer in kind)
    groups = [draw_answers(answer, count, np.random.default_rng([count, i])) for i in range(400)]
    right, place, more = [], [], []
    for said in groups:
        grades = [grade_answer(answer, text) for text in said]
        assert len(said) == count and len(set(grades)) > 1
        claims = [next((word for word in kind if word in text.lower().strip(".").split()), None) for text in said]
        assert set(claims) <= {*kind, None}
        right.append(answer in claims)
        place.append(mean(i for i, grade in enumerate(grades) if grade == max(grades)) / (count - 1))
        tallies = {word: claims.count(word) for word in kind if word in claims}
        if answer in tallies and len(tallies) > 1:
            other = mean(value for word, value in tallies.items() if word != answer)
            more.append(tallies[answer] - other)
    assert 0.8 < mean(right) <= 1.0
    assert abs(mean(place) - 0.5) < 0.12
    assert abs(mean(more)) < 4 * float(np.std(more)) / len(more) ** 0.5 + 0.05


def test_without_the_package_the_error_names_the_extra() -> None:
    if importlib.util.find_spec("easy_vqa"):
        pytest.skip("easy-vqa is installed")
    with pytest.raises(ConfigurationError, match=r"install mr-reward\[shapes\]"):
        make_shapes_tasks("train", 1)


@pytest.mark.usefixtures("stand_in")
def test_splits_tasks_groups_and_rows() -> None:
    shown = {split: {task.path for task in make_shapes_tasks(split, 300, seed=1)} for split in SPLITS}
    assert {split: len(paths) for split, paths in shown.items()} == {"train": 35, "validation": 5, "test": 10}
    assert len(set.union(*shown.values())) == 50
    tasks = make_shapes_tasks("train", 20, seed=3)
    assert make_shapes_tasks("train", 30, seed=3)[:20] == tasks != make_shapes_tasks("train", 20, seed=4)
    groups = make_shapes_groups("train", 20, num_responses=5, seed=3)
    for task, group in zip(tasks, groups, strict=True):
        assert group.id == task.id and group.num_responses == 5
        assert group.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": task.text}]
        grades = [grade_answer(task.answer, text) for text in group.responses]
        assert list(group.rankings or ()) == [1 + len({o for o in grades if o > grade}) for grade in grades]
        assert fingerprint(group.images[0]) == fingerprint(Image.open(task.path))
    assert [g.responses for g in make_shapes_groups("train", 9, num_responses=5, seed=3)] == [
        group.responses for group in groups[:9]
    ]
    stored = Dataset.from_list(make_shapes_rows(tasks))
    assert stored.column_names == ["prompt", "image", "solution"]
    for task, row in zip(tasks, stored, strict=True):
        assert row["prompt"] == [{"role": "user", "content": task.text}]
        assert row["image"].tobytes() == task.image().tobytes()
    assert shapes_truth([task.answer for task in tasks], stored["solution"]) == [1.0] * 20
    assert make_shapes_sft_rows(tasks)[0]["completion"] == [{"role": "assistant", "content": tasks[0].answer}]


@pytest.mark.usefixtures("stand_in")
def test_wrong_arguments_are_refused() -> None:
    for call in (
        lambda: make_shapes_tasks("dev", 1),
        lambda: make_shapes_tasks("train", -1),
        lambda: make_shapes_tasks("train", 1, seed=-1),
        lambda: make_shapes_groups("train", 1, num_responses=1),
        lambda: make_shapes_groups("train", 1, num_responses=65),
    ):
        with pytest.raises(ConfigurationError, match="expected"):
            call()


def test_an_answer_of_another_version_is_refused(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import easy_vqa

    monkeypatch.setattr(easy_vqa, "get_test_questions", lambda: (["what?"], ["purple"], [0]))
    with pytest.raises(ConfigurationError, match="purple.*install easy-vqa 1.0"):
        make_shapes_tasks("test", 1)


def test_the_real_package_has_what_is_documented() -> None:
    easy_vqa = pytest.importorskip("easy_vqa", reason="needs the extra shapes")
    assert sorted(easy_vqa.get_answers()) == list(ANSWERS)
    tasks = {split: make_shapes_tasks(split, 2000) for split in SPLITS}
    images = {split: {fingerprint(task.image()) for task in some} for split, some in tasks.items()}
    assert not images["train"] & images["test"] and not images["train"] & images["validation"]
    assert not images["validation"] & images["test"]
    assert {task.image().size for some in tasks.values() for task in some} == {(64, 64)}
    assert {task.answer for task in tasks["train"]} == set(ANSWERS)
