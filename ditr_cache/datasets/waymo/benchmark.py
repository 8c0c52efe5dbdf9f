"""Waymo's 3D semantic segmentation benchmark: its classes, and the frames of testing that it evaluates."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ditr_cache.datasets.base import ClassInfo
from ditr_cache.datasets.shipped import row_color, shipped_rows, shipped_text
from ditr_cache.errors import DataError

TEST_FRAMES = "3d_semseg_test_set_frames.txt"
"""Official list of the frames that the benchmark evaluates. One at the root wins over the one that comes with ditr."""


def read_test_frames(root: Path) -> dict[str, tuple[int, ...]]:
    """Segment -> time stamps of the frames of testing that the benchmark evaluates.

    Raises:
        DataError: a list at `root` with a line that is not `segment,timestamp`.
    """
    path = root / TEST_FRAMES
    if path.is_file():
        text, where = path.read_text(encoding="utf-8", errors="replace"), str(path)
    else:
        text, where = shipped_text("waymo", "test_frames.txt"), "ditr's own list"
    frames: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        context, comma, timestamp = line.rpartition(",")
        if not comma or not (timestamp.isascii() and timestamp.isdigit()):
            raise DataError(
                f"{where}: line {number}: expected 'segment,timestamp', got {line[:80]!r}; take Waymo's own "
                f"{TEST_FRAMES}, or none: ditr brings it along"
            )
        frames[context] = (*frames.get(context, ()), int(timestamp))
    return frames


@cache
def class_table() -> tuple[ClassInfo, ...]:
    """Classes in the order of their ids, which start at 1. Colours are ours, Waymo publishes none."""
    rows = shipped_rows("waymo", "classes.tsv")
    assert [int(row["id"]) for row in rows] == list(range(1, len(rows) + 1))
    return tuple(ClassInfo(row["name"], row_color(row)) for row in rows)
