"""What a dataset hands over: a `Sample` with its `Points` and posed `View`s.

Axes: the camera looks along +z, x right, y down. Lengths are metres. Image coordinates are continuous, `u` in
[0, width), and the pixel column of `u` is `floor(u)`, so the centre of pixel 0 is at 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditr_cache.errors import DataError

CAMERA_MODELS: dict[str, tuple[int, ...]] = {
    "pinhole": (0,),
    "radial_tangential": (4, 5, 8),
    "fisheye": (4,),
    "equirectangular": (0,),
}
"""Camera model -> how many distortion coefficients it takes."""


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Camera of one image size.

    Models, with (x, y) = (X / Z, Y / Z) of a point in front of the camera and u = fx x' + cx, v = fy y' + cy:

    - `pinhole`: x' = x.
    - `radial_tangential`: OpenCV's (`cv2.projectPoints`), coefficients k1, k2, p1, p2[, k3[, k4, k5, k6]].
    - `fisheye`: OpenCV's (`cv2.fisheye`, Kannala-Brandt), coefficients k1, k2, k3, k4. Only what lies in front of the
      camera is seen.
    - `equirectangular`: a panorama; u = fx longitude + cx, v = fy latitude + cy, longitude from z towards x, latitude
      from the horizon down. Its depth is the distance along the ray.

    Args:
        width, height: image size in pixels.
        fx, fy: focal lengths in pixels (per radian, in a panorama).
        cx, cy: principal point in continuous image coordinates.
        model: one of `CAMERA_MODELS`.
        distortion: coefficients of the model; they do not change with the image size.

    Raises:
        DataError: sizes or focal lengths that are not positive and finite (singular intrinsics), an unknown model, or
            another number of coefficients than it takes.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    model: str = "pinhole"
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.model not in CAMERA_MODELS:
            raise DataError(f"camera: unknown model {self.model!r}, expected one of {', '.join(CAMERA_MODELS)}")
        if len(self.distortion) not in CAMERA_MODELS[self.model] or not np.isfinite(self.distortion).all():
            wanted = " or ".join(str(n) for n in CAMERA_MODELS[self.model])
            raise DataError(
                f"camera: model {self.model} takes {wanted} finite distortion coefficients, got {self.distortion}"
            )
        values = np.array([self.fx, self.fy, self.cx, self.cy], dtype=np.float64)
        if self.width < 1 or self.height < 1:
            raise DataError(f"camera: image size must be positive, got {self.width}x{self.height}")
        if not np.isfinite(values).all() or self.fx <= 0 or self.fy <= 0:
            raise DataError(
                "camera: singular intrinsics, expected finite values and positive focal lengths, got "
                f"fx={self.fx}, fy={self.fy}, cx={self.cx}, cy={self.cy}"
            )

    @classmethod
    def from_matrix(cls, matrix: ArrayLike, *, width: int, height: int) -> Camera:
        """Camera of a 3x3 or 4x4 intrinsic matrix whose last row is (0, 0, 1)."""
        k = np.asarray(matrix, dtype=np.float64)
        if k.shape not in ((3, 3), (4, 4)):
            raise DataError(f"camera: expected a 3x3 or 4x4 intrinsic matrix, got shape {k.shape}")
        if abs(k[0, 1]) > 1e-6 * max(abs(k[0, 0]), 1e-12) or not np.allclose(k[2, :3], (0, 0, 1)):
            raise DataError(f"camera: expected a pinhole matrix without skew, got {k[:3, :3].tolist()}")
        return cls(width=width, height=height, fx=k[0, 0], fy=k[1, 1], cx=k[0, 2], cy=k[1, 2])

    @classmethod
    def panorama(cls, *, width: int, height: int) -> Camera:
        """Equirectangular camera of all directions: the middle column looks along z, the top row up."""
        return cls(
            width=width,
            height=height,
            fx=width / (2 * np.pi),
            fy=height / np.pi,
            cx=width / 2,
            cy=height / 2,
            model="equirectangular",
        )

    def resized(self, *, width: int, height: int) -> Camera:
        """Camera of the same image resized to `width` x `height`."""
        sx, sy = width / self.width, height / self.height
        return replace(
            self, width=width, height=height, fx=self.fx * sx, fy=self.fy * sy, cx=self.cx * sx, cy=self.cy * sy
        )

    def cropped(self, *, left: int, top: int, width: int, height: int) -> Camera:
        """Camera of the window that starts at pixel (`left`, `top`); negative values pad."""
        return replace(self, width=width, height=height, cx=self.cx - left, cy=self.cy - top)


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Where the dataset itself says that points fall in a view.

    Args:
        point: [L] index of the point in the dataset's own order, each at most once.
        u, v: [L] float64 continuous image coordinates of the view's camera, inside the image.
    """

    point: NDArray[np.int64]
    u: NDArray[np.float64]
    v: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """One posed image of a sample. Pixels are read only when asked for.

    Args:
        id: unique within the sample, stable between runs.
        camera: intrinsics of the image as `load_image` returns it.
        camera_from_world: [4, 4] float64; entries that are not finite mark a view without a pose.
        load_image: returns [height, width, 3] uint8 RGB.
        depth_camera: intrinsics of the depth map, which shares the pose; None where there is no depth.
        load_depth: returns [height, width] float32 metres along z (a panorama: along the ray), 0 where unknown.
        load_projection: returns the dataset's own projection of the points, which then stands in place of ours.
    """

    id: str
    camera: Camera
    camera_from_world: NDArray[np.float64]
    load_image: Callable[[], NDArray[np.uint8]]
    depth_camera: Camera | None = None
    load_depth: Callable[[], NDArray[np.float32]] | None = None
    load_projection: Callable[[], Projection] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """A point cloud of N points in the dataset's own order.

    Args:
        coord: [N, 3] float32 metres.
        color: [N, 3] uint8 RGB.
        normal: [N, 3] float32, unit length or zero.
        strength: [N] float32 lidar intensity.
        segment: [N] int16 class indices, `ignore_index` where unlabelled.
        instance: [N] int32, -1 where none.

    Raises:
        DataError: arrays of different lengths, wrong widths, or coordinates that are not finite.
    """

    coord: NDArray[np.float32]
    color: NDArray[np.uint8] | None = None
    normal: NDArray[np.float32] | None = None
    strength: NDArray[np.float32] | None = None
    segment: NDArray[np.int16] | None = None
    instance: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        if self.coord.ndim != 2 or self.coord.shape[1] != 3:
            raise DataError(f"points: expected coord of shape [N, 3], got {list(self.coord.shape)}")
        for name, width in (("color", 3), ("normal", 3), ("strength", 0), ("segment", 0), ("instance", 0)):
            array = getattr(self, name)
            if array is None:
                continue
            expected = (len(self.coord), width) if width else (len(self.coord),)
            if array.shape != expected:
                raise DataError(f"points: expected {name} of shape {list(expected)}, got {list(array.shape)}")
        bad: NDArray[np.bool_] = np.asarray(~np.isfinite(self.coord).all(axis=1))
        if bad.any():
            raise DataError(
                f"points: {int(bad.sum())} of {len(bad)} coordinates are not finite, first at index "
                f"{int(bad.argmax())}: {self.coord[bad.argmax()].tolist()}; remove these points from the file"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One point cloud that a network sees at once, with its views.

    Args:
        id: unique within the dataset.
        split: name of the dataset's split that holds it.
        views: every frame of the sample, in time order, before any selection.
        load_points: reads the points. May raise `DataError`. Called once per sample and only where geometry is made:
            a second VFM never calls it.
        broken_views: (view id, error) of frames that could not be described at all (say an unreadable pose file).
        every_nth_frame: the stride that the dataset recommends where the user names none.
    """

    id: str
    split: str
    views: tuple[View, ...]
    load_points: Callable[[], Points]
    broken_views: tuple[tuple[str, str], ...] = ()
    every_nth_frame: int = 1
