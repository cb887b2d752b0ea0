"""N-way benchmarks from human judgments: votes or rankings, one ranking a question, items with a clear best."""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.mr2bench.build import build_benchmark, write_benchmark
    from mr_reward.mr2bench.judgments import read_questions, read_rankings, read_votes
    from mr_reward.mr2bench.rankings import rank_votes

__all__ = ["build_benchmark", "rank_votes", "read_questions", "read_rankings", "read_votes", "write_benchmark"]

__getattr__ = lazy_exports(
    __name__,
    {
        "build_benchmark": "build",
        "rank_votes": "rankings",
        "read_questions": "judgments",
        "read_rankings": "judgments",
        "read_votes": "judgments",
        "write_benchmark": "build",
    },
)
