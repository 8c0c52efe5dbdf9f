"""Posed frames as files describe them: matrices in text files, poses, cameras, frame numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditr_cache.datasets.images import image_size
from ditr_cache.errors import DataError, MissingDataError, errors_at
from ditr_cache.sample import Camera

_RIGID_TOLERANCE = 0.02  # rotations written with three digits still pass, a scaled or zero matrix does not
_OFF_CENTRE = 0.25  # of the image: how far from its middle a principal point may lie


def read_matrix(path: Path) -> NDArray[np.float64]:
    """A 3x3 or 4x4 matrix in a text file, separated by blanks or commas; `inf` and `nan` are allowed.

    Raises:
        MissingDataError: no such file.
        DataError: not 9 or 16 numbers.
    """
    try:
        return parse_matrix(path.read_text(encoding="ascii", errors="replace"), str(path))
    except FileNotFoundError as error:
        raise MissingDataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def parse_matrix(text: str, where: str) -> NDArray[np.float64]:
    """The 3x3 or 4x4 matrix in `text`; `where` names it in errors.

    Raises:
        DataError: not 9 or 16 numbers.
    """
    words = text.replace(",", " ").split()
    try:
        values = np.array([float(word) for word in words])
    except ValueError as error:
        raise DataError(f"{where}: expected the numbers of a matrix ({error})") from error
    if len(values) not in (9, 16):
        raise DataError(f"{where}: expected 9 or 16 numbers of a matrix, got {len(values)}")
    side = 3 if len(values) == 9 else 4
    return values.reshape(side, side)


def invert_pose(world_from_camera: ArrayLike) -> NDArray[np.float64]:
    """`camera_from_world` [4, 4] of a camera-to-world pose, or the other way round, as `rigid_pose` gives it.

    Raises:
        DataError: the matrix is not a rigid motion: wrong shape, scaled, mirrored, sheared or zero.
    """
    pose = rigid_pose(world_from_camera)
    return np.asarray(np.linalg.inv(pose), dtype=np.float64) if np.isfinite(pose).all() else pose


def rigid_pose(matrix: ArrayLike) -> NDArray[np.float64]:
    """A pose [4, 4] as it is, in float64; all NaN where it is not finite (tracking lost).

    Raises:
        DataError: the matrix is not a rigid motion: wrong shape, scaled, mirrored, sheared or zero.
    """
    pose = np.asarray(matrix, dtype=np.float64)
    if pose.shape != (4, 4):
        raise DataError(f"pose: expected a 4x4 matrix, got shape {list(pose.shape)}")
    if not np.isfinite(pose).all():
        return np.full((4, 4), np.nan)
    rotation = pose[:3, :3]
    # Bounded first, so that squaring cannot overflow.
    rigid = (
        np.abs(rotation).max() < 2
        and np.abs(rotation @ rotation.T - np.eye(3)).max() < _RIGID_TOLERANCE
        and np.linalg.det(rotation) > 0
        and np.allclose(pose[3], (0, 0, 0, 1), atol=1e-4)
    )
    if not rigid:
        raise DataError(f"pose: expected a rotation and a translation, got {np.round(pose, 4).tolist()}")
    return pose


def read_pose(path: Path) -> NDArray[np.float64]:
    """`camera_from_world` [4, 4] of a text file with a 4x4 camera-to-world matrix, as `invert_pose` gives it.

    Raises:
        MissingDataError: no such file.
        DataError: not a matrix, or not a rigid motion.
    """
    matrix = read_matrix(path)
    with errors_at(path):
        return invert_pose(matrix)


def check_principal_point(camera: Camera, where: str) -> Camera:
    """`camera`, where its principal point lies near the middle of the image.

    Raises:
        DataError: it does not: the intrinsics are of another image size, as after a resize that forgot them.
    """
    off = max(abs(camera.cx / camera.width - 0.5), abs(camera.cy / camera.height - 0.5))
    if off > _OFF_CENTRE:
        raise DataError(
            f"{where}: principal point ({camera.cx:g}, {camera.cy:g}) is far from the middle of the "
            f"{camera.width}x{camera.height} image; the intrinsics are of another image size, scale them with the image"
        )
    return camera


def same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two (width, height) differ by one scale, up to the rounding of a resize (one pixel)."""
    scale = a[0] / b[0]
    return abs(a[1] - b[1] * scale) <= max(1.0, scale)


def frame_number(name: str) -> int | None:
    """First number in a file's name, by which frames are paired and put in time order; None where there is none."""
    match = re.search(r"\d+", name)
    return int(match.group()) if match else None


def numbered_files(folder: Path, suffixes: tuple[str, ...]) -> dict[int, Path]:
    """Frame number -> file, in the order of the numbers, of the files of `folder` that end in one of `suffixes`.

    Raises:
        DataError: two files have the same number.
    """
    files: dict[int, Path] = {}
    for path in folder.iterdir():
        if not path.name.lower().endswith(suffixes) or path.name.startswith("."):
            continue
        number = frame_number(path.name)
        if number is None:
            continue
        if number in files:
            raise DataError(f"{folder}: two files have frame number {number}: {files[number].name} and {path.name}")
        files[number] = path
    return dict(sorted(files.items()))


def first_image_size(paths: Iterable[Path]) -> tuple[int, int]:
    """(width, height) of the first image whose header can be read; the others are checked when they are loaded.

    Raises:
        DataError: none can be read; the error of the first.
    """
    first_error: DataError | None = None
    for path in paths:
        try:
            return image_size(path)
        except DataError as error:
            first_error = first_error or error
    raise first_error or MissingDataError("no images")
