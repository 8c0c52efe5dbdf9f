"""The second pass over a file: each point goes to the tiles that read it, in one temporary file on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import StorageError
from ditr_cache.pointcloud.cloud import Chunk, PointCloud
from ditr_train.data.sample import PointSample
from ditr_train.pointcloud.survey import CHUNK, Survey, finite_points
from ditr_train.pointcloud.tiles import TilePlan


@dataclass(frozen=True, kw_only=True, eq=False)
class TilePoints:
    """Some points of a tile.

    Args:
        points: coordinates from the tile's origin, and the channels that the network reads, as training has them.
        position: [N] int64, positions in the file; -1 in the margin, where nothing is to be predicted.
    """

    points: PointSample
    position: NDArray[np.int64]


class Spill:
    """The points of all tiles. The number of points of each is known beforehand, so one file has room for each.

    The file has no name: the system frees it however the process ends.

    Args:
        plan: the tiles.
        channels: what the network reads.
        origin: [T, 3] float64 metres, the origin of each tile.
        folder: where the file lies.

    Raises:
        StorageError: the file cannot be made.
    """

    def __init__(self, plan: TilePlan, channels: Sequence[str], origin: NDArray[np.float64], folder: Path) -> None:
        self.plan, self.origin, self.folder = plan, origin, folder
        self.dtype = record_dtype(channels)
        self._first = np.cumsum([0, *(tile.points for tile in plan.tiles)])
        self._filled = np.zeros(len(plan.tiles), np.int64)
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fill(self, cloud: PointCloud, found: Survey, progress: Callable[[int], None]) -> None:
        """Write all points of the cloud that was surveyed.

        Raises:
            DataError: as `PointCloud.chunks`.
            StorageError: the disk is full or fails.
        """
        done = 0
        for chunk in cloud.chunks(CHUNK):
            valid = np.flatnonzero(finite_points(chunk))
            tile, point, core = self.plan.assign(chunk.coord[valid])
            records = self._records(chunk, valid[point], found.color_factor)
            records["position"] = np.where(core, done + valid[point], -1)
            records["coord"] = chunk.coord[valid[point]].astype(np.float64) - self.origin[tile]
            present, starts = np.unique(tile, return_index=True)
            for t, start, stop in zip(present, starts, [*starts[1:], len(tile)], strict=True):
                offset = (self._first[t] + self._filled[t]) * self.dtype.itemsize
                self._write(records[start:stop].tobytes(), int(offset))
                self._filled[t] += stop - start
            done += len(chunk)
            progress(len(chunk))

    def read(self, tile: int) -> Iterator[TilePoints]:
        """The points of a tile in the file's order, in chunks of bounded size."""
        for start in range(self._first[tile], self._first[tile + 1], 2 * CHUNK):
            rows = min(2 * CHUNK, int(self._first[tile + 1]) - start)
            try:
                raw = os.pread(self._file.fileno(), rows * self.dtype.itemsize, start * self.dtype.itemsize)
            except OSError as error:
                raise self._failed(error) from error
            records = np.frombuffer(raw, self.dtype)
            names = self.dtype.names or ()
            yield TilePoints(
                position=records["position"],
                points=PointSample(
                    name=f"tile {tile}",
                    coord=records["coord"],
                    color=records["color"].astype(np.float32) if "color" in names else None,
                    normal=records["normal"] if "normal" in names else None,
                    strength=records["strength"] if "strength" in names else None,
                ),
            )

    def _records(self, chunk: Chunk, point: NDArray[np.int64], factor: float) -> NDArray[Any]:
        records = np.empty(len(point), self.dtype)
        if "color" in records.dtype.fields:
            assert chunk.color is not None
            color = np.nan_to_num(chunk.color[point].astype(np.float64), posinf=0, neginf=0) * factor
            records["color"] = np.clip(np.rint(color), 0, 255)
        if "normal" in records.dtype.fields:
            assert chunk.normal is not None
            records["normal"] = _unit(np.nan_to_num(chunk.normal[point], posinf=0, neginf=0))
        if "strength" in records.dtype.fields:
            assert chunk.strength is not None
            records["strength"] = np.nan_to_num(chunk.strength[point], posinf=0, neginf=0)
        return records

    def _write(self, content: bytes, offset: int) -> None:
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(self._file.fileno(), content[written:], offset + written)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot use a temporary file in {str(self.folder)!r}: {error.strerror or error}; free space, or name "
            "another folder with --tmp"
        )


def record_dtype(channels: Sequence[str]) -> np.dtype[Any]:
    """What the temporary file holds of each point of each tile."""
    fields: dict[str, Any] = {
        "color": ("color", "u1", (3,)),
        "normal": ("normal", "<f4", (3,)),
        "strength": ("strength", "<f4"),
    }
    return np.dtype([("position", "<i8"), ("coord", "<f4", (3,)), *(fields[c] for c in channels if c in fields)])


def _unit(normal: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normals of unit length; those that are so within rounding, and those of length zero, stay as they are."""
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return np.where((np.abs(length - 1) > 0.01) & (length > 0), normal / np.maximum(length, 1e-30), normal)
