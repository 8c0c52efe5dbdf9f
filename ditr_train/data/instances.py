"""Augmentations of single objects within their scene, for which a cache needs the array `instance`.

Facts from Volt's released recipes (github.com/YilmazKadir/Volt). An instance is all points with the same id >= 0, if
one of them at least is labelled; each is chosen with probability `p`. As everywhere, feature rows move with their
points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import UsageError
from ditr_train.data.checks import check_fractions, check_not_negative
from ditr_train.data.sample import PointSample

Indices = NDArray[np.int64]


def instances_of(points: PointSample) -> list[Indices]:
    """The points of each instance, by ascending id; none where a sample has no instances."""
    if points.instance is None:
        return []
    order = np.argsort(points.instance, kind="stable")
    ids, starts = np.unique(points.instance[order], return_index=True)
    groups = zip(ids, np.split(order, starts[1:]), strict=True)
    labelled = np.ones(len(points), bool) if points.segment is None else points.segment >= 0
    return [members for number, members in groups if number >= 0 and labelled[members].any()]


@dataclass(frozen=True, kw_only=True)
class _OfInstances:
    """What all of them share: the choice of the instances."""

    p: float = 0.2

    def __post_init__(self) -> None:
        check_fractions(self, "p")

    def chosen(self, points: PointSample, rng: np.random.Generator) -> list[Indices]:
        """The points of each chosen instance."""
        found = instances_of(points)
        return [members for members, take in zip(found, rng.random(len(found)) < self.p, strict=True) if take]


@dataclass(frozen=True, kw_only=True)
class InstanceShift(_OfInstances):
    """Moves an instance along each axis by up to +-`metres`."""

    metres: tuple[float, float, float] = (0.1, 0.1, 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "metres")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        coord, limit = points.coord.copy(), np.array(self.metres)
        for members in self.chosen(points, rng):
            coord[members] += rng.uniform(-limit, limit).astype(np.float32)
        return replace(points, coord=coord)


@dataclass(frozen=True, kw_only=True)
class InstanceRotate(_OfInstances):
    """Turns an instance about the vertical through its mean, by up to +-`degrees`; normals turn along."""

    degrees: float = 45.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "degrees")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        coord, normal = points.coord.copy(), None if points.normal is None else points.normal.copy()
        for members in self.chosen(points, rng):
            angle = np.radians(rng.uniform(-self.degrees, self.degrees))
            cos, sin = np.cos(angle), np.sin(angle)
            turned = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=np.float32)
            middle = coord[members].mean(axis=0)
            coord[members] = (coord[members] - middle) @ turned + middle
            if normal is not None:
                normal[members] = normal[members] @ turned
        return replace(points, coord=coord, normal=normal)


@dataclass(frozen=True, kw_only=True)
class InstanceFlip(_OfInstances):
    """Mirrors an instance at its mean, along x and, independently, y, each with probability `flip`; normals along."""

    flip: float = 0.5

    def __post_init__(self) -> None:
        check_fractions(self, "p", "flip")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        coord, normal = points.coord.copy(), None if points.normal is None else points.normal.copy()
        for members in self.chosen(points, rng):
            sign = np.array([*np.where(rng.random(2) < self.flip, -1, 1), 1], dtype=np.float32)
            middle = coord[members].mean(axis=0)
            coord[members] = (coord[members] - middle) * sign + middle
            if normal is not None:
                normal[members] *= sign
        return replace(points, coord=coord, normal=normal)


@dataclass(frozen=True, kw_only=True)
class InstanceScale(_OfInstances):
    """Scales an instance about its mean by one factor drawn from `low`..`high`."""

    low: float = 0.9
    high: float = 1.1

    def __post_init__(self) -> None:
        check_fractions(self, "p")
        if not 0 < self.low <= self.high:
            raise UsageError(f"InstanceScale: expected 0 < low <= high, got low={self.low}, high={self.high}")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        coord = points.coord.copy()
        for members in self.chosen(points, rng):
            middle = coord[members].mean(axis=0)
            coord[members] = (coord[members] - middle) * np.float32(rng.uniform(self.low, self.high)) + middle
        return replace(points, coord=coord)


@dataclass(frozen=True, kw_only=True)
class InstanceLabelDrop(_OfInstances):
    """Ignores the labels of the fraction `ratio` of an instance's points (Volt's InstanceDropOut); no point goes."""

    p: float = 0.1
    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_fractions(self, "p", "ratio")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. A sample without labels passes through."""
        if points.segment is None:
            return points
        segment = points.segment.copy()
        for members in self.chosen(points, rng):
            segment[rng.permutation(members)[: int(len(members) * self.ratio)]] = -1
        return replace(points, segment=segment)


@dataclass(frozen=True, kw_only=True)
class InstanceColorDrop(_OfInstances):
    """Makes an instance black."""

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. A sample without colour passes through."""
        if points.color is None:
            return points
        color = points.color.copy()
        for members in self.chosen(points, rng):
            color[members] = 0
        return replace(points, color=color)


@dataclass(frozen=True, kw_only=True)
class InstanceSwap(_OfInstances):
    """Pairs the instances at random; the two of a pair change places, mean for mean, with probability `p`."""

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`."""
        coord, found = points.coord.copy(), instances_of(points)
        order = rng.permutation(len(found))
        for a, b in zip(order[::2], order[1::2], strict=False):
            if rng.random() < self.p:
                offset = coord[found[b]].mean(axis=0) - coord[found[a]].mean(axis=0)
                coord[found[a]] += offset
                coord[found[b]] -= offset
        return replace(points, coord=coord)


INSTANCE_TRANSFORMS = (
    InstanceShift, InstanceRotate, InstanceFlip, InstanceScale, InstanceLabelDrop, InstanceColorDrop, InstanceSwap,
)  # fmt: skip
"""All of them; a dataset reads `instance` where one of them is used."""
