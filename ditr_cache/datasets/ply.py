"""PLY meshes and point clouds: ASCII and binary of either byte order, any properties in any order.

An ASCII body is turned into one array of float64 values and
then goes through the same decoder as a binary one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError, MissingDataError, UsageError
from ditr_cache.pointcloud.ply_header import BYTE_ORDERS, PlyElement, PlyProperty, read_header

_NAMES = {"i1": "char", "u1": "uchar", "i2": "short", "u2": "ushort", "i4": "int", "u4": "uint", "f4": "float"} | {
    "f8": "double"
}
_FACE_PROPERTIES = ("vertex_indices", "vertex_index")


@dataclass(frozen=True, eq=False)
class Ply:
    """Content of a PLY file.

    Args:
        vertices: property name -> [N] array of the property's type in native byte order. List properties are dropped.
        faces: [F, 3] int32 vertex indices, all in [0, N); polygons are split into fans. None: the file has no faces.
    """

    vertices: dict[str, NDArray[Any]]
    faces: NDArray[np.int32] | None = None

    @property
    def num_vertices(self) -> int:
        """Number of vertices N."""
        return len(next(iter(self.vertices.values()), ()))


@dataclass
class _Rows:
    """Rows of one element that have the same list lengths: row numbers, and a structured array of their content."""

    rows: NDArray[np.int64]
    data: NDArray[Any]


def read_ply(path: str | Path) -> Ply:
    """Vertices and triangles of a PLY file.

    Raises:
        MissingDataError: no such file.
        DataError: not a PLY file, or its content is not what its header announces.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            encoding, elements = read_header(file, path)
            body = file.read()
    except FileNotFoundError as error:
        raise MissingDataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error

    if encoding == "ascii":
        body = _parse_ascii(body, path)
    byte_order = BYTE_ORDERS[encoding]

    vertices: dict[str, NDArray[Any]] | None = None
    faces = None
    offset = 0
    for element in elements:
        groups, offset = _decode(body, offset, element, byte_order, ascii_body=encoding == "ascii", path=path)
        if element.name == "vertex":
            vertices = {
                p.name: _scalars(groups, p, element.count, path) for p in element.properties if not p.count_dtype
            }
        elif element.name == "face":
            faces = _triangles(groups, element, path)
    if vertices is None:
        raise DataError(f"{path}: the header announces no element 'vertex', expected 'element vertex N'")
    result = Ply(vertices, faces)
    if faces is not None and len(faces) and (faces.min() < 0 or faces.max() >= result.num_vertices):
        raise DataError(
            f"{path}: faces name vertices {int(faces.min())}..{int(faces.max())}, expected 0..{result.num_vertices - 1}"
        )
    return result


def write_ply(path: str | Path, vertices: Mapping[str, NDArray[Any]], faces: NDArray[np.int32] | None = None) -> None:
    """Write a binary little-endian PLY file.

    Args:
        path: of the file; an existing one is replaced.
        vertices: property name -> [N] array of 8-, 16- or 32-bit integers or 32- or 64-bit floats.
        faces: [F, 3] vertex indices.

    Raises:
        UsageError: columns of different lengths, of a type that PLY lacks, or faces that are not [F, 3].
    """
    columns = {name: np.asarray(column) for name, column in vertices.items()}
    shapes = {name: column.shape for name, column in columns.items()}
    num_vertices = len(next(iter(columns.values()), ()))
    if any(shape != (num_vertices,) for shape in shapes.values()):
        raise UsageError(f"{path}: expected one-dimensional columns of one length, got shapes {shapes}")
    kinds = {name: f"{column.dtype.kind}{column.dtype.itemsize}" for name, column in columns.items()}
    for name, kind in kinds.items():
        if kind not in _NAMES:
            raise UsageError(f"{path}: PLY has no type for column {name!r} of dtype {columns[name].dtype}; convert it")

    header = ["ply", "format binary_little_endian 1.0", f"element vertex {num_vertices}"]
    header += [f"property {_NAMES[kind]} {name}" for name, kind in kinds.items()]
    table = np.empty(num_vertices, dtype=[(name, f"<{kind}") for name, kind in kinds.items()])
    for name, column in columns.items():
        table[name] = column
    parts = [table.tobytes()]
    if faces is not None:
        if faces.ndim != 2 or faces.shape[1] != 3:
            raise UsageError(f"{path}: expected faces of shape [F, 3], got {list(faces.shape)}")
        header += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
        triangles = np.empty(len(faces), dtype=[("n", "u1"), ("v", "<i4", (3,))])
        triangles["n"] = 3
        triangles["v"] = faces
        parts.append(triangles.tobytes())
    Path(path).write_bytes("\n".join([*header, "end_header\n"]).encode("ascii") + b"".join(parts))


def _parse_ascii(body: bytes, path: Path) -> bytes:
    """All values of an ASCII body as the bytes of a native float64 array (exact for every type that PLY has)."""
    try:
        return np.array(body.split(), dtype="S").astype(np.float64).tobytes()
    except ValueError as error:
        raise DataError(f"{path}: the ASCII body holds something that is not a number ({error})") from error


def _decode(
    body: bytes, offset: int, element: PlyElement, byte_order: str, *, ascii_body: bool, path: Path
) -> tuple[list[_Rows], int]:
    """Rows of `element`, which starts at `offset`, grouped by list lengths; and where the next element starts."""
    unit, unit_name = (8, "values") if ascii_body else (1, "bytes")

    def row_dtype(lengths: tuple[int, ...]) -> np.dtype[Any]:
        fields: list[tuple[str, str] | tuple[str, str, tuple[int]]] = []
        remaining = iter(lengths)
        for p in element.properties:
            if p.count_dtype:
                fields.append((f"count {p.name}", byte_order + ("f8" if ascii_body else p.count_dtype)))
                fields.append((p.name, byte_order + ("f8" if ascii_body else p.dtype), (next(remaining),)))
            else:
                fields.append((p.name, byte_order + ("f8" if ascii_body else p.dtype)))
        return np.dtype(fields)

    def too_short(expected: int, what: str = "") -> DataError:
        return DataError(
            f"{path}: element {element.name!r} of {element.count} rows needs {what}{expected // unit} {unit_name}, "
            f"got {(len(body) - offset) // unit}; the file is truncated, get it again"
        )

    num_lists = sum(p.count_dtype is not None for p in element.properties)
    shortest = row_dtype((0,) * num_lists)
    if len(body) - offset < shortest.itemsize * element.count:
        raise too_short(shortest.itemsize * element.count, "at least " if num_lists else "")
    every = np.arange(element.count)
    if not num_lists or not element.count:
        data = np.frombuffer(body, dtype=shortest, count=element.count, offset=offset)
        return [_Rows(every, data)], offset + data.nbytes

    # Meshes are mostly triangles: try the lengths of the first row for all rows at once.
    counts = [f"count {p.name}" for p in element.properties if p.count_dtype]
    lengths, _ = _row_lengths(body, offset, element, row_dtype, path)
    dtype = row_dtype(lengths)
    if len(body) - offset >= dtype.itemsize * element.count:
        data = np.frombuffer(body, dtype=dtype, count=element.count, offset=offset)
        if all((data[name] == n).all() for name, n in zip(counts, lengths, strict=True)):
            return [_Rows(every, data)], offset + data.nbytes

    # Lengths differ, so where a row starts is known only from the row before it.
    starts: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    position = offset
    for row in range(element.count):
        lengths, end = _row_lengths(body, position, element, row_dtype, path)
        if end > len(body):
            raise too_short(end - offset, "at least ")
        starts.setdefault(lengths, []).append((row, position))
        position = end
    content = np.frombuffer(body, dtype=np.uint8)
    groups = []
    for lengths, rows in starts.items():
        dtype, where = row_dtype(lengths), np.array(rows, dtype=np.int64)
        data = content[where[:, 1, None] + np.arange(dtype.itemsize)].view(dtype)[:, 0]
        groups.append(_Rows(where[:, 0], data))
    return groups, position


def _row_lengths(
    body: bytes, start: int, element: PlyElement, row_dtype: Any, path: Path
) -> tuple[tuple[int, ...], int]:
    """Lengths of the lists of the row at `start`, and where the row ends (perhaps behind the end of `body`)."""
    num_lists = sum(p.count_dtype is not None for p in element.properties)
    names = [f"count {p.name}" for p in element.properties if p.count_dtype]
    lengths = [0] * num_lists
    for i, name in enumerate(names):
        count_dtype, count_offset = row_dtype(tuple(lengths)).fields[name][:2]
        if start + count_offset + count_dtype.itemsize > len(body):
            return tuple(lengths), start + count_offset + count_dtype.itemsize
        value = np.frombuffer(body, dtype=count_dtype, count=1, offset=start + count_offset)[0]
        if not (0 <= value < np.inf and value == int(value)):
            raise DataError(f"{path}: element {element.name!r} has a list of {value} entries, expected 0 or more")
        lengths[i] = int(value)
        if lengths[i] > len(body):
            return tuple(lengths[:i] + [0] * (num_lists - i)), len(body) + 1
    return tuple(lengths), start + row_dtype(tuple(lengths)).itemsize


def _scalars(groups: list[_Rows], prop: PlyProperty, count: int, path: Path) -> NDArray[Any]:
    """[count] values of a scalar property in row order, in the property's own type and native byte order."""
    values = np.empty(count, dtype=groups[0].data.dtype[prop.name].newbyteorder("="))
    for group in groups:
        values[group.rows] = group.data[prop.name]
    return _as_type(values, prop, path)


def _as_type(values: NDArray[Any], prop: PlyProperty, path: Path) -> NDArray[Any]:
    dtype = np.dtype(prop.dtype)
    if values.dtype == dtype:
        return values
    if dtype.kind != "f" and len(values):
        info = np.iinfo(dtype)
        wrong = ~((values >= info.min) & (values <= info.max) & (values == np.floor(values)))
        if wrong.any():
            raise DataError(
                f"{path}: property {prop.name!r} of type {_NAMES[prop.dtype]} has the value {values[wrong][0]}"
            )
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def _triangles(groups: list[_Rows], element: PlyElement, path: Path) -> NDArray[np.int32]:
    """[F, 3] int32 in file order: a polygon (a, b, c, d) becomes (a, b, c), (a, c, d)."""
    prop = next((p for p in element.properties if p.count_dtype and p.name in _FACE_PROPERTIES), None)
    if prop is None:
        raise DataError(
            f"{path}: element 'face' has no list property {' or '.join(_FACE_PROPERTIES)}, got "
            f"{[p.name for p in element.properties]}"
        )
    triangles, order = [np.empty((0, 3), np.int32)], [np.empty(0, np.int64)]
    for group in groups:
        corners = _as_type(group.data[prop.name], prop, path)
        for k in range(1, corners.shape[1] - 1):
            triangles.append(corners[:, [0, k, k + 1]].astype(np.int32))
            order.append(group.rows)
    if len(triangles) == 2:
        return triangles[1]
    return np.concatenate(triangles)[np.argsort(np.concatenate(order), kind="stable")]
