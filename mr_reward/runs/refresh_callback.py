"""A refresh inside a running trainer, see `mr_reward.runs.refresh`."""

from __future__ import annotations

import copy
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import ProgressCallback, TrainerCallback, TrainerState
from trl import GRPOTrainer, RLOOTrainer

from mr_reward.checkpoint.verify import weights_digest
from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.data.groups_file import row_from_group
from mr_reward.data.jsonl import write_json_lines
from mr_reward.errors import ConfigurationError, whole_number
from mr_reward.groups import ResponseGroup, dense_ranks
from mr_reward.grpo.groups import read_rollouts
from mr_reward.grpo.reward import MultiResponseReward, check_same_weights
from mr_reward.grpo.truth import is_asynchronous
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.scorer import GroupScorer
from mr_reward.runs.average import same_random_numbers
from mr_reward.runs.refresh import (
    LABELLED,
    Refreshed,
    check_holdout,
    cut,
    forget_later,
    latest_refresh,
    learn,
    refresh_folder,
)
from mr_reward.training.further import FurtherSteps

logger = logging.getLogger(__name__)

_ROW = "mr_reward_row"  # of the training set, as a column of the prompts that are answered
_METRIC = "mr_reward/refresh/right_above_wrong"

_Rollout = tuple[int, str, float | None]  # row of the training set, response, what the verifier says


class RefreshCallback(TrainerCallback):
    """Refreshes the reward model of a running GRPO or RLOO trainer with rollouts of its policy.

    Every so many steps the trainer answers some prompts of its training set as it does in an evaluation
    (`num_generations_eval` rollouts of each), a verifier says which answers are right, and the reward model is trained
    some steps on them, and on its old groups, where it is. Measured is how often a right rollout scores above a wrong
    one, before and after, on rollouts of held-out prompts, which no refresh trains on: in the log as
    `mr_reward/refresh/right_above_wrong_before` and `..._after`. Scores from before and after a refresh cannot be
    compared. Where all rollouts of a prompt are equally right nothing can be learnt; if there are no others, the
    reward model stays as it is.

    Rank 0 trains and the others wait, for `ddp_timeout` at most; then all have its weights, which is checked. It needs
    12 bytes more for each weight meanwhile; where there is no room, use `mr-reward refresh`. The random states of
    Python, numpy and torch are the run's own afterwards; that of vLLM is not.

    What was learnt lies in `refresh-STEP` of the output folder, and a run that is resumed takes it from there: from
    beside its checkpoint, if `args.resume_from_checkpoint` is a folder.

    Args:
        trainer: the trainer, which has to get the callback too.
        every: refresh after each so many optimizer steps; not after the last one.
        verifier: a reward function as TRL takes it, that is not asynchronous: M truths, higher is better, None where
            it knows none (its group is then left out).
        groups: ranked groups that the reward model was trained on before.
        num_prompts: prompts that are answered for a refresh, drawn anew for each.
        holdout: share of the prompts that are held out.
        **further: `steps` (50), `batch_size` (16 groups), `learning_rate` (1e-5, falling to zero), `share` of the new
            groups among all (0.5), `loss` (`"best_of_n"`), `seed` (0).

    Raises:
        ConfigurationError: a setting that is none; a reward model that is served, offloaded or quantized; a policy
            whose weights are partitioned (ZeRO-3, FSDP); prompts that cannot be drawn.

    Example:
        ```python
        trainer = GRPOTrainer(..., reward_funcs=[MultiResponseReward("rm", num_generations=8)])
        trainer.add_callback(RefreshCallback(trainer, every=50, verifier=accuracy, groups=old_groups))
        ```
    """

    def __init__(
        self,
        trainer: GRPOTrainer | RLOOTrainer,
        *,
        every: int,
        verifier: Callable[..., Any],
        groups: Sequence[ResponseGroup] = (),
        num_prompts: int = 64,
        holdout: float = 0.25,
        **further: Any,
    ) -> None:
        self.every = whole_number(every, "every", "refresh each so many steps")
        self.num_prompts = whole_number(num_prompts, "num_prompts", "prompts that are answered for a refresh")
        check_holdout(holdout)
        try:
            self.how = FurtherSteps(**further)
        except TypeError as error:
            raise ConfigurationError(f"RefreshCallback: {error}; see the names in its documentation") from error
        self.verifier, self.groups, self.holdout = verifier, groups, holdout
        self._trainer: Any = trainer
        self._reward, self._scorer = _refreshable(trainer)
        if is_asynchronous(verifier):
            raise ConfigurationError(f"{verifier!r} is asynchronous, expected a plain function as the verifier")
        self._refuse_pieces()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the reward model that the run had at its checkpoint."""
        self._refuse_pieces()
        given = args.resume_from_checkpoint
        named = isinstance(given, str) and Path(given).is_dir()
        folder = Path(given).parent if named and state.global_step else Path(args.output_dir)
        exchange = self._reward.exchange
        with exchange.fail_together("reading the refreshed reward model") as phase:
            if exchange.rank == 0:
                found = latest_refresh(folder, state.global_step)
                forget_later(args.output_dir, state.global_step)
                phase.payload = None if found is None else str(found)
                if found is not None:
                    with outside_zero3():
                        saved = MultiResponseRewardModel.from_pretrained(found)
                    self._scorer.model.load_state_dict(saved.state_dict())
        if phase.gathered[0] is not None:
            logger.info("the reward model is that of %s", phase.gathered[0])
            self._spread()
        elif state.global_step >= self.every:
            logger.warning("%s holds no refresh; the run goes on with the reward model that was given", folder)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Refresh, if it is time."""
        step = state.global_step
        if step % self.every or step >= state.max_steps:
            return
        exchange = self._reward.exchange
        with same_random_numbers():
            rollouts = self._answer(step)
            with exchange.fail_together("refreshing the reward model") as phase:
                if exchange.rank == 0:
                    phase.payload = self._learn(refresh_folder(args.output_dir, step), step, rollouts)
        done: Refreshed | None = phase.gathered[0]
        if done is None:
            logger.warning("step %d: no prompt has right and wrong rollouts on both sides; nothing is refreshed", step)
            return
        self._spread()
        logger.info(
            "step %d: right above wrong %.3f before the refresh, %.3f after", step, done.before[0], done.after[0]
        )
        for name, found in (("before", done.before), ("after", done.after)):
            self._trainer._metrics["train"][f"{_METRIC}_{name}"].append(found[0])  # for the next log

    def _answer(self, step: int) -> list[_Rollout]:
        """Rollouts of some prompts, from all ranks."""
        trainer: Any = self._trainer
        data = trainer.train_dataset
        drawn = random.Random(f"{self.how.seed} {step}").sample(range(len(data)), min(self.num_prompts, len(data)))
        found: list[_Rollout] = []

        def record(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
            with self._reward.exchange.fail_together("asking the verifier") as phase:
                if _ROW not in columns:
                    raise ConfigurationError("columns are taken out of the rollouts; set remove_unused_columns: false")
                truths = self.verifier(prompts=prompts, completions=completions, **columns)
                truths = [None if truth is None else float(truth) for truth in truths]
                _, rows = read_rollouts(prompts, completions, columns)
                phase.payload = [*zip(columns[_ROW], (row.response for row in rows), truths, strict=True)]
            found.extend(rollout for own in phase.gathered for rollout in own)
            return truths

        with _asking_only(trainer, record):
            loader = trainer.get_eval_dataloader([{**data[row], _ROW: row} for row in drawn])
            trainer.evaluation_loop(loader, "Rollouts for a refresh", prediction_loss_only=True)
        trainer.model.train()  # TRL's log takes the metrics of the mode that the model is in
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):  # ends the bar, which an evaluation would go on with
                callback.on_predict(trainer.args, trainer.state, trainer.control)
        return found

    def _learn(self, folder: Path, step: int, rollouts: Sequence[_Rollout]) -> Refreshed | None:
        """Write the groups, cut them, and train on them; on rank 0."""
        path = folder / LABELLED
        groups = list(self._ranked(step, rollouts))
        if not groups:
            return None
        name = f"verifier {getattr(self.verifier, '__name__', type(self.verifier).__name__)}"
        write_json_lines(path, ({**row_from_group(group, path), "labelled_by": name} for group in groups))
        cut(folder, self.holdout)
        return learn(folder, step, self._scorer, self.groups, self.how)

    def _ranked(self, step: int, rollouts: Sequence[_Rollout]) -> Iterator[ResponseGroup]:
        by_row: defaultdict[int, dict[str, float | None]] = defaultdict(dict)
        for row, response, truth in rollouts:
            by_row[row][response] = truth
        unknown = 0
        for row, truths in sorted(by_row.items()):
            ratings = [truth for truth in truths.values() if truth is not None and truth == truth]
            unknown += len(ratings) < len(truths)
            if len(ratings) < len(truths) or len(ratings) < 2:
                continue
            asked = self._trainer.train_dataset[row]
            columns = {key: [asked[key]] for key in ("image", "images", "tools") if key in asked}
            columns["log_metric"] = self._trainer._log_metric  # whose trainer knows the tools
            (prompt,), _ = read_rollouts([asked["prompt"]], [""], columns)
            yield ResponseGroup(
                prompt=prompt.messages,
                images=prompt.images,
                videos=prompt.videos,
                tools=prompt.tools,
                responses=list(truths),
                rankings=dense_ranks([-rating for rating in ratings]),
                ratings=ratings,
                id=f"step {step} row {row}",
                source=f"step {step}",
            )
        if unknown:
            logger.warning(
                "step %d: the verifier knows nothing of some rollouts of %d groups, left out", step, unknown
            )

    def _spread(self) -> None:
        """All ranks get the reward model of rank 0."""
        exchange, model = self._reward.exchange, self._scorer.model
        exchange.spread_weights(model)
        check_same_weights(exchange.all_gather_objects(weights_digest(model)))

    def _refuse_pieces(self) -> None:
        # The mark of ZeRO-3 on a weight.
        cut_up = any(hasattr(weight, "ds_id") for weight in self._trainer.model.parameters())
        if cut_up or getattr(self._trainer, "is_fsdp_enabled", False):
            raise ConfigurationError(
                "RefreshCallback: the policy's weights are partitioned (ZeRO-3 or FSDP), which it was not tried with; "
                "use ZeRO-2, or `mr-reward refresh` between two parts of the run"
            )


@contextmanager
def _asking_only(trainer: Any, reward: Callable[..., Any]) -> Iterator[None]:
    """A block in which rollouts are rewarded by one function, and leave no trace in the trainer's logs."""
    own = {
        "reward_funcs": [reward],
        "reward_func_names": ["refresh"],
        "reward_processing_classes": [None],
        "reward_weights": torch.ones(1),
        "_logs": copy.deepcopy(trainer._logs),
        "log_completions": False,
    }
    kept = {name: getattr(trainer, name) for name in own}
    metrics = dict(trainer._metrics["eval"])
    try:
        for name, value in own.items():
            setattr(trainer, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
        trainer._metrics["eval"].clear()
        trainer._metrics["eval"].update(metrics)


def _refreshable(trainer: Any) -> tuple[MultiResponseReward, GroupScorer]:
    """The reward of a trainer and its scorer, if it can be refreshed where it is."""
    rewards = [reward for reward in trainer.reward_funcs if isinstance(reward, MultiResponseReward)]
    problems = []
    if len(rewards) != 1:
        raise ConfigurationError(f"RefreshCallback: the trainer has {len(rewards)} MultiResponseReward, expected one")
    scorer: Any = rewards[0].scorer
    if not isinstance(scorer, GroupScorer):
        problems.append(
            f"the reward model is behind a {type(scorer).__name__}, expected one of this process that stays on its "
            "device (reward_model without reward_server, reward_placement: resident)"
        )
    elif not all(weight.is_floating_point() for weight in scorer.model.parameters()):
        problems.append("the reward model is quantized, expected weights that can be trained")
    if isinstance(trainer.train_dataset, IterableDataset) or not hasattr(trainer.train_dataset, "__len__"):
        problems.append("the training set is a stream, expected one whose rows can be drawn")
    if getattr(trainer, "environments", None) is not None:
        problems.append("the trainer has environments, whose prompts are not those of the training set")
    count, batch = trainer.num_generations_eval, trainer.args.per_device_eval_batch_size * trainer.args.world_size
    if batch % count:
        problems.append(
            f"an evaluation batch has {batch} rollouts on all devices, expected a multiple of {count}, the rollouts "
            "of a prompt; set per_device_eval_batch_size"
        )
    if problems:
        raise ConfigurationError(f"RefreshCallback: {'; '.join(problems)}")
    return rewards[0], scorer
