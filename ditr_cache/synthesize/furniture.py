"""Free-standing furniture as boxes. Its classes have shapes of their own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ditr_cache.synthesize.boxes import ALL_FACES, Box

CHAIR, SOFA, TABLE, BOOKSHELF = 5, 6, 7, 10
"""nyu40 ids."""

_SCANNED = tuple(face for face in ALL_FACES if face != "-z")  # cameras look from above
_BEFORE_WALL = tuple(face for face in _SCANNED if face != "+y")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a piece stands: the middle of its footprint on the floor, its yaw; its front looks along its own -y."""

    x: float
    y: float
    yaw: float

    def box(
        self,
        middle: tuple[float, float, float],
        size: tuple[float, float, float],
        *,
        label: int,
        texture: int,
        shift: float = 0.0,
        faces: tuple[str, ...] = _SCANNED,
    ) -> Box:
        """A part of the piece; `middle` is given in the piece's own axes."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        centre = (self.x + c * middle[0] - s * middle[1], self.y + s * middle[0] + c * middle[1], middle[2])
        return Box(
            centre=(float(centre[0]), float(centre[1]), centre[2]),
            size=size,
            yaw=self.yaw,
            label=label,
            texture=texture,
            faces=faces,
            shift=shift,
        )


def chair(place: Place, rng: np.random.Generator, texture: int) -> list[Box]:
    """Four legs, seat and back."""
    width, seat, back = rng.uniform(0.42, 0.5), rng.uniform(0.42, 0.48), rng.uniform(0.38, 0.5)
    parts = [
        ((0.0, 0.0, seat), (width, width, 0.05)),
        ((0.0, width / 2 - 0.025, seat + 0.025 + back / 2), (width, 0.05, back)),
    ]
    reach, leg = width / 2 - 0.025, seat - 0.025
    parts += [((x, y, leg / 2), (0.045, 0.045, leg)) for x in (-reach, reach) for y in (-reach, reach)]
    return [
        place.box(middle, size, label=CHAIR, texture=texture, shift=0.21 * i) for i, (middle, size) in enumerate(parts)
    ]


def table(place: Place, rng: np.random.Generator, texture: int, size: tuple[float, float]) -> list[Box]:
    """Four legs and a top of the given (width, depth)."""
    top, (width, depth) = rng.uniform(0.70, 0.76), size
    parts = [((0.0, 0.0, top - 0.02), (width, depth, 0.04))]
    legs = [(x, y) for x in (-width / 2 + 0.05, width / 2 - 0.05) for y in (-depth / 2 + 0.05, depth / 2 - 0.05)]
    parts += [((x, y, (top - 0.04) / 2), (0.06, 0.06, top - 0.04)) for x, y in legs]
    return [
        place.box(middle, size, label=TABLE, texture=texture, shift=0.21 * i) for i, (middle, size) in enumerate(parts)
    ]


def sofa(place: Place, rng: np.random.Generator, texture: int, size: tuple[float, float]) -> list[Box]:
    """Seat, back and two arms, its back to a wall, within a footprint of the given (width, depth)."""
    (width, depth), seat, back, arm = size, rng.uniform(0.38, 0.46), rng.uniform(0.72, 0.88), 0.18
    inner = width - 2 * arm
    parts = [
        ((0.0, -0.1, seat / 2), (inner, depth - 0.2, seat)),
        ((0.0, depth / 2 - 0.1, back / 2), (inner, 0.2, back)),
        ((-width / 2 + arm / 2, 0.0, 0.3), (arm, depth, 0.6)),
        ((width / 2 - arm / 2, 0.0, 0.3), (arm, depth, 0.6)),
    ]
    return [
        place.box(middle, size, label=SOFA, texture=texture, shift=0.21 * i, faces=_BEFORE_WALL)
        for i, (middle, size) in enumerate(parts)
    ]


def bookshelf(
    place: Place, rng: np.random.Generator, texture: int, books: tuple[int, ...], size: tuple[float, float]
) -> list[Box]:
    """Sides, back, boards and rows of books, its back to a wall, within a footprint of the given (width, depth)."""
    (width, depth), height, thick = size, rng.uniform(1.4, 1.9), 0.03
    levels = np.linspace(thick / 2, height - thick / 2, int(height / 0.36) + 1)
    inner = width - 2 * thick
    parts = [((side * (width - thick) / 2, 0.0, height / 2), (thick, depth, height), texture) for side in (-1.0, 1.0)]
    parts.append(((0.0, depth / 2 - thick / 2, height / 2), (inner, thick, height), texture))
    for level in levels:
        parts.append(((0.0, -thick / 2, float(level)), (inner, depth - thick, thick), texture))
    for below, above in itertools.pairwise(levels):
        x = -inner / 2
        while x < inner / 2 - 0.16:
            run = min(rng.uniform(0.15, 0.3), inner / 2 - x)
            tall = rng.uniform(0.55, 0.9) * (above - below - thick)
            deep = rng.uniform(0.6, 0.8) * (depth - thick)
            middle = (x + run / 2, depth / 2 - thick - deep / 2, float(below + thick / 2 + tall / 2))
            parts.append((middle, (run, deep, tall), int(rng.choice(books))))
            x += run + (rng.uniform(0.1, 0.25) if rng.random() < 0.3 else 0.0)
    return [
        place.box(middle, size, label=BOOKSHELF, texture=index, shift=0.21 * i, faces=_BEFORE_WALL)
        for i, (middle, size, index) in enumerate(parts)
    ]
