"""A furnished room: walls, floor, panels on the walls, mats on the floor, furniture.

Every panel on a wall has the same distribution of size, height, thickness, rim and colour, whatever its class, and so
has everything flat on the floor; one kind of each is mere wall (a painted field) or floor (an inlay).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditr_cache.synthesize import furniture, textures
from ditr_cache.synthesize.boxes import Box, Faces
from ditr_cache.synthesize.furniture import Place
from ditr_cache.synthesize.textures import Pattern

WALL, FLOOR, CABINET, DOOR, WINDOW, PICTURE, CURTAIN, MAT, WHITEBOARD = 1, 2, 3, 8, 9, 11, 16, 20, 30
"""nyu40 ids."""

PANELS: dict[int, Pattern] = {
    CABINET: textures.slats,
    DOOR: textures.grain,
    WINDOW: textures.muntins,
    PICTURE: textures.swirls,
    CURTAIN: textures.folds,
    WHITEBOARD: textures.handwriting,
    WALL: textures.plaster,
}
"""Class of a flat panel on a wall -> its texture. The last is a painted field of the wall."""

RUGS: dict[int, Pattern] = {MAT: textures.medallions, FLOOR: textures.parquet}
"""Class of a flat thing on the floor -> its texture. The last is an inlay of the floor."""

_SLAB = 0.1  # thickness of walls and floor, outside the room
_TILE = 2.4  # edge of textures that repeat over a surface


@dataclass(frozen=True, kw_only=True, eq=False)
class Room:
    """A room with one corner at the origin.

    Args:
        width, depth, height: along x, y, z in metres.
        boxes: everything in it; the first five are the floor and the walls.
        textures: [rows, cols, 3] uint8 images that repeat over the faces.
        lamp: [3] position of the lamp.
        brightness: of the light, (ambient, lamp).
    """

    width: float
    depth: float
    height: float
    boxes: tuple[Box, ...]
    textures: tuple[NDArray[np.uint8], ...]
    lamp: NDArray[np.float64]
    brightness: tuple[float, float]

    def shade(
        self, faces: Faces, index: NDArray[np.integer], s: NDArray[np.float32], t: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """[...] factor on the colour at places (s, t) of the faces `index`: ambient and Lambert with fall-off."""
        to_lamp = self.lamp - faces.origin
        lamp_s, lamp_t, above = (
            np.einsum("kd,kd->k", to_lamp, axis).astype(np.float32)[index]
            for axis in (faces.s_axis, faces.t_axis, faces.normal)
        )
        squared = np.square(lamp_s - s) + np.square(lamp_t - t) + np.square(above)
        ambient, lamp = (np.float32(b) for b in self.brightness)
        return ambient + lamp * np.maximum(above, 0) / (np.sqrt(squared) * (1 + np.float32(0.08) * squared))


class _Builder:
    """Collects boxes and textures while a room is furnished."""

    def __init__(self, rng: np.random.Generator, texel: float) -> None:
        self.rng = rng
        self.texel = texel
        self.width, self.depth = (float(v) for v in rng.uniform(3.5, 6.0, 2))
        self.height = 2.5
        self.boxes: list[Box] = []
        self.textures: list[NDArray[np.uint8]] = []
        self.occupied: list[tuple[float, float, float]] = []  # x, y, radius of furniture

    def texture(self, pattern: Pattern, width: float = _TILE, height: float = _TILE, rim: float = 0.0) -> int:
        """Index of a new texture."""
        self.textures.append(textures.bake(self.rng, pattern, width, height, self.texel, rim=rim))
        return len(self.textures) - 1

    def flat(
        self,
        pattern: Pattern,
        label: int,
        centre: tuple[float, float, float],
        size: tuple[float, float, float],
        yaw: float = 0.0,
    ) -> None:
        """A thin box on a wall (its own -y looks into the room) or on the floor (+z), with its own texture."""
        upright = size[1] < size[2]
        rim = self.rng.uniform(0.03, 0.05) if self.rng.random() < 0.5 else 0.0
        texture = self.texture(pattern, size[0], size[2] if upright else size[1], rim)
        faces = ("-y", "+x", "-x", "+z", "-z") if upright else ("+z", "+x", "-x", "+y", "-y")
        self.boxes.append(Box(centre=centre, size=size, yaw=yaw, label=label, texture=texture, faces=faces))

    def free(self, x: float, y: float, radius: float, margin: float = 0.1) -> bool:
        """Whether a disc is inside the room and clear of furniture."""
        inside = radius <= x <= self.width - radius and radius <= y <= self.depth - radius
        return inside and all(np.hypot(x - a, y - b) > radius + r + margin for a, b, r in self.occupied)


@dataclass(frozen=True)
class _Wall:
    """One wall: `start + a * along` runs over its foot from left to right for someone who looks at it."""

    start: tuple[float, float]
    along: tuple[float, float]
    length: float
    yaw: float  # turns -y into the wall's inward normal

    def at(self, a: float, out: float) -> tuple[float, float]:
        """(x, y) of the place `a` metres along and `out` metres off the wall."""
        dx, dy = self.along
        return self.start[0] + a * dx + out * dy, self.start[1] + a * dy - out * dx


def furnish(rng: np.random.Generator, texel: float) -> Room:
    """A random room; `texel` is the edge of a texture's pixel in metres."""
    room = _Builder(rng, texel)
    w, d = room.width, room.depth
    walls = (
        _Wall((0, d), (1, 0), w, 0.0),
        _Wall((w, d), (0, -1), d, -np.pi / 2),
        _Wall((w, 0), (-1, 0), w, np.pi),
        _Wall((0, 0), (0, 1), d, np.pi / 2),
    )
    _shell(room, walls)
    taken = _along_walls(room, walls)
    _panels(room, walls, taken)
    _middle(room)
    _rugs(room)
    lamp = np.array([w * rng.uniform(0.35, 0.65), d * rng.uniform(0.35, 0.65), 2.4])
    return Room(
        width=w,
        depth=d,
        height=room.height,
        boxes=tuple(room.boxes),
        textures=tuple(room.textures),
        lamp=lamp,
        brightness=(float(rng.uniform(0.6, 0.75)), float(rng.uniform(0.45, 0.65))),
    )


def _shell(room: _Builder, walls: tuple[_Wall, ...]) -> None:
    """Floor and walls: boxes outside the room of which only the inner face is seen."""
    floor = room.texture(textures.parquet)
    room.boxes.append(
        Box(
            centre=(room.width / 2, room.depth / 2, -_SLAB / 2),
            size=(room.width, room.depth, _SLAB),
            label=FLOOR,
            texture=floor,
            faces=("+z",),
        )
    )
    plaster = room.texture(textures.plaster)
    for number, wall in enumerate(walls):
        x, y = wall.at(wall.length / 2, -_SLAB / 2)
        room.boxes.append(
            Box(
                centre=(x, y, room.height / 2),
                size=(wall.length, _SLAB, room.height),
                yaw=wall.yaw,
                label=WALL,
                texture=plaster,
                faces=("-y",),
                shift=0.7 * number,
            )
        )


def _along_walls(room: _Builder, walls: tuple[_Wall, ...]) -> dict[int, tuple[float, float]]:
    """A bookshelf against one wall and a sofa against another; returns wall number -> interval of the bookshelf."""
    rng = room.rng
    first, second = (int(n) for n in rng.permutation(4)[:2])
    width, depth = float(rng.uniform(0.8, 1.1)), float(rng.uniform(0.26, 0.34))
    start = float(rng.uniform(0.3, walls[first].length - width - 0.3))
    x, y = walls[first].at(start + width / 2, depth / 2)
    books = tuple(room.texture(textures.board, 0.6, 0.6) for _ in range(3))
    wood = room.texture(textures.board)
    place = Place(x=x, y=y, yaw=walls[first].yaw)
    room.boxes += furniture.bookshelf(place, rng, wood, books, (width, depth))
    room.occupied.append((x, y, width / 2))

    size = (float(rng.uniform(1.4, 1.9)), float(rng.uniform(0.8, 0.9)))
    for _ in range(50):
        a = float(rng.uniform(size[0] / 2 + 0.2, walls[second].length - size[0] / 2 - 0.2))
        x, y = walls[second].at(a, size[1] / 2 + 0.06)
        if all(np.hypot(x - p, y - q) > 1.0 + r for p, q, r in room.occupied):
            room.boxes += furniture.sofa(
                Place(x=x, y=y, yaw=walls[second].yaw), rng, room.texture(textures.fabric, 0.6, 0.6), size
            )
            room.occupied.append((x, y, 0.95))
            break
    return {first: (start, start + width)}


def _panels(room: _Builder, walls: tuple[_Wall, ...], taken: dict[int, tuple[float, float]]) -> None:
    """Fill the walls with panels of every class in turn."""
    rng, deck = room.rng, _deck(room.rng, tuple(PANELS))
    for number, wall in enumerate(walls):
        low, high = taken.get(number, (wall.length, wall.length))
        a = rng.uniform(0.15, 0.4)
        while True:
            width, height = rng.uniform(0.65, 1.25), rng.uniform(0.85, 1.6)
            if a + width > low - 0.08 and a < high + 0.08:
                a = high + rng.uniform(0.12, 0.3)
            if a + width > wall.length - 0.12:
                break
            thick, bottom = rng.uniform(0.006, 0.02), rng.uniform(0.25, room.height - 0.15 - height)
            x, y = wall.at(float(a + width / 2), float(thick / 2))
            label = next(deck)
            centre = (float(x), float(y), float(bottom + height / 2))
            room.flat(PANELS[label], label, centre, (float(width), float(thick), float(height)), wall.yaw)
            a += width + rng.uniform(0.12, 0.4)


def _middle(room: _Builder) -> None:
    """A table with chairs near the middle of the room, and chairs elsewhere."""
    rng = room.rng
    size = (float(rng.uniform(0.9, 1.4)), float(rng.uniform(0.65, 0.85)))
    cloth = room.texture(textures.fabric, 0.6, 0.6)
    for _ in range(50):
        x, y, yaw = rng.uniform(1, room.width - 1), rng.uniform(1, room.depth - 1), rng.uniform(0, np.pi)
        if room.free(x, y, size[0] / 2 + 0.2):
            break
    else:
        return
    room.boxes += furniture.table(Place(x=x, y=y, yaw=yaw), rng, room.texture(textures.board), size)
    others = tuple(room.occupied)
    room.occupied.append((x, y, size[0] / 2))
    c, s = np.cos(yaw), np.sin(yaw)
    for side in (1.0, -1.0):
        along, off = rng.uniform(-0.2, 0.2), side * (size[1] / 2 + rng.uniform(0.1, 0.3))
        px, py = x + c * along - s * off, y + s * along + c * off
        inside = 0.4 < px < room.width - 0.4 and 0.4 < py < room.depth - 0.4
        if inside and all(np.hypot(px - a, py - b) > 0.4 + r for a, b, r in others):
            turn = yaw + (0.0 if side > 0 else np.pi) + rng.uniform(-0.3, 0.3)
            room.boxes += furniture.chair(Place(x=px, y=py, yaw=turn), rng, cloth)
            room.occupied.append((px, py, 0.35))
    for _ in range(20):
        px, py = rng.uniform(0.4, room.width - 0.4), rng.uniform(0.4, room.depth - 0.4)
        if room.free(px, py, 0.38):
            room.boxes += furniture.chair(Place(x=px, y=py, yaw=rng.uniform(0, 2 * np.pi)), rng, cloth)
            break


def _rugs(room: _Builder) -> None:
    """Mats and inlays on the floor, apart from each other; furniture may stand on them."""
    rng, deck = room.rng, _deck(room.rng, tuple(RUGS))
    lying: list[tuple[float, float, float, float]] = []
    for _ in range(60):
        size = (float(rng.uniform(0.65, 1.25)), float(rng.uniform(0.85, 1.6)))
        x, y = rng.uniform(size[0] / 2, room.width - size[0] / 2), rng.uniform(size[1] / 2, room.depth - size[1] / 2)
        if all(abs(x - a) > (size[0] + w) / 2 + 0.05 or abs(y - b) > (size[1] + h) / 2 + 0.05 for a, b, w, h in lying):
            lying.append((x, y, *size))
            thick, label = float(rng.uniform(0.006, 0.02)), next(deck)
            room.flat(RUGS[label], label, (float(x), float(y), thick / 2), (*size, thick))
        if len(lying) == 6:
            break


def _deck(rng: np.random.Generator, labels: tuple[int, ...]) -> Iterator[int]:
    """Endless labels, every one once per round, the rounds shuffled."""
    while True:
        yield from (labels[i] for i in rng.permutation(len(labels)))
