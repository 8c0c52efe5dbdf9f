"""World -> camera -> pixel, visibility, patch lookup and Morton order: pure functions on arrays, in float64.

Conventions (see `sample`): camera x right, y down, z forward; metres; continuous image coordinates with half-open
bounds, 0 <= u < width, pixel column floor(u).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ditr_cache.sample import Camera

FRACTION_STEPS = 65536
"""Steps of a stored image fraction: u / width is kept as floor(u / width * 65536) in 16 bits."""


def to_camera(coord: NDArray[np.floating], camera_from_world: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [N, 3] of the world in the camera's frame, [N, 3] float64 stored by columns.

    Columns, because all that follows works on x, y and z apart: from memory in one piece it is several times faster.
    """
    columns = camera_from_world[:3, :3] @ coord.T.astype(np.float64, order="C")
    columns += camera_from_world[:3, 3:]
    return columns.T


def depth_of(in_camera: NDArray[np.float64], camera: Camera) -> NDArray[np.float64]:
    """Depth [N] in metres of points [N, 3] of the camera's frame: z, or in a panorama the distance."""
    return distance_of(in_camera) if camera.model == "equirectangular" else in_camera[:, 2]


def distance_of(in_camera: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance [N] in metres of points [N, 3] of the camera's frame from the camera."""
    x, y, z = in_camera.T
    return np.sqrt(x * x + y * y + z * z)


def project(in_camera: NDArray[np.float64], camera: Camera) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Image coordinates (u, v), [N] float64 each, of points [N, 3] of positive depth; NaN where the lens is blind.

    Lens polynomials fold back far outside the image: directions beyond that are not seen.
    """
    x, y, z = in_camera.T
    if camera.model == "equirectangular":
        longitude, latitude = np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))
        u = camera.fx * longitude + camera.cx
        # The right border is the left one.
        return np.where(u >= camera.width, u - 2 * np.pi * camera.fx, u), camera.fy * latitude + camera.cy
    x, y = distort(x / z, y / z, camera)
    return camera.fx * x + camera.cx, camera.fy * y + camera.cy


def distort(
    x: NDArray[np.float64], y: NDArray[np.float64], camera: Camera
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the lens puts the directions (x, y, 1), in units of the focal lengths; NaN where it is blind.

    Sources: OpenCV's documentation of `projectPoints` and of `fisheye::projectPoints`.
    """
    if camera.model == "pinhole":
        return x, y
    limit = lens_limit(camera.model, camera.distortion)
    if camera.model == "fisheye":
        radius = np.hypot(x, y)
        theta = np.arctan(radius)
        factor = _fisheye(theta, camera.distortion) / np.where(radius > 0, radius, 1)
        factor = np.where(radius > 0, factor, 1.0)
        if np.isfinite(limit):
            factor = np.where(theta > limit, np.nan, factor)
        return x * factor, y * factor
    p1, p2 = camera.distortion[2:4]
    square = x * x + y * y
    if not square.max(initial=0.0) < limit * limit * (1 - 1e-9):  # else no radius is near the limit
        blind = np.hypot(x, y) > limit
        x, y = np.where(blind, np.nan, x), np.where(blind, np.nan, y)
        square = x * x + y * y
    factor = _radial(square, camera.distortion)
    return (
        x * factor + 2 * p1 * x * y + p2 * (square + 2 * x * x),
        y * factor + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
    )


def _radial(square: NDArray[np.float64], k: tuple[float, ...]) -> NDArray[np.float64]:
    """Radial factor of OpenCV's rational model at squared radii."""
    k1, k2, _, _, k3, k4, k5, k6 = (*k, *(0.0,) * (8 - len(k)))
    above = 1 + square * (k1 + square * (k2 + square * k3))
    return above / (1 + square * (k4 + square * (k5 + square * k6)))


def _fisheye(theta: NDArray[np.float64], k: tuple[float, ...]) -> NDArray[np.float64]:
    """Distorted angle of angles from the optical axis."""
    square = theta * theta
    return theta * (1 + square * (k[0] + square * (k[1] + square * (k[2] + square * k[3]))))


@lru_cache(maxsize=4096)
def lens_limit(model: str, distortion: tuple[float, ...]) -> float:
    """Largest radius (radial-tangential) or angle (fisheye) up to which the distorted radius still grows, or infinity.

    Beyond it the lens is taken to be blind.
    """
    fine = np.linspace(0, np.arctan(30.0), 20_000) if model == "fisheye" else np.linspace(0, 30, 60_000)
    bent = _fisheye(fine, distortion) if model == "fisheye" else fine * _radial(fine * fine, distortion)
    falling = np.flatnonzero(~(np.diff(bent) > 0))
    return float(fine[falling[0]]) if len(falling) else np.inf


@lru_cache(maxsize=4)
def pixel_rays(camera: Camera) -> NDArray[np.float64]:
    """[H, W, 3] float64 direction of every pixel's centre, as long as its depth says: point = depth * ray.

    NaN where the lens model reaches no such pixel. Frames share the array: it is read-only.
    """
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    x, y = (u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy
    if camera.model == "equirectangular":
        rays = np.stack([np.cos(y) * np.sin(x), np.sin(y), np.cos(y) * np.cos(x)], axis=-1)
    else:
        x, y = undistort(x, y, camera)
        rays = np.stack([x, y, np.ones_like(x)], axis=-1)
    rays.setflags(write=False)
    return rays


def undistort(
    x: NDArray[np.float64], y: NDArray[np.float64], camera: Camera
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Inverse of `distort`: a table of the angle for `fisheye`, or of the radius and then Newton's method; NaN where
    there is none.
    """
    if camera.model == "pinhole":
        return x, y
    if camera.model == "fisheye":  # one dimension: a table of the angle is exact to its step, and always there
        limit = min(lens_limit(camera.model, camera.distortion), float(np.arctan(30.0)))
        theta = np.linspace(0, limit, 200_000)
        bent = np.hypot(x, y)
        angle = np.interp(bent, _fisheye(theta, camera.distortion), theta, right=np.nan)
        factor = np.where(bent > 0, np.tan(angle) / np.where(bent > 0, bent, 1), 1.0)
        return x * factor, y * factor
    goal_x, goal_y, step = x, y, 1e-7
    # Without a start close by, and a bound, Newton's method leaves the part of the lens that sees.
    limit = 0.9999 * min(lens_limit(camera.model, camera.distortion), 30.0)
    radius, bent = np.linspace(0, limit, 20_000), np.hypot(x, y)
    start = np.interp(bent, radius * _radial(radius * radius, camera.distortion), radius)
    factor = np.where(bent > 0, start / np.where(bent > 0, bent, 1), 1.0)
    x, y = x * factor, y * factor
    for _ in range(20):
        at_x, at_y = distort(x, y, camera)
        (ax, ay), (bx, by) = distort(x + step, y, camera), distort(x, y + step, camera)
        a, b, c, d = (ax - at_x) / step, (bx - at_x) / step, (ay - at_y) / step, (by - at_y) / step
        determinant = a * d - b * c
        off_x, off_y = goal_x - at_x, goal_y - at_y
        x = x + (d * off_x - b * off_y) / determinant
        y = y + (a * off_y - c * off_x) / determinant
        factor = limit / np.maximum(np.hypot(x, y), limit)
        x, y = x * factor, y * factor
    at_x, at_y = distort(x, y, camera)
    lost = ~(np.hypot(goal_x - at_x, goal_y - at_y) < 1e-8)
    return np.where(lost, np.nan, x), np.where(lost, np.nan, y)


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
    measured = depth.ravel().take(v.astype(np.intp) * depth.shape[1] + u.astype(np.intp))
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
    level = np.empty(len(z), dtype=np.int16)
    for some in _pieces(len(z)):
        level[some] = np.minimum(np.floor(2 * np.log2(z[some])), farthest)
    lowest, deepest = level.min(initial=np.int16(farthest)), z.max(initial=0.0)
    first = np.full(level.max(initial=lowest) - lowest + 1, np.inf)  # depth of each level's nearest point
    for some in _pieces(len(z)):
        np.minimum.at(first, level[some] - lowest, z[some])
    visible = np.ones(len(z), dtype=bool)
    widths = [max(1.0, spacing_at_one_metre / 2 ** (k / 2)) for k in range(lowest, lowest + len(first))]
    memory = np.empty(_Cells(camera, widths[-1]).size)  # of the most cells; a new array for each level costs more
    for k, limit in enumerate(first + tolerance, lowest):
        if deepest <= limit:  # no point lies behind this level
            continue
        cells = _Cells(camera, widths[k - lowest])
        nearest = memory[: cells.size]
        nearest.fill(np.inf)
        for some in _pieces(len(z)):
            splats = np.flatnonzero(level[some] == k)
            np.minimum.at(nearest, cells.index(u[some].take(splats), v[some].take(splats)), z[some].take(splats))
        cells.spread(nearest)
        for some in _pieces(len(z)):
            behind = np.flatnonzero(visible[some] & (z[some] > limit))
            shown = nearest.take(cells.index(u[some].take(behind), v[some].take(behind)))
            visible[some][behind] = z[some].take(behind) <= shown + tolerance
    return visible


def _pieces(length: int, step: int = 8192) -> Iterator[slice]:
    """Consecutive parts of an array, so short that all that is computed from one stays in the processor's cache."""
    return (slice(start, start + step) for start in range(0, length, step))


class _Cells:
    """Square cells of an image, in one flat array with an empty cell after each row, and a row before and after all.

    Args:
        camera: of the image.
        width: of a cell, in pixels.
    """

    def __init__(self, camera: Camera, width: float) -> None:
        self._width = width
        self._stride = int(camera.width / width) + 2
        self.size = (int(camera.height / width) + 3) * self._stride

    def index(self, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.intp]:
        """The cell of each place, [N]."""
        row = (v / self._width).astype(np.intp)
        row += 1
        row *= self._stride
        row += (u / self._width).astype(np.intp)
        return row

    def spread(self, values: NDArray[np.float64]) -> None:
        """Put into each cell the least of its own value and its eight neighbours'; into the empty ones anything."""
        rows = values.reshape(-1, self._stride)
        above = rows[0].copy()
        for some in _pieces(len(rows) - 2, max(1, 16384 // self._stride)):
            start, stop = some.start + 1, min(some.stop + 1, len(rows) - 1)
            old = rows[start - 1 : stop + 1].copy()
            old[0] = above
            above[:] = old[-2]
            # One flat array: left of a row and right of it lie empty cells.
            flat, across = old.ravel(), old.ravel().copy()
            np.minimum(across[1:], flat[:-1], out=across[1:])
            np.minimum(across[:-1], flat[1:], out=across[:-1])
            row = across.reshape(old.shape)
            np.minimum(row[:-2], row[1:-1], out=rows[start:stop])
            np.minimum(rows[start:stop], row[2:], out=rows[start:stop])


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
