"""Normals from the points alone, for networks that read them and files that lack them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ditr_cache.pointcloud.optional import require

NEIGHBOURS = 16
"""Points, itself included, that a point's plane is fitted to."""

_AT_ONCE = 2**15
_VOXEL = 0.02  # metres: of scans, normals are of the points that the recipes keep


def estimate_normals(
    coord: NDArray[np.float32], viewpoint: Sequence[float] | NDArray[np.floating] | None = None
) -> NDArray[np.float32]:
    """[N, 3] float32 unit normals: of the plane through each point's nearest neighbours (least squares).

    A plane does not say which of its two sides is outside: normals point upwards or, where a viewpoint is given,
    towards it. Of fewer than three points, all normals are zero.

    Args:
        coord: [N, 3] metres, one point per voxel, so that dense spots do not shrink the neighbourhood to noise.
        viewpoint: [3] metres, in the coordinates of the points.

    Raises:
        UsageError: scipy is not installed.
    """
    spatial = require("scipy.spatial", "estimated normals")
    normal = np.zeros((len(coord), 3), np.float32)
    if len(coord) < 3:
        return normal
    tree = spatial.cKDTree(coord)
    for start in range(0, len(coord), _AT_ONCE):
        some = coord[start : start + _AT_ONCE]
        _, near = tree.query(some, k=min(NEIGHBOURS, len(coord)))
        local = coord[near].astype(np.float64)
        local -= local.mean(axis=1, keepdims=True)
        _, axes = np.linalg.eigh(np.einsum("nki,nkj->nij", local, local))
        found = axes[:, :, 0]  # of the smallest eigenvalue
        towards = np.array([0.0, 0.0, 1.0]) if viewpoint is None else np.asarray(viewpoint, np.float64) - some
        found[(found * towards).sum(axis=1) < 0] *= -1
        normal[start : start + _AT_ONCE] = found
    return normal


def estimate_scan_normals(coord: NDArray[np.float64], viewpoints: NDArray[np.float64]) -> NDArray[np.float32]:
    """[N, 3] float32 unit normals of the surface through the points of each voxel of 2 cm.

    Args:
        coord: [N, 3] metres, at least one point.
        viewpoints: [K, 3] places of the scanner or the cameras: the normals look towards the nearest, or towards the
            middle of the points where there is none.

    Raises:
        UsageError: scipy is not installed.
    """
    low, high = coord.min(axis=0), coord.max(axis=0)
    cell = np.floor((coord - low) / _VOXEL).astype(np.int64)
    sides = cell.max(axis=0) + 1
    key = (cell[:, 0] * sides[1] + cell[:, 1]) * sides[2] + cell[:, 2]
    _, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
    mean = np.stack([np.bincount(inverse, (coord - low)[:, axis]) / count for axis in range(3)], axis=1)
    normal = estimate_normals(mean.astype(np.float32))
    scanners = viewpoints if len(viewpoints) else ((low + high) / 2)[None]
    _, nearest = require("scipy.spatial", "estimated normals").cKDTree(scanners - low).query(mean)
    away = np.einsum("nc,nc->n", normal, (scanners - low)[nearest] - mean) < 0
    normal[away] *= -1
    return normal[inverse]
