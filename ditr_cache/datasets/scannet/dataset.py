"""ScanNet v2 in its official layout, and the synthetic rooms, which are written in the same one.

```
ROOT/scans/<id>/<id>_vh_clean_2.ply, <id>.txt                                  scans_test/ likewise, without labels
ROOT/scans/<id>/<id>.aggregation.json, <id>_vh_clean_2.0.010000.segs.json      objects; or, without instances:
ROOT/scans/<id>/<id>_vh_clean_2.labels.ply
ROOT/scannetv2-labels.combined.tsv                                             what objects are, for all scans
ROOT/scans/<id>/<id>.sens                                                      or the frames exported from it:
ROOT/scans/<id>/color/*.jpg  depth/*.png  pose/*.txt  intrinsic/intrinsic_color.txt  intrinsic/intrinsic_depth.txt
```

Mesh and poses are both in the scan's own frame, so the `axisAlignment` of `<id>.txt` is not applied: coordinates stay
those of the files. `<id>_vh_clean.aggregation.json` and `<id>_vh_clean.segs.json` are of the high-resolution mesh and
not read. The split lists in `splits/` are those of https://github.com/ScanNet/ScanNet
(Tasks/Benchmark), sorted; lists that lie next to the data win over them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo, Dataset, Defaults, Need, Release
from ditr_cache.datasets.documents import read_lines
from ditr_cache.datasets.frames import first_image_size, numbered_files
from ditr_cache.datasets.images import read_color, read_depth
from ditr_cache.datasets.meshes import Labels, ReadLabels, read_mesh_points
from ditr_cache.datasets.nyu40 import ROOMS13, SCANNET20, nyu40_to_index
from ditr_cache.datasets.ply import read_ply
from ditr_cache.datasets.roots import other_root
from ditr_cache.datasets.scannet.annotation import (
    AGGREGATION,
    LABEL_TABLE,
    SEGMENTS,
    read_annotation,
    read_label_table,
)
from ditr_cache.datasets.scannet.cameras import (
    exported_camera,
    read_info,
    read_tracked_pose,
    released_camera,
    tracked_pose,
)
from ditr_cache.datasets.scannet.sens import open_sens
from ditr_cache.datasets.shipped import shipped_lines
from ditr_cache.errors import DataError, MissingDataError, shortened
from ditr_cache.sample import Sample, View
from ditr_cache.schema import LinkSettings

_LOG = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
_SCAN_FOLDERS = ("scans", "scans_test")
_LIST_FOLDERS = (".", "splits", "meta_data", "Tasks/Benchmark")
_TABLE_FOLDERS = (".", "tasks", "meta_data", "scans")
_DEPTH = "export depth with ScanNet's SensReader (--export_depth_images)"
_VIDEO_FRAMES = 100  # a scan has hundreds: fewer frames in a row are somebody's choice


MESH_NEED = Need("scans/<id>/<id>_vh_clean_2.ply", "points, colour, mesh", "download-scannet.py --type _vh_clean_2.ply")
OBJECT_NEEDS = (
    Need("scans/<id>/<id>.aggregation.json", "objects", "download-scannet.py --type .aggregation.json"),
    Need(
        "scans/<id>/<id>_vh_clean_2.0.010000.segs.json",
        "segments that objects are made of",
        "download-scannet.py --type _vh_clean_2.0.010000.segs.json",
    ),
    Need("scannetv2-labels.combined.tsv", "categories of objects -> classes", "download-scannet.py --label_map"),
)
FRAME_NEEDS = (
    Need(
        "scans/<id>/<id>.txt",
        "image sizes; without it intrinsics of resized exported frames are refused",
        "download-scannet.py --type .txt",
        optional=True,
    ),
    Need(
        "scans/<id>/<id>.sens",
        "frames; or color/ depth/ pose/ intrinsic/ exported from it; without them points have no features",
        "download-scannet.py --type .sens",
        optional=True,
    ),
)
TEST_NEED = Need("scans_test/<id>/", "the same without labels", "download-scannet.py, test scans", optional=True)


class ScanNetDataset(Dataset):
    """ScanNet v2 with the 20 classes of its benchmark; the splits are those that have a list.

    Args:
        root: folder that holds `scans/` and, where downloaded, `scans_test/`. Scans may be missing: those on disk are
            the dataset.

    Raises:
        MissingDataError: neither folder is there, or no scan is in them.
        DataError: the label table cannot be used.
    """

    name: ClassVar[str] = "scannet"
    title: ClassVar[str] = "ScanNet v2, the 20 classes of its benchmark"
    needs: ClassVar[tuple[Need, ...]] = (
        MESH_NEED,
        Need(
            "scans/<id>/<id>_vh_clean_2.labels.ply",
            "labels, where one of the next three is missing",
            "download-scannet.py --type _vh_clean_2.labels.ply",
        ),
        *(
            replace(
                need,
                content=f"{need.content} (instances; without them scannet/plain-strong cannot run)",
                optional=True,
            )
            for need in OBJECT_NEEDS
        ),
        *FRAME_NEEDS,
        TEST_NEED,
    )
    release: ClassVar[Release | None] = Release(
        samples=1613,
        images=270_000,
        points=150_000,
        coverage=0.95,
        views_per_point=12.0,
        source=(
            "1201 + 312 + 100 scans, and 2.5 million frames of all but the 100, are official; 0.2 million frames of "
            "the 100, 150,000 vertices a mesh, coverage and views per point are estimates"
        ),
    )
    defaults: ClassVar[Defaults] = Defaults(links=LinkSettings(depth_min=1.0, depth_max=4.0))
    class_table: ClassVar[Mapping[int, ClassInfo]] = SCANNET20
    """Id in the annotation (here NYU40's) -> class, in the order of the label indices."""
    label_column: ClassVar[str] = "nyu40id"
    """Column of the label table with these ids."""
    shipped_lists: ClassVar[bool] = True
    """Whether the official lists serve where there are none next to the data."""
    video_stride: ClassVar[int] = 10
    """Recommended stride where every frame of the video, of 30 Hz, is there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        folders = [root / name for name in _SCAN_FOLDERS if (root / name).is_dir()]
        if not folders:
            need = self.needs[0]
            hint = other_root(root, _has_scans, f"{need.path} there, from: {need.download}")
            raise MissingDataError(f"dataset {self.name!r}: no folder 'scans' in {str(root)!r}; {hint}")
        self._scans = {
            scan.name: scan
            for folder in reversed(folders)
            for scan in folder.iterdir()
            if scan.is_dir() and not scan.name.startswith(".")
        }
        if not self._scans:
            raise MissingDataError(
                f"dataset {self.name!r}: no scan in {' or '.join(str(f) for f in folders)}, expected folders such as "
                "scene0000_00; download some with ScanNet's download script (--id scene0000_00)"
            )
        self.ids = self._split_ids()
        tables = (root / folder / LABEL_TABLE for folder in _TABLE_FOLDERS)
        self._table = next((path for path in tables if path.is_file()), None)
        self._numbers = {} if self._table is None else read_label_table(self._table, self.label_column)
        self._no_instances_said = False

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes by label index."""
        return tuple(self.class_table.values())

    def read(self, sample_id: str) -> Sample:
        """One scan; pixels, mesh and labels are read only when asked for.

        Raises:
            UnknownNameError: no such scan in any split.
            MissingDataError: the scan has no mesh or no labels, or only some of the folders of exported frames.
            DataError: its `.sens` file or its intrinsics cannot be used.
        """
        split = self.split_of(sample_id)
        scan = self._scans[sample_id]
        mesh, labels = released_file(scan, "_vh_clean_2.ply"), self._labels(scan, annotated=split != "test")
        views, broken, video = _read_frames(scan)
        return Sample(
            id=sample_id,
            split=split,
            views=views,
            load_points=partial(read_mesh_points, mesh, labels),
            broken_views=broken,
            every_nth_frame=self.video_stride if video else 1,
        )

    def _labels(self, scan: Path, *, annotated: bool) -> ReadLabels | None:
        """How to read the labels of a scan; None where it has none and need not be annotated.

        Raises:
            MissingDataError: a file of the annotation is missing.
        """
        aggregation, segments = (scan / f"{scan.name}{suffix}" for suffix in (AGGREGATION, SEGMENTS))
        missing = [path for path in (aggregation, segments) if not path.is_file()]
        if self._table is not None and not missing:
            return partial(read_annotation, aggregation, segments, self._table, self._numbers, self.class_table)
        if not annotated and not (scan / f"{scan.name}_vh_clean_2.labels.ply").is_file():
            return None
        labels = released_file(scan, "_vh_clean_2.labels.ply")
        self._say_no_instances(missing[0] if missing else self.root / LABEL_TABLE)
        return partial(_labels_of_mesh, labels, self.class_table)

    def _say_no_instances(self, missing: Path) -> None:
        """Once: hundreds of scans lack the same files."""
        if not self._no_instances_said:
            self._no_instances_said = True
            _LOG.warning(
                "dataset %r: %s is missing: scans that lack it or its like have no instances, without which recipe "
                "scannet/plain-strong cannot run; download --type %s, --type %s and --label_map",
                self.name,
                missing,
                AGGREGATION,
                SEGMENTS,
            )

    def _split_ids(self) -> dict[str, list[str]]:
        """Split -> sorted ids of the scans on disk."""
        lists = {split: path for split in SPLITS if (path := self._list_beside_data(split)) is not None}
        if lists:
            listed = {split: set(read_lines(path, "get ScanNet's list again")) for split, path in lists.items()}
        elif self.shipped_lists:
            listed = {split: set(shipped_lines("scannet/splits", f"scannetv2_{split}.txt")) for split in SPLITS}
        else:
            listed = {}
        ids = {split: sorted(names & self._scans.keys()) for split, names in listed.items()}
        found = sum(map(len, ids.values()))
        if not lists and not found:
            _LOG.warning(
                "dataset %r: no split list (scannetv2_train.txt, ...) next to the data at %s: all %d scans are in "
                "split 'train'",
                self.name,
                self.root,
                len(self._scans),
            )
            return {"train": sorted(self._scans)}
        if found < len(self._scans):
            unlisted = sorted(self._scans.keys() - set().union(*listed.values()))
            _LOG.warning(
                "dataset %r: %d scans at %s are in no split list and are left out: %s",
                self.name,
                len(unlisted),
                self.root,
                shortened(unlisted),
            )
        return ids

    def _list_beside_data(self, split: str) -> Path | None:
        candidates = (self.root / folder / f"scannetv2_{split}.txt" for folder in _LIST_FOLDERS)
        return next((path for path in candidates if path.is_file()), None)


class RoomsDataset(ScanNetDataset):
    """Rooms that `ditr-cache synthesize` wrote: the ScanNet layout with classes and split lists of their own."""

    name: ClassVar[str] = "rooms"
    title: ClassVar[str] = "generated rooms (`ditr-cache synthesize`)"
    needs: ClassVar[tuple[Need, ...]] = (Need("scans/<id>/", "everything", "ditr-cache synthesize ROOT"),)
    release: ClassVar[Release | None] = None
    defaults: ClassVar[Defaults] = Defaults()
    class_table: ClassVar[Mapping[int, ClassInfo]] = ROOMS13
    shipped_lists: ClassVar[bool] = False

    def _say_no_instances(self, missing: Path) -> None:
        """They never have any."""


def _has_scans(root: Path) -> bool:
    return any((root / name).is_dir() for name in _SCAN_FOLDERS)


def released_file(scan: Path, suffix: str) -> Path:
    """The file of a scan that ScanNet's script names `--type suffix`. Raises `MissingDataError`."""
    path = scan / f"{scan.name}{suffix}"
    if not path.is_file():
        raise MissingDataError(f"{path}: no such file; download it with ScanNet's script (--type {suffix})")
    return path


def _labels_of_mesh(path: Path, class_table: Mapping[int, ClassInfo], vertices: int) -> Labels:
    """Classes of the vertices of a mesh by the property `label` of its copy with labels."""
    label = read_ply(path).vertices.get("label")
    if label is None:
        raise DataError(f"{path}: no vertex property 'label'")
    if len(label) != vertices:
        raise DataError(
            f"{path}: {len(label)} labels for the {vertices} vertices of {path.name.replace('.labels', '')}, expected "
            "one each; the two files are of different meshes, download both again"
        )
    return nyu40_to_index(label, class_table), None


Frames = tuple[tuple[View, ...], tuple[tuple[str, str], ...], bool]
"""Views, broken views (id, error), and whether they are every frame of a video."""


def _read_frames(scan: Path) -> Frames:
    """Exported frames where there are some, else those of the `.sens` file; none, and why, where neither is there."""
    colors = numbered_files(scan / "color", (".jpg", ".jpeg", ".png")) if (scan / "color").is_dir() else {}
    if colors:
        return _exported_frames(scan, colors)
    path = scan / f"{scan.name}.sens"
    if path.is_file():
        return _sens_frames(path)
    error = (
        f"{path}: no such file, and no frames exported from it (folders color, depth, pose and intrinsic, with images "
        "in color): its points have no features; download it with ScanNet's script (--type .sens), then run again with "
        "--retry-incomplete"
    )
    return (), (("", error),), False


def _sens_frames(path: Path) -> Frames:
    sens = open_sens(path)
    camera = released_camera(sens.intrinsic_color, sens.color_size, None, f"{path} colour")
    depth_camera = released_camera(sens.intrinsic_depth, sens.depth_size, None, f"{path} depth")
    if not np.allclose(sens.extrinsic_color, sens.extrinsic_depth, atol=1e-3):
        _LOG.warning("%s: colour and depth have different extrinsics; they are taken as registered", path)
    views, broken = [], []
    for frame, pose in enumerate(sens.world_from_camera):
        try:
            camera_from_world = tracked_pose(pose)
        except DataError as error:
            broken.append((str(frame), f"{path} frame {frame}: {error}"))
            continue
        views.append(
            View(
                id=str(frame),
                camera=camera,
                camera_from_world=camera_from_world,
                load_image=partial(sens.read_color, frame),
                depth_camera=depth_camera,
                load_depth=partial(sens.read_depth, frame),
            )
        )
    return tuple(views), tuple(broken), True


def _exported_frames(scan: Path, colors: Mapping[int, Path]) -> Frames:
    depths = numbered_files(scan / "depth", (".png",)) if (scan / "depth").is_dir() else {}
    if not depths:
        error = (
            f"{scan / 'depth'}: no depth maps of the {len(colors)} images in color: its points have no features; "
            f"{_DEPTH}, then run again with --retry-incomplete"
        )
        return (), (("", error),), False
    broken: list[tuple[str, str]] = []
    frames: list[tuple[str, NDArray[np.float64], Path, Path]] = []
    for number, color in colors.items():
        try:
            depth = depths.get(number)
            if depth is None:
                raise MissingDataError(f"{scan / 'depth' / color.stem}.png: no depth file for {color.name}; {_DEPTH}")
            frames.append((color.stem, read_tracked_pose(scan / "pose" / f"{color.stem}.txt"), color, depth))
        except DataError as error:
            broken.append((color.stem, str(error)))
    if not frames:
        return (), tuple(broken), False

    info = read_info(scan / f"{scan.name}.txt")
    camera = exported_camera(scan, info, "color", first_image_size([f[2] for f in frames]))
    depth_camera = exported_camera(scan, info, "depth", first_image_size([f[3] for f in frames]))
    views = tuple(
        View(
            id=stem,
            camera=camera,
            camera_from_world=pose,
            load_image=partial(read_color, color, size=(camera.width, camera.height), where=str(color)),
            depth_camera=depth_camera,
            load_depth=partial(read_depth, depth, size=(depth_camera.width, depth_camera.height), where=str(depth)),
        )
        for stem, pose, color, depth in frames
    )
    numbers = list(colors)
    return views, tuple(broken), len(numbers) == numbers[-1] - numbers[0] + 1 >= _VIDEO_FRAMES
