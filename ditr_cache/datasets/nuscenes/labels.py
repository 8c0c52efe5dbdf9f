"""Labels of nuScenes-lidarseg, and the 16 classes of its benchmark.

A `*_lidarseg.bin` file has one uint8 per point of the scan: the `index` that `category.json` gives to one of 32 general
classes. 12 of them are void to the benchmark, the others make 16 classes. `classes.tsv` is that mapping with the
classes' colours: eval/lidarseg/README.md and utils/color_map.py of github.com/nutonomy/nuscenes-devkit. It is looked up
by name: neither the rows of `category.json` nor the numbers in the annotators' instructions are in the order of the
indices.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo
from ditr_cache.datasets.json_rows import rows
from ditr_cache.datasets.shipped import row_color, shipped_rows
from ditr_cache.errors import DataError, MissingDataError
from ditr_cache.schema import IGNORE_INDEX

_UNKNOWN = -2


def _table() -> list[dict[str, str]]:
    return shipped_rows("nuscenes", "classes.tsv")


@lru_cache(maxsize=1)
def classes() -> tuple[ClassInfo, ...]:
    """The 16 classes, by label index: the benchmark's class 1 is index 0."""
    found = {int(row["train_id"]): ClassInfo(row["train_name"], row_color(row)) for row in _table()}
    return tuple(found[i] for i in range(1, len(found)))


def index_of_category(path: Path, remedy: str) -> NDArray[np.int16]:
    """[256] value of a label file -> label index, `IGNORE_INDEX` where the benchmark ignores it.

    Args:
        path: of `category.json`.
        remedy: which download it comes from.

    Raises:
        MissingDataError: no such file, or that of the metadata, which lidarseg's has not replaced.
        DataError: other categories than nuScenes'.
    """
    train_id = {row["general_name"]: int(row["train_id"]) for row in _table()}
    table = np.full(256, _UNKNOWN, dtype=np.int16)
    for row in rows(path, remedy):
        name, index = row.get("name"), row.get("index")
        if index is None:
            raise MissingDataError(
                f"{path}: its categories have no 'index', expected the file of lidarseg, which replaces that of the "
                f"metadata; {remedy}"
            )
        if name not in train_id or not isinstance(index, int) or not 0 <= index < len(table):
            raise DataError(
                f"{path}: category {name!r} with index {index!r}, expected one of nuScenes' {len(train_id)} categories "
                f"with an index of one byte; {remedy}"
            )
        table[index] = train_id[name] - 1 if train_id[name] else IGNORE_INDEX
    return table


def read_labels(path: Path, points: int, table: NDArray[np.int16], remedy: str) -> NDArray[np.int16]:
    """Label index [N] of every point of a scan.

    Args:
        path: of the label file.
        points: of the scan.
        table: of `index_of_category`.
        remedy: which download it comes from.

    Raises:
        DataError: not as many labels as points, or values that are no category.
    """
    try:
        with path.open("rb") as file:
            raw = np.frombuffer(file.read(points + 1), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    if len(raw) != points:
        count = len(raw) if len(raw) < points else f"more than {points}"
        raise DataError(f"{path}: {count} labels for the {points} points of the scan, expected one each; {remedy}")
    segment = table[raw]
    if (unknown := segment == _UNKNOWN).any():
        raise DataError(
            f"{path}: {int(unknown.sum())} points have labels that category.json does not list, for example "
            f"{int(raw[unknown][0])}; {remedy}"
        )
    return segment
