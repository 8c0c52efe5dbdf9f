"""Points in the frame of their sensor, where a network without `data.center` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ditr_cache.errors import DataError
from ditr_cache.pointcloud.cloud import Chunk, PointCloud
from ditr_train.data.sample import PointSample
from ditr_train.data.transforms import Transform, apply
from ditr_train.pointcloud.survey import finite_points
from ditr_train.pointcloud.tiles import LONGEST_EDGE


class PlacedCloud(PointCloud):
    """A cloud whose coordinates are those of the file in float32, moved by the transforms of `data.at_test`.

    Tiles are cut of what this gives, so that points that a clamp brings together are seen together.

    Args:
        cloud: as the file has it.
        transforms: that move points, each by itself.
        grid_size: edge of a voxel in metres.

    Raises:
        DataError: from `chunks`, points so far from the origin that float32 has no place for them in their voxel.
    """

    FORMAT = "point"

    def __init__(self, cloud: PointCloud, transforms: Sequence[Transform], grid_size: float) -> None:
        super().__init__(cloud.path, cloud.count, cloud.channels, np.float32)
        self._cloud, self._transforms, self._grid_size = cloud, tuple(transforms), grid_size

    def _chunks(self, size: int) -> Iterator[Chunk]:
        """See `PointCloud`."""
        for chunk in self._cloud.chunks(size):
            finite = finite_points(chunk)[:, None]
            coord = np.where(finite, chunk.coord, 0)
            self._check(float(np.abs(coord).max()))
            points = PointSample(name=str(self.path), coord=coord.astype(np.float32))
            placed = apply(self._transforms, points, np.random.default_rng(0)).coord
            # A clamp would make a place of infinity.
            yield replace(chunk, coord=np.where(finite, placed, np.float32(np.nan)))

    def _check(self, farthest: float) -> None:
        limit = LONGEST_EDGE * self._grid_size
        if farthest > limit:
            raise DataError(
                f"{self.path}: coordinates reach {farthest:.0f} m from the origin, which the network takes for the "
                f"sensor (data.center is false), and float32 holds places in voxels of {self._grid_size:g} m up to "
                f"{limit:.0f} m; subtract the sensor's position from the points, remove outliers, or use a network "
                "with data.center"
            )
