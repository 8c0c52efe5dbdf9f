"""Elastic distortion: a cloud bent by smooth noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import UsageError
from ditr_train.data.checks import check_fractions
from ditr_train.data.sample import PointSample


@dataclass(frozen=True, kw_only=True)
class ElasticDistortion:
    """With probability `p`, bends the cloud by smooth noise, once for each (granularity, magnitude) in metres."""

    levels: tuple[tuple[float, float], ...] = ((0.2, 0.4), (0.8, 1.6))
    p: float = 0.95

    def __post_init__(self) -> None:
        check_fractions(self, "p")
        if any(granularity <= 0 for granularity, _ in self.levels):
            raise UsageError(f"ElasticDistortion: expected granularities above 0, got {self.levels}")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        if rng.random() >= self.p:
            return points
        coord = points.coord
        for granularity, magnitude in self.levels:
            low = coord.min(axis=0)
            shape = ((coord.max(axis=0) - low) // granularity).astype(int) + 3
            noise = rng.standard_normal((*shape, 3), dtype=np.float32)
            for _ in range(2):
                for axis in range(3):
                    noise = _box_blur(noise, axis)
            # The first node lies one granularity below the lowest point.
            coord = coord + np.float32(magnitude) * _interpolate(noise, (coord - low) / np.float32(granularity) + 1)
        return replace(points, coord=coord)


def _box_blur(field: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Mean of each node and its two neighbours along `axis`; nodes outside count as 0."""
    padded = np.zeros([n + 2 * (a == axis) for a, n in enumerate(field.shape)], dtype=np.float32)
    view = np.moveaxis(padded, axis, 0)
    view[1:-1] = np.moveaxis(field, axis, 0)
    return np.moveaxis((view[:-2] + view[1:-1] + view[2:]) / np.float32(3), 0, axis)


def _interpolate(field: NDArray[np.float32], position: NDArray[np.float32]) -> NDArray[np.float32]:
    """Trilinear interpolation of `field` [X, Y, Z, 3] at `position` [N, 3] in node units, all inside the field."""
    base = np.floor(position).astype(np.int64)
    t = position - base.astype(np.float32)
    _, ny, nz, width = field.shape
    flat = np.ascontiguousarray(field).reshape(-1, width)
    result = np.zeros_like(position)
    for dx in (0, 1):
        wx = t[:, 0] if dx else 1 - t[:, 0]
        for dy in (0, 1):
            wxy = wx * (t[:, 1] if dy else 1 - t[:, 1])
            for dz in (0, 1):
                weight = wxy * (t[:, 2] if dz else 1 - t[:, 2])
                node = ((base[:, 0] + dx) * ny + base[:, 1] + dy) * nz + base[:, 2] + dz
                result += weight[:, None] * flat[node]
    return result
