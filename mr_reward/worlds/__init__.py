"""Test beds with a known truth, and tiny real models for them: for recipes, benchmarks, tests and the command line."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.worlds.handwriting import grade, make_groups, make_policy_rows, make_tasks
    from mr_reward.worlds.handwriting_policy import HandwritingArguments

__all__ = ["HandwritingArguments", "grade", "make_groups", "make_policy_rows", "make_tasks"]

__getattr__ = lazy_exports(
    __name__,
    {
        "HandwritingArguments": "handwriting_policy",
        "grade": "handwriting",
        "make_groups": "handwriting",
        "make_policy_rows": "handwriting",
        "make_tasks": "handwriting",
    },
)
