"""Labels of ScanNet++: from the annotated objects of a scene to one benchmark class for every vertex of its mesh.

The rule is that of the toolkit (`semantic/prep/map_semantic.py` and `semantic/transforms/mesh.py` of
https://github.com/scannetpp/scannetpp), for one label a vertex:

```
semantic_benchmark/map_benchmark.csv   raw label -> semantic_map_to; empty: itself; None, or no row: dropped
semantic_benchmark/top100.txt          what is left is kept if it is one of these, in this order
scans/segments.json                    segIndices: the segment of every vertex, named by any number
scans/segments_anno.json               segGroups: objects of {objectId, label, segments}, which may overlap
scans/mesh_aligned_0.05_mask.txt       vertices that are not evaluated: anonymised ones
```

Of the objects that keep a class, the first three in the file's order count for a vertex, and of those the one with the
fewest vertices wins it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo, distinct_color
from ditr_cache.datasets.documents import read_lines, read_text
from ditr_cache.datasets.scannet.scannet200_labels import SCANNET200
from ditr_cache.datasets.segments import VerticesBySegment, read_objects, read_segments
from ditr_cache.datasets.shipped import shipped_lines
from ditr_cache.errors import DataError
from ditr_cache.schema import IGNORE_INDEX

BENCHMARK = Path("metadata", "semantic_benchmark")
"""Folder of the benchmark's lists, below the root."""

MASK = "mesh_aligned_0.05_mask.txt"

LABELS_PER_VERTEX = 3
"""Further objects that a vertex is in do not count."""

_NONE = "None"
_METADATA = "it comes with the folders metadata and splits, which ScanNet++'s download script gets first"
_AGAIN = "download it again with ScanNet++'s script"
_NEAR = 24  # in RGB: colours nearer than this are not told apart


def benchmark_classes(root: Path) -> tuple[ClassInfo, ...]:
    """The classes of the semantic benchmark, by the list below `root`, or the one that is shipped where there is none.

    The release names no colours: a class that ScanNet200 has keeps its colour, the others get one of their own.

    Raises:
        DataError: the list below `root` cannot be used.
    """
    path = root / BENCHMARK / "top100.txt"
    if path.is_file():
        names = read_lines(path, _METADATA)
        if not names or len(set(names)) != len(names):
            raise DataError(f"{path}: expected one class a line, each once, got {len(names)} lines; {_METADATA}")
    else:
        names = shipped_lines("scannetpp", "top100.txt")
    return tuple(ClassInfo(name, color) for name, color in zip(names, _colors(names), strict=True))


def class_indices(root: Path, classes: Sequence[ClassInfo]) -> dict[str, int]:
    """Raw label -> index of its class, without the labels that the benchmark drops.

    Raises:
        MissingDataError: no map of labels below `root`.
        DataError: it is not that map.
    """
    path = root / BENCHMARK / "map_benchmark.csv"
    index = {info.name: position for position, info in enumerate(classes)}
    found = {}
    try:
        rows = csv.DictReader(read_text(path, _METADATA).splitlines())
        for row in rows:
            raw, target = row["class"], row["semantic_map_to"]
            if target != _NONE and (target or raw) in index:
                found[raw] = index[target or raw]
    except (csv.Error, KeyError) as error:
        raise DataError(f"{path}: expected columns class and semantic_map_to ({error}); {_METADATA}") from error
    if not found:
        raise DataError(f"{path}: maps no label to a class of the benchmark; {_METADATA}")
    return found


@dataclass(frozen=True)
class Annotation:
    """The labels of one scene, read when called with the number of vertices N of its mesh.

    Args:
        scans: the scene's folder `scans`.
        index: raw label -> index of its class.
    """

    scans: Path
    index: Mapping[str, int]

    def __call__(self, vertices: int) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
        """Class indices [N], ignored where no object counts or the vertex is not evaluated; and `objectId` [N], or -1.

        Raises:
            MissingDataError: a file is missing.
            DataError: a file that cannot be used, or that is of another mesh.
        """
        segments, annotation = self.scans / "segments.json", self.scans / "segments_anno.json"
        segment_of = read_segments(
            segments, vertices, "mesh_aligned_0.05.ply (scan_mesh_path)", f"{_AGAIN} (scan_mesh_segs_path)"
        )
        segment, instance = smallest_objects(segment_of, _objects(annotation, self.index))
        segment[_masked(self.scans / MASK, vertices)] = IGNORE_INDEX
        return segment, instance


Object = tuple[int, int, NDArray[np.int64]]
"""Id, class index, segments."""


def smallest_objects(
    segment_of: NDArray[np.int64], objects: Iterator[Object]
) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """Class index [N] and id [N] of the object that wins each vertex, `IGNORE_INDEX` and -1 where there is none.

    Args:
        segment_of: [N] segment of each vertex.
        objects: in the order of the annotation.
    """
    vertices = VerticesBySegment(segment_of)
    label = np.full(len(segment_of), IGNORE_INDEX, dtype=np.int16)
    instance = np.full(len(segment_of), -1, dtype=np.int32)
    smallest = np.full(len(segment_of), np.iinfo(np.int64).max)
    counted = np.zeros(len(segment_of), dtype=np.uint8)
    for number, index, segments in objects:
        members = vertices[segments]
        members = members[counted[members] < LABELS_PER_VERTEX]
        counted[members] += 1
        won = members[len(members) < smallest[members]]  # of equally small ones the first
        smallest[won], label[won], instance[won] = len(members), index, number
    return label, instance


def _objects(path: Path, index: Mapping[str, int]) -> Iterator[Object]:
    """Objects that keep a class, in the order of the file."""
    for number, raw, segments in read_objects(path, "objectId", f"{_AGAIN} (scan_anno_json_path)"):
        if raw in index:
            yield number, index[raw], segments


def _masked(path: Path, vertices: int) -> NDArray[np.int64]:
    """Indices of vertices that are not evaluated; none where there is no such file."""
    if not path.is_file():
        return np.zeros(0, dtype=np.int64)
    words = read_text(path, f"{_AGAIN} (scan_mesh_mask_path)").split()
    try:
        masked = np.array([int(word) for word in words], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: expected one vertex index a line ({error}); {_AGAIN} (scan_mesh_mask_path)"
        ) from error
    if len(masked) and not 0 <= masked.min() <= masked.max() < vertices:
        raise DataError(
            f"{path}: names vertices {masked.min()} to {masked.max()}, expected 0 to {vertices - 1} as in "
            f"mesh_aligned_0.05.ply; the two files are of different meshes, {_AGAIN} (scan_mesh_mask_path)"
        )
    return masked


def _colors(names: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """One colour a name, no two of them close to each other."""
    known = {info.name: info.color for info in SCANNET200.values()}
    used = [known[name] for name in names if name in known]
    turn = 0
    for name in names:
        color = known.get(name)
        while color is None:
            new = distinct_color(turn)
            if turn > 1000 or np.abs(np.subtract(used or [(-255, 0, 0)], new)).max(axis=1).min() >= _NEAR:
                color = new
                used.append(new)
            turn += 1
        yield color
