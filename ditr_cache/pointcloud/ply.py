"""PLY: ASCII and binary of either byte order, vertices read in chunks; other elements are skipped.

The libraries that read PLY hold a whole file (plyfile maps
binary vertices, but reads ASCII files and lists, so the faces of a mesh, into Python objects).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError
from ditr_cache.pointcloud.cloud import Chunk, Columns, PointCloud
from ditr_cache.pointcloud.ply_header import BYTE_ORDERS, PlyElement, PlyProperty, read_header


class PlyCloud(PointCloud):
    """The vertices of a PLY file.

    Raises:
        DataError: not a PLY file, no vertices with x, y and z, or cut short (binary; an ASCII file tells at its end).
    """

    FORMAT = "PLY"

    def __init__(self, path: Path, *, labels: bool = False) -> None:
        with path.open("rb") as file:
            self._encoding, elements = read_header(file, path)
            names = [e.name for e in elements]
            if "vertex" not in names:
                raise DataError(
                    f"{path}: the PLY header announces no element 'vertex', got {', '.join(names) or 'none'}"
                )
            self._vertex = elements[names.index("vertex")]
            lists = [p.name for p in self._vertex.properties if p.count_dtype]
            if lists:
                raise DataError(
                    f"{path}: vertices with a list ({', '.join(lists)}) cannot be read; remove this property"
                )
            self._columns = Columns({p.name: np.dtype(p.dtype) for p in self._vertex.properties}, path, labels=labels)
            self._order = BYTE_ORDERS[self._encoding]
            for element in elements[: names.index("vertex")]:
                _skip(file, element, self._encoding, path)
            self._start = file.tell()
        super().__init__(path, self._vertex.count, tuple(self._columns.of), self._columns.coord_dtype)
        if self._encoding != "ascii":
            got = (path.stat().st_size - self._start) // self._vertex.dtype(self._order).itemsize
            if got < self.count:
                raise self.cut_short(max(got, 0))

    def _chunks(self, size: int) -> Iterator[Chunk]:
        """See `PointCloud`."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            for first, rows in self.spans(size):
                if self._encoding == "ascii":
                    table = self._typed(self.text_rows(file, len(self._vertex.properties), first, rows))
                else:
                    table = self.binary_rows(file, self._vertex.dtype(self._order), first, rows)
                yield self._columns.chunk(table)

    def _typed(self, values: NDArray[np.float64]) -> Any:
        """The columns [N, P] of an ASCII body that are used, in the types of the header."""
        used = self._columns.used
        properties = enumerate(self._vertex.properties)
        return {p.name: _as_type(values[:, i], p, self.path) for i, p in properties if p.name in used}


def _as_type(values: NDArray[np.float64], prop: PlyProperty, path: Path) -> NDArray[Any]:
    dtype = np.dtype(prop.dtype)
    if dtype.kind != "f":
        info = np.iinfo(dtype)
        wrong = ~((values >= info.min) & (values <= info.max))  # also true for NaN
        if wrong.any():
            raise DataError(f"{path}: property {prop.name!r} of type {prop.dtype} has the value {values[wrong][0]}")
    with np.errstate(over="ignore"):  # becomes infinite, which is found where coordinates are checked
        return values.astype(dtype)


def _skip(file: BinaryIO, element: PlyElement, encoding: str, path: Path) -> None:
    """Go past an element that lies before the vertices."""
    cut = DataError(f"{path}: the file ends within the element {element.name!r}; it is truncated, get it again")
    if encoding == "ascii":
        if sum(1 for _ in islice(filter(bytes.strip, file), element.count)) < element.count:
            raise cut
        return
    order = BYTE_ORDERS[encoding]
    if not any(p.count_dtype for p in element.properties):
        file.seek(element.dtype(order).itemsize * element.count, 1)
        return
    # Where a row with lists ends is known only from the row itself.
    for _ in range(element.count):
        for prop in element.properties:
            entries = 1
            if prop.count_dtype:
                dtype = np.dtype(order + prop.count_dtype)
                raw = file.read(dtype.itemsize)
                if len(raw) < dtype.itemsize:
                    raise cut
                entries = int(np.frombuffer(raw, dtype)[0])
                if entries < 0:
                    raise DataError(f"{path}: element {element.name!r} has a list of {entries} entries, expected >= 0")
            file.seek(entries * np.dtype(prop.dtype).itemsize, 1)
