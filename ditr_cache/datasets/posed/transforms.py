"""`transforms.json` of nerfstudio and of Instant-NGP.

Facts, read in the sources of nerfstudio (50e0e3c) and Instant-NGP (abe236e):

- `transform_matrix` is camera to world, its camera in OpenGL's axes: x right, y up, z back. Pixel centres are at 0.5.
- nerfstudio's poses are in the *saved* world. `applied_transform` leads to it from the original one, in which all files
  are that `ns-process-data` did not write; the points of `ply_file_path` are in the saved one. Where the key lacks but
  `colmap/sparse/0` is there, an old `ns-process-data` applied `LEGACY_TRANSFORM`. `applied_scale` was applied to the
  camera's places alone, neither to points nor to depth.
- `train_filenames` and the like split images, not captures: all are used.
- Instant-NGP's `x_fov` (degrees) wins over `fl_x`, and that over `camera_angle_x` (radians); all span the whole image.
  Its `scale`, `offset` and `aabb_scale` are settings that are applied to the poses afterwards. `file_path` may lack its
  suffix.
- Lenses: k1, k2, k3 of `OPENCV` are coefficients of r^2, r^4, r^6. So is nerfstudio's k4 of r^8, which OpenCV lacks
  (its k4 stands in a denominator). A fisheye's k1 to k4 are OpenCV's. nerfstudio's `distortion_params` are k1 to k4,
  p1, p2 and win over keys of these names; twelve are those of `FISHEYE624`.
- Instant-NGP's `rolling_shutter` moves the camera while an image is exposed.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.documents import read_json
from ditr_cache.datasets.frames import invert_pose, rigid_pose
from ditr_cache.datasets.images import image_size
from ditr_cache.datasets.posed.frames import Description, PosedFrame, path_inside
from ditr_cache.errors import DataError, errors_at
from ditr_cache.sample import Camera

_LOG = logging.getLogger(__name__)

FILE = "transforms.json"

PERSPECTIVE = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")
FISHEYE = ("OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE")
PANORAMA = ("EQUIRECTANGULAR",)

LEGACY_TRANSFORM = ((0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, -1.0, 0.0))
"""What `ns-process-data` applied before it wrote `applied_transform`."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")

_EXPORT = "write it with nerfstudio's ns-process-data or Instant-NGP's scripts/colmap2nerf.py"
_OTHER_LENSES = ("ftheta_p0", "latlong", "equirectangular", "orthographic")  # Instant-NGP's, of its own conventions
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")  # in the order of distortion_params
_OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
_SCALED = 0.02  # by which a rotation's columns may be longer or shorter than 1

Keys = Mapping[str, Any]
"""What the file says of a frame: its own keys, which win, and those of the whole file."""


def read_transforms(folder: Path, root: Path, *, depth: bool, depth_unit: float) -> Description:
    """The frames of the `transforms.json` of a folder.

    Args:
        folder: of the capture.
        root: paths in the file must not lead out of it.
        depth: whether depth maps are wanted.
        depth_unit: metres per unit of depth maps where the file does not say.

    Raises:
        MissingDataError: no such file.
        DataError: no JSON, no frames, or a world that cannot be used.
    """
    path = folder / FILE
    meta = read_json(path, _EXPORT)
    entries = meta.get("frames")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected a list of 'frames', got {str(entries)[:100]}; {_EXPORT}")
    scale = meta.get("applied_scale", 1.0)
    if not isinstance(scale, int | float) or not 0 < scale < 1e12:
        raise DataError(f"{path}: expected a positive number as applied_scale, got {str(scale)[:100]}")
    if any(_rolls(keys) for keys in (meta, *entries)):
        _LOG.warning("%s: rolling_shutter is not read: features lie beside their points where the camera moved", path)
    frames: list[PosedFrame] = []
    broken: list[tuple[str, DataError]] = []
    for position, entry in enumerate(entries):
        name = f"frame {position}"
        try:
            if not isinstance(entry, dict):
                raise DataError(f"expected an object, got {str(entry)[:100]}; {_EXPORT}")
            image = _image_file(entry.get("file_path"), folder, root)
            keys = meta | {key: value for key, value in entry.items() if value is not None}
            name = Path(os.path.relpath(image, os.path.abspath(folder))).as_posix()  # noqa: PTH100
            frames.append(
                PosedFrame(
                    id=name,
                    image=image,
                    camera=_camera(keys, image),
                    camera_from_world=_camera_from_world(entry.get("transform_matrix"), scale),
                    depth=_depth_file(entry, folder, root) if depth else None,
                    depth_unit=_unit_of_depth(keys, depth_unit),
                )
            )
        except DataError as error:
            broken.append((name, type(error)(f"{path}: {name}: {error}")))
    cloud = meta.get("ply_file_path")
    return Description(
        source=path,
        frames=tuple(frames),
        broken=tuple(broken),
        cloud=None if cloud is None else path_inside(cloud, folder, root, f"{path}: ply_file_path"),
        poses_from_original=_poses_from_original(meta, folder),
    )


def _rolls(keys: Any) -> bool:
    """Whether the camera moves while its rows are exposed, by any of the three or four numbers."""
    numbers = keys.get("rolling_shutter") if isinstance(keys, dict) else None
    return any(number != 0 for number in numbers) if isinstance(numbers, list) else bool(numbers)


def _image_file(text: Any, folder: Path, root: Path) -> Path:
    """The image of a frame, with its suffix where the file leaves it out."""
    path = path_inside(text, folder, root, "file_path")
    if path.suffix in IMAGE_SUFFIXES or path.is_file():
        return path
    candidates = (path.with_name(path.name + suffix) for suffix in IMAGE_SUFFIXES)
    return next((p for p in candidates if p.is_file()), path)


def _depth_file(entry: Keys, folder: Path, root: Path) -> Path | None:
    key = next((key for key in ("depth_file_path", "depth_path") if entry.get(key) is not None), None)
    return None if key is None else path_inside(entry[key], folder, root, key)


def _unit_of_depth(keys: Keys, default: float) -> float:
    """Metres per unit: Instant-NGP says it, nerfstudio leaves it to its user."""
    key = "integer_depth_scale" if keys.get("integer_depth_scale") else "depth_unit_scale_factor"
    unit = _number(keys, key, default)
    if not unit > 0:
        raise DataError(f"{key}: expected a positive number of metres per unit of depth, got {unit}")
    return unit


def _camera_from_world(matrix: Any, scale: float) -> NDArray[np.float64]:
    """`camera_from_world` of a camera-to-world matrix with OpenGL's axes, its place divided by `scale`."""
    pose = _matrix(matrix, "transform_matrix")
    if not np.abs(pose).max() < 1e12:  # tracking was lost: a frame without a pose
        return np.full((4, 4), np.nan)
    pose[:3, 3] /= scale
    lengths = np.linalg.norm(pose[:3, :3], axis=0)
    mean = float(lengths.mean())
    if np.abs(lengths - mean).max() < _SCALED * mean and abs(mean - 1) > _SCALED:
        raise DataError(
            f"transform_matrix scales by {mean:.4g}, expected a rotation and a place in metres; the poses were scaled "
            "after they were found: divide the rotation by the scale, and the place too unless the point cloud was "
            "scaled likewise"
        )
    with errors_at("transform_matrix", _EXPORT):
        return invert_pose(pose @ _OPENCV_FROM_OPENGL)


def _poses_from_original(meta: Mapping[str, Any], folder: Path) -> NDArray[np.float64] | None:
    """The saved world from the original one; None where they are the same."""
    applied = meta.get("applied_transform")
    if applied is None and (folder / "colmap" / "sparse" / "0").is_dir():
        applied = LEGACY_TRANSFORM
    if applied is None:
        return None
    where = f"{folder / FILE}: applied_transform"
    matrix = _matrix(applied, where)
    with errors_at(where):
        matrix = rigid_pose(matrix)
    if not np.isfinite(matrix).all():
        raise DataError(f"{where}: expected finite numbers, got {applied}")
    return matrix


def _matrix(value: Any, where: str) -> NDArray[np.float64]:
    """A 4x4 matrix, whose last row may be left out."""
    try:
        matrix = np.array(value, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: expected a matrix, got {str(value)[:100]}") from error
    if matrix.shape == (3, 4):
        matrix = np.vstack([matrix, (0.0, 0.0, 0.0, 1.0)])
    if matrix.shape != (4, 4):
        raise DataError(f"{where}: expected a matrix of 3x4 or 4x4 numbers, got {str(value)[:100]}")
    return matrix


# --- intrinsics -----------------------------------------------------------------------------------------------------


def _camera(keys: Keys, image: Path) -> Camera:
    """Intrinsics of a frame. Where the file does not say how large images are, the image itself is asked."""
    other = next((key for key in _OTHER_LENSES if keys.get(key)), None)
    model = keys.get("camera_model") or "OPENCV"
    if keys.get("is_fisheye") and model in PERSPECTIVE:
        model = "OPENCV_FISHEYE"
    if other or model not in PERSPECTIVE + FISHEYE + PANORAMA:
        raise DataError(
            f"lens {other or model} cannot be read, expected one of {', '.join(PERSPECTIVE + FISHEYE + PANORAMA)}; "
            "undistort the images and use the poses of these"
        )
    width, height = _size(keys) or image_size(image)
    if model in PANORAMA:
        return Camera.panorama(width=width, height=height)
    fx, fy = _focal(keys, "x", width), _focal(keys, "y", height)
    fx, fy = fy if fx is None else fx, fx if fy is None else fy
    if fx is None or fy is None:
        raise DataError(f"no focal length, expected fl_x, camera_angle_x or x_fov; {_EXPORT}")
    lens, distortion = _distortion(keys, model)
    return Camera(
        width=width,
        height=height,
        fx=fx,
        fy=fy,
        cx=_number(keys, "cx", width / 2),
        cy=_number(keys, "cy", height / 2),
        model=lens,
        distortion=distortion,
    )


def _size(keys: Keys) -> tuple[int, int] | None:
    """(width, height), which Instant-NGP writes as floats."""
    width, height = _number(keys, "w", 0.0), _number(keys, "h", 0.0)
    if width == 0 or height == 0:
        return None
    if not (1 <= width < 2**20 and 1 <= height < 2**20):
        raise DataError(f"w, h: expected an image's size in pixels, got {width}, {height}")
    return round(width), round(height)


def _focal(keys: Keys, axis: str, pixels: int) -> float | None:
    """Focal length in pixels along an axis; None where nothing is said."""
    if keys.get(f"{axis}_fov") is not None:
        angle = math.radians(_number(keys, f"{axis}_fov"))
    elif keys.get(f"fl_{axis}") is not None:
        return _number(keys, f"fl_{axis}")
    elif keys.get(f"camera_angle_{axis}") is not None:
        angle = _number(keys, f"camera_angle_{axis}")
    else:
        return None
    if not 0 < angle < math.pi:
        raise DataError(f"expected a field of view of less than 180 degrees along {axis}, got {angle:g} radians")
    return pixels / 2 / math.tan(angle / 2)


def _distortion(keys: Keys, model: str) -> tuple[str, tuple[float, ...]]:
    """Model and coefficients of a `Camera`."""
    listed = keys.get("distortion_params")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != len(_DISTORTION):
            raise DataError(
                f"distortion_params: expected the six numbers {', '.join(_DISTORTION)}, got {str(listed)[:100]}; "
                "undistort the images and use the poses of these"
            )
        keys = dict(zip(_DISTORTION, listed, strict=True))
    k1, k2, k3, k4, p1, p2 = (_number(keys, name) for name in _DISTORTION)
    remedy = "no lens of OpenCV's is so: undistort the images, or calibrate without this coefficient"
    if model in FISHEYE:
        if p1 or p2:
            raise DataError(f"p1={p1:g}, p2={p2:g} of a fisheye, expected 0; {remedy}")
        return "fisheye", (k1, k2, k3, k4)
    if k4:
        raise DataError(f"k4={k4:g} of a lens that is no fisheye, expected 0; {remedy}")
    if not any((k1, k2, k3, p1, p2)):
        return "pinhole", ()
    return "radial_tangential", (k1, k2, p1, p2, k3)


def _number(keys: Keys, key: str, default: float = 0.0) -> float:
    value = keys.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise DataError(f"{key}: expected a finite number, got {str(value)[:100]!r}")
    return float(value)
