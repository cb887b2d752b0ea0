"""Validation during GRPO: what held-out prompts say at each evaluation, samples to read, and early warnings.

The rollouts are the trainer's own (`eval_strategy`, `eval_dataset`), so this works wherever training does: with vLLM,
with ZeRO-3, on many ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mr_reward.data.jsonl import read_json_lines, write_json_lines
from mr_reward.errors import ConfigurationError
from mr_reward.evaluation.plots import plot_curves
from mr_reward.groups import ResponseGroup
from mr_reward.grpo.reward import MultiResponseReward
from mr_reward.runs.warning_signs import WarningSigns

__all__ = ["PolicyValidation"]

logger = logging.getLogger(__name__)

# Panel of the figure -> the metrics it shows, as the trainer logs them at an evaluation.
_PANELS = {
    "score of the reward model": ("eval_mr_reward/score_mean",),
    "within groups": ("eval_mr_reward/score_spread", "eval_mr_reward/score_length_correlation"),
    "responses": ("eval_mr_reward/duplicate_responses", "eval_mr_reward/repeated_text"),
}


class PolicyValidation(TrainerCallback):
    """Writes `validation.jsonl`, `validation.png` and `samples.md` to a folder, and warns of reward hacking.

    At each evaluation of the trainer: its `eval_` metrics (one line of `validation.jsonl`; the figure has a curve of
    each, with the other reward functions, a verifiable one for instance, in a panel of their own), and a few groups
    of the last evaluation batch with their responses from best to worst (`samples.md`, and a table in the terminal).
    At each log of the training: `WarningSigns`, as warnings and in `warning_signs` of the next line. Only the main
    process writes. A resumed run goes on with its files; what was written after the checkpoint is written again.

    Args:
        reward: the reward function of the trainer; its last call is where the samples come from.
        folder: where to write.
        num_samples: groups to show at each evaluation.
        signs: what to warn of; None for the defaults.
        console: where the table goes; None for the terminal.

    Raises:
        ConfigurationError: matplotlib is missing.

    Example:
        ```python
        validation = PolicyValidation(reward, "out")
        trainer = GRPOTrainer(..., eval_dataset=held_out, callbacks=[validation])
        ```
    """

    def __init__(
        self,
        reward: MultiResponseReward,
        folder: str | Path,
        *,
        num_samples: int = 3,
        signs: WarningSigns | None = None,
        console: Console | None = None,
    ) -> None:
        if find_spec("matplotlib") is None:
            raise ConfigurationError("the validation figure needs matplotlib; install mr-reward[eval]")
        self.reward = reward
        self.folder = Path(folder)
        self.num_samples = num_samples
        self.signs = signs if signs is not None else WarningSigns()
        self.console = console if console is not None else Console()
        self._pending: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what an interrupted run had written up to the checkpoint, or start anew."""
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = [record for record in self._read() if record["step"] <= state.global_step]
            write_json_lines(
                self._file, kept if state.global_step else []
            )  # a new run replaces what an older one left here
            for logs in state.log_history:  # of the run that is resumed
                self._pending.extend(self.signs.update(logs))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look for warning signs in the metrics of the training."""
        if not state.is_world_process_zero or not logs or any(key.startswith("eval_") for key in logs):
            return
        for sign in self.signs.update(logs):
            logger.warning("step %d, sign of reward hacking: %s", state.global_step, sign)
            self._pending.append(sign)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write down this evaluation."""
        if not state.is_world_process_zero:
            return
        logs = next((entry for entry in reversed(state.log_history) if "eval_mr_reward/score_mean" in entry), None)
        if logs is None or logs["step"] != state.global_step:
            return
        metrics = {key: value for key, value in logs.items() if key.startswith("eval_")}
        # The evaluation that ends an epoch may fall on a step that was evaluated already.
        records = [record for record in self._read() if record["step"] != state.global_step]
        records.append({"step": state.global_step, **metrics, "warning_signs": self._pending})
        self._pending = []
        write_json_lines(self._file, records)
        self._plot(records)
        self._show_samples(state.global_step)

    @property
    def _file(self) -> Path:
        return self.folder / "validation.jsonl"

    def _read(self) -> list[dict[str, Any]]:
        if not self._file.is_file():
            return []
        return [record for _, record in read_json_lines(self._file)]

    def _plot(self, records: Sequence[Mapping[str, Any]]) -> None:
        others = sorted(
            {
                key
                for record in records
                for key in record
                if key.startswith("eval_rewards/") and key.endswith("/mean") and self.reward.__name__ not in key
            }
        )
        panels = {}
        for title, keys in {**_PANELS, "other rewards": others}.items():
            curves = {}
            for key in keys:
                points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
                if points:
                    steps, values = zip(*points, strict=True)
                    curves[key.removeprefix("eval_").removeprefix("mr_reward/")] = (steps, values)
            if curves:
                panels[title] = curves
        if panels:
            plot_curves(panels, self.folder / "validation.png", title="held-out prompts")

    def _show_samples(self, step: int) -> None:
        scored = [(found.group, found.scores) for found in self.reward.last_scored if found.scores is not None]
        samples = scored[: self.num_samples]
        table = Table("prompt", "score", "response", title=f"step {step}: rollouts for held-out prompts, best first")
        lines = [f"# Step {step}: rollouts for held-out prompts, best first", ""]
        for group, scores in samples:
            ranked = sorted(zip(scores, group.responses, strict=True), key=lambda pair: -pair[0])
            lines += ["```text", json.dumps(_prompt_text(group), ensure_ascii=False)]
            for position, (score, response) in enumerate(ranked):
                name = _shorten(_prompt_text(group), 60) if position == 0 else ""
                table.add_row(_plain(name), f"{score:+.3f}", _plain(_shorten(response, 100)))
                lines.append(f"{score:+9.3f}  {json.dumps(response, ensure_ascii=False)}")
            lines += ["```", ""]
            table.add_section()
        # Lone surrogates, which a policy can write, have no UTF-8.
        (self.folder / "samples.md").write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
        self.console.print(table)


def _prompt_text(group: ResponseGroup) -> str:
    """The text of the last turn; media as a word."""
    content = group.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(block["text"] if block["type"] == "text" else f"({block['type']})" for block in content)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _plain(text: str) -> Text:
    """Text that the terminal shows as it is: no markup, no control characters."""
    return Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))
