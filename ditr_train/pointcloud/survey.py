"""The first pass over a file: what it holds, and how its points are spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError
from ditr_cache.pointcloud.cloud import Chunk, PointCloud, color_factor
from ditr_train.data.voxelize import MAX_EXTENT

CHUNK = 2**18
"""Points that are read at once."""

MAX_CELLS = 2**22
"""Occupied cells that are counted apart; of a cloud that has more, the cells are made larger."""

MAX_SAMPLED = 2**18
"""Voxels that are kept to estimate how many there are; of a cloud that has no more, all are."""

_LIMIT = 2**30


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """How many points lie in each square cell of the ground plane.

    Args:
        anchor: [2] float64, x and y of the corner of cell (0, 0).
        size: edge of a cell in metres.
        index: [M, 2] int64, occupied cells, sorted by x, then y.
        points: [M] int64, finite points in each.
        voxels: [M] float64, about how many voxels they occupy.
    """

    anchor: NDArray[np.float64]
    size: float
    index: NDArray[np.int64]
    points: NDArray[np.int64]
    voxels: NDArray[np.float64]

    def find(self, coord: NDArray[np.floating]) -> NDArray[np.int64]:
        """[N] row in `index` of the cell of each of some of the points [N, 3] that were counted."""
        return np.searchsorted(_keys(self.index), _keys(_cell(coord, self.anchor, self.size)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What the first pass finds.

    Args:
        finite: number of points whose coordinates are finite.
        low, high: [3] extremes of these, of the file's dtype.
        color_factor: what brings the colours to 0..255.
        cells: where the points lie.
    """

    finite: int
    low: NDArray[np.floating]
    high: NDArray[np.floating]
    color_factor: float
    cells: Cells


def survey(cloud: PointCloud, cell_size: float, grid_size: float, progress: Callable[[int], None]) -> Survey:
    """Go through all points once, in bounded memory.

    Args:
        cloud: an open file.
        cell_size: edge of the cells in metres; multiplied by a power of two where `MAX_CELLS` would not do.
        grid_size: edge of the voxels in metres that are counted.
        progress: told the number of points of each chunk.

    Raises:
        DataError: no point has finite coordinates, or the points lie too far apart.
    """
    finite, largest, color_type = 0, -np.inf, None
    low, high = np.full(3, np.inf, cloud.coord_dtype), np.full(3, -np.inf, cloud.coord_dtype)
    anchor: NDArray[np.float64] | None = None
    keys, points = np.empty(0, np.int64), np.empty(0, np.int64)
    voxels = _DistinctVoxels(grid_size)
    for chunk in cloud.chunks(CHUNK):
        valid = finite_points(chunk)
        coord = chunk.coord[valid]
        if chunk.color is not None:
            color_type = chunk.color.dtype
            largest = max(largest, float(np.nan_to_num(chunk.color, posinf=0, neginf=0).max()))
        if len(coord):
            finite += len(coord)
            low, high = np.minimum(low, coord.min(axis=0)), np.maximum(high, coord.max(axis=0))
            if anchor is None:
                anchor = coord[0, :2].astype(np.float64)
            extent = high.astype(np.float64) - low
            if extent[:2].max() >= _LIMIT * cell_size or extent[2] >= MAX_EXTENT * grid_size:
                raise DataError(
                    f"{cloud.path}: the points reach from {low.tolist()} to {high.tolist()} metres, too far for voxels "
                    f"of {grid_size:g} m; remove outliers, or check the unit of the coordinates"
                )
            voxels.add(coord)
            found, counts = np.unique(_keys(_cell(coord, anchor, cell_size)), return_counts=True)
            keys, points = _merge(np.concatenate([keys, found]), np.concatenate([points, counts]))
            while len(keys) > MAX_CELLS:
                cell_size *= 2
                keys, points = _merge(_keys(_unpacked(keys) >> 1), points)
        progress(len(chunk))
    if anchor is None:
        raise DataError(f"{cloud.path}: none of its {cloud.count} points has finite coordinates")
    index = _unpacked(keys)
    return Survey(
        finite=finite,
        low=low,
        high=high,
        color_factor=1.0 if color_type is None else color_factor(color_type, largest),
        cells=Cells(
            anchor=anchor,
            size=cell_size,
            index=index,
            points=points,
            voxels=voxels.per_cell(keys, anchor, cell_size),
        ),
    )


class _DistinctVoxels:
    """Estimates how many voxels the points of each cell occupy, in bounded memory.

    Of all voxels, those whose hash is below a limit are kept, once each; where they become too many, the limit is
    halved. Method: Gibbons, "Distinct sampling for highly-accurate answers to distinct values queries" (2001).
    """

    def __init__(self, grid_size: float) -> None:
        self._grid_size = grid_size
        self._halvings = 0
        self._hash = np.empty(0, np.uint64)
        self._at = np.empty((0, 2))  # x and y of one point of the voxel

    def add(self, coord: NDArray[np.floating]) -> None:
        """Count the voxels of some points [N, 3]."""
        voxel = np.floor(coord.astype(np.float64) / self._grid_size) + 0.0  # no negative zero, which has other bits
        hashed = np.zeros(len(coord), np.uint64)
        for axis in range(3):
            hashed = _mix(hashed ^ voxel[:, axis].view(np.uint64))
        few = self._few(hashed)
        self._keep(np.concatenate([self._hash, hashed[few]]), np.concatenate([self._at, coord[few, :2]]))
        while len(self._hash) > MAX_SAMPLED:
            self._halvings += 1
            few = self._few(self._hash)
            self._hash, self._at = self._hash[few], self._at[few]

    def per_cell(self, keys: NDArray[np.int64], anchor: NDArray[np.float64], size: float) -> NDArray[np.float64]:
        """[M] the number of voxels in each cell."""
        row = np.searchsorted(keys, _keys(_cell(self._at, anchor, size)))
        return np.bincount(row, minlength=len(keys)).astype(np.float64) * 2**self._halvings

    def _few(self, hashed: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return hashed <= np.uint64(2 ** (64 - self._halvings) - 1)

    def _keep(self, hashed: NDArray[np.uint64], at: NDArray[np.float64]) -> None:
        self._hash, first = np.unique(hashed, return_index=True)
        self._at = at[first]


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of 64-bit integers in which every bit depends on all (the finaliser of splitmix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def finite_points(chunk: Chunk) -> NDArray[np.bool_]:
    """[N] whether a point has finite coordinates; one that has not cannot be predicted."""
    return np.asarray(np.isfinite(chunk.coord).all(axis=1))


def _cell(coord: NDArray[Any], anchor: NDArray[np.float64], size: float) -> NDArray[np.int64]:
    return np.floor((coord[:, :2].astype(np.float64) - anchor) / size).astype(np.int64)


def _keys(cell: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] one integer per cell [N, 2], in the order of x, then y."""
    return (cell[:, 0] + _LIMIT << 31) + cell[:, 1] + _LIMIT


def _unpacked(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.stack([(keys >> 31) - _LIMIT, (keys & 2**31 - 1) - _LIMIT], axis=1)


def _merge(keys: NDArray[np.int64], points: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    unique, inverse = np.unique(keys, return_inverse=True)
    total = np.zeros(len(unique), np.int64)
    np.add.at(total, inverse, points)
    return unique, total
