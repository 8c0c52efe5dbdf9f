"""Points from posed depth maps: back-projection of every frame, then one point per voxel: the mean, or the first.

Memory is bounded by the number of occupied voxels, not by the number of frames.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError
from ditr_cache.geometry import inside, pixel_rays, project
from ditr_cache.sample import Camera, Points, View

T = TypeVar("T", np.float32, np.float64)

_LOG = logging.getLogger(__name__)

_STEP = 3  # pixels to each side for normals: a longer base line outweighs the quantisation of consumer depth sensors
_JUMP = 0.03  # of the depth, per pixel of step: neighbours further apart lie on another surface
_CELLS = 2**20  # voxels per axis on either side of the origin: three axes fit into 63 bits
_MERGE_ROWS = 2**20


def fuse_views(
    views: Sequence[View], *, where: str, voxel_size: float = 0.02, depth_range: tuple[float, float] = (0.1, 6.0)
) -> Points:
    """One point per occupied voxel: mean position, mean colour, mean normal over all frames.

    Frames without a finite pose are skipped; so are frames that cannot be read, with a logged warning. Depth that falls
    outside the colour image is left out.

    Args:
        views: posed views with depth.
        where: names the capture in errors.
        voxel_size: metres.
        depth_range: metres along z.

    Returns:
        Points with colour and unit normals that point to the cameras (zero where no surface could be fitted), sorted
        by voxel: the same views give the same points in the same order.

    Raises:
        DataError: no frame gave a point.
    """
    grid = _VoxelGrid(voxel_size)
    skipped, first_error = 0, ""
    for view in views:
        if not np.isfinite(view.camera_from_world).all():
            skipped += 1
            continue
        try:
            coord, color, normal = back_project(view, depth_range)
            grid.add(coord, color, normal)
        except DataError as error:
            skipped += 1
            first_error = first_error or f" ({error})"
            _LOG.warning("view %s left out of the fusion: %s", view.id, error)
    if not grid.occupied:
        raise DataError(
            f"{where}: no points: {skipped} of {len(views)} frames cannot be used{first_error}, the others have "
            f"no depth within {depth_range[0]}..{depth_range[1]} m"
        )
    return grid.points()


def back_project(
    view: View, depth_range: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.float64]]:
    """World coordinates, colours and normals of the pixels of one view that have depth within `depth_range`.

    Args:
        view: with depth and a finite pose.
        depth_range: metres along z.

    Returns:
        coord [N, 3] float64, color [N, 3] uint8, normal [N, 3] float64, unit and towards the camera, or zero.

    Raises:
        DataError: image or depth cannot be read.
    """
    if view.load_depth is None or view.depth_camera is None:
        raise DataError(f"view {view.id}: no depth to take points from")
    depth = view.load_depth()
    image = view.load_image()
    points = unproject(depth, view.depth_camera)
    keep = (depth >= depth_range[0]) & (depth <= depth_range[1]) & np.isfinite(points).all(axis=2)
    in_camera, normals = points[keep].astype(np.float64), depth_normals(points, depth)[keep].astype(np.float64)
    u, v = project(in_camera, view.camera)
    seen = inside(u, v, view.camera)
    color = image[v[seen].astype(np.intp), u[seen].astype(np.intp)]
    world_from_camera = np.linalg.inv(view.camera_from_world)
    rotation, translation = world_from_camera[:3, :3], world_from_camera[:3, 3]
    return in_camera[seen] @ rotation.T + translation, color, normals[seen] @ rotation.T


def unproject(depth: NDArray[np.float32], camera: Camera) -> NDArray[np.float32]:
    """[H, W, 3] float32 points in the camera's frame of a depth map [H, W] in metres; pixel centres are at +0.5."""
    return pixel_rays(camera).astype(np.float32) * depth[..., None]


def depth_normals(
    in_camera: NDArray[np.float32], depth: NDArray[np.float32], *, step: int = _STEP, jump: float = _JUMP
) -> NDArray[np.float32]:
    """[H, W, 3] float32 unit normals of a map of points [H, W, 3] and their depth [H, W], towards the camera.

    Zero at the border, where a neighbour has no depth, and at jumps of the depth, where no surface is.

    Args:
        in_camera: points of the camera's frame.
        depth: metres, 0 where unknown.
        step: pixels to the neighbours on each side.
        jump: fraction of the depth, per pixel of `step`, by which a neighbour may be nearer or farther.
    """
    normals = np.zeros_like(in_camera)
    s = step
    if min(in_camera.shape[:2]) <= 2 * s:
        return normals
    centre = (slice(s, -s), slice(s, -s))
    left, right = (slice(s, -s), slice(None, -2 * s)), (slice(s, -s), slice(2 * s, None))
    above, below = (slice(None, -2 * s), slice(s, -s)), (slice(2 * s, None), slice(s, -s))
    smooth = depth[centre] > 0
    for neighbour in (left, right, above, below):
        smooth &= (depth[neighbour] > 0) & (np.abs(depth[neighbour] - depth[centre]) <= jump * s * depth[centre])
    # x right, y down, z forward: below-above cross right-left looks back at the camera.
    normal = np.cross(in_camera[below] - in_camera[above], in_camera[right] - in_camera[left])
    away = np.einsum("hwc,hwc->hw", normal, in_camera[centre]) > 0
    normals[centre] = _unit(normal) * (smooth * np.where(away, np.float32(-1), np.float32(1)))[..., None]
    return normals


def first_of_voxels(clouds: Iterable[Points], voxel_size: float) -> Points | None:
    """The first point in every occupied voxel of several clouds, as it is; sorted by voxel. None where no point is.

    Labels and edges stay what they are, where a mean would mix two surfaces. Memory is bounded by the number of
    occupied voxels and the largest cloud.

    Args:
        clouds: with the same arrays.
        voxel_size: metres.

    Raises:
        DataError: points outside the grid.
    """
    keys, kept = np.empty(0, dtype=np.int64), None
    for cloud in clouds:
        found = _voxel_keys(cloud.coord, voxel_size)
        keys, first = np.unique(np.concatenate([keys, found]), return_index=True)
        kept = _rows([cloud] if kept is None else [kept, cloud], first)
    return kept if len(keys) else None


def _rows(clouds: Sequence[Points], rows: NDArray[np.intp]) -> Points:
    """Rows of clouds that stand one after the other."""
    arrays = {f.name: [getattr(cloud, f.name) for cloud in clouds] for f in fields(Points)}
    return Points(**{name: np.concatenate(parts)[rows] for name, parts in arrays.items() if parts[0] is not None})


def _voxel_keys(coord: NDArray[np.floating], voxel_size: float) -> NDArray[np.int64]:
    """[N] number of the voxel of each of the points [N, 3]. Raises `DataError` where they lie outside the grid."""
    cell = np.floor(coord.astype(np.float64) / voxel_size)
    if not (np.abs(cell) < _CELLS).all():
        raise DataError(
            f"points up to {float(np.abs(coord).max()):.3g} m from the origin, expected at most "
            f"{_CELLS * voxel_size:.3g} m; the pose is damaged"
        )
    x, y, z = (cell.astype(np.int64) + _CELLS).T
    return np.asarray((x * 2 * _CELLS + y) * 2 * _CELLS + z)


class _VoxelGrid:
    """Sums of position, colour and normal by voxel, sorted by voxel; new rows are merged in large batches."""

    def __init__(self, voxel_size: float) -> None:
        self._voxel_size = voxel_size
        self._keys = np.empty(0, dtype=np.int64)
        self._sums = np.empty((0, 10))  # count, xyz, rgb, normal
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        self._pending_rows = 0

    @property
    def occupied(self) -> bool:
        """Whether any point was added."""
        return bool(len(self._keys) or self._pending)

    def add(self, coord: NDArray[np.float64], color: NDArray[np.uint8], normal: NDArray[np.float64]) -> None:
        """Add points [N, 3] of one frame. Raises `DataError` where they lie outside the grid."""
        if not len(coord):
            return
        keys = _voxel_keys(coord, self._voxel_size)
        values = np.concatenate([np.ones((len(coord), 1)), coord, color, normal], axis=1)
        self._pending.append(_sum_by_key(keys, values))
        self._pending_rows += len(self._pending[-1][0])
        if self._pending_rows > max(_MERGE_ROWS, len(self._keys)):
            self._merge()

    def points(self) -> Points:
        """Mean of every voxel."""
        self._merge()
        mean = self._sums[:, 1:7] / self._sums[:, :1]
        return Points(
            coord=mean[:, :3].astype(np.float32),
            color=np.rint(mean[:, 3:]).astype(np.uint8),
            normal=_unit(self._sums[:, 7:]).astype(np.float32),
        )

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(k for k, _ in self._pending)])
        sums = np.concatenate([self._sums, *(s for _, s in self._pending)])
        self._keys, self._sums = _sum_by_key(keys, sums)
        self._pending, self._pending_rows = [], 0


def _sum_by_key(keys: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sorted distinct keys and the sum of the rows of `values` of each."""
    if not len(keys):
        return keys, values
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(values[order], starts, axis=0)


def _unit(vectors: NDArray[T]) -> NDArray[T]:
    """Vectors [..., 3] scaled to unit length; those too short to have a direction become zero."""
    length = np.sqrt(np.einsum("...c,...c->...", vectors, vectors))[..., None]
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-12)
