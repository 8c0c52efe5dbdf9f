"""LAS and LAZ through laspy, chunk by chunk.

Coordinates are integers with a scale and an offset (map projections: millions of metres), so they stay float64.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ditr_cache.errors import DataError
from ditr_cache.pointcloud.cloud import Chunk, Columns, PointCloud
from ditr_cache.pointcloud.optional import require

_PURPOSE = "LAS and LAZ files"
_RECORD = 54  # bytes of the smallest variable-length record
_COMPRESSED = 0x80  # bit of the point format


class LasCloud(PointCloud):
    """The points of a LAS or LAZ file. Intensity, 0..65535 by the format, becomes a strength of 0..1.

    Raises:
        UsageError: laspy (or lazrs, for LAZ) is not installed.
        DataError: not a LAS file, or cut short.
    """

    FORMAT = "LAS"

    def __init__(self, path: Path, *, labels: bool = False) -> None:
        laspy = require("laspy", _PURPOSE)
        if path.suffix.lower() == ".laz":
            require("lazrs", "LAZ files")
        _check_header(path)
        with _las_errors(path), laspy.open(path, read_evlrs=False) as reader:
            header = reader.header
            count, point_size, start = header.point_count, header.point_format.size, header.offset_to_point_data
            names = [name.lower() for name in header.point_format.dimension_names]
            compressed = header.are_points_compressed
        # Scaled, whatever the stored dimensions X, Y and Z are.
        self._columns = Columns({name: np.dtype(np.float64) for name in names}, path, labels=labels)
        super().__init__(path, count, tuple(self._columns.of), np.float64)
        got = (path.stat().st_size - start) // point_size
        if not compressed and got < count:
            raise self.cut_short(max(got, 0))

    def _chunks(self, size: int) -> Iterator[Chunk]:
        """See `PointCloud`."""
        laspy = require("laspy", _PURPOSE)
        done = 0
        # One thread: the parallel reader holds several times as many points.
        single = laspy.LazBackend.Lazrs
        with _las_errors(self.path), laspy.open(self.path, read_evlrs=False, laz_backend=single) as reader:
            for points in reader.chunk_iterator(size):
                done += len(points)
                yield self._columns.chunk(self._table(points))
        if done < self.count:
            raise self.cut_short(done)

    def _table(self, points: Any) -> dict[str, Any]:
        names = {name.lower(): name for name in points.point_format.dimension_names}
        table = {name: np.asarray(points[names[name]]) for name in self._columns.used if name not in ("x", "y", "z")}
        for axis in "xyz":
            table[axis] = np.asarray(points[axis])
        if "intensity" in table:
            table["intensity"] = table["intensity"] / np.float32(65535)
        return table


@contextlib.contextmanager
def _las_errors(path: Path) -> Iterator[None]:
    """Turn whatever the libraries raise for bytes that make no sense into a `DataError`."""
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # lazrs lets Rust's panics out, which are no `Exception`
        raise DataError(f"{path}: cannot be read as LAS ({error}); it is damaged, get it again") from error


def _check_header(path: Path) -> None:
    """Raise `DataError` for numbers that the libraries would believe, and read or allocate without end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(105)
        if len(start) < 105 or start[:4] != b"LASF":
            raise DataError(f"{path}: cannot be read as LAS (no header); it is damaged or another format")
        header_size, points_at, records = struct.unpack_from("<HII", start, 94)
        if header_size + _RECORD * records > points_at or points_at > size:
            raise DataError(
                f"{path}: cannot be read as LAS: {records} records do not fit between the header ({header_size} bytes) "
                f"and the points at byte {points_at} of {size}; it is damaged, get it again"
            )
        if not start[104] & _COMPRESSED:
            return
        file.seek(points_at)
        table_at = int.from_bytes(file.read(8), "little", signed=True)
        file.seek(max(table_at, 0))
        table = file.read(8)
    # -1: the writer could not go back, and wrote the table's place to the end of the file.
    if table_at != -1 and (not points_at < table_at <= size - 8 or int.from_bytes(table[4:], "little") > size):
        raise DataError(
            f"{path}: cannot be read as LAS: the compressed points end at byte {table_at}, the file has {size}; it is "
            "truncated or damaged, get it again"
        )
