"""Settings of the generated rooms."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ditr_cache.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RoomsSettings:
    """What decides the content of the rooms, next to the seed. Lengths are metres.

    Args:
        frames: views per room.
        color_size, depth_size: (width, height) of the colour and depth images in pixels.
        focal: focal length of the colour camera as a fraction of its image width.
        val_fraction: share of the rooms in the validation split.
        point_spacing: mean distance of neighbouring mesh vertices.
        surface_noise: standard deviation of the vertices along their normal.
        texel: edge of a texture's pixel.
        image_noise: standard deviation of the colour sensor's noise, in grey levels.
        jpeg_quality: of the colour images.
        lost_pose_probability: share of the rooms in which one frame has no pose (all entries -inf, as in ScanNet).

    Raises:
        UsageError: a value out of its range.
    """

    frames: int = 20
    color_size: tuple[int, int] = (320, 240)
    depth_size: tuple[int, int] = (160, 120)
    focal: float = 0.75
    val_fraction: float = 1 / 3
    point_spacing: float = 0.048
    surface_noise: float = 0.002
    texel: float = 0.005
    image_noise: float = 2.0
    jpeg_quality: int = 92
    lost_pose_probability: float = 0.35

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "frames": (2, 10_000),
            "focal": (0.2, 5),
            "val_fraction": (0.01, 0.99),
            "point_spacing": (0.01, 0.5),
            "surface_noise": (0, 0.02),
            "texel": (0.001, 0.05),
            "image_noise": (0, 64),
            "jpeg_quality": (1, 95),
            "lost_pose_probability": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"rooms: {name} must be in [{low}, {high}], got {value!r}")
        for name in ("color_size", "depth_size"):
            size = getattr(self, name)
            if len(size) != 2 or not all(8 <= edge <= 4096 for edge in size):
                raise UsageError(f"rooms: {name} must be (width, height) with edges in [8, 4096], got {size!r}")

    def is_val(self, scene: int) -> bool:
        """Whether room number `scene` belongs to the validation split; the same whatever the number of rooms."""
        return math.floor((scene + 1) * self.val_fraction + 0.5) > math.floor(scene * self.val_fraction + 0.5)
