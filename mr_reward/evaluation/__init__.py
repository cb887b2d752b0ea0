"""Evaluation of reward models: benchmarks by their official metrics, ranked groups of your own, known attacks."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.evaluation.attacks import attack_items, run_attacks
    from mr_reward.evaluation.evaluator import evaluate_benchmark, evaluate_groups
    from mr_reward.evaluation.judges import load_scorer

__all__ = ["attack_items", "evaluate_benchmark", "evaluate_groups", "load_scorer", "run_attacks"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "attacks": ["attack_items", "run_attacks"],
        "evaluator": ["evaluate_benchmark", "evaluate_groups"],
        "judges": ["load_scorer"],
    },
)
