"""Boxes, the only shape of the generated rooms, and their faces as arrays.

World axes: z up, the floor at z = 0. A box may be turned about z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ALL_FACES = ("+x", "-x", "+y", "-y", "+z", "-z")
"""Names of a box's faces: the box's own axis that is the outward normal."""

_NORMALS = {"+x": (1, 0, 0), "-x": (-1, 0, 0), "+y": (0, 1, 0), "-y": (0, -1, 0), "+z": (0, 0, 1), "-z": (0, 0, -1)}


@dataclass(frozen=True, kw_only=True)
class Box:
    """A textured box of one class.

    Args:
        centre: (x, y, z) in metres.
        size: edge lengths along the box's own axes, metres.
        yaw: rotation about z in radians.
        label: nyu40 id of the class.
        texture: index into the room's textures.
        faces: the faces that can be seen; others are neither rendered nor sampled.
        shift: where the texture starts, in metres; sets apart the parts of one object.
    """

    centre: tuple[float, float, float]
    size: tuple[float, float, float]
    label: int
    texture: int
    yaw: float = 0.0
    faces: tuple[str, ...] = ALL_FACES
    shift: float = 0.0

    @property
    def rotation(self) -> NDArray[np.float64]:
        """[3, 3] world_from_box."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])

    def distance(self, points: ArrayLike) -> NDArray[np.float64]:
        """[N] distance in metres from [N, 3] points to the box's surface, negative inside."""
        local = (np.asarray(points, dtype=np.float64) - self.centre) @ self.rotation
        beyond = np.abs(local) - np.asarray(self.size) / 2
        return np.linalg.norm(np.maximum(beyond, 0), axis=1) + np.minimum(beyond.max(axis=1), 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Faces:
    """K rectangles `origin + s * s_axis + t * t_axis`, 0 <= s, t <= extent. All float64 and metres.

    Args:
        origin: [K, 3] the corner s = t = 0, the upper left one of an upright face seen from outside.
        s_axis, t_axis: [K, 3] unit vectors; t points down on upright faces.
        normal: [K, 3] outward unit normals.
        extent: [K, 2] lengths along s and t.
        texture, label, box: [K] int64, of the box that the face belongs to.
        shift: [K] start of the texture.
    """

    origin: NDArray[np.float64]
    s_axis: NDArray[np.float64]
    t_axis: NDArray[np.float64]
    normal: NDArray[np.float64]
    extent: NDArray[np.float64]
    texture: NDArray[np.int64]
    label: NDArray[np.int64]
    box: NDArray[np.int64]
    shift: NDArray[np.float64]

    @classmethod
    def of(cls, boxes: Sequence[Box]) -> Faces:
        """The visible faces of `boxes`, in their order."""
        rows = [(i, b, np.array(_NORMALS[name], dtype=np.float64)) for i, b in enumerate(boxes) for name in b.faces]
        columns: dict[str, list[object]] = {"origin": [], "s_axis": [], "t_axis": [], "normal": [], "extent": []}
        for _, box, normal in rows:
            t_axis = np.array([0.0, -1.0, 0.0]) if normal[2] else np.array([0.0, 0.0, -1.0])
            s_axis = np.cross(normal, t_axis)  # to the right for an observer outside who sees t go down
            size = np.asarray(box.size)
            extent = np.array([np.abs(s_axis) @ size, np.abs(t_axis) @ size])
            corner = (normal * size - s_axis * extent[0] - t_axis * extent[1]) / 2
            columns["origin"].append(box.rotation @ corner + box.centre)
            for name, axis in (("s_axis", s_axis), ("t_axis", t_axis), ("normal", normal)):
                columns[name].append(box.rotation @ axis)
            columns["extent"].append(extent)
        return cls(
            **{name: np.array(values, dtype=np.float64) for name, values in columns.items()},
            texture=np.array([b.texture for _, b, _ in rows]),
            label=np.array([b.label for _, b, _ in rows]),
            box=np.array([i for i, _, _ in rows]),
            shift=np.array([b.shift for _, b, _ in rows]),
        )

    def __len__(self) -> int:
        return len(self.origin)
