"""The points of a sample in blocks, so that a view passes over whole blocks that it cannot see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditr_cache.geometry import lens_limit
from ditr_cache.sample import Camera

BLOCK = 512
"""Points of a block. Fewer would fit the image's border closer, more would cost fewer tests."""

SLACK = 1e-9
"""Relative to all lengths in a test: some 10^5 times what float64 may round off, and nothing beside a block's size."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PointBlocks:
    """N points as B blocks of `BLOCK`, in their order: small in space where that is the Morton order.

    Args:
        count: N.
        columns: [3, B, BLOCK] float32 x, y and z in metres; NaN after the last point.
        centre, half: [B, 3] float64 metres, the middle and half the size of each block's bounding box.
    """

    count: int
    columns: NDArray[np.float32]
    centre: NDArray[np.float64]
    half: NDArray[np.float64]

    @classmethod
    def of(cls, coord: NDArray[np.float32]) -> PointBlocks:
        """Blocks of points [N, 3]."""
        count, blocks = len(coord), -(-len(coord) // BLOCK)
        columns = np.empty((3, blocks * BLOCK), dtype=coord.dtype)
        columns[:, :count] = coord.T
        columns[:, count:] = coord[-1:].T  # until the boxes are known
        boxed = columns.reshape(3, blocks, BLOCK)
        low, high = boxed.min(axis=2).T.astype(np.float64), boxed.max(axis=2).T.astype(np.float64)
        columns[:, count:] = np.nan
        return cls(count=count, columns=boxed, centre=(low + high) / 2, half=(high - low) / 2)

    def coord(self) -> NDArray[np.float32]:
        """The points, [N, 3] float32, stored by columns."""
        return self.columns.reshape(3, -1)[:, : self.count].T

    def some(self, blocks: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """Index [n] and coordinates [n, 3] of the points of some blocks, NaN after the last point of all."""
        point = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        return point, self.columns.take(blocks, axis=1).reshape(3, -1).T

    def maybe_seen(
        self,
        camera: Camera,
        camera_from_world: NDArray[np.float64],
        *,
        depth_min: float,
        depth_max: float | None,
    ) -> NDArray[np.intp]:
        """Ascending indices of the blocks that may hold a point within the depth range and inside the image.

        A block is left out only where all of its box lies beyond one plane that no point in sight lies beyond. A lens
        model has such planes where it is blind, a panorama has none.
        """
        planes = sight_planes(camera, depth_min, depth_max)
        if not len(planes) or not self.count:
            return np.arange(len(self.centre))
        normal, offset = planes[:, :3] @ camera_from_world[:3, :3], planes[:, :3] @ camera_from_world[:3, 3]
        # The corner of the box that lies farthest on the inner side.
        inner = self.centre @ normal.T + self.half @ np.abs(normal).T + offset + planes[:, 3]
        reach = np.linalg.norm(np.abs(self.centre) + self.half, axis=1).max() + np.linalg.norm(camera_from_world[:3, 3])
        slack = SLACK * (np.linalg.norm(planes[:, :3], axis=1) * reach + np.abs(planes[:, 3]))
        return np.flatnonzero(~(inner < -slack).any(axis=1))


def sight_planes(camera: Camera, depth_min: float, depth_max: float | None) -> NDArray[np.float64]:
    """Planes (a, b, c, d), [K, 4]: a x + b y + c z + d >= 0 for every place of the camera's frame that can be seen."""
    if camera.model == "equirectangular":
        return np.zeros((0, 4))
    planes = [(0.0, 0.0, 1.0, -max(depth_min, 0.0))]
    if depth_max is not None:
        planes.append((0.0, 0.0, -1.0, depth_max))
    if camera.model == "pinhole":  # 0 <= fx x / z + cx < width, times z
        planes += [
            (camera.fx, 0.0, camera.cx, 0.0),
            (-camera.fx, 0.0, camera.width - camera.cx, 0.0),
            (0.0, camera.fy, camera.cy, 0.0),
            (0.0, -camera.fy, camera.height - camera.cy, 0.0),
        ]
    else:
        limit = lens_limit(camera.model, camera.distortion)
        if np.isfinite(limit):
            slope = float(np.tan(limit) if camera.model == "fisheye" else limit) * (1 + SLACK)
            planes += [(sign, 0.0, slope, 0.0) for sign in (1.0, -1.0)]
            planes += [(0.0, sign, slope, 0.0) for sign in (1.0, -1.0)]
    return np.array(planes)
