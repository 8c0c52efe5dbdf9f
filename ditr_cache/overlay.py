"""A picture of points drawn over an image that sees them: colours of depth, and of labels where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ditr_cache.errors import StorageError
from ditr_cache.geometry import FRACTION_STEPS

WIDTH = 960
"""Width of one panel in pixels; images are scaled to it."""

_IGNORED = (150, 150, 150)
_TITLE = 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlay:
    """What is drawn.

    Args:
        title: a line of text above.
        image: [H, W, 3] uint8 RGB.
        uv: [L, 2] uint16 fractions of the image, as in links.
        depth: [L] float32 metres.
        segment: [L] class indices; None where there are no labels.
        colors: RGB of each class.
    """

    title: str
    image: NDArray[np.uint8]
    uv: NDArray[np.uint16]
    depth: NDArray[np.float32]
    segment: NDArray[np.int16] | None
    colors: Sequence[tuple[int, int, int]]

    def draw(self) -> Image.Image:
        """The image alone, under points coloured by depth and, with labels, under points coloured by class."""
        height = max(1, round(WIDTH * self.image.shape[0] / self.image.shape[1]))
        picture = np.asarray(Image.fromarray(self.image).resize((WIDTH, height), Image.Resampling.BILINEAR))
        panels = [picture, self._points(picture, depth_colors(self.depth))]
        if self.segment is not None and self.colors:
            table = np.array([*self.colors, _IGNORED], dtype=np.uint8)
            known = (self.segment >= 0) & (self.segment < len(self.colors))
            panels.append(self._points(picture, table[np.where(known, self.segment, len(self.colors))]))
        sheet = Image.new("RGB", (WIDTH, _TITLE + len(panels) * height), (255, 255, 255))
        near, far = np.percentile(self.depth, [2, 98]) if len(self.depth) else (0.0, 0.0)
        ImageDraw.Draw(sheet).text(
            (8, 6), f"{self.title}  depth {near:.1f} m (red) to {far:.1f} m (blue)", fill=(0, 0, 0)
        )
        for i, panel in enumerate(panels):
            sheet.paste(Image.fromarray(panel), (0, _TITLE + i * height))
        return sheet

    def save(self, path: Path) -> None:
        """Write the picture as PNG. Raises `StorageError`."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.draw().save(path, format="PNG")
        except OSError as error:
            raise StorageError(f"cannot write {str(path)!r}: {error}") from error

    def _points(self, picture: NDArray[np.uint8], colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture, darkened, with a dot for each point; near ones over far ones."""
        height, width = picture.shape[:2]
        canvas = (picture * 0.45).astype(np.uint8)
        far_to_near = np.argsort(-self.depth, kind="stable")
        column = self.uv[far_to_near, 0].astype(np.int64) * width // FRACTION_STEPS
        row = self.uv[far_to_near, 1].astype(np.int64) * height // FRACTION_STEPS
        # Dense clouds stay legible with one pixel a point, sparse lidar needs more.
        radius = 0 if len(self.depth) > width * height / 12 else 1
        for dv in range(-radius, radius + 1):
            for du in range(-radius, radius + 1):
                at = np.clip(row + dv, 0, height - 1), np.clip(column + du, 0, width - 1)
                canvas[at] = colors[far_to_near]
        return canvas


def depth_colors(depth: NDArray[np.float32]) -> NDArray[np.uint8]:
    """RGB [L, 3] uint8 from red (near) over yellow, green and cyan to blue (far), by the logarithm of depth [L]."""
    if not len(depth):
        return np.zeros((0, 3), dtype=np.uint8)
    log = np.log(np.maximum(depth.astype(np.float64), 1e-3))
    low, high = np.percentile(log, [2, 98])
    t = ((log - low) / max(high - low, 1e-9)).clip(0, 1)
    stops = np.array([[230, 40, 40], [240, 220, 50], [60, 200, 80], [60, 200, 220], [60, 80, 230]], dtype=np.float64)
    place = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(t, place, stops[:, c]) for c in range(3)], axis=1).astype(np.uint8)
