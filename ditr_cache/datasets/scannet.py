"""ScanNet v2 in its official layout, and the synthetic rooms, which are written in the same one.

```
ROOT/scans/<id>/<id>_vh_clean_2.ply, <id>_vh_clean_2.labels.ply, <id>.txt     scans_test/ likewise, without labels
ROOT/scans/<id>/<id>.sens                                                      or the frames exported from it:
ROOT/scans/<id>/color/*.jpg  depth/*.png  pose/*.txt  intrinsic/intrinsic_color.txt  intrinsic/intrinsic_depth.txt
```

Mesh and poses are both in the scan's own frame, so the `axisAlignment` of `<id>.txt` is not applied: coordinates stay
those of the files. The split lists in `scannet_splits/` are those of https://github.com/ScanNet/ScanNet
(Tasks/Benchmark), sorted; lists that lie next to the data win over them.
"""

from __future__ import annotations

import importlib.resources
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo, Dataset, Need
from ditr_cache.datasets.frames import (
    check_principal_point,
    first_image_size,
    invert_pose,
    numbered_files,
    read_matrix,
    read_pose,
)
from ditr_cache.datasets.images import read_color, read_depth
from ditr_cache.datasets.nyu40 import ROOMS13, SCANNET20, nyu40_to_index
from ditr_cache.datasets.ply import read_ply
from ditr_cache.datasets.sens import open_sens
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError
from ditr_cache.sample import Camera, Points, Sample, View

_LOG = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
_SCAN_FOLDERS = ("scans", "scans_test")
_LIST_FOLDERS = (".", "splits", "meta_data", "Tasks/Benchmark")
_SENS_STRIDE = 10  # .sens files hold every frame of a 30 Hz video


class ScanNetDataset(Dataset):
    """ScanNet v2 with the 20 classes of its benchmark.

    Args:
        root: folder that holds `scans/` and, where downloaded, `scans_test/`. Scans may be missing: those on disk are
            the dataset.

    Raises:
        MissingDataError: neither folder is there, or no scan is in them.
    """

    name: ClassVar[str] = "scannet"
    title: ClassVar[str] = "ScanNet v2, the 20 classes of its benchmark"
    needs: ClassVar[tuple[Need, ...]] = (
        Need("scans/<id>/<id>_vh_clean_2.ply", "points, colour, mesh", "download-scannet.py --type _vh_clean_2.ply"),
        Need("scans/<id>/<id>_vh_clean_2.labels.ply", "labels", "download-scannet.py --type _vh_clean_2.labels.ply"),
        Need("scans/<id>/<id>.txt", "image sizes", "download-scannet.py --type .txt"),
        Need(
            "scans/<id>/<id>.sens",
            "frames; or color/ depth/ pose/ intrinsic/ exported from it",
            "download-scannet.py --type .sens",
        ),
        Need("scans_test/<id>/", "the same without labels", "download-scannet.py, test scans", optional=True),
    )
    class_table: ClassVar[Mapping[int, ClassInfo]] = SCANNET20
    """NYU40 id -> class, in the order of the label indices."""
    shipped_lists: ClassVar[bool] = True
    """Whether the official lists serve where there are none next to the data."""

    def __init__(self, root: Path) -> None:
        self.root = root
        folders = [root / name for name in _SCAN_FOLDERS if (root / name).is_dir()]
        if not folders:
            hint = f"pass its parent {str(root.parent)!r}" if root.name in _SCAN_FOLDERS else "pass the folder above it"
            raise MissingDataError(f"dataset {self.name!r}: no folder 'scans' in {str(root)!r}; {hint} with --root")
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
        self._ids = self._split_ids()
        self._split_of = {sample_id: split for split, ids in self._ids.items() for sample_id in ids}

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes by label index."""
        return tuple(self.class_table.values())

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that have a list, in the order train, val, test."""
        return tuple(self._ids)

    def sample_ids(self, split: str) -> Sequence[str]:
        """Sorted ids of the scans of one split that are on disk. Raises `UnknownNameError` for an unknown split."""
        if split not in self._ids:
            raise UnknownNameError.of(f"split of dataset {self.name!r}", split, self._ids)
        return self._ids[split]

    def read(self, sample_id: str) -> Sample:
        """One scan; pixels, mesh and labels are read only when asked for.

        Raises:
            UnknownNameError: no such scan in any split.
            MissingDataError: the scan has no frames.
            DataError: its `.sens` file or its intrinsics cannot be used.
        """
        if sample_id not in self._split_of:
            raise UnknownNameError.of(f"sample of dataset {self.name!r}", sample_id, self._split_of)
        scan, split = self._scans[sample_id], self._split_of[sample_id]
        read_frames = _exported_frames if (scan / "color").is_dir() else _sens_frames
        views, broken, stride = read_frames(scan)
        return Sample(
            id=sample_id,
            split=split,
            views=views,
            load_points=partial(_read_points, scan, self.class_table, labels_needed=split != "test"),
            broken_views=broken,
            every_nth_frame=stride,
        )

    def _split_ids(self) -> dict[str, list[str]]:
        """Split -> sorted ids of the scans on disk."""
        lists = {split: path for split in SPLITS if (path := self._list_beside_data(split)) is not None}
        if lists:
            listed = {
                split: _read_list(path.read_text(encoding="utf-8", errors="replace")) for split, path in lists.items()
            }
        elif self.shipped_lists:
            shipped = importlib.resources.files("ditr_cache.datasets") / "scannet_splits"
            listed = {s: _read_list((shipped / f"scannetv2_{s}.txt").read_text(encoding="utf-8")) for s in SPLITS}
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
                ", ".join(unlisted[:5]) + (", ..." if len(unlisted) > 5 else ""),
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
    class_table: ClassVar[Mapping[int, ClassInfo]] = ROOMS13
    shipped_lists: ClassVar[bool] = False


def vertex_normals(coord: NDArray[np.floating], faces: NDArray[np.integer]) -> NDArray[np.float32]:
    """Normals [N, 3] float32 of mesh vertices: mean of the adjacent faces' normals, weighted by their area.

    Args:
        coord: [N, 3] vertices.
        faces: [F, 3] vertex indices, counter-clockwise seen from outside.

    Returns:
        Unit vectors; zero for a vertex without a face of positive area.
    """
    corners = coord.astype(np.float64)[faces]
    with np.errstate(invalid="ignore", over="ignore"):  # not finite coordinates are reported by `Points`
        # The cross product is twice the area long: summing it weights by area.
        face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        total = np.zeros((len(coord), 3))
        for corner in range(3):
            for axis in range(3):
                total[:, axis] += np.bincount(faces[:, corner], face_normals[:, axis], minlength=len(coord))
        length = np.linalg.norm(total, axis=1, keepdims=True)
        return np.divide(total, length, out=np.zeros_like(total), where=length > 1e-20).astype(np.float32)


def _read_list(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if line.strip()}


def _read_points(scan: Path, class_table: Mapping[int, ClassInfo], *, labels_needed: bool) -> Points:
    """Vertices of the scan's mesh, with colour, normals and labels."""
    path = scan / f"{scan.name}_vh_clean_2.ply"
    if not path.is_file():
        raise MissingDataError(f"{path}: no such file; download it with ScanNet's script (--type _vh_clean_2.ply)")
    mesh = read_ply(path)
    columns = mesh.vertices
    if not {"x", "y", "z"} <= columns.keys():
        raise DataError(f"{path}: expected vertex properties x, y, z, got {sorted(columns)}")
    with np.errstate(over="ignore"):  # becomes infinite, which `Points` reports
        coord = np.stack([columns[axis] for axis in "xyz"], axis=1).astype(np.float32)
    color = None
    if {"red", "green", "blue"} <= columns.keys():
        color = np.stack([columns[channel] for channel in ("red", "green", "blue")], axis=1)
        if color.dtype != np.uint8:
            raise DataError(f"{path}: expected colours of type uchar, got {color.dtype}")
    normal = None if mesh.faces is None or not len(mesh.faces) else vertex_normals(coord, mesh.faces)

    segment = None
    labels_path = scan / f"{scan.name}_vh_clean_2.labels.ply"
    if labels_path.is_file():
        label = read_ply(labels_path).vertices.get("label")
        if label is None:
            raise DataError(f"{labels_path}: no vertex property 'label'")
        if len(label) != len(coord):
            raise DataError(
                f"{labels_path}: {len(label)} labels for the {len(coord)} vertices of {path.name}, expected one each; "
                "the two files are of different meshes, download both again"
            )
        segment = nyu40_to_index(label, class_table)
    elif labels_needed:
        raise MissingDataError(
            f"{labels_path}: no such file; download it with ScanNet's script (--type _vh_clean_2.labels.ply)"
        )
    try:
        return Points(coord=coord, color=color, normal=normal, segment=segment)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


Frames = tuple[tuple[View, ...], tuple[tuple[str, str], ...], int]
"""Views, broken views (id, error), recommended stride."""


def _sens_frames(scan: Path) -> Frames:
    path = scan / f"{scan.name}.sens"
    if not path.is_file():
        raise MissingDataError(
            f"{scan}: no frames, expected {path.name} or the folders color, depth, pose and intrinsic exported from "
            "it; download it with ScanNet's script (--type .sens)"
        )
    sens = open_sens(path)
    camera = _camera(sens.intrinsic_color, sens.color_size, None, f"{path} colour")
    depth_camera = _camera(sens.intrinsic_depth, sens.depth_size, None, f"{path} depth")
    if not np.allclose(sens.extrinsic_color, sens.extrinsic_depth, atol=1e-3):
        _LOG.warning("%s: colour and depth have different extrinsics; they are taken as registered", path)
    views, broken = [], []
    for frame, pose in enumerate(sens.world_from_camera):
        try:
            camera_from_world = invert_pose(pose)
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
    return tuple(views), tuple(broken), _SENS_STRIDE


def _exported_frames(scan: Path) -> Frames:
    colors = numbered_files(scan / "color", (".jpg", ".jpeg", ".png"))
    depths = numbered_files(scan / "depth", (".png",)) if (scan / "depth").is_dir() else {}
    if not colors:
        return (), (), 1
    broken: list[tuple[str, str]] = []
    frames: list[tuple[str, NDArray[np.float64], Path, Path]] = []
    for number, color in colors.items():
        try:
            depth = depths.get(number)
            if depth is None:
                raise MissingDataError(f"{scan / 'depth' / color.stem}.png: no depth file for {color.name}")
            frames.append((color.stem, read_pose(scan / "pose" / f"{color.stem}.txt"), color, depth))
        except DataError as error:
            broken.append((color.stem, str(error)))
    if not frames:
        return (), tuple(broken), 1

    info = _read_info(scan / f"{scan.name}.txt")
    camera = _exported_camera(scan, info, "color", first_image_size([f[2] for f in frames]))
    depth_camera = _exported_camera(scan, info, "depth", first_image_size([f[3] for f in frames]))
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
    return views, tuple(broken), 1


def _exported_camera(scan: Path, info: Mapping[str, float], kind: str, size: tuple[int, int]) -> Camera:
    """Camera of exported `color` or `depth` images of (width, height) `size`."""
    calibrated = None
    if f"{kind}Width" in info and f"{kind}Height" in info:
        calibrated = (int(info[f"{kind}Width"]), int(info[f"{kind}Height"]))
    path = scan / "intrinsic" / f"intrinsic_{kind}.txt"
    if path.is_file():
        return _camera(read_matrix(path), size, calibrated, str(path))
    names = [f"{letter}_{kind}" for letter in ("fx", "fy", "mx", "my")]
    if not all(name in info for name in names):
        raise MissingDataError(
            f"{path}: no such file, and {scan.name}.txt has no {', '.join(names)}; export it from the .sens file with "
            "ScanNet's SensReader (--export_intrinsics)"
        )
    fx, fy, mx, my = (info[name] for name in names)
    return _camera(np.array([[fx, 0, mx], [0, fy, my], [0, 0, 1]]), size, calibrated, f"{scan / scan.name}.txt")


def _camera(matrix: NDArray[Any], size: tuple[int, int], calibrated: tuple[int, int] | None, where: str) -> Camera:
    """Camera of images of (width, height) `size` whose intrinsics were calibrated for images of `calibrated`.

    Exporters resize images and leave `intrinsic_*.txt` as calibrated; some scale it too. The principal point tells
    which: it lies near the middle of the image that the matrix belongs to.
    """
    try:
        camera = Camera.from_matrix(matrix, width=size[0], height=size[1])
        if calibrated is not None and min(calibrated) > 0 and calibrated != size:
            full = Camera.from_matrix(matrix, width=calibrated[0], height=calibrated[1])
            if abs(full.cx / full.width - 0.5) < abs(camera.cx / camera.width - 0.5):
                camera = full.resized(width=size[0], height=size[1])
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return check_principal_point(camera, where)


def _read_info(path: Path) -> dict[str, float]:
    """Numbers of `<id>.txt` by name ("fx_color = 1170.19"); empty where there is no such file."""
    if not path.is_file():
        return {}
    info = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition("=")
        try:
            number = float(value)
        except ValueError:  # sceneType, axisAlignment and other entries that are not one number
            continue
        if math.isfinite(number):
            info[name.strip()] = number
    return info
