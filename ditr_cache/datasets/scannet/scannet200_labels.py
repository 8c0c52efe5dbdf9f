"""Labels of ScanNet200: from the objects that annotators put together of segments to a class for every vertex.

Three files speak of a scan's mesh `_vh_clean_2.ply`, and the rule is that of the benchmark
(`BenchmarkScripts/ScanNet200` of https://github.com/ScanNet/ScanNet):

```
<id>_vh_clean_2.0.010000.segs.json   segIndices: the segment of every vertex, named by any number
<id>.aggregation.json                segGroups: objects of {id, label, segments}; a later one overwrites an earlier one
scannetv2-labels.combined.tsv        row of `raw_category` == label -> `id`, which is a class if it is one of the 200
```

Ids decide, not names: `doors` and `door` are both 5, and `category` groups otherwise than the benchmark does. The
classes of `scannet200.tsv` are those of `scannet200_constants.py` and `scannet200_splits.py` of the same
repository.
"""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo
from ditr_cache.datasets.documents import read_json, read_text, whole_numbers
from ditr_cache.errors import DataError
from ditr_cache.schema import IGNORE_INDEX

AGGREGATION = ".aggregation.json"
SEGMENTS = "_vh_clean_2.0.010000.segs.json"
LABEL_TABLE = "scannetv2-labels.combined.tsv"

_NO_INSTANCE = -1
_AGAIN = "download it again with ScanNet's script"


def _read_classes() -> dict[int, ClassInfo]:
    text = (importlib.resources.files("ditr_cache.datasets.scannet") / "scannet200.tsv").read_text(encoding="utf-8")
    return {
        int(row["id"]): ClassInfo(row["name"], (int(row["r"]), int(row["g"]), int(row["b"])), row["group"])
        for row in csv.DictReader(text.splitlines(), delimiter="\t")
    }


SCANNET200: dict[int, ClassInfo] = _read_classes()
"""Id of the label table -> class of the benchmark, in the order of its label indices 0..199; groups are head, common
and tail."""

_INDEX = {category: index for index, category in enumerate(SCANNET200)}


def read_label_table(path: Path) -> dict[str, int]:
    """Raw category -> id, of ScanNet's label table; of rows with one name the first counts, as in the benchmark.

    Raises:
        MissingDataError: no such file.
        DataError: not that table.
    """
    # Public copies end their lines in CR CR LF.
    lines = [line for line in read_text(path, f"{_AGAIN} (--label_map)").splitlines() if line.strip()]
    ids: dict[str, int] = {}
    try:
        rows = csv.reader(lines, delimiter="\t")
        header = next(rows, [])
        name, number = header.index("raw_category"), header.index("id")
        for row in rows:
            ids.setdefault(row[name], int(row[number]))
    except (csv.Error, ValueError, IndexError) as error:
        raise DataError(
            f"{path}: not ScanNet's label table, expected columns raw_category and id, separated by tabs, and whole "
            f"numbers as ids ({error}); {_AGAIN} (--label_map)"
        ) from error
    return ids


def read_annotation(
    aggregation: Path, segments: Path, table: Path, ids: Mapping[str, int], vertices: int
) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """Class indices [N] and instances [N] of the vertices of a mesh.

    Args:
        aggregation: objects, each a list of segments with a raw category.
        segments: the segment of every vertex.
        table: file that `ids` come from; named in errors.
        ids: raw category -> id.
        vertices: N, of the mesh that is to be labelled.

    Returns:
        Class indices, ignored where a vertex is in no object or its category is none of the 200; and ids of objects,
        -1 where a vertex is in none.

    Raises:
        MissingDataError: a file is missing.
        DataError: a file that cannot be used, or that is of another mesh or table.
    """
    segment_of = _segments(segments, vertices)
    names, at = np.unique(segment_of, return_inverse=True)
    label = np.full(len(names), IGNORE_INDEX, dtype=np.int16)
    instance = np.full(len(names), _NO_INSTANCE, dtype=np.int32)
    categories: list[str] = []
    placed = 0
    for number, category, members in _groups(aggregation):
        here = np.searchsorted(names, members[np.isin(members, names)])
        label[here] = _INDEX.get(ids.get(category, 0), IGNORE_INDEX)
        instance[here] = number
        placed += len(here)
        categories.append(category)
    if categories and vertices and not placed:
        raise DataError(
            f"{aggregation}: none of its {len(categories)} objects has a segment of {segments.name}; the two files are "
            f"of different meshes, {_AGAIN} (--type {AGGREGATION}, --type {SEGMENTS})"
        )
    if categories and not any(category in ids for category in categories):
        raise DataError(
            f"{aggregation}: none of its {len(categories)} objects is of a category of {table}, the first is "
            f"{categories[0]!r}; the table is not that of ScanNet v2, {_AGAIN} (--label_map)"
        )
    return label[at], instance[at]


def _segments(path: Path, vertices: int) -> NDArray[np.int64]:
    document = read_json(path, f"{_AGAIN} (--type {SEGMENTS})")
    segment_of = whole_numbers(document.get("segIndices"))
    if segment_of is None:
        raise DataError(f"{path}: expected a list of whole numbers 'segIndices'; {_AGAIN} (--type {SEGMENTS})")
    if len(segment_of) != vertices:
        raise DataError(
            f"{path}: segments of {len(segment_of)} vertices, expected the {vertices} of the mesh _vh_clean_2.ply; the "
            f"two files are of different meshes, {_AGAIN} (--type {SEGMENTS}, --type _vh_clean_2.ply)"
        )
    return segment_of


def _groups(path: Path) -> Iterator[tuple[int, str, NDArray[np.int64]]]:
    """Id, raw category and segments of every object, in the order of the file."""
    groups = read_json(path, f"{_AGAIN} (--type {AGGREGATION})").get("segGroups")
    if not isinstance(groups, list):
        raise DataError(f"{path}: expected a list of objects 'segGroups'; {_AGAIN} (--type {AGGREGATION})")
    for position, group in enumerate(groups):
        fields = group if isinstance(group, dict) else {}
        number, category, members = fields.get("id"), fields.get("label"), whole_numbers(fields.get("segments"))
        if type(number) is not int or not 0 <= number < 2**31 or not isinstance(category, str) or members is None:
            raise DataError(
                f"{path}: object {position} of 'segGroups': expected a whole number 'id', a text 'label' and a list of "
                f"whole numbers 'segments', got {str(group)[:100]}; {_AGAIN} (--type {AGGREGATION})"
            )
        yield number, category, members
