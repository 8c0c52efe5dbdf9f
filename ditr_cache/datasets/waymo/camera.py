"""Waymo's cameras: lenses, the published crop, where points fall in images.

Waymo's camera frame is x forward, y left, z up; its lens is OpenCV's of (-y / x, -z / x), so of our axes as they are.
Images are read out row by row or column by column while the vehicle moves. The released projections know that; our own
take the pose at the time at which the point's own row or column was exposed, from the image's pose and velocities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.waymo.lidar import LASERS, Scan, pose_of
from ditr_cache.datasets.waymo.tables import Table
from ditr_cache.errors import DataError, errors_at
from ditr_cache.geometry import project, to_camera
from ditr_cache.sample import Camera, Projection

CAMERAS = {1: "FRONT", 2: "FRONT_LEFT", 3: "FRONT_RIGHT", 4: "SIDE_LEFT", 5: "SIDE_RIGHT"}
"""Number -> name."""

CROPPED_ASPECT = 886 / 1920
"""Height by width of the side cameras' images; DITR cuts the upper rows off the others until they are as wide."""

OURS_FROM_WAYMO = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
"""Camera axes x right, y down, z forward from x forward, y left, z up."""

_INTRINSICS = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")
_TOP_TO_BOTTOM, _LEFT_TO_RIGHT, _BOTTOM_TO_TOP, _RIGHT_TO_LEFT = 1, 2, 3, 4
_AT_ONCE = (0, 5)  # unknown, and a global shutter
_LONGEST_READOUT = 0.2  # seconds; real ones take some hundredths
_STEPS = 5  # each shrinks the error by the image's speed in columns per column read out, a few hundredths


@dataclass(frozen=True, kw_only=True)
class Lens:
    """One camera of one segment.

    Args:
        whole: camera of the image as stored.
        top: rows that are cut off.
        extrinsic: `vehicle_from_camera` in Waymo's axes, 16 numbers by rows.
        readout: direction of the rolling shutter, as released.
    """

    whole: Camera
    top: int
    extrinsic: tuple[float, ...]
    readout: int

    @property
    def camera(self) -> Camera:
        """Camera of the image as used."""
        return self.whole.cropped(left=0, top=self.top, width=self.whole.width, height=self.whole.height - self.top)

    @property
    def camera_from_vehicle(self) -> NDArray[np.float64]:
        """[4, 4], to our axes."""
        return np.asarray(OURS_FROM_WAYMO @ np.linalg.inv(np.array(self.extrinsic).reshape(4, 4)))


def read_lens(calibration: Table, number: int, *, crop: bool) -> Lens:
    """A camera.

    Args:
        calibration: component `camera_calibration`.
        number: of the camera.
        crop: cut the upper rows off until the image is as wide as the side cameras'.

    Raises:
        DataError: values that no camera has.
    """
    where = f"{calibration.path}: camera {CAMERAS[number]}"
    numbers = [float(calibration.numbers(f"intrinsic.{name}", number, count=1)[0]) for name in _INTRINSICS]
    width, height, readout = (
        int(np.nan_to_num(calibration.numbers(name, number, count=1)[0]))
        for name in ("width", "height", "rolling_shutter_direction")
    )
    fx, fy, cx, cy, *distortion = numbers
    with errors_at(where, "download the file again"):
        whole = Camera(
            width=width, height=height, fx=fx, fy=fy, cx=cx, cy=cy,
            model="radial_tangential", distortion=tuple(distortion),
        )  # fmt: skip
    if readout not in (*_AT_ONCE, _TOP_TO_BOTTOM, _LEFT_TO_RIGHT, _BOTTOM_TO_TOP, _RIGHT_TO_LEFT):
        raise DataError(f"{where}: rolling shutter direction {readout}, expected 0 to 5; download the file again")
    top = max(0, height - round(width * CROPPED_ASPECT)) if crop else 0
    extrinsic = pose_of(calibration, "extrinsic.transform", number)
    return Lens(whole=whole, top=top, extrinsic=tuple(extrinsic.ravel().tolist()), readout=readout)


def image_from_frame(
    images: Table, timestamp: int, number: int, world_from_vehicle: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[4, 4] from the vehicle's frame at the frame's pose to the one at the image's, which has a time of its own.

    Raises:
        DataError: the image's pose is no rigid motion.
    """
    pose = pose_of(images, "pose.transform", timestamp, number)
    return np.asarray(np.linalg.inv(pose) @ world_from_vehicle)


def released_projections(found: Iterable[Scan], table: Table, timestamp: int) -> dict[int, Projection]:
    """Camera -> where Waymo itself says that points fall in its image as stored.

    A point may be in two images: both slots of a pixel count. Coordinates are stored rounded down (std::floor, see
    waymo-open-dataset issue 146), and 0 is the left edge of the first pixel (v2/perception/lidar.py there), so the
    middle of the pixel is half a pixel on.

    Args:
        found: scans in the order of the points.
        table: component `lidar_camera_projection`.
        timestamp: of the frame.

    Raises:
        DataError: a missing or damaged projection.
    """
    slots = [np.zeros((0, 2, 3))]
    for scan in found:
        count = len(scan.pixels[0])
        if not count:
            continue
        pixels = scan.of_points(table, timestamp, channels=6)
        if pixels is None:
            raise DataError(
                f"{table.path}: no projection of return {scan.echo} of lidar {LASERS[scan.laser]} at {timestamp}, "
                f"which has {count} points; download the file again, or take --option projection=geometry"
            )
        slots.append(pixels.reshape(-1, 2, 3).astype(np.float64))
    every = np.concatenate(slots)
    camera = every[..., 0]
    if not np.isin(camera, (0, *CAMERAS)).all():
        wrong = camera[~np.isin(camera, (0, *CAMERAS))]
        raise DataError(
            f"{table.path}: camera {wrong[0]:g} at {timestamp}, expected 0 (none) to {len(CAMERAS)}; download the file "
            "again, or take --option projection=geometry"
        )
    result = {}
    for number in CAMERAS:
        named = camera == number
        point = np.flatnonzero(named.any(axis=1))
        pixel = every[point, named[point].argmax(axis=1), 1:]
        result[number] = Projection(point=point, u=pixel[:, 0] + 0.5, v=pixel[:, 1] + 0.5)
    return result


@dataclass(frozen=True, kw_only=True)
class Shutter:
    """How an image was read out while the vehicle moved.

    Args:
        direction: of the readout, as released.
        start: seconds from the image's pose to the exposure of the first row or column.
        duration: seconds of the readout.
        linear: [3] velocity of the vehicle in its own axes at the image's pose, m/s.
        angular: [3] likewise, rad/s.
    """

    direction: int
    start: float
    duration: float
    linear: NDArray[np.float64]
    angular: NDArray[np.float64]

    def delay(self, u: NDArray[np.float64], v: NDArray[np.float64], camera: Camera) -> NDArray[np.float64]:
        """Seconds [N] from the image's pose to the exposure of places in the whole image; clamped to the readout."""
        along = {
            _LEFT_TO_RIGHT: u / camera.width,
            _RIGHT_TO_LEFT: 1 - u / camera.width,
            _TOP_TO_BOTTOM: v / camera.height,
            _BOTTOM_TO_TOP: 1 - v / camera.height,
        }[self.direction]
        return self.start + self.duration * np.nan_to_num(along, nan=0.5).clip(0, 1)

    def moved(self, points: NDArray[np.float64], delay: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points [N, 3] of the vehicle's frame at the image's pose, in its frame `delay` [N] seconds later."""
        points = points - delay[:, None] * self.linear
        speed = float(np.linalg.norm(self.angular))
        if speed == 0:
            return points
        axis, angle = self.angular / speed, -speed * delay[:, None]
        along = (points @ axis)[:, None] * axis
        return along + np.cos(angle) * (points - along) + np.sin(angle) * np.cross(axis, points)


def read_shutter(images: Table, timestamp: int, number: int, lens: Lens) -> Shutter | None:
    """How an image was read out; None where at once.

    Raises:
        DataError: times or velocities that no image has.
    """
    if lens.readout in _AT_ONCE:
        return None

    def read(name: str) -> float:
        return float(images.numbers(name, timestamp, number, count=1)[0])

    exposure, trigger, done = (
        read(f"rolling_shutter_params.{name}")
        for name in ("shutter", "camera_trigger_time", "camera_readout_done_time")
    )
    start, duration = trigger + exposure / 2 - read("pose_timestamp"), done - trigger - exposure
    velocity = np.array(
        [[read(f"velocity.{kind}_velocity.{axis}") for axis in "xyz"] for kind in ("linear", "angular")]
    )
    if not (0 <= duration <= _LONGEST_READOUT and abs(start) <= 1 and np.isfinite(velocity).all()):
        raise DataError(
            f"{images.path}: camera {CAMERAS[number]} at {timestamp}: a readout of {duration:.3g} s that starts "
            f"{start:.3g} s after the pose, at velocity {velocity[0].tolist()}; expected up to {_LONGEST_READOUT} s "
            "near the pose; download the file again, or take --option projection=released"
        )
    # The linear velocity is given in the world's axes, the angular one in the vehicle's.
    pose = pose_of(images, "pose.transform", timestamp, number)
    return Shutter(
        direction=lens.readout, start=start, duration=duration, linear=pose[:3, :3].T @ velocity[0], angular=velocity[1]
    )


def rolling_projection(
    coord: NDArray[np.floating],
    image_from_frame: NDArray[np.float64],
    lens: Lens,
    shutter: Shutter,
) -> Projection:
    """Where points fall in an image that was read out bit by bit.

    When a point is exposed depends on where it falls, and that on when: solved by repetition.

    Args:
        coord: [N, 3] in the vehicle's frame at the frame's pose.
        image_from_frame: to the vehicle's frame at the image's pose.
        lens, shutter: of the image.
    """
    camera_from_vehicle = lens.camera_from_vehicle
    points = to_camera(coord, image_from_frame)
    # What lies beside the camera or behind it cannot come into view within a readout.
    point = np.flatnonzero(to_camera(points, camera_from_vehicle)[:, 2] > 0)
    points = points[point]
    delay = np.full(len(points), shutter.start + shutter.duration / 2)
    u = v = np.zeros(len(points))
    for _ in range(_STEPS):
        in_camera = to_camera(shutter.moved(points, delay), camera_from_vehicle)
        in_camera[in_camera[:, 2] <= 1e-6] = np.nan
        u, v = project(in_camera, lens.whole)
        delay = shutter.delay(u, v, lens.whole)
    seen = np.isfinite(u) & np.isfinite(v)
    return Projection(point=point[seen], u=u[seen], v=v[seen] - lens.top)
