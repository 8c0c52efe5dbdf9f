"""SemanticKITTI's label files, and the classes of its single-scan benchmark.

A `.label` file has one little-endian uint32 per point of the scan: the raw id in the lower 16 bits, the number of the
object in the upper 16 (github.com/PRBonn/semantic-kitti-api, README.md). `classes.tsv` is `labels`,
`learning_map` and `color_map` of `config/semantic-kitti.yaml` there: moving objects have raw ids of their own, which
join the classes of those that stand still.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo
from ditr_cache.datasets.shipped import row_color, shipped_rows
from ditr_cache.errors import DataError
from ditr_cache.schema import IGNORE_INDEX

LABELS_ZIP = "data_odometry_labels.zip of SemanticKITTI, https://semantic-kitti.org/dataset.html"

NO_INSTANCE = -1

_UNKNOWN = -2
_MOST_UNKNOWN = 0.01  # of a scan: a few stray ids are ignored, as SemanticKITTI's own scripts do


def _table() -> list[dict[str, str]]:
    return shipped_rows("semantickitti", "classes.tsv")


@lru_cache(maxsize=1)
def classes() -> tuple[ClassInfo, ...]:
    """The 19 classes, by label index: train id 1 is index 0. Each has the colour of the raw id of its own name."""
    own = {int(row["train_id"]): row for row in _table() if row["raw_name"] == row["train_name"]}
    own.pop(0)  # unlabeled
    return tuple(ClassInfo(row["train_name"], row_color(row)) for _, row in sorted(own.items()))


@lru_cache(maxsize=1)
def _index_of_raw() -> NDArray[np.int16]:
    """[65536] raw id -> label index, `IGNORE_INDEX` where the benchmark ignores it, `_UNKNOWN` where there is none."""
    table = np.full(2**16, _UNKNOWN, dtype=np.int16)
    for row in _table():
        train_id = int(row["train_id"])
        table[int(row["raw_id"])] = train_id - 1 if train_id else IGNORE_INDEX
    return table


def read_labels(path: Path, points: int) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """Label index and instance of every point of a scan.

    Objects are numbered per raw id: a car and a person may both be number 1. An instance is therefore `raw id << 16 |
    number`, the two halves of the file's uint32 exchanged, which is unique within a sequence.

    Args:
        path: of the `.label` file.
        points: of the scan.

    Returns:
        segment [N] int16, `IGNORE_INDEX` where the benchmark ignores the point; instance [N] int32, -1 where none.

    Raises:
        DataError: not as many labels as points, or ids that are not the release's.
    """
    try:
        size = path.stat().st_size
        if size != 4 * points:
            raise DataError(
                f"{path}: {size / 4:g} labels for the {points} points of its scan, expected one each; the file is "
                f"truncated, or the scan is not of KITTI odometry: unpack {LABELS_ZIP}, and the scans again"
            )
        label = np.fromfile(path, dtype="<u4")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if len(label) != points:
        raise DataError(f"{path}: the file ends after {len(label)} of {points} labels; unpack {LABELS_ZIP}")
    raw, number = label & 0xFFFF, label >> 16
    segment = _index_of_raw()[raw]
    unknown = segment == _UNKNOWN
    if unknown.sum() > _MOST_UNKNOWN * points:
        ids = ", ".join(str(i) for i in np.unique(raw[unknown])[:8])
        raise DataError(
            f"{path}: {unknown.mean():.0%} of the points have ids that SemanticKITTI does not know ({ids}); labels "
            f"that remap_semantic_labels.py has overwritten cannot be used, unpack {LABELS_ZIP}"
        )
    segment[unknown] = IGNORE_INDEX
    none = unknown | (number == 0)
    return segment, np.where(none, NO_INSTANCE, (raw << 16 | number).astype(np.int32))
