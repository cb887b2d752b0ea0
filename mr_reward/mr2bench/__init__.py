"""N-way benchmarks from human judgments: votes or rankings, one ranking a question, items with a clear best."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.mr2bench.build import build_benchmark, write_benchmark

__all__ = ["build_benchmark", "write_benchmark"]

__getattr__, __dir__ = lazy_exports(__name__, {"build": __all__})
