"""An average of a policy's weights over the steps of its training: evaluated and saved beside the last weights.

Its checkpoint lies in the trainer's own (`checkpoint-50/ema`), written before the trainer's state, which ends a
checkpoint: a kill in between leaves none that looks whole and has no average.
"""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import Parameter
from transformers import ProgressCallback, TrainerCallback, TrainerState
from trl import GRPOTrainer, RLOOTrainer

from mr_reward.errors import ConfigurationError
from mr_reward.grpo.reward import MultiResponseReward

FOLDER = "ema"
_EXACT = "average.safetensors"  # in float32, for a run that is resumed; the model beside it has the policy's dtype


class EMACallback(TrainerCallback):
    """Keeps an average of the policy's weights over its steps, which swings less than the weights themselves.

    The weights after each optimizer step count, those of `half_life` steps ago half as much as the last ones; the
    weights before training do not. Only weights that are trained are averaged (of LoRA the adapter), in float32 and in
    CPU memory: 4 bytes for each of them, in every process.

    - Evaluation: after each of the trainer's, the average rolls out the same prompts. Its metrics begin with
      `eval_ema_`, in the log and in `validation.jsonl`. An evaluation takes twice as long. Without vLLM, whose random
      state is its own, the run is the same with the average as without it.
    - Saving: whatever `trainer.save_model` writes has a folder `ema` in it, which `from_pretrained` loads; checkpoints
      too. A run that is resumed has the average of one that was not interrupted. Its checkpoint is looked for in
      `args.resume_from_checkpoint`, if that is a folder, else in the output folder.

    Works with one process or many, with ZeRO-1 and ZeRO-2, with vLLM. Not with weights that are cut into pieces
    (ZeRO-3, FSDP).

    Args:
        trainer: the trainer, which has to get the callback too.
        half_life: in optimizer steps, above 0.

    Raises:
        ConfigurationError: a half-life that is none, weights that are partitioned, several evaluation sets, or, when
            training begins, a checkpoint without its average.

    Example:
        ```python
        trainer = GRPOTrainer(...)
        trainer.add_callback(EMACallback(trainer, half_life=20))
        ```
    """

    def __init__(self, trainer: GRPOTrainer | RLOOTrainer, *, half_life: float) -> None:
        if not 0 < half_life < float("inf"):
            raise ConfigurationError(f"half_life is {half_life}, expected a number of optimizer steps above 0")
        if isinstance(trainer.eval_dataset, dict):
            names = ", ".join(map(str, trainer.eval_dataset))
            raise ConfigurationError(
                f"the trainer has the evaluation sets {names}, expected one: their metrics in TRL's log share one "
                "name, so those of the average would be mixed up too"
            )
        self.half_life = half_life
        self._decay = 0.5 ** (1 / half_life)
        self._trainer: Any = trainer
        self._average: dict[str, torch.Tensor] = {}
        self._count = 0  # of the steps in it
        self._weights()  # refuses while nothing has been computed
        trainer.save_model = self._saving_both(trainer.save_model)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin with nothing, or with what the checkpoint has."""
        self._weights()  # DeepSpeed may have cut them only now
        self._average, self._count = {}, 0
        if state.global_step:
            given = args.resume_from_checkpoint
            named = isinstance(given, str) and Path(given).is_dir()
            self._load(Path(given) if named else Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take in the weights of this step."""
        self._count += 1
        share = (1 - self._decay) / (1 - self._decay**self._count)
        for name, weight in self._weights().items():
            now = weight.detach().to("cpu", torch.float32)
            self._average.setdefault(name, torch.zeros_like(now)).lerp_(now, share)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Evaluate the average too."""
        trainer = self._trainer
        if not self._count or trainer.eval_dataset is None:
            return
        with ExitStack() as stack:
            stack.enter_context(same_random_numbers())
            for reward in trainer.reward_funcs:
                if isinstance(reward, MultiResponseReward):
                    stack.enter_context(reward.unrecorded())
            stack.enter_context(self._in_place_of_the_weights())
            # The table of completions stays that of the last weights.
            table, trainer._logs = trainer._logs, copy.deepcopy(trainer._logs)
            shown, trainer.log_completions = trainer.log_completions, False
            try:
                logs = trainer.evaluation_loop(
                    trainer.get_eval_dataloader(),
                    "Evaluation of the average",
                    prediction_loss_only=True,
                    metric_key_prefix=f"eval_{FOLDER}",
                ).metrics
                found = trainer._metrics["eval"]  # TRL's log writes them as eval_...
                for key in list(found):
                    found[f"{FOLDER}_{key}"] = found.pop(key)
                trainer.log(logs)
            finally:
                trainer._logs, trainer.log_completions = table, shown
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_predict(args, state, control)  # ends the bar, which the next evaluation would go on with

    def _weights(self) -> Mapping[str, Parameter]:
        """The weights that are trained."""
        weights = {name: each for name, each in self._trainer.model.named_parameters() if each.requires_grad}
        # The mark of ZeRO-3 on a weight; what is left of it on a rank has no values.
        if self._trainer.is_fsdp_enabled or any(hasattr(weight, "ds_id") for weight in weights.values()):
            raise ConfigurationError(
                "EMACallback: each process holds a part of the weights only (ZeRO-3 or FSDP), expected whole weights; "
                "use ZeRO-2, or leave the average out (ema_half_life: 0)"
            )
        return weights

    @contextmanager
    def _in_place_of_the_weights(self) -> Iterator[None]:
        """A block in which the policy is the average."""
        last = {name: weight.detach().to("cpu", copy=True) for name, weight in self._weights().items()}
        try:
            self._put(self._average)
            yield
        finally:
            self._put(last)

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self._weights().items():
            weight.copy_(values[name])
        self._trainer._last_loaded_step = -1  # vLLM gets the weights once a step, unless it is told of others

    def _saving_both(self, save: Any) -> Any:
        """`Trainer.save_model`, and the average in a folder of what it writes."""

        @functools.wraps(save)
        def save_both(output_dir: str | None = None, _internal_call: bool = False) -> None:
            if self._count:  # first, as the trainer sends the whole folder to the hub
                args = self._trainer.args
                folder = Path(output_dir if output_dir is not None else args.output_dir) / FOLDER
                with self._in_place_of_the_weights():
                    save(str(folder), _internal_call=True)
                if _internal_call and args.should_save:  # a checkpoint
                    told = {"steps": self._count, "half_life": self.half_life}
                    save_file(self._average, folder / _EXACT, metadata={"average": json.dumps(told)})
            save(output_dir, _internal_call=_internal_call)

        return save_both

    def _load(self, checkpoint: Path) -> None:
        path = checkpoint / FOLDER / _EXACT
        if not path.is_file():
            raise ConfigurationError(
                f"{path} is not there: the run was saved without an average of its weights, and the steps before the "
                "checkpoint cannot be averaged any more; resume without one (ema_half_life: 0), or start anew. If the "
                "checkpoint lies elsewhere, name it in resume_from_checkpoint of the trainer's arguments"
            )
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["average"])
        if told["half_life"] != self.half_life:
            raise ConfigurationError(
                f"{path} is an average with half-life {told['half_life']}, expected {self.half_life}; resume with the "
                "same half-life, or start anew"
            )
        self._average, self._count = load_file(path), told["steps"]
        if strange := self._average.keys() ^ self._weights().keys():
            raise ConfigurationError(
                f"{path} is an average of other weights than those that are trained now ({min(strange)}); resume with "
                "the settings of LoRA that the run began with"
            )


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """A block that draws random numbers, after which the same come as if it had drawn none."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
