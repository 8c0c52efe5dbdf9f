"""The scanned mesh of a room: jittered grids of vertices on every visible face, with triangles between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditr_cache.synthesize.boxes import Faces
from ditr_cache.synthesize.layout import Room
from ditr_cache.synthesize.raycast import TextureAtlas

_JITTER = 0.45  # of a cell; below one half, so that every vertex stays in its own


@dataclass(frozen=True, eq=False)
class Mesh:
    """N vertices and F triangles.

    Args:
        coord: [N, 3] float32 metres.
        color: [N, 3] uint8.
        label: [N] uint16 nyu40 ids.
        faces: [F, 3] int32, anticlockwise seen from outside.
        surface: [N] int64 face of the room that each vertex lies on.
    """

    coord: NDArray[np.float32]
    color: NDArray[np.uint8]
    label: NDArray[np.uint16]
    faces: NDArray[np.int32]
    surface: NDArray[np.int64]


def sample_mesh(
    rng: np.random.Generator,
    room: Room,
    faces: Faces,
    atlas: TextureAtlas,
    *,
    spacing: float,
    noise: float,
) -> Mesh:
    """Mesh of a room.

    Args:
        rng: random stream.
        room: the room.
        faces: its faces.
        atlas: its textures.
        spacing: mean distance of vertices in metres. Edges narrower than half of it are left out.
        noise: standard deviation of the vertices along the normal, metres.
    """
    places, owners, triangles = [], [], []
    count = 0
    for k in range(len(faces)):
        if faces.extent[k].min() < spacing / 2:
            continue
        grid, cells = _grid(rng, faces.extent[k], spacing)
        places.append(grid)
        owners.append(np.full(len(grid), k))
        triangles.append(cells + count)
        count += len(grid)
    st, surface, mesh_faces = np.concatenate(places), np.concatenate(owners), np.concatenate(triangles)
    on_surface = faces.origin[surface] + st[:, :1] * faces.s_axis[surface] + st[:, 1:] * faces.t_axis[surface]
    shown = ~_buried(room, on_surface, faces.box[surface])
    # A vertex without a triangle has no normal: a mesh has none such.
    mesh_faces = mesh_faces[shown[mesh_faces].all(axis=1)]
    used, renumbered = np.unique(mesh_faces, return_inverse=True)
    st, surface, on_surface = st[used], surface[used], on_surface[used]

    normal = faces.normal[surface]
    coord = (on_surface + rng.normal(0, noise, (len(used), 1)) * normal).astype(np.float32)
    s, t = (st[:, i].astype(np.float32) for i in (0, 1))
    albedo = atlas.sample(
        faces.texture[surface], s + faces.shift[surface].astype(np.float32), t, np.zeros(len(used), np.float32)
    )
    lit = albedo * room.shade(faces, surface, s, t)[:, None]
    return Mesh(
        coord=coord,
        color=np.clip(np.rint(lit), 0, 255).astype(np.uint8),
        label=faces.label[surface].astype(np.uint16),
        faces=renumbered.reshape(-1, 3).astype(np.int32),
        surface=surface,
    )


def _grid(
    rng: np.random.Generator, extent: NDArray[np.float64], spacing: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[n, 2] jittered cell centres of a rectangle and [m, 3] triangles between them."""
    cols, rows = (max(2, round(float(length) / spacing)) for length in extent)
    index = np.arange(rows * cols).reshape(rows, cols)
    centre = np.stack(np.meshgrid(np.arange(cols) + 0.5, np.arange(rows) + 0.5), axis=-1).reshape(-1, 2)
    place = (centre + rng.uniform(-_JITTER, _JITTER, centre.shape)) * extent / (cols, rows)
    a, b, c, d = (v.ravel() for v in (index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]))
    # Of the two ways to cut a quadrilateral, one never turns a triangle over: each corner stays in its own cell.
    one, other = (((a, c, b), (b, c, d)), ((a, c, d), (a, d, b)))
    worst = [np.minimum(*(_area(*(place[v] for v in corners)) for corners in cut)) for cut in (one, other)]
    better = (worst[0] >= worst[1])[:, None]
    cells = [
        np.where(better, np.stack(first, axis=1), np.stack(second, axis=1))
        for first, second in zip(one, other, strict=True)
    ]
    return place, np.concatenate(cells)


def _area(p: NDArray[np.float64], q: NDArray[np.float64], r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Twice the area of triangles, positive where anticlockwise for someone who sees s run right and t down."""
    return (q[:, 1] - p[:, 1]) * (r[:, 0] - p[:, 0]) - (q[:, 0] - p[:, 0]) * (r[:, 1] - p[:, 1])


def _buried(room: Room, points: NDArray[np.float64], owner: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[N] whether a point of box `owner` lies in or on another box."""
    buried = np.zeros(len(points), dtype=bool)
    for i, box in enumerate(room.boxes):
        reach = np.linalg.norm(box.size) / 2 + 1e-3
        near = owner != i
        for axis in range(3):
            near &= np.abs(points[:, axis] - box.centre[axis]) < reach
        buried[near] |= box.distance(points[near]) < 1e-4
    return buried
