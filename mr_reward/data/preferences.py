"""Ranked groups in JSON Lines, read and written.

One object per line: `prompt` (text or chat messages), `responses`, `rankings` (1 = best, ties share a rank) and, where
there are any, `images`, `videos`, `id` and `source`. The paper's public data (`prompt, responses, rankings, image,
video`, arXiv 2604.10966) reads as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mr_reward.data.groups_file import read_groups, row_from_group
from mr_reward.data.jsonl import write_json_lines
from mr_reward.errors import GroupError
from mr_reward.groups import ResponseGroup

__all__ = ["load_preferences", "save_preferences"]


def load_preferences(
    path: str | Path, *, skip_bad: bool = False, media_within: str | Path | None = None
) -> list[ResponseGroup]:
    """Read ranked groups.

    Args:
        path: a `.jsonl` file. `image` is one path, `images` a list of paths; `video` is one video and `videos` a list,
            a video being a folder of frames, in the order of the numbers in their names, or a list of frame paths, one
            frame a second. Relative paths count from the file's folder. Other keys are ignored.
        skip_bad: leave out lines that are no valid group; they are listed in a warning, with their number.
        media_within: folder that the files named in rows have to lie in; None for the file's and the working folder.

    Returns:
        The groups in file order.

    Raises:
        GroupError: a line that is no valid group or whose media do not exist (the message names file, line and field),
            or no group at all.

    Example:
        >>> groups = load_preferences("train.jsonl")  # doctest: +SKIP
    """
    expected = "a .jsonl file with one ranked group per line"
    return read_groups(
        path, lambda group, _: group, expected=expected, ranked=True, skip_bad=skip_bad, media_within=media_within
    )


def save_preferences(groups: Iterable[ResponseGroup], path: str | Path) -> int:
    """Write ranked groups so that `load_preferences` reads equal ones.

    Media that are paths stay where they are, relative to the file's folder. Embedded ones (bytes, PIL images) are
    written beside the file, to `<name>_media/<sha256>.<type>`, so that a picture that many groups share is there once.
    The file appears when it is whole.

    Args:
        groups: ranked groups; an iterator is read one group at a time.
        path: the `.jsonl` file, replaced if it exists.

    Returns:
        The number of groups.

    Raises:
        GroupError: a group without rankings, or no group at all.
        MediaError: a medium that is no image.

    Example:
        >>> save_preferences(groups, "train.jsonl")  # doctest: +SKIP
        1234
    """
    path = Path(path)

    def rows() -> Iterator[dict[str, Any]]:
        empty = True
        for group in groups:
            empty = False
            if group.rankings is None:
                raise GroupError(
                    f"{group.name}: has no rankings, expected 1 = best, ties share a rank; rank it or leave it out"
                )
            yield row_from_group(group, path)
        if empty:
            raise GroupError(f"{path}: there is no group to write; check the source and what was skipped")

    return write_json_lines(path, rows())
