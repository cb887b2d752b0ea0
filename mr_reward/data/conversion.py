"""One pass of a converter over the rows of a data set, with a count of everything that became no group."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

from mr_reward.data.converters import Converter, SkippedRow
from mr_reward.data.media_files import resolve_media
from mr_reward.data.sources import RowSource
from mr_reward.errors import GroupError, MRRewardError
from mr_reward.groups import ResponseGroup

__all__ = ["Conversion"]

logger = logging.getLogger(__name__)


@dataclass
class Conversion:
    """The groups of a data set, made while they are iterated over; the counts are complete at the end.

    Public pairs store the chosen response first, which a model that sees all responses would learn. So the order of
    the responses is shuffled, for each group in the same way at every run.
    """

    converter: Converter
    rows: RowSource
    _: KW_ONLY
    media_root: Path | None = None  # relative paths in the rows count from here; the folder of the source if None
    limit: int | None = None  # stop after so many rows
    skip_bad: bool = False  # leave a bad row out and continue; otherwise it is an error with file, line and field
    keep_order: bool = False  # do not shuffle the responses
    num_rows: int = field(default=0, init=False)  # rows that were read
    skipped: Counter[str] = field(default_factory=Counter, init=False)  # rows without a preference, by reason
    # Rows that contradict the schema or whose media are missing: file and line, field, what was found and expected.
    bad_rows: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._convert = self.converter.make(row for _, row in self.rows)

    def __iter__(self) -> Iterator[ResponseGroup]:
        self.num_rows = 0
        self.skipped.clear()
        self.bad_rows.clear()
        for place, row in self.rows:
            if self.limit is not None and self.num_rows >= self.limit:
                break
            self.num_rows += 1
            try:
                if isinstance(row, GroupError):
                    raise row
                group = self._finish(self._convert(row))
            except SkippedRow as reason:
                self.skipped[str(reason)] += 1
            except MRRewardError as error:
                if not self.skip_bad:
                    raise GroupError(
                        f"{place}: {error} (converter {self.converter.name}; --skip-bad leaves such rows out)"
                    ) from error
                self.bad_rows.append(f"{place}: {error}")
            else:
                yield group
        if self.bad_rows:
            logger.warning("%s: skipped %d of %d rows as bad", self.rows.name, len(self.bad_rows), self.num_rows)

    def _finish(self, group: ResponseGroup) -> ResponseGroup:
        """Find the media, name the group, shuffle the responses."""
        name = group.id if group.id is not None else f"{self.converter.name}-{self.num_rows}"
        group = replace(resolve_media(group, self.media_root or self.rows.folder), id=name)
        if self.keep_order:
            return group
        # By the row's number too: ids need not be unique.
        order = random.Random(f"{name} {self.num_rows}").sample(range(group.num_responses), group.num_responses)
        return group.select(order)
