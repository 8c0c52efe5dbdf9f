"""Annotation of ScanNet: from the objects that annotators put together of segments to a class for every vertex.

Three files speak of a scan's mesh `_vh_clean_2.ply`, and the rule is that of the benchmarks (`BenchmarkScripts` of
https://github.com/ScanNet/ScanNet), for 20 classes as for 200:

```
<id>_vh_clean_2.0.010000.segs.json   segIndices: the segment of every vertex, named by any number
<id>.aggregation.json                segGroups: objects of {id, label, segments}; a later one overwrites an earlier one
scannetv2-labels.combined.tsv        row of `raw_category` == label -> number of a class: `nyu40id`, or `id` for the 200
```

Numbers decide, not names: `doors` and `door` are both 5 of the 200, and `category` groups otherwise than these do.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo
from ditr_cache.datasets.documents import read_text
from ditr_cache.datasets.segments import positions_of, read_objects, read_segments
from ditr_cache.errors import DataError
from ditr_cache.schema import IGNORE_INDEX

AGGREGATION = ".aggregation.json"
SEGMENTS = "_vh_clean_2.0.010000.segs.json"
LABEL_TABLE = "scannetv2-labels.combined.tsv"

_NO_INSTANCE = -1
_AGAIN = "download it again with ScanNet's script"


def read_label_table(path: Path, column: str) -> dict[str, int]:
    """Raw category -> number in `column`, of ScanNet's label table; of rows with one name the first counts.

    Raises:
        MissingDataError: no such file.
        DataError: not that table.
    """
    # Public copies end their lines in CR CR LF.
    lines = [line for line in read_text(path, f"{_AGAIN} (--label_map)").splitlines() if line.strip()]
    numbers: dict[str, int] = {}
    try:
        rows = csv.reader(lines, delimiter="\t")
        header = next(rows, [])
        name, number = header.index("raw_category"), header.index(column)
        for row in rows:
            numbers.setdefault(row[name], int(row[number]))
    except (csv.Error, ValueError, IndexError) as error:
        raise DataError(
            f"{path}: not ScanNet's label table, expected columns raw_category and {column}, separated by tabs, and "
            f"whole numbers in {column} ({error}); {_AGAIN} (--label_map)"
        ) from error
    return numbers


def read_annotation(
    aggregation: Path,
    segments: Path,
    table: Path,
    numbers: Mapping[str, int],
    classes: Mapping[int, ClassInfo],
    vertices: int,
) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """Class indices [N] and instances [N] of the vertices of a mesh.

    Args:
        aggregation: objects, each a list of segments with a raw category.
        segments: the segment of every vertex.
        table: file that `numbers` come from; named in errors.
        numbers: raw category -> number.
        classes: number -> class, in the order of the indices.
        vertices: N, of the mesh that is to be labelled.

    Returns:
        Class indices, ignored where a vertex is in no object or its category is in none of the classes; and ids of
        objects, -1 where a vertex is in none.

    Raises:
        MissingDataError: a file is missing.
        DataError: a file that cannot be used, or that is of another mesh or table.
    """
    index = {number: position for position, number in enumerate(classes)}
    segment_of = read_segments(segments, vertices, "the mesh (--type _vh_clean_2.ply)", f"{_AGAIN} (--type {SEGMENTS})")
    names, at = np.unique(segment_of, return_inverse=True)
    label = np.full(len(names), IGNORE_INDEX, dtype=np.int16)
    instance = np.full(len(names), _NO_INSTANCE, dtype=np.int32)
    categories: list[str] = []
    placed = 0
    for number, category, members in read_objects(aggregation, "id", f"{_AGAIN} (--type {AGGREGATION})"):
        here = positions_of(members, names)
        label[here] = index.get(numbers.get(category, 0), IGNORE_INDEX)
        instance[here] = number
        placed += len(here)
        categories.append(category)
    if categories and vertices and not placed:
        raise DataError(
            f"{aggregation}: none of its {len(categories)} objects has a segment of {segments.name}; the two files are "
            f"of different meshes, {_AGAIN} (--type {AGGREGATION}, --type {SEGMENTS})"
        )
    if categories and not any(category in numbers for category in categories):
        raise DataError(
            f"{aggregation}: none of its {len(categories)} objects is of a category of {table}, the first is "
            f"{categories[0]!r}; the table is not that of ScanNet v2, {_AGAIN} (--label_map)"
        )
    return label[at], instance[at]
