"""KITTI's velodyne scans: float32 x, y, z and intensity of one point after the other, without a header."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ditr_cache.errors import DataError
from ditr_cache.pointcloud.cloud import Chunk, PointCloud

_POINT = np.dtype([("values", "<f4", (4,))])


class KittiCloud(PointCloud):
    """A scan of KITTI or SemanticKITTI, whose labels are a file of their own.

    Raises:
        DataError: a size that is no whole number of points, or a scan of nuScenes, whose points have five values.
    """

    FORMAT = "KITTI .bin"

    def __init__(self, path: Path, *, labels: bool = False) -> None:
        if path.name.endswith(".pcd.bin"):
            raise DataError(
                f"{path}: a scan of nuScenes has five values per point, expected KITTI's x, y, z, intensity; extract "
                "the dataset with ditr-cache and name the sample's id"
            )
        size = path.stat().st_size
        if size % _POINT.itemsize:
            raise DataError(
                f"{path}: expected float32 x, y, z and intensity of whole points ({_POINT.itemsize} bytes each), got "
                f"{size} bytes, no multiple of that; the file is truncated or not a KITTI scan"
            )
        super().__init__(path, size // _POINT.itemsize, ("coord", "strength"), np.float32)

    def _chunks(self, size: int) -> Iterator[Chunk]:
        """See `PointCloud`."""
        with self.path.open("rb") as file:
            for first, rows in self.spans(size):
                points = self.binary_rows(file, _POINT, first, rows)["values"]
                yield Chunk(coord=points[:, :3], strength=points[:, 3])
