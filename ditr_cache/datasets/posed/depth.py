"""Depth maps of posed captures: 16-bit images, NumPy arrays, and those of COLMAP's dense reconstruction."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.images import MAX_PIXELS, depth_in_metres, image_size, read_depth
from ditr_cache.datasets.numpy_files import map_array
from ditr_cache.errors import DataError

_COLMAP_HEADER = re.compile(rb"(\d{1,9})&(\d{1,9})&(\d{1,9})&")


def depth_map_size(path: Path) -> tuple[int, int]:
    """(width, height) of a depth map, from its header alone.

    Raises:
        MissingDataError: no such file.
        DataError: not a depth map.
    """
    match path.suffix.lower():
        case ".npy":
            height, width = _numpy_map(path).shape
            return width, height
        case ".bin":
            return _colmap_header(path)[:2]
        case _:
            return image_size(path)


def read_depth_map(path: Path, *, size: tuple[int, int], unit: float) -> NDArray[np.float32]:
    """[height, width] float32 metres, 0 where unknown.

    Args:
        path: `.npy` (of any numbers), COLMAP's `.bin`, or an image of 16 bits.
        size: (width, height) of the depth map.
        unit: metres per unit of the file.

    Raises:
        MissingDataError: no such file.
        DataError: truncated, damaged, or of another size.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".bin"):
        return read_depth(path, size=size, where=str(path), scale=1 / unit)
    values = _numpy_map(path) if suffix == ".npy" else _colmap_map(path)
    if values.shape[::-1] != size:
        raise DataError(f"{path}: expected {size[0]}x{size[1]} values, got {values.shape[1]}x{values.shape[0]}")
    if values.dtype.kind != "f":
        return depth_in_metres(np.asarray(values), 1 / unit)
    with np.errstate(over="ignore", invalid="ignore"):
        metres = np.asarray(values, dtype=np.float32) * np.float32(unit)
        metres[~(np.isfinite(metres) & (metres > 0))] = 0
    return metres


def _numpy_map(path: Path) -> NDArray[Any]:
    """[height, width] numbers of a `.npy` file, mapped into memory: its header is checked against its size."""
    values = map_array(path, "it is truncated or damaged")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not 0 < values.size <= MAX_PIXELS:
        raise DataError(
            f"{path}: expected the numbers of a depth map [height, width] of at most {MAX_PIXELS} pixels, got "
            f"{values.dtype} {list(values.shape)}"
        )
    return values


def _colmap_header(path: Path) -> tuple[int, int, int]:
    """Width, height and length of the header of COLMAP's depth map, "width&height&1&"."""
    try:
        with path.open("rb") as file:
            start = file.read(40)
        bytes_there = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    match = _COLMAP_HEADER.match(start)
    if match is None:
        raise DataError(f"{path}: expected a depth map of COLMAP, which starts with 'width&height&1&'")
    width, height, channels = (int(n) for n in match.groups())
    if channels != 1 or not 0 < width * height <= MAX_PIXELS or bytes_there != match.end() + 4 * width * height:
        raise DataError(
            f"{path}: announces {width}x{height}x{channels} values, expected one per pixel, at most {MAX_PIXELS}, and "
            f"a file of {match.end() + 4 * width * height} bytes, got {bytes_there}; it is truncated, or of normals"
        )
    return width, height, match.end()


def _colmap_map(path: Path) -> NDArray[np.float32]:
    width, height, start = _colmap_header(path)
    return np.fromfile(path, "<f4", width * height, offset=start).reshape(height, width)
