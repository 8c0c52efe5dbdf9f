"""World -> camera -> pixel, visibility, patch lookup and Morton order: pure functions on arrays, in float64.

Conventions (see `sample`): camera x right, y down, z forward; metres; continuous image coordinates with half-open
bounds, 0 <= u < width, pixel column floor(u).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditr_cache.sample import Camera

FRACTION_STEPS = 65536
"""Steps of a stored image fraction: u / width is kept as floor(u / width * 65536) in 16 bits."""


def to_camera(coord: NDArray[np.floating], camera_from_world: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [N, 3] of the world in the camera's frame, [N, 3] float64."""
    return coord.astype(np.float64) @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]


def project(in_camera: NDArray[np.float64], camera: Camera) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Image coordinates (u, v), [N] float64 each, of points [N, 3] in front of the camera (z > 0)."""
    x, y, z = in_camera.T
    return camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy


def inside(u: NDArray[np.float64], v: NDArray[np.float64], camera: Camera) -> NDArray[np.bool_]:
    """Whether image coordinates lie in the half-open image, [N] bool."""
    return (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)


def visible_by_depth(
    u: NDArray[np.float64],
    v: NDArray[np.float64],
    z: NDArray[np.float64],
    depth: NDArray[np.float32],
    tolerance: float,
) -> NDArray[np.bool_]:
    """Whether points agree with a measured depth map, [N] bool (DITR's occlusion test).

    Args:
        u, v: [N] image coordinates in the depth map's own camera, inside its bounds.
        z: [N] depth of the points in metres.
        depth: [H, W] metres, 0 where unknown. A point before unknown depth is not visible: nothing speaks for it.
        tolerance: metres.
    """
    measured = depth[v.astype(np.intp), u.astype(np.intp)].astype(np.float64)
    return (measured > 0) & (np.abs(z - measured) <= tolerance)


def visible_by_zbuffer(
    u: NDArray[np.float64],
    v: NDArray[np.float64],
    z: NDArray[np.float64],
    camera: Camera,
    *,
    spacing: float,
    tolerance: float,
) -> NDArray[np.bool_]:
    """Whether points are not hidden behind other points of the cloud, [N] bool.

    The points are splatted into z-buffers, each over 3x3 cells that are as wide as the points' spacing at their own
    depth, so that a surface has no holes through which what lies behind would show, be it near or far.

    Args:
        u, v: [N] image coordinates, inside the bounds.
        z: [N] metres.
        spacing: typical distance of neighbouring points in metres.
        tolerance: metres behind the nearest splat that still count as visible.
    """
    spacing_at_one_metre = spacing * max(camera.fx, camera.fy)  # in pixels
    # One buffer per factor of sqrt(2) in depth; beyond the depth at which a splat is one pixel wide they are all alike.
    farthest = np.ceil(2 * np.log2(max(spacing_at_one_metre, 1e-6)))
    level = np.minimum(np.floor(2 * np.log2(z)), farthest)
    nearest = np.full(len(z), np.inf)
    for k in np.unique(level):
        cell = max(1.0, spacing_at_one_metre / 2 ** (k / 2))
        columns, rows = int(camera.width / cell) + 1, int(camera.height / cell) + 1
        index = (v / cell).astype(np.intp) * columns + (u / cell).astype(np.intp)
        splats = np.flatnonzero(level == k)
        nearest = np.minimum(nearest, _nearest_splat(index[splats], z[splats], rows, columns)[index])
    return z <= nearest + tolerance


def _nearest_splat(index: NDArray[np.intp], z: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """Depth of the nearest of the points z [N] in cells `index` [N] and their eight neighbours, [rows * columns]."""
    buffer = np.full((rows + 2, columns + 2), np.inf)
    inner = np.full(rows * columns, np.inf)
    far_to_near = np.argsort(-z, kind="stable")
    inner[index[far_to_near]] = z[far_to_near]
    buffer[1:-1, 1:-1] = inner.reshape(rows, columns)
    across = np.minimum(np.minimum(buffer[:, :-2], buffer[:, 1:-1]), buffer[:, 2:])
    return np.minimum(np.minimum(across[:-2], across[1:-1]), across[2:]).ravel()


def to_fraction(u: NDArray[np.float64], size: int) -> NDArray[np.uint16]:
    """Image coordinates in [0, size) as 16-bit fractions of the image, rounded down: they stay in the image."""
    return np.minimum(u * (FRACTION_STEPS / size), FRACTION_STEPS - 1).astype(np.uint16)


def patch_index(uv: NDArray[np.uint16], grid: tuple[int, int]) -> NDArray[np.int64]:
    """Index of the token under each stored link, `row * columns + column`, [L] int64.

    This is the one place where a link meets a VFM's grid.

    Args:
        uv: [L, 2] fractions (of width, of height) as `to_fraction` gives them.
        grid: (rows, columns) of tokens.
    """
    rows, columns = grid
    column = uv[:, 0].astype(np.int64) * columns // FRACTION_STEPS
    row = uv[:, 1].astype(np.int64) * rows // FRACTION_STEPS
    return row * columns + column


def morton_order(coord: NDArray[np.floating]) -> NDArray[np.int64]:
    """Permutation [N] that sorts points [N, 3] along a Z-curve of 2^21 cells per axis; stable.

    Neighbours in space become neighbours in storage, so that a crop touches few chunks.
    """
    if not len(coord):
        return np.zeros(0, dtype=np.int64)
    low = coord.min(axis=0).astype(np.float64)
    extent = max(float((coord.max(axis=0) - low).max()), 1e-9)
    cells = ((coord - low) * ((2**21 - 1) / extent)).astype(np.uint64)
    code = np.zeros(len(coord), dtype=np.uint64)
    for axis in range(3):
        code |= _spread_bits(cells[:, axis]) << np.uint64(axis)
    return np.argsort(code, kind="stable")


def _spread_bits(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Put two zero bits between the 21 low bits of each value."""
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        x = (x | (x << np.uint64(shift))) & np.uint64(mask)
    return x


def point_spacing(coord: NDArray[np.floating]) -> float:
    """Typical distance in metres between neighbouring points [N, 3] that stand in Morton order.

    The median step along the curve: within a small factor of the nearest-neighbour distance, at no cost.
    """
    if len(coord) < 2:
        return 0.0
    return float(np.median(np.linalg.norm(np.diff(coord.astype(np.float64), axis=0), axis=1)))
