"""Normals from the points alone, for networks that read them and files that lack them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ditr_cache.pointcloud.optional import require

NEIGHBOURS = 16
"""Points, itself included, that a point's plane is fitted to."""

_AT_ONCE = 2**15


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
