"""Augmentations of colour, which leave every point where it is. A sample without colour passes through all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ditr_cache.errors import UsageError
from ditr_train.data.checks import check_fractions
from ditr_train.data.sample import PointSample


@dataclass(frozen=True, kw_only=True)
class ChromaticAutoContrast:
    """With probability `p`, blends colours (by a random share) with colours stretched to the full range."""

    p: float = 0.2

    def __post_init__(self) -> None:
        check_fractions(self, "p")

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
        check_fractions(self, "p", "ratio")

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
        check_fractions(self, "p", "std")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. A sample without colour passes through."""
        if points.color is None or rng.random() >= self.p:
            return points
        noise = rng.standard_normal(points.color.shape, dtype=np.float32) * np.float32(self.std * 255)
        return replace(points, color=np.clip(points.color + noise, 0, 255))


@dataclass(frozen=True, kw_only=True)
class ChromaticDrop:
    """With probability `p`, makes all points black (PointNeXt)."""

    p: float = 0.2

    def __post_init__(self) -> None:
        check_fractions(self, "p")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. A sample without colour passes through."""
        if points.color is None or rng.random() >= self.p:
            return points
        return replace(points, color=np.zeros_like(points.color))


@dataclass(frozen=True, kw_only=True)
class ChromaticNormalize:
    """Colours minus `mean`, over `std`, both of colours in 0..1; the last colour transform, as the result is in no
    range. Draws nothing.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise UsageError(f"ChromaticNormalize: expected std > 0, got {list(self.std)}")

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """See `Transform`. A sample without colour passes through."""
        if points.color is None:
            return points
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        # Colours stay in units of 255 until they become channels.
        return replace(points, color=(points.color - 255 * mean) / std)
