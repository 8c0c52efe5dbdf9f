"""COLMAP models: cameras and posed images, as text or binary, read image by image.

Format: https://colmap.github.io/format.html. A model is a folder with `cameras.txt` and `images.txt`, or `cameras.bin`
and `images.bin`. Poses are world to camera in OpenCV's axes and the first pixel's centre is at 0.5, as in `sample`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError, MissingDataError, errors_at
from ditr_cache.sample import Camera


@dataclass(frozen=True)
class _Model:
    """One of COLMAP's camera models.

    Args:
        id: in binary files.
        parameters: how many.
        focals: 1 (fx = fy) or 2; the principal point and the distortion follow. 0: there is nothing but the image size.
        model: of `Camera`; empty where `Camera` has no such lens.
        distortion: the coefficients of `Camera` of COLMAP's.
    """

    id: int
    parameters: int
    focals: int
    model: str
    distortion: Callable[[tuple[float, ...]], tuple[float, ...]] = lambda k: k


def _padded(k: tuple[float, ...]) -> tuple[float, ...]:
    return (*k, *(0.0,) * (4 - len(k)))


_MODELS = {
    "SIMPLE_PINHOLE": _Model(0, 3, 1, "pinhole"),
    "PINHOLE": _Model(1, 4, 2, "pinhole"),
    "SIMPLE_RADIAL": _Model(2, 4, 1, "radial_tangential", _padded),
    "RADIAL": _Model(3, 5, 1, "radial_tangential", _padded),
    "OPENCV": _Model(4, 8, 2, "radial_tangential"),
    "OPENCV_FISHEYE": _Model(5, 8, 2, "fisheye"),
    "FULL_OPENCV": _Model(6, 12, 2, "radial_tangential"),
    "FOV": _Model(7, 5, 2, ""),
    "SIMPLE_RADIAL_FISHEYE": _Model(8, 4, 1, "fisheye", _padded),
    "RADIAL_FISHEYE": _Model(9, 5, 1, "fisheye", _padded),
    "THIN_PRISM_FISHEYE": _Model(10, 12, 2, ""),
    "RAD_TAN_THIN_PRISM_FISHEYE": _Model(11, 16, 2, ""),
    "SIMPLE_DIVISION": _Model(12, 4, 1, ""),
    "DIVISION": _Model(13, 5, 2, ""),
    "SIMPLE_FISHEYE": _Model(14, 3, 1, "fisheye", _padded),
    "FISHEYE": _Model(15, 4, 2, "fisheye", _padded),
    "EUCM": _Model(16, 6, 2, ""),
    "EQUIRECTANGULAR": _Model(17, 2, 0, "equirectangular"),
}
_NAME_OF_ID = {model.id: name for name, model in _MODELS.items()}

CAMERA_MODELS = tuple(name for name, model in _MODELS.items() if model.model)
"""COLMAP's camera models that can be read."""

_MAX_LINE = 2**16  # of a camera or an image; lines of 2D points are skipped whatever their length
_MAX_NAME = 4096


@dataclass(frozen=True, eq=False)
class ColmapImage:
    """One registered image.

    Args:
        id: of the image, not always from 1.
        name: as in the model: a path relative to COLMAP's image folder, not checked in any way.
        camera_id: key of `read_cameras`.
        camera_from_world: [4, 4] float64.
    """

    id: int
    name: str
    camera_id: int
    camera_from_world: NDArray[np.float64]


def has_model(folder: Path) -> bool:
    """Whether `folder` holds a COLMAP model, text or binary."""
    return any(all((folder / f"{kind}.{suffix}").is_file() for kind in ("cameras", "images")) for suffix in _SUFFIXES)


def read_cameras(folder: Path) -> dict[int, Camera]:
    """Camera id -> camera of the model in `folder`; `cameras.bin` wins over `cameras.txt`, as in COLMAP.

    Raises:
        MissingDataError: neither file is there.
        DataError: truncated, not understood, or a camera model that is not one of `CAMERA_MODELS`.
    """
    path = _file(folder, "cameras")
    cameras: dict[int, Camera] = {}
    for camera_id, camera in _text_cameras(path) if path.suffix == ".txt" else _binary_cameras(path):
        if camera_id in cameras:
            raise DataError(f"{path}: camera {camera_id} stands there twice")
        cameras[camera_id] = camera
    if not cameras:
        raise DataError(f"{path}: no camera in it; the file is incomplete, export the model again")
    return cameras


def read_images(folder: Path) -> Iterator[ColmapImage]:
    """Images of the model in `folder` in the file's order, one at a time; `images.bin` wins over `images.txt`.

    2D points are skipped, so files of hundreds of megabytes are no burden.

    Raises:
        MissingDataError: neither file is there.
        DataError: truncated or not understood; names the line or the image.
    """
    path = _file(folder, "images")
    return _text_images(path) if path.suffix == ".txt" else _binary_images(path)


def camera_of(model: str, parameters: Sequence[float], *, width: int, height: int, where: str) -> Camera:
    """Camera of COLMAP's `model` with COLMAP's parameters.

    Args:
        model: COLMAP's name, say `OPENCV_FISHEYE`.
        parameters: focal length(s), principal point, distortion, in COLMAP's order.
        width, height: image size in pixels.
        where: names the camera in errors.

    Raises:
        DataError: another model than `CAMERA_MODELS`, another number of parameters, or values that no camera has.
    """
    known = _MODELS.get(model)
    if known is None or not known.model:
        raise DataError(
            f"{where}: camera model {model} cannot be read, expected one of {', '.join(CAMERA_MODELS)}; undistort the "
            "images (colmap image_undistorter) and use the model that it writes"
        )
    if len(parameters) != known.parameters:
        raise DataError(f"{where}: camera model {model} has {known.parameters} parameters, got {len(parameters)}")
    focals, (cx, cy, *k) = parameters[: known.focals], parameters[known.focals :]
    with errors_at(where):
        if not focals:
            return Camera.panorama(width=width, height=height)
        return Camera(
            width=width,
            height=height,
            fx=float(focals[0]),
            fy=float(focals[-1]),
            cx=float(cx),
            cy=float(cy),
            model=known.model,
            distortion=known.distortion(tuple(float(x) for x in k)),
        )


_SUFFIXES = ("bin", "txt")


def _file(folder: Path, kind: str) -> Path:
    path = next((p for suffix in _SUFFIXES if (p := folder / f"{kind}.{suffix}").is_file()), None)
    if path is None:
        raise MissingDataError(f"{folder / kind}.txt: no such file, nor {kind}.bin; expected a COLMAP model there")
    return path


def _pose(quaternion: Sequence[float], translation: Sequence[float], where: str) -> NDArray[np.float64]:
    """`camera_from_world` of COLMAP's quaternion (w, x, y, z), which need not be of unit length, and translation."""
    q, t = np.array(quaternion, dtype=np.float64), np.array(translation, dtype=np.float64)
    length = float(np.abs(q).max()) if np.isfinite(q).all() else 0.0
    if not length > 1e-6 or length > 1e6 or not np.isfinite(t).all():
        raise DataError(f"{where}: expected a rotation as a quaternion and a translation, got {(*q, *t)}")
    w, x, y, z = q / np.linalg.norm(q)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = t
    return matrix


# --- text -----------------------------------------------------------------------------------------------------------


def _text_cameras(path: Path) -> Iterator[tuple[int, Camera]]:
    with _opened(path) as file:
        for number, line in _records(file, path):
            where = f"{path} line {number}"
            try:
                camera_id, model, width, height, *parameters = line.split()
                values = [float(x) for x in parameters]
                size = int(width), int(height)
                key = int(camera_id)
            except ValueError as error:
                raise DataError(
                    f"{where}: expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS..., got {line[:100]!r} ({error})"
                ) from error
            yield key, camera_of(model, values, width=size[0], height=size[1], where=where)


def _text_images(path: Path) -> Iterator[ColmapImage]:
    with _opened(path) as file:
        number_of = _Counter()
        while (line := _next_record(file, path, number_of)) is not None:
            where = f"{path} line {number_of.lines}"
            words = line.split(maxsplit=9)
            try:
                values = [float(x) for x in words[1:8]]
                image_id, camera_id, name = int(words[0]), int(words[8]), words[9]
            except (ValueError, IndexError) as error:
                raise DataError(
                    f"{where}: expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, got {line[:100]!r}; each image "
                    "takes two lines, the second (of 2D points) may be empty but not left out"
                ) from error
            yield ColmapImage(image_id, name, camera_id, _pose(values[:4], values[4:], where))
            _skip_points(file, path, number_of)


@dataclass
class _Counter:
    lines: int = 0


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    counter = _Counter()
    while (line := _next_record(file, path, counter)) is not None:
        yield counter.lines, line


def _next_record(file: BinaryIO, path: Path, counter: _Counter) -> str | None:
    """Next line that is neither empty nor a comment; None at the end."""
    while raw := file.readline(_MAX_LINE):
        counter.lines += 1
        text = raw.decode("utf-8", errors="replace").strip()
        if len(raw) == _MAX_LINE and not raw.endswith(b"\n"):
            raise DataError(f"{path} line {counter.lines}: longer than {_MAX_LINE} bytes; not a COLMAP text model")
        if text and not text.startswith("#"):
            return text
    return None


def _skip_points(file: BinaryIO, path: Path, counter: _Counter) -> None:
    """Skip the line of 2D points, which may be empty or many megabytes long, but must not be an image's."""
    raw = file.readline(_MAX_LINE)
    counter.lines += 1
    if len(raw) < 1000 and len(words := raw.split(maxsplit=9)) == 10 and not _is_number(words[9].split()[-1]):
        raise DataError(
            f"{path} line {counter.lines}: expected the 2D points of the image before it, got another image; each "
            "image takes two lines, the second (of 2D points) may be empty but not left out"
        )
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(2**20)


def _is_number(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


# --- binary ---------------------------------------------------------------------------------------------------------


def _binary_cameras(path: Path) -> Iterator[tuple[int, Camera]]:
    with _opened(path) as file:
        for _ in range(_unpack(file, "<Q", path)[0]):
            camera_id, model_id, width, height = _unpack(file, "<iiQQ", path)
            name = _NAME_OF_ID.get(model_id)
            if name is None:
                raise DataError(f"{path}: camera {camera_id} has the unknown model {model_id}; is it a COLMAP model?")
            parameters = _unpack(file, f"<{_MODELS[name].parameters}d", path)
            yield camera_id, camera_of(name, parameters, width=width, height=height, where=f"{path} camera {camera_id}")


def _binary_images(path: Path) -> Iterator[ColmapImage]:
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        for _ in range(_unpack(file, "<Q", path)[0]):
            image_id, *values, camera_id = _unpack(file, "<I7dI", path)
            name = bytearray()
            while (byte := file.read(1)) != b"\0":
                if not byte or len(name) == _MAX_NAME:
                    raise DataError(f"{path}: the name of image {image_id} does not end; the file is damaged")
                name += byte
            (points,) = _unpack(file, "<Q", path)
            if points * 24 > size - file.tell():
                raise DataError(
                    f"{path}: image {image_id} announces {points} 2D points, more than the file holds; it is truncated"
                )
            file.seek(points * 24, os.SEEK_CUR)
            pose = _pose(values[:4], values[4:], f"{path} image {image_id}")
            yield ColmapImage(image_id, name.decode("utf-8", errors="replace"), camera_id, pose)


def _unpack(file: BinaryIO, form: str, path: Path) -> tuple[int, ...]:
    data = file.read(struct.calcsize(form))
    if len(data) < struct.calcsize(form):
        raise DataError(f"{path}: ends within a record; the file is truncated, export or download it again")
    return struct.unpack(form, data)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
