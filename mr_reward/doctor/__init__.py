"""What is wrong with a recipe, a reward model or this machine, before a weight is loaded.

The checks ask the objects of a run what they would do, and derive nothing a second time.
"""

from typing import TYPE_CHECKING

from mr_reward.exports import lazy_exports

if TYPE_CHECKING:
    from mr_reward.doctor.examine import check_before_start, examine_machine, examine_recipe
    from mr_reward.doctor.findings import Finding

__all__ = ["Finding", "check_before_start", "examine_machine", "examine_recipe"]

__getattr__, __dir__ = lazy_exports(
    __name__, {"examine": ["check_before_start", "examine_machine", "examine_recipe"], "findings": ["Finding"]}
)
