"""Grid sampling: which voxel each point lies in, and which points stand for the voxels, once or in fragments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError, UsageError


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """V occupied voxels of a cloud of N points, ordered by grid coordinate (x, then y, then z).

    Args:
        grid_coord: [V, 3] int32, unique, shifted so that the smallest coordinate of each axis is 0.
        origin: [3] int64, the voxel of grid coordinate 0, counted from that of coordinate 0.
        pick: [V] int64, the point that stands for the voxel.
        inverse: [N] int64, the voxel of each point.
    """

    grid_coord: NDArray[np.int32]
    origin: NDArray[np.int64]
    pick: NDArray[np.int64]
    inverse: NDArray[np.int64]


def voxelize(coord: NDArray[np.floating], grid_size: float, rng: np.random.Generator | None = None) -> Voxels:
    """Voxels of edge `grid_size` metres that the points occupy.

    Args:
        coord: [N, 3] metres.
        grid_size: edge of a voxel in metres.
        rng: train mode: each voxel is stood for by one of its points, drawn uniformly. None is test mode: by its
            first point, and `inverse` carries the prediction back to all of them.

    Raises:
        UsageError: a grid size that is not positive.
        DataError: no points, coordinates that are not finite, or an extent of more than 2**21 voxels along an axis.
    """
    grid, origin = _cells(coord, grid_size)
    order, starts, inverse = group(grid)
    counts = np.diff(starts, append=len(grid))
    # Stable sorting keeps the first point of a voxel in front.
    chosen = starts if rng is None else starts + (rng.random(len(starts)) * counts).astype(np.int64)
    pick = order[chosen]
    return Voxels(grid_coord=grid[pick].astype(np.int32), origin=origin, pick=pick, inverse=inverse)


@dataclass(frozen=True, kw_only=True)
class Fragments:
    """A cloud of N points in V voxels as several clouds of V points each, which together hold every point.

    Args:
        grid_coord: [V, 3] int32, of every fragment, ordered and shifted as those of `Voxels`.
        order: [N] int64, points sorted by voxel and, within one, as given.
        starts: [V] int64, where each voxel begins in `order`.
        counts: [V] int64, points of each voxel.
    """

    grid_coord: NDArray[np.int32]
    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of fragments: the points of the fullest voxel."""
        return int(self.counts.max())

    def pick(self, number: int) -> NDArray[np.int64]:
        """[V] points of a fragment: of each voxel its point `number` modulo the voxel's count."""
        return self.order[self.starts + number % self.counts]


def fragments(coord: NDArray[np.floating], grid_size: float) -> Fragments:
    """Fragments of the official test protocol; fragment 0 is `voxelize` in test mode. Arguments and errors as there."""
    grid, _ = _cells(coord, grid_size)
    order, starts, _ = group(grid)
    return Fragments(
        grid_coord=grid[order[starts]].astype(np.int32),
        order=order,
        starts=starts,
        counts=np.diff(starts, append=len(grid)),
    )


def _cells(coord: NDArray[np.floating], grid_size: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[N, 3] int64 grid coordinate of each point, the smallest of each axis at 0; and [3] what that is counted from."""
    if not grid_size > 0:
        raise UsageError(f"voxelize: expected a positive grid size in metres, got {grid_size}")
    if len(coord) == 0:
        raise DataError("voxelize: expected at least one point, got none")
    # float64: the voxel of a coordinate must not depend on how float32 rounds the quotient.
    cell = np.floor(coord.astype(np.float64) / grid_size)
    low = cell.min(axis=0)
    extent = cell.max(axis=0) - low + 1
    if not (extent <= MAX_EXTENT).all():  # also false for NaN
        raise DataError(
            f"voxelize: an extent of {extent.tolist()} voxels of {grid_size} m is not finite or exceeds {MAX_EXTENT} "
            "along an axis; remove outliers or raise data.grid_size"
        )
    return (cell - low).astype(np.int64), low.astype(np.int64)


MAX_EXTENT = 2**21
"""Most voxels along an axis: three of them fit the 63 bits of a sort key."""


def group(grid: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Groups of points with the same grid coordinate.

    Args:
        grid: [N, 3] integers >= 0 and below `MAX_EXTENT`.

    Returns:
        `order` [N], positions sorted by voxel and, within one, as given; `starts` [V], where each voxel begins in
        `order`; `inverse` [N], the voxel of each point.
    """
    g = grid.astype(np.int64)
    size = g.max(axis=0) + 1
    key = (g[:, 0] * size[1] + g[:, 1]) * size[2] + g[:, 2]
    order = np.argsort(key, kind="stable")
    ranked = key[order]
    first = np.empty(len(key), dtype=bool)
    first[0] = True
    np.not_equal(ranked[1:], ranked[:-1], out=first[1:])
    inverse = np.empty(len(key), dtype=np.int64)
    inverse[order] = np.cumsum(first) - 1
    return order, np.flatnonzero(first), inverse
