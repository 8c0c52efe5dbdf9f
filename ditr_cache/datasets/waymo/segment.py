"""One Waymo segment: its files, opened once per process, and what the frames of a dataset load from them.

The loaders are functions of a small key, so that samples can be sent to other processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.images import read_color
from ditr_cache.datasets.waymo.camera import (
    CAMERAS,
    Lens,
    Shutter,
    image_from_frame,
    released_projections,
    rolling_projection,
)
from ditr_cache.datasets.waymo.lidar import TOP, LidarTables, frame_pose, read_points, scans
from ditr_cache.datasets.waymo.tables import COMPONENTS, Table, component_path
from ditr_cache.errors import DataError
from ditr_cache.sample import Points, Projection

_OPEN_SEGMENTS = 2
"""Segments whose files stay open in memory: the one that is worked on, and another thread's."""


@dataclass(frozen=True)
class SegmentKey:
    """Which segment, and in which state its files are.

    Args:
        root: of the dataset.
        folder: of the split.
        context: Waymo's name of the segment.
        frames: time stamps of those of its frames that are samples.
        files: (component, size, modification time) of its files.
    """

    root: Path
    folder: str
    context: str
    frames: tuple[int, ...]
    files: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, root: Path, folder: str, context: str, frames: tuple[int, ...]) -> SegmentKey:
        """Key of a segment as it is on disk now."""
        files = []
        for component in COMPONENTS:
            path = component_path(root, folder, component, context)
            if path.is_file():
                found = path.stat()
                files.append((component, found.st_size, found.st_mtime_ns))
        return cls(root, folder, context, frames, tuple(files))

    def has(self, component: str) -> bool:
        """Whether the component's file is there."""
        return any(name == component for name, _, _ in self.files)

    def path(self, component: str) -> Path:
        """File of a component."""
        return component_path(self.root, self.folder, component, self.context)


class Segment:
    """The components of a segment, each opened when it is first asked for."""

    def __init__(self, key: SegmentKey) -> None:
        self.key = key
        self._frames = frozenset(key.frames)
        self._tables: dict[str, Table] = {}
        self._lock = Lock()

    def table(self, component: str) -> Table:
        """A component. Raises `DataError` where its file cannot be read."""
        with self._lock:
            if component not in self._tables:
                self._tables[component] = Table(self.key.path(component), self._frames)
            return self._tables[component]


@lru_cache(maxsize=_OPEN_SEGMENTS)
def open_segment(key: SegmentKey) -> Segment:
    """The segment of a key: the same object as long as its files are the same."""
    return Segment(key)


@lru_cache(maxsize=1)  # also every rolling projection asks for the points of its frame
def load_points(key: SegmentKey, timestamp: int, returns: tuple[int, ...], classes: int) -> Points:
    """Points of a frame, see `read_points`."""
    segment = open_segment(key)
    labels = segment.table("lidar_segmentation") if key.has("lidar_segmentation") else None
    tables = LidarTables(
        lidar=segment.table("lidar"),
        calibration=segment.table("lidar_calibration"),
        pixel_pose=segment.table("lidar_pose"),
        vehicle_pose=segment.table("vehicle_pose"),
        labels=labels if labels is not None and (timestamp, TOP) in labels else None,
    )
    return read_points(tables, timestamp, returns, classes)


def load_image(key: SegmentKey, timestamp: int, number: int, lens: Lens) -> NDArray[np.uint8]:
    """Image [H, W, 3] of a camera, cropped as its lens says.

    Raises:
        DataError: no image, or one that is damaged or of another size than the calibration says.
    """
    images = open_segment(key).table("camera_image")
    where = f"{images.path}: image of camera {CAMERAS[number]} at {timestamp}"
    content = images.binary("image", timestamp, number)
    if not content:
        raise DataError(f"{where} is empty; download the file again")
    return read_color(content, size=(lens.whole.width, lens.whole.height), where=where)[lens.top :]


def load_released(key: SegmentKey, timestamp: int, returns: tuple[int, ...], number: int, lens: Lens) -> Projection:
    """Where Waymo itself says that the frame's points fall in an image."""
    found = _released(key, timestamp, returns)[number]
    return replace(found, v=found.v - lens.top)


@lru_cache(maxsize=1)  # every camera of a frame asks for the same
def _released(key: SegmentKey, timestamp: int, returns: tuple[int, ...]) -> dict[int, Projection]:
    segment = open_segment(key)
    return released_projections(
        scans(segment.table("lidar"), timestamp, returns), segment.table("lidar_camera_projection"), timestamp
    )


def load_rolling(
    key: SegmentKey, timestamp: int, returns: tuple[int, ...], classes: int, number: int, lens: Lens, shutter: Shutter
) -> Projection:
    """Where the frame's points fall in an image that was read out while the vehicle moved."""
    segment = open_segment(key)
    pose = image_from_frame(
        segment.table("camera_image"), timestamp, number, frame_pose(segment.table("vehicle_pose"), timestamp)
    )
    return rolling_projection(load_points(key, timestamp, returns, classes).coord, pose, lens, shutter)
