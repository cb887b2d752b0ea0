"""One pass of a converter over the rows of a data set, with a count of everything that became no group."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mr_reward.data.converters import Converter, SkippedRow
from mr_reward.data.media_files import resolve_media
from mr_reward.data.sources import RowSource
from mr_reward.errors import GroupError, MRRewardError
from mr_reward.groups import ResponseGroup

__all__ = ["BadRow", "Conversion"]

logger = logging.getLogger(__name__)


class BadRow(NamedTuple):
    """A row that is no group."""

    where: str  # file and line
    reason: str  # the field, what was found and what was expected


class Conversion:
    """The groups of a data set, made while they are iterated over; the counts are complete at the end.

    Public pairs store the chosen response first, which a model that sees all responses would learn. So the order of
    the responses is shuffled, for each group in the same way at every run.
    """

    def __init__(
        self,
        converter: Converter,
        rows: RowSource,
        *,
        media_root: str | Path | None = None,
        limit: int | None = None,
        skip_bad: bool = False,
        keep_order: bool = False,
    ) -> None:
        self.converter = converter
        self.rows = rows
        self.media_root = rows.folder if media_root is None else Path(media_root)
        self.limit = limit
        self.skip_bad = skip_bad
        self.keep_order = keep_order
        self._convert = converter.make(row for _, row in rows)
        self.num_rows = 0
        self.skipped: Counter[str] = Counter()
        self.bad_rows: list[BadRow] = []

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
                self.bad_rows.append(BadRow(place, str(error)))
            else:
                yield group
        if self.bad_rows:
            logger.warning("%s: skipped %d of %d rows as bad", self.rows.name, len(self.bad_rows), self.num_rows)

    def _finish(self, group: ResponseGroup) -> ResponseGroup:
        """Find the media, name the group, shuffle the responses."""
        name = group.id if group.id is not None else f"{self.converter.name}-{self.num_rows}"
        group = replace(resolve_media(group, self.media_root), id=name)
        if self.keep_order:
            return group
        # By the row's number too: ids need not be unique.
        order = random.Random(f"{name} {self.num_rows}").sample(range(group.num_responses), group.num_responses)
        return group.select(order)
