"""Refresh: in the middle of a GRPO run its reward model learns from what the policy writes now.

By the command `mr-reward refresh` between two parts of a run, or by `mr_reward.runs.RefreshCallback` inside it. Both
leave a folder `refresh-STEP` in the run's folder: `labelled.jsonl`, cut into `train.jsonl` and `heldout.jsonl`; `rm`,
the new reward model; and as the last file `refresh.json`, with the numbers.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mr_reward.checkpoint.checksums import written_whole_file
from mr_reward.data.groups_file import load_preferences
from mr_reward.data.jsonl import read_json_lines, write_json_lines
from mr_reward.data.labels import Labeller, label_groups
from mr_reward.data.sources import SUFFIXES, RowSource
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.evaluation.evaluator import report_rollouts
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.groups import prompt_fingerprint
from mr_reward.model.scorer import GroupScorer
from mr_reward.runs.average import same_random_numbers
from mr_reward.runs.collect import CollectArguments, collect, prompt_rows
from mr_reward.runs.recipe import PolicyArguments, scorer_options
from mr_reward.scorers.opening import is_url, open_scorer, require_local
from mr_reward.templates.images import DecodedImages
from mr_reward.training.further import FurtherSteps, train_further
from mr_reward.training.saving import incomplete_reason, saved_checkpoints

logger = logging.getLogger(__name__)

LABELLED = "labelled.jsonl"
_ROLLOUTS, _TRAIN, _HELDOUT, _RESULT, _SETTINGS = (
    "rollouts.jsonl",
    "train.jsonl",
    "heldout.jsonl",
    "refresh.json",
    "settings.json",
)
_FOLDER, _MODEL = "refresh-", "rm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshed:
    """What a refresh has done."""

    folder: str  # of the new reward model
    step: int  # of the policy whose rollouts these are
    train_groups: int  # with responses that are right and others that are wrong
    heldout_groups: int  # the same, of prompts that no refresh trains on
    # Right above wrong on the held-out groups, and where 95 % of the resampled values lie.
    before: tuple[float, float, float]
    after: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshPlan:
    """What the command `mr-reward refresh` does, beside what a recipe says."""

    labeller: Labeller | None  # None: somebody else labels the rollouts
    old: Sequence[str] = ()  # files of groups that the reward model was trained on
    prompts: int = 256
    holdout: float = 0.25
    how: FurtherSteps = FurtherSteps()

    def __post_init__(self) -> None:
        check_holdout(self.holdout)


def check_holdout(holdout: float) -> None:
    """Refuse a share of the prompts that leaves nothing on one of the two sides."""
    if not 0 < holdout < 1:
        raise ConfigurationError(
            f"holdout is {holdout}, expected the share of the prompts kept apart, between 0 and 1"
        )


def refresh(
    run: Path, recipe: PolicyArguments, collecting: CollectArguments, plan: RefreshPlan
) -> Refreshed | Path | None:
    """Do a refresh, or the rest of it: each stage leaves a whole file or folder, and a killed one goes on there.

    None where the labeller has not come to all groups yet; the file to label where there is no labeller.
    """
    checkpoint, step = _newest(run)
    folder = refresh_folder(run, step)
    known = latest_refresh(run, step - 1) if recipe.refresh_steps else None
    model = recipe.reward_model if known is None else str(known)
    if model is None or is_url(model):
        raise ConfigurationError(f"reward_model is {model}, expected the folder or hub id of what is to be refreshed")
    old_groups = [group for file in plan.old for group in load_preferences(file)]
    _check_settings(folder, plan, {"reward_model": model, "policy": str(checkpoint)})
    if (folder / _RESULT).is_file():
        logger.info("%s is complete", folder)
        return Refreshed(**json.loads((folder / _RESULT).read_text()))
    if not (folder / _TRAIN).is_file():
        split = None if str(recipe.dataset).endswith(SUFFIXES) else collecting.dataset_split  # as `load_prompts`
        given = replace(
            collecting,
            policy=str(checkpoint),
            dataset=recipe.dataset,
            dataset_split=split,
            out=str(folder / _ROLLOUTS),
            limit=None,
        )
        collect(given, _some(prompt_rows(given), plan.prompts, f"{plan.how.seed} {step}"))
        if plan.labeller is None and not (folder / LABELLED).is_file():
            return folder / _ROLLOUTS
        if plan.labeller is not None:
            done = label_groups(folder / _ROLLOUTS, folder / LABELLED, plan.labeller)
            for why, count in done.left_out.items():
                logger.warning("%d groups have no label (%s) and are left out", count, why)
            if done.not_reached:
                logger.warning("%d groups are not labelled yet; the same command goes on", done.not_reached)
                return None
        cut(folder, plan.holdout)
    logger.info("the reward model %s is trained further", model)
    scorer = require_local(open_scorer(model, **{**scorer_options(recipe), "dtype": None}), "mr-reward refresh")
    refreshed = learn(folder, step, scorer, old_groups, plan.how)
    if refreshed is None:
        raise GroupError(
            f"{folder}: {_TRAIN} or {_HELDOUT} holds no group with responses that are right and others that are "
            "wrong; delete the folder and give more --prompts, or more rollouts of each with --n"
        )
    return refreshed


def refresh_folder(run: str | Path, step: int) -> Path:
    """Where the refresh of a step lies."""
    return Path(run) / f"{_FOLDER}{step}"


def latest_refresh(run: str | Path, step: int) -> Path | None:
    """The reward model of the last whole refresh of a run, up to a step."""
    steps = (path.parent.name.removeprefix(_FOLDER) for path in Path(run).glob(f"{_FOLDER}*/{_RESULT}"))
    done = [int(each) for each in steps if each.isdigit() and int(each) <= step]
    return refresh_folder(run, max(done)) / _MODEL if done else None


def forget_later(run: str | Path, step: int) -> None:
    """The refreshes of a run behind a step count as not done: they are done again, or are those of an earlier run."""
    for path in Path(run).glob(f"{_FOLDER}*/{_RESULT}"):
        number = path.parent.name.removeprefix(_FOLDER)
        if number.isdigit() and int(number) > step:
            logger.warning("%s is of an earlier run, or of one that was interrupted, and is not used", path.parent)
            path.unlink()


def cut(folder: Path, holdout: float) -> None:
    """The labelled groups into those to train on and those held out.

    A prompt is always on the same side, in every refresh: what was held out once has never been trained on.
    """
    images = DecodedImages()
    sides: dict[str, list[Any]] = {_HELDOUT: [], _TRAIN: []}
    rows = (row for _, row in read_json_lines(folder / LABELLED))
    for group, row in zip(load_preferences(folder / LABELLED), rows, strict=True):
        place = int(prompt_fingerprint(group, images.digest)[:8], 16) / 16**8
        sides[_HELDOUT if place < holdout else _TRAIN].append(row)
    for name, some in sides.items():  # what there is to train on last: with it the stage is done
        write_json_lines(folder / name, some)


def learn(
    folder: Path, step: int, scorer: GroupScorer, old: Sequence[ResponseGroup], how: FurtherSteps
) -> Refreshed | None:
    """Train the scorer's model on a folder's groups and old ones, and write it; None where nothing could be learnt."""
    new, heldout = (list(_mixed(folder / name)) for name in (_TRAIN, _HELDOUT))
    if not new or not heldout:
        return None
    images = DecodedImages()
    apart = {prompt_fingerprint(group, images.digest) for group in heldout}
    few = random.Random(f"{how.seed} {step}").sample(old, min(len(old), how.num_groups))
    clean = [group for group in few if prompt_fingerprint(group, images.digest) not in apart]
    if len(clean) < len(few):
        logger.warning("%d of %d old groups have a held-out prompt and are left out", len(few) - len(clean), len(few))
    before = _right_above_wrong(scorer, folder)
    with same_random_numbers():
        torch.manual_seed(how.seed)
        train_further(scorer, new, clean, how)
    refreshed = Refreshed(
        folder=str(folder / _MODEL),
        step=step,
        train_groups=len(new),
        heldout_groups=len(heldout),
        before=before,
        after=_right_above_wrong(scorer, folder),
    )
    scorer.model.save_pretrained(folder / _MODEL)
    _write(folder / _RESULT, asdict(refreshed))
    return refreshed


def _mixed(path: Path) -> Iterator[ResponseGroup]:
    """The groups of a file with responses that are right and others that are wrong; a file may be empty."""
    groups: Iterable[ResponseGroup] = load_preferences(path) if path.stat().st_size else ()
    return (group for group in groups if len(set(group.rankings or ())) > 1)


def _right_above_wrong(scorer: GroupScorer, folder: Path) -> tuple[float, float, float]:
    found = report_rollouts(scorer, folder / _HELDOUT).metrics["right_above_wrong"]
    return found.value, found.low, found.high


def _newest(run: Path) -> tuple[Path, int]:
    """The newest whole checkpoint of a run with any number of processes, and its step."""
    for checkpoint in saved_checkpoints(run):
        ranks = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
        if (reason := incomplete_reason(checkpoint, ranks)) is None:
            return checkpoint, int(checkpoint.name.split("-")[-1])
        logger.warning("%s is not whole (%s), looking for an older checkpoint", checkpoint, reason)
    raise ConfigurationError(
        f"{run} holds no whole checkpoint, from which the run could go on after a refresh; give the output folder of "
        "a run with save_strategy: steps"
    )


def _some(rows: RowSource, count: int, seed: str) -> RowSource:
    """So many of the rows, drawn, in their order."""
    total = sum(1 for _ in rows)
    drawn = set(random.Random(seed).sample(range(total), min(count, total)))
    return RowSource(rows.name, rows.folder, lambda: (row for index, row in enumerate(rows) if index in drawn))


def _check_settings(folder: Path, plan: RefreshPlan, more: Mapping[str, Any]) -> None:
    """Refuse to go on with a refresh of other settings, or one that the run did itself; write down those of a new."""
    settings = {**more, "labelled_by": None if plan.labeller is None else plan.labeller.name, "old": list(plan.old)}
    settings |= {"prompts": plan.prompts, "holdout": plan.holdout, **asdict(plan.how)}
    path = folder / _SETTINGS
    if not path.is_file():
        if (folder / LABELLED).is_file():
            raise ConfigurationError(f"{folder} is a refresh that the run did itself (refresh_steps); let it go on")
        _write(path, settings)
        return
    began = json.loads(path.read_text())
    if other := [key for key in settings if began.get(key) != settings[key]]:
        raise ConfigurationError(
            f"{folder} was begun with other settings ({', '.join(f'{key}: {began.get(key)}' for key in other)}); give "
            "those, or delete the folder"
        )


def _write(path: Path, content: Any) -> None:
    with written_whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
