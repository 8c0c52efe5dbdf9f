"""Where points are, and which of them stay: frames, rigid and other motions of a whole cloud, crops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import UsageError
from ditr_train.data.checks import check_fractions, check_not_negative
from ditr_train.data.sample import PointSample


def center(points: PointSample, *, apply_z: bool) -> PointSample:
    """`points` with the middle of their x and y extent at 0 and, where `apply_z`, the lowest at z = 0."""
    low, high = points.coord.min(axis=0), points.coord.max(axis=0)
    shift = np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2] if apply_z else 0], dtype=np.float32)
    return replace(points, coord=points.coord - shift)


@dataclass(frozen=True, kw_only=True)
class CenterShift:
    """Moves the middle of the x and y extent to 0 and, where `apply_z`, the lowest point to z = 0."""

    apply_z: bool = True

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        return center(points, apply_z=self.apply_z)


@dataclass(frozen=True, kw_only=True)
class RandomDropout:
    """With probability `p`, drops the fraction `ratio` of the points."""

    ratio: float = 0.2
    p: float = 0.2

    def __post_init__(self) -> None:
        check_fractions(self, "ratio", "p")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. At least one point stays; points keep their order."""
        if rng.random() >= self.p:
            return points
        keep = max(1, int(len(points) * (1 - self.ratio)))
        return points.take(np.sort(rng.permutation(len(points))[:keep]))


@dataclass(frozen=True, kw_only=True)
class RandomRotate:
    """With probability `p`, rotates coordinates and normals about an axis through the origin, up to +-`degrees`."""

    axis: Literal["x", "y", "z"] = "z"
    degrees: float = 180.0
    p: float = 0.5

    def __post_init__(self) -> None:
        check_fractions(self, "p")
        check_not_negative(self, "degrees")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        if rng.random() >= self.p:
            return points
        angle = np.radians(rng.uniform(-self.degrees, self.degrees))
        i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[self.axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        turned = turn.T.astype(np.float32)
        return replace(
            points,
            coord=points.coord @ turned,
            normal=None if points.normal is None else points.normal @ turned,
        )


@dataclass(frozen=True, kw_only=True)
class RandomScale:
    """Scales all coordinates by one factor drawn from `low`..`high`, or, `anisotropic`, each axis by one of its own."""

    low: float = 0.9
    high: float = 1.1
    anisotropic: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise UsageError(f"RandomScale: expected 0 < low <= high, got low={self.low}, high={self.high}")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. Normals stay those of their surfaces."""
        if not self.anisotropic:
            return replace(points, coord=points.coord * np.float32(rng.uniform(self.low, self.high)))
        factor = rng.uniform(self.low, self.high, size=3).astype(np.float32)
        normal = points.normal
        if normal is not None:
            length = np.linalg.norm(normal, axis=1, keepdims=True)
            normal = normal / factor
            # As long as before: those that are not known are zero.
            normal *= length / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        return replace(points, coord=points.coord * factor, normal=normal)


@dataclass(frozen=True, kw_only=True)
class RandomShift:
    """Moves the whole cloud along each axis by up to +-`metres`."""

    metres: tuple[float, float, float] = (0.2, 0.2, 0.2)

    def __post_init__(self) -> None:
        check_not_negative(self, "metres")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        limit = np.array(self.metres)
        return replace(points, coord=points.coord + rng.uniform(-limit, limit).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class RandomFlip:
    """Mirrors x and, independently, y, each with probability `p`; or one of them alone."""

    p: float = 0.5
    axes: Literal["x", "y", "xy"] = "xy"

    def __post_init__(self) -> None:
        check_fractions(self, "p")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        mirrored = (rng.random(2) < self.p) & ["x" in self.axes, "y" in self.axes]
        sign = np.array([*np.where(mirrored, -1, 1), 1], dtype=np.float32)
        return replace(
            points, coord=points.coord * sign, normal=None if points.normal is None else points.normal * sign
        )


@dataclass(frozen=True, kw_only=True)
class RandomJitter:
    """Adds normal noise of deviation `sigma` to every coordinate, clipped to +-`clip`."""

    sigma: float = 0.005
    clip: float = 0.02

    def __post_init__(self) -> None:
        if self.sigma < 0 or self.clip <= 0:
            raise UsageError(f"RandomJitter: expected sigma >= 0 and clip > 0, got {self.sigma} and {self.clip}")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        noise = rng.standard_normal(points.coord.shape, dtype=np.float32) * np.float32(self.sigma)
        return replace(points, coord=points.coord + np.clip(noise, -self.clip, self.clip))


@dataclass(frozen=True, kw_only=True)
class SphereCrop:
    """Keeps the points nearest to a random one: at most `point_max`, or the fraction `rate` of them."""

    point_max: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.point_max is None) == (self.rate is None):
            raise UsageError("SphereCrop: expected either point_max or rate")
        if self.point_max is not None and self.point_max < 1:
            raise UsageError(f"SphereCrop: expected point_max >= 1, got {self.point_max}")
        if self.rate is not None:
            check_fractions(self, "rate")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. Points keep their order."""
        keep = self.keep(points.coord, rng)
        return points if keep is None else points.take(keep)

    def keep(self, coord: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64] | None:
        """Positions of the points that stay, ascending; None where all do."""
        limit = max(1, int(len(coord) * self.rate)) if self.rate is not None else self.point_max
        assert limit is not None
        if len(coord) <= limit:
            return None
        center = coord[rng.integers(len(coord))]
        distance = np.square(coord - center).sum(axis=1)
        return np.sort(np.argpartition(distance, limit - 1)[:limit])


@dataclass(frozen=True, kw_only=True)
class PointClip:
    """Clamps coordinates to the box `low`..`high`; no point goes. In the sensor's frame, so with `data.center` off.

    Draws nothing, and is meant for `data.at_test`, too.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def __post_init__(self) -> None:
        if any(a >= b for a, b in zip(self.low, self.high, strict=True)):
            raise UsageError(f"PointClip: expected low < high, got {list(self.low)} and {list(self.high)}")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        low, high = np.array(self.low, np.float32), np.array(self.high, np.float32)
        return replace(points, coord=np.clip(points.coord, low, high))


@dataclass(frozen=True, kw_only=True)
class PointClipDistance:
    """Pulls points beyond `radius` metres of the sensor onto that sphere, then clamps z to `low`..`high`.

    As `PointClip`, for recipes with `data.center` off and for `data.at_test`, too.
    """

    radius: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.radius <= 0 or self.low >= self.high:
            raise UsageError(
                f"PointClipDistance: expected radius > 0 and low < high, got {self.radius}, {self.low} and {self.high}"
            )

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        distance = np.linalg.norm(points.coord, axis=1, keepdims=True)
        coord = points.coord * np.minimum(1, np.float32(self.radius) / np.maximum(distance, 1e-6))
        coord[:, 2] = np.clip(coord[:, 2], self.low, self.high)
        return replace(points, coord=coord.astype(np.float32))
