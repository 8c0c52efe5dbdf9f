"""nuScenes in its official layout: the keyframes of the lidar, its six cameras, and lidarseg's labels.

```
ROOT/v1.0-trainval/*.json  v1.0-test/*.json  v1.0-mini/*.json        tables, see `tables`
ROOT/samples/LIDAR_TOP/*.pcd.bin  samples/CAM_*/*.jpg                 keyframes
ROOT/lidarseg/v1.0-trainval/<token>_lidarseg.bin                      labels, see `labels`
```

A sample is one keyframe. Its id is the token of the lidar's `sample_data`, which names its label file and its
prediction on the benchmark's server; its world is the lidar's frame (x right, y forward, z up). The car moves between
the moments of the scan and of each image: points go from the lidar to the car, by the car's pose at the scan's time to
the map, from there by its pose at the image's time to the car, and to the camera, whose images have no distortion.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import SCANS_PER_PARTITION, ClassInfo, Dataset, Defaults, Need, Option, Release
from ditr_cache.datasets.frames import check_principal_point
from ditr_cache.datasets.images import read_color
from ditr_cache.datasets.nuscenes import labels as nuscenes_labels
from ditr_cache.datasets.nuscenes.labels import read_labels
from ditr_cache.datasets.nuscenes.release import (
    META,
    MINI,
    PAGE,
    TEST,
    TRAINVAL,
    NuScenesRelease,
    released_file,
    versions,
)
from ditr_cache.datasets.nuscenes.tables import CAMERAS, LIDAR, Frame, Pose
from ditr_cache.errors import DataError, MissingDataError, errors_at
from ditr_cache.sample import Camera, Points, Sample, View
from ditr_cache.schema import LinkSettings

MAX_POSE_LAG = 10_000
"""Microseconds between a frame and its pose, which have the same time stamp: a car drives 15 cm."""

MAX_IMAGE_LAG = 250_000
"""Microseconds between a scan and its image: samples are 500 000 apart, so a later one belongs to another sample. As a
rule it is less than 50 000; whatever the car drove in between is compensated."""

MAX_POINTS = 2**20
"""Most points of a scan that is read: the lidar makes 35 000, more is no scan of it."""

MAX_STRENGTH = 255.0
"""The lidar's intensity is in 0..255; recipes want it in 0..1."""

_VALUES = 5  # of a point: x, y, z, intensity, ring
_UNIT_TOLERANCE = 1e-3  # of a quaternion's length; the release's are exact to 1e-9


class NuScenesDataset(Dataset):
    """nuScenes with the 16 classes of its lidar segmentation benchmark.

    Splits are `train` and `val` (of v1.0-mini its own: `mini_train` and `mini_val`), and `test` where v1.0-test is
    read; their ids are in the order of scenes and of time.

    Args:
        root: folder that the archives were unpacked in. Samples whose tables are there are the dataset: those whose
            archive is missing are listed, too, and fail when they are read.
        version: the release to read; `auto` takes v1.0-trainval, or v1.0-mini where that is not there, and v1.0-test.
        labels: `none` does without lidarseg.

    Raises:
        MissingDataError: the tables of the release, or of lidarseg, are not there.
        DataError: tables that cannot be read, or do not belong together.
    """

    name: ClassVar[str] = "nuscenes"
    title: ClassVar[str] = "nuScenes, the 16 classes of its lidar segmentation benchmark"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(
            "v1.0-trainval/*.json (or v1.0-mini, v1.0-test)",
            "tables: scenes, samples, calibration, poses",
            f"v1.0-trainval_meta.tgz (or v1.0-mini.tgz, v1.0-test_meta.tgz), {PAGE}",
        ),
        Need(
            "samples/LIDAR_TOP/*.pcd.bin",
            "points, strength",
            "v1.0-trainval01_blobs.tgz to 10 or, a seventh of that, v1.0-trainval01_keyframes.tgz to 10 (or "
            "v1.0-mini.tgz, v1.0-test_blobs.tgz)",
        ),
        Need(
            "samples/CAM_*/*.jpg",
            "images; where one is missing, the points that it sees get no feature from it",
            "the same archives",
            optional=True,
        ),
        Need(
            "v1.0-trainval/lidarseg.json, category.json, lidarseg/v1.0-trainval/*_lidarseg.bin",
            "labels; --option labels=none does without",
            "nuScenes-lidarseg-all-v1.0.tar.bz2 (or nuScenes-lidarseg-mini-v1.0.tar.bz2), unpacked over the tables",
        ),
    )
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "version",
            "auto",
            "release to read; auto: v1.0-trainval if it is there, else v1.0-mini, and v1.0-test if it is there",
            choices=("auto", TRAINVAL, TEST, MINI),
        ),
        Option(
            "labels", "lidarseg", "none: points without labels, lidarseg is not needed", choices=("lidarseg", "none")
        ),
    )
    defaults: ClassVar[Defaults] = Defaults(
        grid=(27, 48), links=LinkSettings(depth_min=1.0, occlusion="none"), layout="views"
    )
    samples_per_partition: ClassVar[int] = SCANS_PER_PARTITION
    release: ClassVar[Release | None] = Release(
        samples=34_149 + 6_008,
        images=6 * (34_149 + 6_008),
        points=34_700,
        coverage=0.58,
        views_per_point=1.1,
        source="34,149 samples of v1.0-trainval, 6,008 of v1.0-test and six cameras are official; points, coverage and "
        "views per point are those of one real keyframe",
    )

    def __init__(self, root: Path, *, version: str = "auto", labels: str = "lidarseg") -> None:
        self.root = root
        releases = [NuScenesRelease(root, name, labelled=labels != "none") for name in versions(root, version)]
        self.ids = {split: ids for release in releases for split, ids in release.ids.items()}
        self._release_of = {i: release for release in releases for ids in release.ids.values() for i in ids}
        if not self._release_of:
            raise MissingDataError(
                f"dataset {self.name!r} at {str(root)!r}: the tables of {', '.join(r.name for r in releases)} "
                f"list no sample of an official scene; unpack {META[releases[0].name]} again ({PAGE})"
            )

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes by label index."""
        return nuscenes_labels.classes()

    def sequence(self, sample_id: str) -> str:
        """The scene that a sample belongs to.

        Those of v1.0-mini have names of their own: two of its training scenes are validation scenes of v1.0-trainval,
        and a cache that grows from one to the other must not take them for done.
        """
        release = self._release_of[sample_id]
        scene = release.tables.scene(sample_id)
        return f"mini-{scene}" if release.name == MINI else scene

    def read(self, sample_id: str) -> Sample:
        """One keyframe; points, labels and pixels are read only when asked for.

        Raises:
            UnknownNameError: no such sample in any split.
            MissingDataError: its scan or its labels are not there.
            DataError: the lidar's calibration or pose cannot be used.
        """
        if sample_id not in self._release_of:
            raise self.unknown_sample(sample_id, self._release_of)
        release = self._release_of[sample_id]
        scene = release.tables.scene(sample_id)
        remedy = f"unpack {release.archive(scene)} ({PAGE})"
        lidar = release.tables.frame(sample_id, LIDAR)
        with errors_at(f"sample {sample_id!r} of {scene}"):
            global_from_lidar = global_from_sensor(lidar)
        scan = released_file(self.root, lidar.filename, remedy)
        labels = release.label_file(sample_id)
        views: list[View] = []
        broken: list[tuple[str, str]] = []
        for channel in CAMERAS:
            try:
                frame = release.tables.frame(sample_id, channel)
                views.append(_view(self.root, frame, global_from_lidar, lidar.timestamp, remedy))
            except DataError as error:
                broken.append((channel, str(error)))
        return Sample(
            id=sample_id,
            split=release.split_of[scene],
            views=tuple(views),
            load_points=partial(read_points, scan, labels, release.categories, remedy, release.lidarseg_remedy),
            broken_views=tuple(broken),
        )


def rigid(pose: Pose) -> NDArray[np.float64]:
    """[4, 4] `parent_from_child`. Raises `DataError` where the quaternion is not of unit length, or not finite."""
    length = math.hypot(*pose.rotation)
    if not abs(length - 1) < _UNIT_TOLERANCE or not np.isfinite(pose.translation).all():
        raise DataError(
            f"quaternion {list(pose.rotation)} has length {length:.6g}, translation {list(pose.translation)}; expected "
            "length 1 and finite metres: the table is damaged, unpack it again"
        )
    w, x, y, z = np.array(pose.rotation) / length
    matrix = np.eye(4)
    matrix[:3, :3] = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    matrix[:3, 3] = pose.translation
    return matrix


def global_from_sensor(frame: Frame) -> NDArray[np.float64]:
    """[4, 4], by the car's pose at the frame's own time. Raises `DataError` for a pose of another time."""
    lag = abs(frame.pose_timestamp - frame.timestamp)
    channel = frame.sensor.channel
    if lag > MAX_POSE_LAG:
        raise DataError(
            f"{channel}: its ego pose is {lag / 1e6:.3f} s away from it (time stamps {frame.pose_timestamp} and "
            f"{frame.timestamp}), expected the pose of its own time; the tables are damaged, unpack them again"
        )
    matrices = []
    for table, pose in (("ego_pose", frame.global_from_ego), ("calibrated_sensor", frame.sensor.ego_from_sensor)):
        with errors_at(f"{channel}, {table}"):
            matrices.append(rigid(pose))
    global_from_ego, ego_from_sensor = matrices
    return global_from_ego @ ego_from_sensor


def _view(root: Path, frame: Frame, global_from_lidar: NDArray[np.float64], scanned: int, remedy: str) -> View:
    """The view of one camera.

    Args:
        root: of the dataset.
        frame: of the camera.
        global_from_lidar: at the time of the scan.
        scanned: time stamp of the scan.
        remedy: which archive holds the image.

    Raises:
        MissingDataError: the image is not there.
        DataError: a pose, intrinsics or a time stamp that cannot be used.
    """
    channel = frame.sensor.channel
    lag = abs(frame.timestamp - scanned)
    if lag > MAX_IMAGE_LAG:
        raise DataError(
            f"{frame.filename}: taken {lag / 1e6:.3f} s away from the scan (time stamps {frame.timestamp} and "
            f"{scanned}), expected less than {MAX_IMAGE_LAG / 1e6:g} s: it belongs to another sample"
        )
    width, height = frame.size
    try:
        camera = Camera.from_matrix(frame.sensor.intrinsic or np.zeros((0, 0)), width=width, height=height)
    except (DataError, ValueError) as error:
        raise DataError(f"{channel}, calibrated_sensor: {error}") from error
    camera_from_global = np.linalg.inv(global_from_sensor(frame))
    image = released_file(root, frame.filename, remedy)
    return View(
        id=channel,
        camera=check_principal_point(camera, f"{channel}, calibrated_sensor"),
        camera_from_world=camera_from_global @ global_from_lidar,
        load_image=partial(_read_image, image, frame.size, remedy),
    )


def _read_image(path: Path, size: tuple[int, int], remedy: str) -> NDArray[np.uint8]:
    try:
        return read_color(path, size=size, where=str(path))
    except DataError as error:
        raise type(error)(f"{error}; images have to be as released, {remedy}") from error


def read_points(
    path: Path, labels: Path | None, categories: NDArray[np.int16] | None, remedy: str, lidarseg_remedy: str
) -> Points:
    """Points of a scan, in the frame of the lidar: every return, those from the car itself, too.

    Args:
        path: of the `.pcd.bin` file.
        labels: of the label file; None where the scan has none.
        categories: value of a label -> label index.
        remedy, lidarseg_remedy: which archive holds the scan, and which its labels.

    Raises:
        DataError: files that are truncated, empty, or do not belong together.
    """
    try:
        size = path.stat().st_size
        count, rest = divmod(size, 4 * _VALUES)
        if rest or not 0 < count <= MAX_POINTS:
            raise DataError(
                f"{path}: {size} bytes, expected 1 to {MAX_POINTS} points of {_VALUES} float32 (x, y, z, intensity, "
                f"ring), {4 * _VALUES} bytes each; the file is truncated, or no scan of nuScenes: {remedy}"
            )
        values = np.fromfile(path, dtype="<f4", count=_VALUES * count)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    if len(values) != _VALUES * count:
        raise DataError(f"{path}: the file ends after {len(values)} of {_VALUES * count} values; {remedy}")
    scan = values.reshape(count, _VALUES)
    segment = None
    if labels is not None and categories is not None:
        segment = read_labels(labels, count, categories, lidarseg_remedy)
    with errors_at(path):
        return Points(
            coord=np.ascontiguousarray(scan[:, :3]),
            strength=(scan[:, 3] / MAX_STRENGTH).astype(np.float32),
            segment=segment,
        )
