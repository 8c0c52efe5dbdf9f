"""Which point is seen by which view, and where: links. Knows no VFM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError
from ditr_cache.geometry import (
    depth_of,
    inside,
    project,
    to_camera,
    to_fraction,
    visible_by_depth,
    visible_by_zbuffer,
)
from ditr_cache.sample import Sample, View
from ditr_cache.schema import LinkSettings

T = TypeVar("T")


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
    coord: NDArray[np.float32],
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
        coord: [N, 3] float32 world coordinates in metres.
        view: its pose must be finite.
        settings: depth range, occlusion test and tolerance.
        spacing: typical distance of neighbouring points, for the z-buffer.
        order: [N] index of each point in the dataset's own order; None: the same order.

    Raises:
        DataError: the pose is not rigid, or the depth map or projection cannot be read.
    """
    check_pose(view)
    in_camera = to_camera(coord, view.camera_from_world)
    z = depth_of(in_camera, view.camera)
    in_range = (z > 0) & (z >= settings.depth_min)
    if settings.depth_max is not None:
        in_range &= z <= settings.depth_max
    if view.load_projection is not None:
        point, u, v = _released(view, len(coord), order)
        keep = in_range[point] & inside(u, v, view.camera)
    else:
        point = np.flatnonzero(in_range)
        u, v = project(in_camera[point], view.camera)
        keep = inside(u, v, view.camera)
    point, u, v = point[keep], u[keep], v[keep]
    z = z[point]
    if settings.occlusion == "none" or view.load_projection is not None:
        visible = np.ones(len(point), dtype=bool)
    elif view.load_depth is not None and view.depth_camera is not None:
        visible = _agrees(view, in_camera[point], settings.occlusion_tolerance)
    else:
        # Far off the axis of a fisheye z says little of how near, and how large in the image, a point is.
        near = np.linalg.norm(in_camera[point], axis=1) if view.camera.model == "fisheye" else z
        visible = visible_by_zbuffer(u, v, near, view.camera, spacing=spacing, tolerance=settings.occlusion_tolerance)
    uv = np.stack([to_fraction(u[visible], view.camera.width), to_fraction(v[visible], view.camera.height)], axis=1)
    return Links(point=point[visible].astype(np.uint32), uv=uv, depth=z[visible].astype(np.float16))


def _agrees(view: View, in_camera: NDArray[np.float64], tolerance: float) -> NDArray[np.bool_]:
    """Whether points [N, 3] of the camera's frame agree with the view's depth map, [N] bool."""
    camera, load = view.depth_camera, view.load_depth
    assert camera is not None and load is not None
    depth = load()
    if depth.shape != (camera.height, camera.width):
        raise DataError(
            f"depth of view {view.id!r}: expected {camera.height}x{camera.width} pixels, "
            f"got {depth.shape[0]}x{depth.shape[1]}"
        )
    u, v = project(in_camera, camera)
    visible = inside(u, v, camera)
    z = depth_of(in_camera, camera)
    visible[visible] = visible_by_depth(u[visible], v[visible], z[visible], depth, tolerance)
    return visible


def _released(
    view: View, points: int, order: NDArray[np.integer] | None
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The dataset's own projection, by ascending point of the stored order."""
    assert view.load_projection is not None
    found = view.load_projection()
    if len(found.point) and not 0 <= found.point.min() <= found.point.max() < points:
        raise DataError(
            f"view {view.id!r}: its projection names points {found.point.min()} to {found.point.max()}, expected 0 to "
            f"{points - 1}"
        )
    point = found.point.astype(np.int64)
    if order is not None:
        position = np.empty(points, dtype=np.int64)
        position[order] = np.arange(points)
        point = position[point]
    ascending = np.argsort(point, kind="stable")
    return point[ascending], found.u[ascending], found.v[ascending]


def concatenate(links: Sequence[Links]) -> Links:
    """Links of several views, one after the other."""
    empty = Links(point=np.zeros(0, np.uint32), uv=np.zeros((0, 2), np.uint16), depth=np.zeros(0, np.float16))
    every = [empty, *links]
    return Links(
        point=np.concatenate([x.point for x in every]),
        uv=np.concatenate([x.uv for x in every]),
        depth=np.concatenate([x.depth for x in every]),
    )
