"""The shapes world, on the real `easy-vqa`; its grades and made-up answers; and that recipes know it by name."""

import builtins
import hashlib
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from mr_reward.errors import ConfigurationError
from mr_reward.runs.pretraining import load_sets
from mr_reward.runs.recipe import load_prompts, truths
from mr_reward.worlds import shapes
from mr_reward.worlds.handwriting import SPLITS, TILE_SIZE, make_policy_rows, make_sft_rows
from mr_reward.worlds.named import WORLDS
from mr_reward.worlds.shapes import (
    ANSWERS,
    QUESTIONS,
    ShapesTask,
    draw_answers,
    grade,
    is_correct,
    make_groups,
    make_tasks,
    shapes_accuracy,
)
from mr_reward.worlds.tiny import build_tokenizer
from mr_reward.worlds.world_policy import GRADES, TRUTHS, WorldPolicyArguments
from mr_reward.worlds.world_pretraining import WorldRewardArguments

TASK = ShapesTask("x", "color", "?", "red", "")


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
    assert grade(answer, response) == quality
    assert is_correct(answer, response) == (quality == 1.0)


def test_the_truth_as_a_reward_function() -> None:
    completions = ["red", [{"role": "assistant", "content": "yes"}], "It is red.", "Yes", ""]
    assert shapes_accuracy(completions, ["red", "yes", "red", "yes", "red"], image=None) == [1.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("answer", [words[0] for words in QUESTIONS.values()])
@pytest.mark.parametrize("count", [2, 4, 8, 64])
def test_made_up_answers_do_not_give_the_right_one_away(answer: str, count: int) -> None:
    """Ranked, nine groups in ten have a right one, and no word of the kind is said oftener than the right one."""
    kind = next(words for words in QUESTIONS.values() if answer in words)
    groups = [draw_answers(answer, count, np.random.default_rng([count, i])) for i in range(400)]
    right, place, more = [], [], []
    for said in groups:
        grades = [grade(answer, text) for text in said]
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


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "easy_vqa":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"install mr-reward\[shapes\]"):
        shapes._questions.__wrapped__("train")


@pytest.mark.parametrize("seed", range(3))
def test_tasks_and_groups(seed: int) -> None:
    every = {"questions": list(QUESTIONS), "seed": seed}
    tasks = make_tasks("train", 60, **every)
    assert make_tasks("train", 90, **every)[:60] == tasks != make_tasks("train", 60, **{**every, "seed": seed + 1})
    assert {task.question for task in tasks} == set(QUESTIONS)
    assert all(task.answer in QUESTIONS[task.question] for task in tasks)
    assert {task.question for task in make_tasks("test", 30, questions=["color"], seed=seed)} == {"color"}
    groups = make_groups("train", 60, num_responses=5, **every)
    for task, group in zip(tasks, groups, strict=True):
        assert group.id == task.id and group.num_responses == 5
        assert group.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": task.text}]
        grades = [task.grade(text) for text in group.responses]
        assert list(group.rankings or ()) == [1 + len({o for o in grades if o > one}) for one in grades]
        assert fingerprint(group.images[0]) == fingerprint(task.image())
    assert [g.responses for g in make_groups("train", 9, num_responses=5, **every)] == [
        group.responses for group in groups[:9]
    ]


def test_rows() -> None:
    tasks = make_tasks("train", 20, seed=3)
    stored = Dataset.from_list(make_policy_rows(tasks))
    assert stored.column_names == ["prompt", "image", "solution", "question"]
    for task, row in zip(tasks, stored, strict=True):
        assert row["prompt"] == [{"role": "user", "content": task.text}]
        assert row["image"].tobytes() == task.image().tobytes()
    assert shapes_accuracy([task.answer for task in tasks], stored["solution"]) == [1.0] * 20
    assert make_sft_rows(tasks)[0]["completion"] == [{"role": "assistant", "content": tasks[0].answer}]


def test_the_splits_share_no_picture() -> None:
    """Not by name and not by what is shown, over every picture that a task of the split can have."""
    paths = {split: {path for rows in shapes._questions(split).values() for _, _, path in rows} for split in SPLITS}
    images = {split: {fingerprint(replace(TASK, path=path).image()) for path in some} for split, some in paths.items()}
    assert {split: len(found) for split, found in images.items()} == {"train": 3500, "validation": 500, "test": 1000}
    assert len(set.union(*images.values())) == 5000


COLOURS = {"black": (0, 0, 0), "blue": (0, 0, 255), "gray": (128, 128, 128), "green": (0, 255, 0), "red": (255, 0, 0)}


def test_a_picture_shows_the_whole_shape_in_its_colour() -> None:
    """In the middle, as wide or as high as the picture but for the margin, whole where it was whole."""
    for task in make_tasks("train", 400, questions=["color"], seed=2):
        image = np.asarray(task.image()).astype(int)
        assert image.shape == (TILE_SIZE, TILE_SIZE, 3)
        background = image[0, 0]
        assert background.min() > 180, "the corners are background"
        rows, columns = np.nonzero(np.abs(image - background).max(axis=2) > 60)
        assert max(np.ptp(rows), np.ptp(columns)) >= 0.6 * TILE_SIZE
        assert (
            abs(rows.min() + rows.max() - TILE_SIZE + 1) <= 4
            and abs(columns.min() + columns.max() - TILE_SIZE + 1) <= 4
        )
        if task.answer in COLOURS:
            middle = image[len(image) * 5 // 8, TILE_SIZE // 2]  # inside a triangle too
            assert np.abs(middle - COLOURS[task.answer]).max() < 90, task


def test_the_real_package_has_what_is_documented() -> None:
    import easy_vqa

    assert sorted(easy_vqa.get_answers()) == list(ANSWERS)
    assert sum(len(rows) for split in SPLITS for rows in shapes._questions(split).values()) == 48_248
    with Image.open(make_tasks("validation", 1)[0].path) as picture:
        assert picture.size == (64, 64)


@pytest.mark.parametrize("world", WORLDS)
def test_the_worlds_have_one_form(world: str) -> None:
    tasks = WORLDS[world].make_tasks("validation", 12, seed=1)
    groups = WORLDS[world].make_groups("validation", 12, num_responses=3, seed=1)
    for task, group in zip(tasks, groups, strict=True):
        assert task.is_correct(task.answer) and task.grade(task.answer) == 1.0
        assert not task.is_correct(task.answer + "?") and task.media == "image"
        assert (group.id, group.messages) == (task.id, task.messages)
    arguments = WorldPolicyArguments(dataset=world, eval_dataset=world, num_prompts=12, num_eval_prompts=5)
    (truth,) = truths(arguments)
    rows = load_prompts(arguments)
    assert truth(rows["solution"], **{name: rows[name] for name in rows.column_names}) == [1.0] * 12
    seen, held_out = (
        {image.tobytes() for image in load_prompts(arguments, evaluation=evaluation)["image"]}
        for evaluation in (False, True)
    )
    assert not seen & held_out
    assert len(load_prompts(arguments, evaluation=True, limit=2)) == 2
    reward = WorldRewardArguments(train_file=[world], eval_file=[world], num_train_groups=7, num_eval_groups=3)
    sets = load_sets(reward, seed=1), load_sets(reward, evaluation=True, seed=1)
    assert [[(name, len(groups)) for name, groups in one.items()] for one in sets] == [[(world, 7)], [(world, 3)]]


@pytest.mark.parametrize("world", WORLDS)
def test_verifiers_know_how_good_an_answer_is(world: str) -> None:
    """As the columns of a prompt reach them, texts and messages alike."""
    tasks = WORLDS[world].make_tasks("train", 24, seed=2)
    made = WORLDS[world].make_groups("train", 24, num_responses=5, seed=2)
    rows = make_policy_rows(tasks)
    pairs = [(task, row, text) for task, row, one in zip(tasks, rows, made, strict=True) for text in one.responses]
    columns = {name: [row[name] for _, row, _ in pairs] for name in rows[0] if name != "image"}
    texts = [text for _, _, text in pairs]
    qualities = [task.grade(text) for task, _, text in pairs]
    assert len(set(qualities)) > 3
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert GRADES[world](texts, **columns) == GRADES[world](messages, **columns) == qualities
    assert TRUTHS[world](texts, **columns) == [float(quality == 1.0) for quality in qualities]


@pytest.mark.parametrize("world", WORLDS)
def test_a_rollout_has_room_for_every_right_answer(world: str) -> None:
    tokenizer = build_tokenizer()
    tasks = WORLDS[world].make_tasks("train", 200, seed=0)
    assert max(len(tokenizer(task.answer)["input_ids"]) for task in tasks) < WORLDS[world].answer_tokens


@pytest.mark.parametrize("world", WORLDS)
def test_runs_of_several_seeds_can_learn_from_the_same_groups(world: str) -> None:
    same, own = (WorldRewardArguments(train_file=[world], num_train_groups=9, groups_seed=s) for s in (4, None))
    made = WORLDS[world].make_groups("train", 9, num_responses=4, seed=4)
    found = [load_sets(one, seed=seed)[world] for one, seed in ((same, 0), (same, 1), (own, 4), (own, 1))]
    assert [one.responses for one in found[0]] == [one.responses for one in made]
    assert [[one.responses for one in groups] == [one.responses for one in made] for groups in found[1:]] == [
        True,
        True,
        False,
    ]


def test_a_recipe_chooses_the_questions() -> None:
    arguments = WorldPolicyArguments(dataset="shapes", questions=["color"], num_prompts=20)
    assert set(load_prompts(arguments)["question"]) == {"color"}
    with pytest.raises(ConfigurationError, match="expected a non-empty list out of"):
        load_prompts(WorldPolicyArguments(dataset="shapes", questions=["sum"]))


def test_wrong_arguments_are_refused() -> None:
    for call in (
        lambda: make_tasks("dev", 1),
        lambda: make_tasks("train", -1),
        lambda: make_tasks("train", 1, seed=-1),
        lambda: make_tasks("train", 1, questions=["size"]),
        lambda: make_tasks("train", 1, questions=[]),
        lambda: make_groups("train", 1, num_responses=1),
        lambda: make_groups("train", 1, num_responses=65),
    ):
        with pytest.raises(ConfigurationError, match="expected"):
            call()


def test_an_answer_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import easy_vqa

    monkeypatch.setattr(easy_vqa, "get_test_questions", lambda: (["what?"], ["purple"], [0]))
    with pytest.raises(ConfigurationError, match="purple.*install easy-vqa 1.0"):
        shapes._questions.__wrapped__("test")
