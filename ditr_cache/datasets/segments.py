"""Annotations of meshes by segments, as ScanNet's and ScanNet++'s tools write them.

```
segs.json         segIndices: the segment of every vertex, named by any number
aggregation.json  segGroups: objects that annotators put together of segments, each with a label
```
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.documents import read_json, whole_numbers
from ditr_cache.errors import DataError

Object = tuple[int, str, NDArray[np.int64]]
"""Id, label, segments."""


def read_segments(path: Path, vertices: int, mesh: str, remedy: str) -> NDArray[np.int64]:
    """[vertices] the segment of every vertex.

    Args:
        path: of the file with `segIndices`.
        vertices: of the mesh.
        mesh: names it, and its download, in errors.
        remedy: how to get the file again.

    Raises:
        MissingDataError: no such file.
        DataError: it cannot be used, or is of another mesh.
    """
    segment_of = whole_numbers(read_json(path, remedy).get("segIndices"))
    if segment_of is None:
        raise DataError(f"{path}: expected a list of whole numbers 'segIndices', one a vertex; {remedy}")
    if len(segment_of) != vertices:
        raise DataError(
            f"{path}: segments of {len(segment_of)} vertices, expected the {vertices} of {mesh}; the two files are of "
            f"different meshes: {remedy}, and the mesh"
        )
    return segment_of


def read_objects(path: Path, id_key: str, remedy: str) -> Iterator[Object]:
    """Annotated objects in the order of the file.

    Args:
        path: of the file with `segGroups`.
        id_key: key of an object's id.
        remedy: how to get the file again.

    Raises:
        MissingDataError: no such file.
        DataError: it cannot be used.
    """
    groups = read_json(path, remedy).get("segGroups")
    if not isinstance(groups, list):
        raise DataError(f"{path}: expected a list of objects 'segGroups'; {remedy}")
    for position, group in enumerate(groups):
        fields = group if isinstance(group, dict) else {}
        number, label, segments = fields.get(id_key), fields.get("label"), whole_numbers(fields.get("segments"))
        if type(number) is not int or not 0 <= number < 2**31 or not isinstance(label, str) or segments is None:
            raise DataError(
                f"{path}: object {position} of 'segGroups': expected a whole number '{id_key}', a text 'label' and a "
                f"list of whole numbers 'segments', got {str(group)[:100]}; {remedy}"
            )
        yield number, label, segments


def positions_of(segments: NDArray[np.int64], names: NDArray[np.int64]) -> NDArray[np.intp]:
    """Where the segments of an object stand among the sorted `names` of the mesh's; without those that it lacks."""
    at = np.searchsorted(names, segments)
    known = at < len(names)
    known[known] = names[at[known]] == segments[known]
    return at[known]


class VerticesBySegment:
    """The vertices of every segment of a mesh, sorted once: an object costs no more than it is large.

    Args:
        segment_of: [N] the segment of every vertex.
    """

    def __init__(self, segment_of: NDArray[np.int64]) -> None:
        self._names, of, self._count = np.unique(segment_of, return_inverse=True, return_counts=True)
        self._vertices = np.argsort(of, kind="stable")
        self._first = np.cumsum(self._count) - self._count

    def __getitem__(self, segments: NDArray[np.int64]) -> NDArray[np.intp]:
        """Vertices of an object's segments, each once."""
        at = np.unique(positions_of(segments, self._names))
        count = self._count[at]
        # One run of numbers a segment, end to end.
        skipped = np.repeat(self._first[at] - (np.cumsum(count) - count), count)
        return self._vertices[skipped + np.arange(len(skipped))]
