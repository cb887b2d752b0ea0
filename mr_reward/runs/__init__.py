"""A GRPO run around the reward: its recipe, what watches it, resuming, and rollouts by vLLM."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.runs.callbacks import PolicyValidation, RunFigure, WarningSigns
    from mr_reward.runs.recipe import PolicyArguments, PolicyTrainingArguments, PromptSource
    from mr_reward.runs.resume import ContinuedEpochs, checkpoint_to_resume
    from mr_reward.runs.vllm import check_vllm_server, prepare_vllm_on_cpu, send_single_placeholders

__all__ = [
    "ContinuedEpochs",
    "PolicyArguments",
    "PolicyTrainingArguments",
    "PolicyValidation",
    "PromptSource",
    "RunFigure",
    "WarningSigns",
    "check_vllm_server",
    "checkpoint_to_resume",
    "prepare_vllm_on_cpu",
    "send_single_placeholders",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "ContinuedEpochs": "resume",
        "PolicyArguments": "recipe",
        "PolicyTrainingArguments": "recipe",
        "PolicyValidation": "callbacks",
        "PromptSource": "recipe",
        "RunFigure": "callbacks",
        "WarningSigns": "callbacks",
        "check_vllm_server": "vllm",
        "checkpoint_to_resume": "resume",
        "prepare_vllm_on_cpu": "vllm",
        "send_single_placeholders": "vllm",
    },
)
