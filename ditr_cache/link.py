"""Which point is seen by which view, and where: links. Knows no VFM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.blocks import BLOCK, PointBlocks
from ditr_cache.errors import DataError
from ditr_cache.geometry import (
    depth_of,
    distance_of,
    inside,
    project,
    to_camera,
    to_fraction,
    visible_by_depth,
    visible_by_zbuffer,
)
from ditr_cache.sample import Camera, Sample, View
from ditr_cache.schema import LinkSettings

T = TypeVar("T")

FARTHEST = float(np.finfo(np.float16).max)
"""Metres; depths of links are stored as float16."""

BLOCKS_AT_ONCE = 8192 // BLOCK
"""So many that every array of a step stays in the processor's cache, and few enough to make calls cheap."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Links:
    """Links of one view.

    Args:
        point: [L] uint32 index of the point, ascending.
        uv: [L, 2] uint16 fractions of the image's width and height.
        depth: [L] float16 metres along the camera's z.
    """

    point: NDArray[np.uint32]
    uv: NDArray[np.uint16]
    depth: NDArray[np.float16]


def select_views(sample: Sample, settings: LinkSettings) -> list[View]:
    """The views of a sample that are used, in time order.

    First every n-th frame, then those without a pose (infinite, as ScanNet marks lost tracking) are dropped, then at
    most `max_views` of the rest are taken, evenly spread from the first to the last.
    """
    stride = settings.every_nth_frame or sample.every_nth_frame
    posed = [v for v in sample.views[::stride] if np.isfinite(v.camera_from_world).all()]
    return posed if settings.max_views is None else evenly_spread(posed, settings.max_views)


def evenly_spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, the first and the last among them, evenly spread; all where there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def check_pose(view: View) -> None:
    """Raise `DataError` where a pose is no rigid motion (a scaled, sheared or mirrored one moves every feature)."""
    pose = view.camera_from_world
    if pose.shape != (4, 4) or not np.allclose(pose[3], (0, 0, 0, 1), atol=1e-6):
        raise DataError(f"pose of view {view.id!r}: expected a 4x4 matrix with last row 0 0 0 1, got {pose.tolist()}")
    error = float(np.abs(pose[:3, :3] @ pose[:3, :3].T - np.eye(3)).max())
    if error > 1e-2 or np.linalg.det(pose[:3, :3]) < 0:
        raise DataError(
            f"pose of view {view.id!r}: its rotation is not orthonormal (off by {error:.3g}, determinant "
            f"{np.linalg.det(pose[:3, :3]):.3g}); expected a rigid motion in metres"
        )


def link_view(
    coord: NDArray[np.float32] | PointBlocks,
    view: View,
    settings: LinkSettings,
    *,
    spacing: float,
    order: NDArray[np.integer] | None = None,
) -> Links:
    """Links between points [N, 3] and one view.

    A point is linked where it lies before the camera within the depth range and inside the image, and agrees with the
    view's depth map within the tolerance (DITR: 0.2 m); without a depth map a z-buffer of the points decides. A view
    that comes with the dataset's own projection is linked by that, within the depth range, without an occlusion test.

    Args:
        coord: [N, 3] float32 world coordinates in metres, or the blocks of them, which serve all views of a sample.
        view: its pose must be finite.
        settings: depth range, occlusion test and tolerance.
        spacing: typical distance of neighbouring points, for the z-buffer.
        order: [N] index of each point in the dataset's own order; None: the same order.

    Raises:
        DataError: the pose is not rigid, or the depth map or projection cannot be read.
    """
    check_pose(view)
    blocks = coord if isinstance(coord, PointBlocks) else PointBlocks.of(coord)
    if view.load_projection is not None:
        return _link(_released(view, blocks, settings, order), view.camera)
    by_depth = settings.occlusion != "none" and view.load_depth is not None and view.depth_camera is not None
    depth = _depth_map(view) if by_depth else None
    candidates = blocks.maybe_seen(
        view.camera, view.camera_from_world, depth_min=settings.depth_min, depth_max=settings.depth_max
    )
    found = [
        _in_sight(*blocks.some(candidates[i : i + BLOCKS_AT_ONCE]), view, settings, depth)
        for i in range(0, len(candidates), BLOCKS_AT_ONCE)
    ]
    if settings.occlusion == "none" or by_depth:
        return concatenate([_link(seen, view.camera) for seen in found])
    u, v, near = (np.concatenate([[], *(seen[column] for seen in found)]) for column in (1, 2, 4))
    visible = visible_by_zbuffer(u, v, near, view.camera, spacing=spacing, tolerance=settings.occlusion_tolerance)
    ends = np.cumsum([len(seen.point) for seen in found])
    return concatenate(
        [
            _link(_Seen(*_where(visible[end - len(seen.point) : end], *seen)), view.camera)
            for seen, end in zip(found, ends, strict=True)
        ]
    )


class _Seen(NamedTuple):
    """Points of one view: [n] index, image coordinates, depth, and what the z-buffer compares, in metres."""

    point: NDArray[np.integer]
    u: NDArray[np.float64]
    v: NDArray[np.float64]
    z: NDArray[np.float64]
    near: NDArray[np.float64]


def _in_sight(
    point: NDArray[np.integer],
    coord: NDArray[np.float32],
    view: View,
    settings: LinkSettings,
    depth: NDArray[np.float32] | None,
) -> _Seen:
    """Which of the points [n] at `coord` [n, 3] lie in the depth range and the image, and agree with the depth map."""
    in_camera = to_camera(coord, view.camera_from_world)
    z = depth_of(in_camera, view.camera)
    point, z, in_camera = _where(_in_range(z, settings), point, z, in_camera)
    u, v = project(in_camera, view.camera)
    point, u, v, z, in_camera = _where(inside(u, v, view.camera), point, u, v, z, in_camera)
    if depth is not None:
        visible = _agrees(view, in_camera, (u, v, z), depth, settings.occlusion_tolerance)
        return _Seen(*_where(visible, point, u, v, z, z))
    # Far off the axis of a fisheye z says little of how near, and how large in the image, a point is.
    return _Seen(point, u, v, z, distance_of(in_camera) if view.camera.model == "fisheye" else z)


def _in_range(z: NDArray[np.float64], settings: LinkSettings) -> NDArray[np.bool_]:
    farthest = FARTHEST if settings.depth_max is None else min(FARTHEST, settings.depth_max)
    return (z > 0) & (z >= settings.depth_min) & (z <= farthest)


def _where(keep: NDArray[np.bool_], *arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """The kept entries of arrays [n] and [n, 3]."""
    if keep.all():
        return arrays
    index = np.flatnonzero(keep)
    return tuple(array.T.take(index, axis=-1).T for array in arrays)  # coordinates are stored by columns


def _link(seen: _Seen, camera: Camera) -> Links:
    uv = np.stack([to_fraction(seen.u, camera.width), to_fraction(seen.v, camera.height)], axis=1)
    return Links(point=seen.point.astype(np.uint32), uv=uv, depth=seen.z.astype(np.float16))


def _depth_map(view: View) -> NDArray[np.float32]:
    camera, load = view.depth_camera, view.load_depth
    assert camera is not None and load is not None
    depth = load()
    if depth.shape != (camera.height, camera.width):
        raise DataError(
            f"depth of view {view.id!r}: expected {camera.height}x{camera.width} pixels, "
            f"got {depth.shape[0]}x{depth.shape[1]}"
        )
    return np.ascontiguousarray(depth)


def _agrees(
    view: View,
    in_camera: NDArray[np.float64],
    seen: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    depth: NDArray[np.float32],
    tolerance: float,
) -> NDArray[np.bool_]:
    """Whether points [N, 3] of the camera's frame, seen at (u, v, z), agree with the view's depth map, [N] bool."""
    camera = view.depth_camera
    assert camera is not None
    if camera == view.camera:
        return visible_by_depth(*seen, depth, tolerance)
    u, v = project(in_camera, camera)
    visible = inside(u, v, camera)
    u, v, z = _where(visible, u, v, depth_of(in_camera, camera))
    agree = visible_by_depth(u, v, z, depth, tolerance)
    if len(agree) == len(visible):
        return agree
    visible[visible] = agree
    return visible


def _released(view: View, blocks: PointBlocks, settings: LinkSettings, order: NDArray[np.integer] | None) -> _Seen:
    """The dataset's own projection within the depth range and the image, by ascending point of the stored order."""
    assert view.load_projection is not None
    found = view.load_projection()
    if len(found.point) and not 0 <= found.point.min() <= found.point.max() < blocks.count:
        raise DataError(
            f"view {view.id!r}: its projection names points {found.point.min()} to {found.point.max()}, expected 0 to "
            f"{blocks.count - 1}"
        )
    point = found.point.astype(np.int64)
    if order is not None:
        position = np.empty(blocks.count, dtype=np.int64)
        position[order] = np.arange(blocks.count)
        point = position[point]
    ascending = np.argsort(point, kind="stable")
    point, u, v = point[ascending], found.u[ascending], found.v[ascending]
    z = depth_of(to_camera(blocks.coord(), view.camera_from_world), view.camera)[point]
    return _Seen(*_where(_in_range(z, settings) & inside(u, v, view.camera), point, u, v, z, z))


def concatenate(links: Sequence[Links]) -> Links:
    """Links of several views, one after the other."""
    empty = Links(point=np.zeros(0, np.uint32), uv=np.zeros((0, 2), np.uint16), depth=np.zeros(0, np.float16))
    every = [empty, *links]
    return Links(
        point=np.concatenate([x.point for x in every]),
        uv=np.concatenate([x.uv for x in every]),
        depth=np.concatenate([x.depth for x in every]),
    )
