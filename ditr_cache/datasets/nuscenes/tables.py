"""The tables of one nuScenes release, of which the keyframes of the lidar and the cameras are kept.

The keys and what they refer to: docs/schema_nuscenes.md of github.com/nutonomy/nuscenes-devkit. A row of `sample_data`
is one frame of one sensor; `is_key_frame` marks the one of 6 to 10 that belongs to a sample. Its sensor is found
through `calibrated_sensor`, its pose through `ego_pose_token`: every frame has a pose of its own, at its own time. Rows
are in no order of time. v1.0-trainval has 2 631 083 rows of `sample_data` and as many of `ego_pose`, 1.9 GB of text:
these two are searched, and the 9 % of their rows that matter are kept in columns, less than 100 MB. Poses are read with
the first frame that is asked for: listing needs none.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.json_rows import Row, check_ends, rows, rows_where
from ditr_cache.errors import DataError

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

LIDAR = "LIDAR_TOP"

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
"""Channels of the cameras, in the order in which DITR goes through them."""

CHANNELS = (LIDAR, *CAMERAS)

_NONE, _SEVERAL = -1, -2
"""Instead of the number of a keyframe."""


@dataclass(frozen=True, kw_only=True)
class Pose:
    """`parent_from_child` as nuScenes writes it: a quaternion w, x, y, z, and a translation in metres."""

    rotation: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """A row of `calibrated_sensor`: where a sensor sits on the car, and a camera's 3x3 matrix (else empty)."""

    channel: str
    ego_from_sensor: Pose
    intrinsic: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A keyframe of one sensor.

    Args:
        filename: below the root, as the table has it.
        timestamp: of the frame, microseconds.
        size: (width, height) of an image; zeros for the lidar.
        sensor: its calibration.
        global_from_ego: pose of the car at the frame's own time.
        pose_timestamp: of that pose, microseconds.
    """

    filename: str
    timestamp: int
    size: tuple[int, int]
    sensor: Sensor
    global_from_ego: Pose
    pose_timestamp: int


@dataclass(kw_only=True, eq=False)
class _Columns:
    """The keyframes, one entry each; `pose` is the number of its pose."""

    filename: list[str] = field(default_factory=list)
    time: array[int] = field(default_factory=lambda: array("q"))
    width: array[int] = field(default_factory=lambda: array("i"))
    height: array[int] = field(default_factory=lambda: array("i"))
    sensor: array[int] = field(default_factory=lambda: array("i"))
    pose: array[int] = field(default_factory=lambda: array("i"))


class Tables:
    """Samples of one release, by the token of the lidar's keyframe, in the order of scenes and of time.

    Args:
        folder: of the tables, say `v1.0-trainval`.
        remedy: ends every error: which download the tables come from.

    Raises:
        MissingDataError: a table is missing.
        DataError: a table is truncated, or the tables are not of one release.
    """

    def __init__(self, folder: Path, remedy: str) -> None:
        check_ends(folder / "ego_pose.json", remedy)
        reader = _Reader(folder, remedy)
        self._folder, self._remedy = folder, remedy
        self._columns, self._sensors, self._keyframe = reader.columns, reader.sensors, reader.keyframe
        self._pose_of = reader.pose_of
        self._scene_of = reader.scenes
        self._number = reader.in_order()

    @property
    def ids(self) -> list[str]:
        """Ids of all samples."""
        return list(self._number)

    def scene(self, sample_id: str) -> str:
        """Name of a sample's scene."""
        return self._scene_of[self._number[sample_id]]

    def frame(self, sample_id: str, channel: str) -> Frame:
        """The keyframe of one sensor. Raises `DataError` where the tables have none or several, or cannot be read."""
        number = int(self._keyframe[self._number[sample_id], CHANNELS.index(channel)])
        if number < 0:
            count = "no keyframe" if number == _NONE else "several keyframes"
            raise DataError(
                f"{self._folder / 'sample_data.json'}: {count} of {channel} for sample {sample_id!r}, expected one; "
                f"{self._remedy}"
            )
        if isinstance(self._poses, DataError):
            raise type(self._poses)(str(self._poses))
        columns = self._columns
        pose, time = self._poses[0][columns.pose[number]].tolist(), self._poses[1][columns.pose[number]]
        return Frame(
            filename=columns.filename[number],
            timestamp=columns.time[number],
            size=(columns.width[number], columns.height[number]),
            sensor=self._sensors[columns.sensor[number]],
            global_from_ego=Pose(rotation=tuple(pose[:4]), translation=tuple(pose[4:])),
            pose_timestamp=int(time),
        )

    @cached_property
    def _poses(self) -> tuple[NDArray[np.float64], NDArray[np.int64]] | DataError:
        """[P, 7] rotation and translation, and [P] time stamp of every pose; or why they cannot be had: read once."""
        number_of, self._pose_of = self._pose_of, {}
        try:
            return _read_poses(self._folder, number_of, self._remedy)
        except DataError as error:
            return error


class _Reader:
    """Reads the tables one after the other. What only leads from one to the next goes when the reader goes."""

    def __init__(self, folder: Path, remedy: str) -> None:
        self._folder, self._remedy = folder, remedy
        self.columns = _Columns()
        self.sensors: list[Sensor] = []
        self.scenes: list[str] = []
        """Name of the scene of every sample."""
        self._channel_of: dict[str, str] = {}
        self._column_of: list[int] = []
        self._sensor_of: dict[str, int | None] = {}
        self._scene_of: dict[str, str] = {}
        self._sample_of: dict[str, int] = {}
        self.pose_of: dict[str, int] = {}
        """Token of the pose of every keyframe -> its number."""
        self._each("sensor", self._keep_channel)
        self._each("calibrated_sensor", self._keep_sensor)
        self._each("scene", self._keep_scene)
        self._each("sample", self._keep_sample)
        self._ids = [""] * len(self.scenes)
        self.keyframe = np.full((len(self.scenes), len(CHANNELS)), _NONE, dtype=np.int32)
        """Number of the keyframe of every sample and channel."""
        path = folder / "sample_data.json"
        self._each("sample_data", self._keep_frame, rows_where(path, "is_key_frame", True, remedy))

    def in_order(self) -> dict[str, int]:
        """Id of every sample that has a scan -> its number, by scene and time."""
        lidar = self.keyframe[:, 0].tolist()
        times = [self.columns.time[frame] if frame >= 0 else 0 for frame in lidar]
        keys = sorted((self.scenes[i], times[i], self._ids[i], i) for i, f in enumerate(lidar) if f != _NONE)
        found = {sample_id: number for _, _, sample_id, number in keys}
        if len(found) < len(keys):
            raise DataError(
                f"{self._folder / 'sample_data.json'}: {len(keys) - len(found)} samples have the same token of "
                f"{LIDAR} as another one, expected one each; {self._remedy}"
            )
        equal = [b[2] for a, b in pairwise(keys) if a[:2] == b[:2]]
        if equal:
            _LOG.warning(
                "%s: %d samples have the time stamp of the one before, the first is %r; they are ordered by their ids",
                self._folder,
                len(equal),
                equal[0],
            )
        if len(found) < len(lidar):
            _LOG.warning(
                "%s: %d samples have no keyframe of %s and are left out", self._folder, len(lidar) - len(found), LIDAR
            )
        return found

    def _each(self, table: str, keep: Callable[[Row], None], found: Iterable[Row] | None = None) -> None:
        path = self._folder / f"{table}.json"
        _for_each(path, rows(path, self._remedy) if found is None else found, keep, self._remedy)

    def _keep_channel(self, row: Row) -> None:
        self._channel_of[row["token"]] = str(row["channel"])

    def _keep_sensor(self, row: Row) -> None:
        channel = self._find(self._channel_of, row["sensor_token"], "calibrated_sensor", "sensor")
        if channel not in CHANNELS:
            self._sensor_of[row["token"]] = None
            return
        self._sensor_of[row["token"]] = len(self.sensors)
        self._column_of.append(CHANNELS.index(channel))
        self.sensors.append(
            Sensor(
                channel=channel,
                ego_from_sensor=Pose(
                    rotation=_numbers(row["rotation"], 4), translation=_numbers(row["translation"], 3)
                ),
                intrinsic=tuple(_numbers(line, 3) for line in row["camera_intrinsic"]),
            )
        )

    def _keep_scene(self, row: Row) -> None:
        self._scene_of[row["token"]] = str(row["name"])

    def _keep_sample(self, row: Row) -> None:
        self._sample_of[row["token"]] = len(self.scenes)
        self.scenes.append(self._find(self._scene_of, row["scene_token"], "sample", "scene"))

    def _keep_frame(self, row: Row) -> None:
        sensor = self._find(self._sensor_of, row["calibrated_sensor_token"], "sample_data", "calibrated_sensor")
        if sensor is None:
            return
        sample = self._find(self._sample_of, row["sample_token"], "sample_data", "sample")
        channel = self._column_of[sensor]
        if channel == 0 and not self._ids[sample]:
            self._ids[sample] = str(row["token"])
        first = self.keyframe[sample, channel] == _NONE
        columns = self.columns
        self.keyframe[sample, channel] = len(columns.filename) if first else _SEVERAL
        columns.filename.append(str(row["filename"]))
        columns.time.append(row["timestamp"])
        columns.width.append(row["width"])
        columns.height.append(row["height"])
        columns.sensor.append(sensor)
        columns.pose.append(self.pose_of.setdefault(row["ego_pose_token"], len(self.pose_of)))

    def _find(self, known: Mapping[str, T], token: str, table: str, of: str) -> T:
        """What a token in `table` refers to."""
        if token not in known:
            raise _dangling(self._folder, table, of, token, self._remedy)
        return known[token]


def _read_poses(
    folder: Path, number_of: Mapping[str, int], remedy: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[P, 7] rotation and translation, and [P] time stamp, of the poses whose numbers are given."""
    poses, times = np.full((len(number_of), 7), np.nan), np.full(len(number_of), -1, dtype=np.int64)

    def keep(row: Row) -> None:
        number, rotation, translation = number_of[row["token"]], row["rotation"], row["translation"]
        poses[number, :4], poses[number, 4:] = _numbers(rotation, 4), _numbers(translation, 3)
        times[number] = row["timestamp"]

    path = folder / "ego_pose.json"
    _for_each(path, rows_where(path, "token", number_of.keys(), remedy), keep, remedy)
    missing = next((token for token, number in number_of.items() if times[number] < 0), None)
    if missing is not None:
        raise _dangling(folder, "sample_data", "ego_pose", missing, remedy)
    return poses, times


def _for_each(path: Path, found: Iterable[Row], keep: Callable[[Row], None], remedy: str) -> None:
    """Keep rows. Raises `DataError` for a row that lacks a key, or has values of other types."""
    for row in found:
        try:
            keep(row)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path}: row {row.get('token')!r} is not as nuScenes describes it ({type(error).__name__}: {error}); "
                f"{remedy}"
            ) from error


def _dangling(folder: Path, table: str, of: str, token: str, remedy: str) -> DataError:
    return DataError(
        f"{folder / of}.json: no row {token!r}, which {table}.json refers to; the tables are not of one release, or "
        f"one is incomplete; {remedy}"
    )


def _numbers(values: object, count: int) -> tuple[float, ...]:
    """A list of `count` numbers. Raises `ValueError` or `TypeError` for anything else."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"expected {count} numbers, got {values!r}")
    return tuple(map(float, values))
