"""Points of Waymo's range images: directions of their pixels, the motion of the vehicle, labels.

Conventions are those of github.com/waymo-research/waymo-open-dataset (99a4cb3, utils/range_image_utils.py and
v2/perception/utils/lidar_utils.py): a pixel is a point where its range is positive; column 0 looks to azimuth pi less
the sensor's yaw, and azimuths fall with the columns; the first row has the highest inclination. Images of TOP hold what
the sensor measured while the vehicle moved, and `lidar_pose` where the vehicle was at every pixel; those of the other
lidars are in the frame's own pose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.frames import rigid_pose
from ditr_cache.datasets.waymo.tables import Table
from ditr_cache.errors import DataError, errors_at
from ditr_cache.sample import Points
from ditr_cache.schema import IGNORE_INDEX

TOP = 1
LASERS = {TOP: "TOP", 2: "FRONT", 3: "SIDE_LEFT", 4: "SIDE_RIGHT", 5: "REAR"}
"""Number -> name."""

_FARTHEST = 20.0
"""Metres that the vehicle may be from its frame's pose while TOP turns once, at 200 m/s."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What one lidar returned in one frame.

    Args:
        laser: its number.
        echo: 1 for the first return, 2 for the second.
        image: [H, W, 4] range, intensity, elongation, whether in a zone without labels.
    """

    laser: int
    echo: int
    image: NDArray[np.float32]

    @cached_property
    def pixels(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows [N] and columns [N] of the points, row by row."""
        rows, columns = np.nonzero(self.image[..., 0] > 0)
        return rows, columns

    def of_points(self, table: Table, timestamp: int, channels: int) -> NDArray[Any] | None:
        """Values [N, channels] of the points in another component's image of the same scan; None where it is null.

        Raises:
            DataError: it is of another size.
        """
        image = table.image(self.echo, timestamp, self.laser, channels=channels)
        if image is None:
            return None
        self.check_size(image, table, timestamp)
        return image[self.pixels]

    def check_size(self, image: NDArray[Any], table: Table, timestamp: int) -> None:
        """Raise `DataError` where an image of another component is not of this scan's size."""
        if image.shape[:2] != self.image.shape[:2]:
            raise DataError(
                f"{table.path}: the image of lidar {LASERS[self.laser]} at {timestamp} has {image.shape[0]}x"
                f"{image.shape[1]} pixels, but its range image of return {self.echo} {self.image.shape[0]}x"
                f"{self.image.shape[1]}; the files are of different releases, download both again"
            )


def scans(lidar: Table, timestamp: int, returns: tuple[int, ...]) -> Iterator[Scan]:
    """Scans of one frame in the order of the points: return 1 of all lidars by their numbers, then return 2 of all.

    Lidars without returns have empty scans, or none: the release then has no row of them.

    Raises:
        DataError: TOP is missing, or an image damaged.
    """
    for echo in returns:
        for laser in LASERS:
            if laser != TOP and (timestamp, laser) not in lidar:
                continue
            image = lidar.image(echo, timestamp, laser, channels=4)
            if image is not None:
                yield Scan(laser, echo, image)


@dataclass(frozen=True, eq=False)
class LidarTables:
    """The components that points are made of; `labels` is None where the frame has none."""

    lidar: Table
    calibration: Table
    pixel_pose: Table
    vehicle_pose: Table
    labels: Table | None


def read_points(tables: LidarTables, timestamp: int, returns: tuple[int, ...], classes: int) -> Points:
    """Points of one frame in the vehicle's coordinates (x forward, y left, z up) at the frame's pose.

    `strength` is tanh of the intensity, which has no upper bound. Only points of TOP have labels.

    Args:
        tables: of the segment.
        timestamp: of the frame.
        returns: which of 1 and 2.
        classes: number of classes, whose ids start at 1.

    Raises:
        DataError: a component that cannot be used, or no point at all.
    """
    found = [scan for scan in scans(tables.lidar, timestamp, returns) if len(scan.pixels[0])]
    if not found:
        raise DataError(
            f"{tables.lidar.path}: no lidar has a single return at {timestamp}; leave the frame out, or download the "
            "file again"
        )
    vehicle_from_world = np.asarray(np.linalg.inv(frame_pose(tables.vehicle_pose, timestamp)))
    coord = np.concatenate([_coordinates(scan, tables, timestamp, vehicle_from_world) for scan in found])
    segment = instance = None
    if tables.labels is not None:
        labels = np.concatenate([_labels(scan, tables.labels, timestamp, classes) for scan in found])
        instance, segment = labels[:, 0].astype(np.int32), labels[:, 1].astype(np.int16)
    strength = np.concatenate([scan.image[scan.pixels][:, 1] for scan in found]).astype(np.float32)
    with errors_at(f"{tables.lidar.path} at {timestamp}"):
        return Points(coord=coord, strength=np.tanh(strength), segment=segment, instance=instance)


def pose_of(table: Table, column: str, *key: int) -> NDArray[np.float64]:
    """Pose [4, 4] in a small column. Raises `DataError` where it is no rigid motion."""
    pose = table.numbers(column, *key, count=16).reshape(4, 4)
    with errors_at(f"{table.path}: {column} of {key}", "download the file again"):
        finite = np.isfinite(rigid_pose(pose)).all()
    if not finite:
        raise DataError(f"{table.path}: {column} of {key} is not finite; download the file again")
    return pose


def frame_pose(vehicle_pose: Table, timestamp: int) -> NDArray[np.float64]:
    """`world_from_vehicle` [4, 4] of a frame. Raises `DataError` where it is no rigid motion."""
    return pose_of(vehicle_pose, "world_from_vehicle.transform", timestamp)


def _coordinates(
    scan: Scan, tables: LidarTables, timestamp: int, vehicle_from_world: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Points [N, 3] of a scan in the vehicle's frame."""
    vehicle_from_laser = pose_of(tables.calibration, "extrinsic.transform", scan.laser)
    inclination = _inclinations(tables.calibration, scan)
    points = _directions(scan, vehicle_from_laser, inclination) * scan.image[scan.pixels][:, :1].astype(np.float64)
    points = points @ vehicle_from_laser[:3, :3].T + vehicle_from_laser[:3, 3]
    if scan.laser != TOP:
        return points.astype(np.float32)
    poses = _pixel_poses(scan, tables.pixel_pose, timestamp)
    world = moved_by(points, poses)
    away = np.linalg.norm(poses[:, 3:] @ vehicle_from_world[:3, :3].T + vehicle_from_world[:3, 3], axis=1)
    if not (away <= _FARTHEST).all():
        raise DataError(
            f"{tables.pixel_pose.path}: at {timestamp} the vehicle is up to {away.max():.4g} m away from the pose of "
            f"the frame in {tables.vehicle_pose.path}, expected at most {_FARTHEST:g}; the files are of different "
            "frames or damaged, download both again"
        )
    return (world @ vehicle_from_world[:3, :3].T + vehicle_from_world[:3, 3]).astype(np.float32)


def _pixel_poses(scan: Scan, table: Table, timestamp: int) -> NDArray[np.float64]:
    """[N, 6] where the vehicle was at the points of a scan of TOP: stored for the first return, valid for both.

    Pixels without a return may have no pose, all zeros. A point whose own pixel has none takes that of its column,
    which was measured at the same time.
    """
    image = table.image(1, timestamp, TOP, channels=6)
    if image is None:
        raise DataError(f"{table.path}: no poses of lidar TOP at {timestamp}; download the file again")
    scan.check_size(image, table, timestamp)
    rows, columns = scan.pixels
    known = np.asarray(image.any(axis=2))
    rows = np.where(known[rows, columns], rows, known.argmax(axis=0)[columns])
    return image[rows, columns].astype(np.float64)


def moved_by(points: NDArray[np.float64], poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [N, 3], each moved by a pose of its own, [N, 6] roll, pitch, yaw (about x, then y, then z), x, y, z."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(poses[:, :3].T), np.sin(poses[:, :3].T)
    x, y, z = points.T
    y, z = cr * y - sr * z, sr * y + cr * z
    x, z = cp * x + sp * z, cp * z - sp * x
    x, y = cy * x - sy * y, sy * x + cy * y
    return np.stack([x, y, z], axis=1) + poses[:, 3:]


def _inclinations(calibration: Table, scan: Scan) -> NDArray[np.float64]:
    """[H] radians above the sensor's plane, from the first row to the last."""
    height = scan.image.shape[0]
    if calibration.value("beam_inclination.values", scan.laser):
        upwards = calibration.numbers("beam_inclination.values", scan.laser, count=height)
    else:
        low = calibration.numbers("beam_inclination.min", scan.laser, count=1)
        high = calibration.numbers("beam_inclination.max", scan.laser, count=1)
        upwards = low + (np.arange(height) + 0.5) / height * (high - low)
    return upwards[::-1]


def _directions(
    scan: Scan, vehicle_from_laser: NDArray[np.float64], inclination: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Unit directions [N, 3] of the points in the sensor's frame."""
    rows, columns = scan.pixels
    width = scan.image.shape[1]
    yaw = np.arctan2(vehicle_from_laser[1, 0], vehicle_from_laser[0, 0])
    azimuth = ((width - columns - 0.5) / width * 2 - 1) * np.pi - yaw
    up = inclination[rows]
    return np.stack([np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)], axis=1)


def _labels(scan: Scan, table: Table, timestamp: int, classes: int) -> NDArray[np.int32]:
    """[N, 2] instance and class index of the points of a scan."""
    nothing = np.full((len(scan.pixels[0]), 2), IGNORE_INDEX, dtype=np.int32)
    if (timestamp, scan.laser) not in table:
        return nothing
    found = scan.of_points(table, timestamp, channels=2)
    if found is None:
        return nothing
    wrong = (found[:, 1] < 0) | (found[:, 1] > classes)
    if wrong.any():
        raise DataError(
            f"{table.path}: class {found[wrong][0, 1]} of {int(wrong.sum())} points of lidar {LASERS[scan.laser]} at "
            f"{timestamp}, expected 0 (undefined) to {classes}; download the file again"
        )
    return np.stack([np.maximum(found[:, 0], -1), found[:, 1] - 1], axis=1).astype(np.int32)
