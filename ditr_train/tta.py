"""Test-time augmentation: the copies of a sample whose scores the official protocol sums up.

The named sets are those of the published recipes (Pointcept's test configurations, which DITR's share). Their flip is
`RandomFlip` with p = 1, which mirrors x and y together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.data.sample import PointSample

_MIRROR = {"none": (1, 1), "x": (-1, 1), "y": (1, -1), "xy": (-1, -1)}


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """One copy of a sample: turned about z through the origin, then scaled, then mirrored. Nothing is drawn.

    Args:
        rotate: degrees, counter-clockwise seen from above.
        scale: factor of all coordinates.
        flip: axes whose coordinates change their sign.

    Raises:
        UsageError: an angle that is not finite, or a scale that is not positive and finite.
    """

    rotate: float = 0.0
    scale: float = 1.0
    flip: Literal["none", "x", "y", "xy"] = "none"

    def __post_init__(self) -> None:
        if not np.isfinite(self.rotate) or not 0 < self.scale < np.inf:
            raise UsageError(
                f"test-time augmentation: expected a finite rotate in degrees and a positive scale, got {self.rotate} "
                f"and {self.scale}"
            )
        if self.flip not in _MIRROR:
            raise UnknownNameError.of("flip of a test-time augmentation", str(self.flip), _MIRROR)

    def __call__(self, points: PointSample) -> PointSample:
        """The augmented points; normals turn and flip along, everything else stays as it is."""
        coord = self._turned(points.coord) * np.float32(self.scale)
        return replace(points, coord=coord, normal=None if points.normal is None else self._turned(points.normal))

    def _turned(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, 3] vectors after rotation and flip."""
        quarters, rest = divmod(self.rotate, 90)
        if rest == 0:  # exact, so that a quarter turn moves no point over the edge of a voxel
            cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[int(quarters) % 4]
        else:
            cos, sin = np.cos(np.radians(self.rotate)), np.sin(np.radians(self.rotate))
        c, s = np.float32(cos), np.float32(sin)
        x, y, z = vectors.T
        mirror_x, mirror_y = (np.float32(sign) for sign in _MIRROR[self.flip])
        return np.stack([mirror_x * (c * x - s * y), mirror_y * (s * x + c * y), z], axis=1)


IDENTITY = Augmentation()

_TURNS = tuple(Augmentation(rotate=angle) for angle in (0, 90, 180, 270))
_SCALES_AND_FLIP = tuple(
    Augmentation(scale=scale, flip=flip) for flip in ("none", "xy") for scale in (0.9, 0.95, 1.0, 1.05, 1.1)
)
_SCANNET = (
    *(replace(turn, scale=scale) for scale in (1.0, 0.95, 1.05) for turn in _TURNS),
    Augmentation(flip="xy"),
)

TTA_SETS: dict[str, tuple[Augmentation, ...]] = {
    "none": (IDENTITY,),
    "scannet": _SCANNET,
    "scannet200": _SCANNET,
    "scannet200-spunet": _TURNS,
    "s3dis": _SCALES_AND_FLIP,
    "nuscenes": _SCALES_AND_FLIP,
    "semantickitti": _TURNS,
    "waymo": _TURNS,
}
"""Name of every set that a recipe or `--tta` can ask for -> its augmentations, of which a copy of the sample each."""


def tta_set(tta: str | Sequence[Augmentation]) -> tuple[Augmentation, ...]:
    """The augmentations of a named set; those of a list as they are.

    Raises:
        UnknownNameError: no set of that name; names the nearest.
        UsageError: an empty list.
    """
    if not isinstance(tta, str):
        if not tta:
            raise UsageError("test-time augmentation: expected at least one augmentation, got none; use `none`")
        return tuple(tta)
    if tta not in TTA_SETS:
        raise UnknownNameError.of("set of test-time augmentations", tta, TTA_SETS)
    return TTA_SETS[tta]
