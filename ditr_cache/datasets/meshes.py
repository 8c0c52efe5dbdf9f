"""Points of a mesh: its vertices, with the normals of its faces and whatever labels it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.ply import read_ply
from ditr_cache.errors import DataError, errors_at
from ditr_cache.sample import Points

Labels = tuple[NDArray[np.int16], NDArray[np.int32] | None]
"""Class indices and, where they are annotated, instances of the N vertices of a mesh."""

ReadLabels = Callable[[int], Labels]
"""Reads the labels of a mesh of so many vertices."""


def read_mesh_points(path: Path, labels: ReadLabels | None) -> Points:
    """Vertices of a mesh, with colour, normals of its faces, and labels.

    Args:
        path: of a PLY file.
        labels: called with the number of vertices; None: the mesh has no labels.

    Raises:
        MissingDataError: the mesh or a file of its labels is missing.
        DataError: they cannot be used, or do not belong together.
    """
    mesh = read_ply(path)
    columns = mesh.vertices
    if not {"x", "y", "z"} <= columns.keys():
        raise DataError(f"{path}: expected vertex properties x, y, z, got {sorted(columns)}")
    with np.errstate(over="ignore"):  # becomes infinite, which `Points` reports
        coord = np.stack([columns[axis] for axis in "xyz"], axis=1).astype(np.float32)
    color = None
    if {"red", "green", "blue"} <= columns.keys():
        color = np.stack([columns[channel] for channel in ("red", "green", "blue")], axis=1)
        if color.dtype != np.uint8:
            raise DataError(f"{path}: expected colours of type uchar, got {color.dtype}")
    normal = None if mesh.faces is None or not len(mesh.faces) else vertex_normals(coord, mesh.faces)
    segment, instance = (None, None) if labels is None else labels(len(coord))
    with errors_at(path):
        return Points(coord=coord, color=color, normal=normal, segment=segment, instance=instance)


def vertex_normals(coord: NDArray[np.floating], faces: NDArray[np.integer]) -> NDArray[np.float32]:
    """Normals [N, 3] float32 of mesh vertices: mean of the adjacent faces' normals, weighted by their area.

    Args:
        coord: [N, 3] vertices.
        faces: [F, 3] vertex indices, counter-clockwise seen from outside.

    Returns:
        Unit vectors; zero for a vertex without a face of positive area.
    """
    corners = coord.astype(np.float64)[faces]
    with np.errstate(invalid="ignore", over="ignore"):  # not finite coordinates are reported by `Points`
        # The cross product is twice the area long: summing it weights by area.
        face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        total = np.zeros((len(coord), 3))
        for corner in range(3):
            for axis in range(3):
                total[:, axis] += np.bincount(faces[:, corner], face_normals[:, axis], minlength=len(coord))
        length = np.linalg.norm(total, axis=1, keepdims=True)
        return np.divide(total, length, out=np.zeros_like(total), where=length > 1e-20).astype(np.float32)
