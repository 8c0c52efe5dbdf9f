"""Pointcept's augmentations for indoor scenes, as pure functions of a sample and a random generator.

A transform never writes into the arrays it is given, and it moves `PointSample.row` with its point and never changes
it: the link between a point and its feature survives every augmentation. Defaults are those of Pointcept's ScanNet
recipes. Angles are degrees, lengths metres, colours 0..255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import pydantic
from numpy.typing import NDArray

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.data.sample import PointSample


class Transform(Protocol):
    """A step of augmentation."""

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """The augmented points; every random draw comes from `rng`."""


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
        _check_fractions(self, "ratio", "p")

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
        _check_fractions(self, "p")

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
    """Scales all coordinates by one factor drawn from `low`..`high`."""

    low: float = 0.9
    high: float = 1.1

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise UsageError(f"RandomScale: expected 0 < low <= high, got low={self.low}, high={self.high}")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        return replace(points, coord=points.coord * np.float32(rng.uniform(self.low, self.high)))


@dataclass(frozen=True, kw_only=True)
class RandomFlip:
    """Mirrors x and, independently, y, each with probability `p`."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _check_fractions(self, "p")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        sign = np.array([*np.where(rng.random(2) < self.p, -1, 1), 1], dtype=np.float32)
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
class ElasticDistortion:
    """With probability `p`, bends the cloud by smooth noise, once for each (granularity, magnitude) in metres."""

    levels: tuple[tuple[float, float], ...] = ((0.2, 0.4), (0.8, 1.6))
    p: float = 0.95

    def __post_init__(self) -> None:
        _check_fractions(self, "p")
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


@dataclass(frozen=True, kw_only=True)
class ChromaticAutoContrast:
    """With probability `p`, blends colours (by a random share) with colours stretched to the full range."""

    p: float = 0.2

    def __post_init__(self) -> None:
        _check_fractions(self, "p")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. A sample without colour passes through."""
        if points.color is None or rng.random() >= self.p:
            return points
        low, high = points.color.min(axis=0), points.color.max(axis=0)
        stretched = (points.color - low) * (255 / np.maximum(high - low, 1e-3))
        share = np.float32(rng.random())
        return replace(points, color=(1 - share) * points.color + share * stretched)


@dataclass(frozen=True, kw_only=True)
class ChromaticTranslation:
    """With probability `p`, adds one colour of up to +-`ratio` of the range to all points."""

    p: float = 0.95
    ratio: float = 0.05

    def __post_init__(self) -> None:
        _check_fractions(self, "p", "ratio")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. A sample without colour passes through."""
        if points.color is None or rng.random() >= self.p:
            return points
        shift = rng.uniform(-self.ratio, self.ratio, size=3).astype(np.float32) * 255
        return replace(points, color=np.clip(points.color + shift, 0, 255))


@dataclass(frozen=True, kw_only=True)
class ChromaticJitter:
    """With probability `p`, adds normal noise of deviation `std` (a fraction of the range) to every colour value."""

    p: float = 0.95
    std: float = 0.05

    def __post_init__(self) -> None:
        _check_fractions(self, "p", "std")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. A sample without colour passes through."""
        if points.color is None or rng.random() >= self.p:
            return points
        noise = rng.standard_normal(points.color.shape, dtype=np.float32) * np.float32(self.std * 255)
        return replace(points, color=np.clip(points.color + noise, 0, 255))


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
            _check_fractions(self, "rate")

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


TRANSFORMS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        CenterShift, RandomDropout, RandomRotate, RandomScale, RandomFlip, RandomJitter, ElasticDistortion,
        ChromaticAutoContrast, ChromaticTranslation, ChromaticJitter, SphereCrop,
    )
}  # fmt: skip
"""Name of every transform that a recipe can list -> class."""


def build_transform(name: str, args: Mapping[str, Any]) -> Transform:
    """Transform `name` with its arguments.

    Raises:
        UnknownNameError: no such transform, or an argument that it does not have; names the nearest.
        UsageError: a value that it cannot use.
    """
    if name not in TRANSFORMS:
        raise UnknownNameError.of("transform", name, TRANSFORMS)
    cls = TRANSFORMS[name]
    known = {f.name for f in dataclasses.fields(cls)}
    for key in args:
        if key not in known:
            raise UnknownNameError.of(f"argument of {name}", str(key), known)
    try:
        return pydantic.TypeAdapter(cls).validate_python(dict(args))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        message = first["msg"].removeprefix("Value error, ").removeprefix(f"{name}: ")
        raise UsageError(f"{where}: {message[:1].lower()}{message[1:]}, got {first['input']!r}") from error


def apply(transforms: Sequence[Transform], points: PointSample, rng: np.random.Generator) -> PointSample:
    """`points` after every transform in turn."""
    for transform in transforms:
        points = transform(points, rng)
    return points


def center(points: PointSample, *, apply_z: bool) -> PointSample:
    """`points` with the middle of their x and y extent at 0 and, where `apply_z`, the lowest at z = 0."""
    low, high = points.coord.min(axis=0), points.coord.max(axis=0)
    shift = np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2] if apply_z else 0], dtype=np.float32)
    return replace(points, coord=points.coord - shift)


def _check_fractions(transform: object, *names: str) -> None:
    """Raise `UsageError` where one of the fields is outside 0..1."""
    for name in names:
        if not 0 <= getattr(transform, name) <= 1:
            raise UsageError(f"{type(transform).__name__}: expected {name} in 0..1, got {getattr(transform, name)}")


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
