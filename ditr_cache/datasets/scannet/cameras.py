"""Intrinsics of ScanNet's frames, whatever size they were exported in, and their poses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.frames import check_principal_point, invert_pose, read_matrix
from ditr_cache.errors import MissingDataError, errors_at
from ditr_cache.sample import Camera


def tracked_pose(world_from_camera: NDArray[Any]) -> NDArray[np.float64]:
    """`camera_from_world` [4, 4] of a camera-to-world pose; all NaN where tracking was lost.

    ScanNet says so by a pose that is all -inf, or all zero (`saveToPointCloud` in its `sensorData.h`).

    Raises:
        DataError: the matrix is not a rigid motion.
    """
    return invert_pose(world_from_camera if np.any(world_from_camera) else np.full_like(world_from_camera, np.nan))


def read_tracked_pose(path: Path) -> NDArray[np.float64]:
    """The same of a text file with the matrix.

    Raises:
        MissingDataError: no such file.
        DataError: not a matrix, or not a rigid motion.
    """
    matrix = read_matrix(path)
    with errors_at(path):
        return tracked_pose(matrix)


def exported_camera(scan: Path, info: Mapping[str, float], kind: str, size: tuple[int, int]) -> Camera:
    """Camera of exported images.

    Args:
        scan: folder of the scan.
        info: of its `<id>.txt`, see `read_info`.
        kind: color or depth.
        size: (width, height) of the images.

    Raises:
        MissingDataError: no intrinsics.
        DataError: intrinsics that cannot be those of the images.
    """
    calibrated = None
    if f"{kind}Width" in info and f"{kind}Height" in info:
        calibrated = (int(info[f"{kind}Width"]), int(info[f"{kind}Height"]))
    path = scan / "intrinsic" / f"intrinsic_{kind}.txt"
    if path.is_file():
        return released_camera(read_matrix(path), size, calibrated, str(path))
    names = [f"{letter}_{kind}" for letter in ("fx", "fy", "mx", "my")]
    if not all(name in info for name in names):
        raise MissingDataError(
            f"{path}: no such file, and {scan.name}.txt has no {', '.join(names)}; export it from the .sens file with "
            "ScanNet's SensReader (--export_intrinsics)"
        )
    fx, fy, mx, my = (info[name] for name in names)
    return released_camera(np.array([[fx, 0, mx], [0, fy, my], [0, 0, 1]]), size, calibrated, f"{scan / scan.name}.txt")


def released_camera(
    matrix: NDArray[Any], size: tuple[int, int], calibrated: tuple[int, int] | None, where: str
) -> Camera:
    """Camera of images of (width, height) `size` whose intrinsics were calibrated for images of `calibrated`.

    Exporters resize images and leave `intrinsic_*.txt` as calibrated; some scale it too. The principal point tells
    which: it lies near the middle of the image that the matrix belongs to.

    Raises:
        DataError: intrinsics that cannot be those of the images.
    """
    with errors_at(where):
        camera = Camera.from_matrix(matrix, width=size[0], height=size[1])
        if calibrated is not None and min(calibrated) > 0 and calibrated != size:
            full = Camera.from_matrix(matrix, width=calibrated[0], height=calibrated[1])
            if abs(full.cx / full.width - 0.5) < abs(camera.cx / camera.width - 0.5):
                camera = full.resized(width=size[0], height=size[1])
    return check_principal_point(camera, where)


def read_info(path: Path) -> dict[str, float]:
    """Numbers of `<id>.txt` by name ("fx_color = 1170.19"); empty where there is no such file."""
    if not path.is_file():
        return {}
    info = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition("=")
        try:
            number = float(value)
        except ValueError:  # sceneType, axisAlignment and other entries that are not one number
            continue
        if math.isfinite(number):
            info[name.strip()] = number
    return info
