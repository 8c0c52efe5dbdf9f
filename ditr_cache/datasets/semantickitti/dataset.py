"""SemanticKITTI in its official layout: the labels of KITTI odometry's lidar scans, with the left colour camera.

```
ROOT/dataset/sequences/<00 to 21>/velodyne/<000000>.bin  labels/<000000>.label  image_2/<000000>.png  calib.txt
```

A sample is one scan, its id `<sequence>/<scan>` as on the benchmark's server, its world the frame of the velodyne (x
forward, y left, z up). KITTI compensates the motion within a scan to the moment at which the cameras trigger, so the
image of the same number belongs to it, and neither poses nor time stamps come in between.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import SCANS_PER_PARTITION, ClassInfo, Dataset, Defaults, Need, Option, Release
from ditr_cache.datasets.frames import first_image_size
from ditr_cache.datasets.images import read_color
from ditr_cache.datasets.semantickitti import labels as semantickitti_labels
from ditr_cache.datasets.semantickitti.labels import LABELS_ZIP, read_labels
from ditr_cache.datasets.semantickitti.odometry import (
    CALIB_ZIP,
    COLOR_ZIP,
    VELODYNE_ZIP,
    OdometryFolders,
    check_times,
    read_calibration,
)
from ditr_cache.errors import DataError, MissingDataError, errors_at, shortened
from ditr_cache.pointcloud.readers import open_cloud
from ditr_cache.sample import Camera, Points, Sample, View
from ditr_cache.schema import LinkSettings

_LOG = logging.getLogger(__name__)

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "val": ("08",),
    "test": ("11", "12", "13", "14", "15", "16", "17", "18", "19", "20", "21"),
}
"""Split -> its sequences: `split` of SemanticKITTI's `config/semantic-kitti.yaml`."""

_SPLIT_OF = {sequence: split for split, sequences in SPLITS.items() for sequence in sequences}

SCANS: dict[str, int] = {
    "00": 4541, "01": 1101, "02": 4661, "03": 801, "04": 271, "05": 2761, "06": 1101, "07": 1101, "08": 4071,
    "09": 1591, "10": 1201, "11": 921, "12": 1061, "13": 3281, "14": 631, "15": 1901, "16": 1731, "17": 491,
    "18": 1801, "19": 4981, "20": 831, "21": 2721,
}  # fmt: skip
"""Sequence -> number of scans in the release."""

CAMERA = "image_2"
"""Folder of the left colour camera, and the id of every view."""

MAX_POINTS = 2**21
"""Most points of a scan that is read: the lidar makes 130 000, more is no scan of it."""


class SemanticKITTIDataset(Dataset):
    """SemanticKITTI with the 19 classes of its single-scan benchmark; all of its splits, whatever is on disk of them.

    Args:
        root: folder that the zips were unpacked in, or `dataset` in it, or one with a folder for each zip. Sequences
            may be missing: those on disk are the dataset. Within a sequence, every scan that has a label has to be
            there.
        labels: `official`, or `none`: KITTI odometry as it is, for distillation, which reads no labels.

    Raises:
        MissingDataError: no folder `sequences`, or no scan in it.
    """

    name: ClassVar[str] = "semantickitti"
    title: ClassVar[str] = "SemanticKITTI, the 19 classes of its single-scan benchmark"
    needs: ClassVar[tuple[Need, ...]] = (
        Need("dataset/sequences/<00-21>/velodyne/<scan>.bin", "points, strength", VELODYNE_ZIP),
        Need(
            "dataset/sequences/<00-10>/labels/<scan>.label",
            "labels, instances; --option labels=none does without",
            LABELS_ZIP,
        ),
        Need(
            "dataset/sequences/<00-21>/calib.txt",
            "calibration with Tr: unpack it last, the other zips have a calib.txt without",
            CALIB_ZIP,
        ),
        Need(
            "dataset/sequences/<00-21>/image_2/<scan>.png",
            "images; without them the points of a sequence are kept without features",
            COLOR_ZIP,
            optional=True,
        ),
        Need(
            "dataset/sequences/<00-21>/times.txt",
            "time stamps; without them it is not checked that they rise",
            CALIB_ZIP,
            optional=True,
        ),
    )
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "labels",
            "official",
            "none: points without labels, SemanticKITTI's own zip is not needed",
            choices=("official", "none"),
        ),
    )
    defaults: ClassVar[Defaults] = Defaults(grid=(27, 89), links=LinkSettings(occlusion="none"), layout="views")
    samples_per_partition: ClassVar[int] = SCANS_PER_PARTITION
    release: ClassVar[Release | None] = Release(
        samples=sum(SCANS.values()),
        images=sum(SCANS.values()),
        points=121_000,
        coverage=0.15,
        views_per_point=1.0,
        source="43,552 scans, one image each, are official; points: an estimate from the size of KITTI's archive at 16 "
        "bytes a point (the 4,549 million of SemanticKITTI's paper would be 104,000 a scan); coverage: an estimate "
        "from the camera's field of view",
    )

    def __init__(self, root: Path, *, labels: str = "official") -> None:
        self.root = root
        self._labelled = labels != "none"
        self._folders = OdometryFolders(root, self.name)
        names = self._folders.names()
        self._scans = {name: scans for name in names if name in _SPLIT_OF and (scans := self._list(name))}
        if not self._scans:
            raise MissingDataError(
                f"dataset {self.name!r}: no scan such as 00/velodyne/000000.bin in "
                f"{' or '.join(str(p) for p in self._folders.places)}; unpack {VELODYNE_ZIP}"
            )
        self.ids = {split: self._ids_of(split) for split in SPLITS}
        self._posed_cameras: dict[str, tuple[Camera, NDArray[np.float64]]] = {}
        self._warn(names)

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes by label index."""
        return semantickitti_labels.classes()

    def sequence(self, sample_id: str) -> str:
        """The drive that a scan belongs to."""
        return sample_id.partition("/")[0]

    def read(self, sample_id: str) -> Sample:
        """One scan; points, labels and pixels are read only when asked for.

        Raises:
            UnknownNameError: no such scan.
            MissingDataError: its points, its labels (where it has and wants some), or the calibration of its image.
            DataError: a calibration that cannot be used, or is not of its images.
        """
        sequence, _, scan = sample_id.partition("/")
        scans = self._scans.get(sequence, set())
        if scan not in scans:
            firsts = (f"{name}/{min(of_sequence)}" for name, of_sequence in self._scans.items())
            known = (f"{sequence}/{s}" for s in scans) if scans else firsts
            raise self.unknown_sample(sample_id, known)
        cloud = self._folders.file(sequence, f"velodyne/{scan}.bin", VELODYNE_ZIP)
        labels = None
        if self._has_labels(sequence):
            remedy = f"{LABELS_ZIP}, or --option labels=none"
            labels = self._folders.file(sequence, f"labels/{scan}.label", remedy)
        views, broken = self._views(sequence, scan)
        return Sample(
            id=sample_id,
            split=_SPLIT_OF[sequence],
            views=views,
            load_points=partial(read_points, cloud, labels),
            broken_views=broken,
        )

    def _views(self, sequence: str, scan: str) -> tuple[tuple[View, ...], tuple[tuple[str, str], ...]]:
        """The scan's one view, or else why there is none."""
        name = f"{CAMERA}/{scan}.png"
        found = self._folders.files(sequence, name)
        if not found:
            whole = "" if self._folders.has_folder(sequence, CAMERA) else f"sequence {sequence} has no images: "
            missing = f"{whole}{self._folders.expected(sequence, name)}: no such file; unpack {COLOR_ZIP}"
            return (), ((CAMERA, missing),)
        camera, camera_from_velodyne = self._posed_camera(sequence)
        view = View(
            id=CAMERA,
            camera=camera,
            camera_from_world=camera_from_velodyne,
            load_image=partial(read_color, found[0], size=(camera.width, camera.height), where=str(found[0])),
        )
        return (view,), ()

    def _posed_camera(self, sequence: str) -> tuple[Camera, NDArray[np.float64]]:
        """Camera and `camera_from_velodyne` of a sequence, whose images are of one size; read once."""
        if sequence not in self._posed_cameras:
            calibration = read_calibration(self._folders, sequence)
            for times in self._folders.files(sequence, "times.txt")[:1]:
                check_times(times, self._scans[sequence])
            scans = sorted(self._folders.scans(sequence, CAMERA, ".png"))
            size = first_image_size(self._folders.file(sequence, f"{CAMERA}/{scan}.png", COLOR_ZIP) for scan in scans)
            self._posed_cameras[sequence] = calibration.posed_camera(size)
        return self._posed_cameras[sequence]

    def _list(self, sequence: str) -> set[str]:
        """Scans of a sequence. A label without its scan counts: the scan is missing, and `read` says so."""
        scans = self._folders.scans(sequence, "velodyne", ".bin")
        if scans and self._has_labels(sequence):
            scans |= self._folders.scans(sequence, "labels", ".label")
        return scans

    def _has_labels(self, sequence: str) -> bool:
        """Whether the scans of a sequence need labels; those of the test split are not published."""
        return self._labelled and _SPLIT_OF[sequence] != "test"

    def _ids_of(self, split: str) -> list[str]:
        sequences = (s for s in SPLITS[split] if s in self._scans)
        return [f"{sequence}/{scan}" for sequence in sequences for scan in sorted(self._scans[sequence])]

    def _warn(self, names: Sequence[str]) -> None:
        """Log what is less, or other, than the release."""
        official = [name for name in names if name in _SPLIT_OF]
        other = [
            f"{name} ({len(scans)} of {SCANS[name]})"
            for name, scans in self._scans.items()
            if len(scans) != SCANS[name]
        ]
        no_images = [name for name in self._scans if not self._folders.has_folder(name, CAMERA)]
        for found, text in (
            ([n for n in names if n not in _SPLIT_OF], "folders that are no sequence 00 to 21 are left out"),
            ([n for n in official if n not in self._scans], f"sequences without scans (unpack {VELODYNE_ZIP})"),
            (other, "sequences with another number of scans than the release"),
            (no_images, f"sequences without images, whose points get no features (unpack {COLOR_ZIP})"),
        ):
            if found:
                _LOG.warning("dataset %r at %s: %s: %s", self.name, self.root, text, shortened(found))


def read_points(path: Path, labels: Path | None) -> Points:
    """Points of a scan, in the frame of the velodyne.

    Args:
        path: of the `.bin` file.
        labels: of the `.label` file; None where the scan has none.

    Raises:
        DataError: files that are truncated, empty, or do not belong together.
    """
    try:
        cloud = open_cloud(path)
        if cloud.count > MAX_POINTS:
            raise DataError(f"{path}: {cloud.count} points, expected a scan of at most {MAX_POINTS}")
        (scan,) = cloud.chunks(cloud.count)
    except DataError as error:
        raise DataError(f"{error}; unpack {VELODYNE_ZIP}") from error
    segment, instance = (None, None) if labels is None else read_labels(labels, cloud.count)
    with errors_at(path):
        return Points(
            coord=np.ascontiguousarray(scan.coord, dtype=np.float32),
            strength=scan.strength,
            segment=segment,
            instance=instance,
        )
