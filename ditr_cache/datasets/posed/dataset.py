"""Captures of your own: posed images, and a point cloud beside them.

```
ROOT/<capture>/transforms.json   images/...   point_cloud.{ply,las,laz,pcd}   [depth maps]   [labels.npy|txt]
ROOT/<capture>/sparse/0/{cameras,images}.{bin,txt}   images/...   point_cloud.*  or COLMAP's fused.ply
ROOT/[classes.txt|json]   [train.txt  val.txt  test.txt: a capture a line]
```

A capture lies at the root or up to three levels below it; its id is the path below the root. Its world is that of the
point cloud. Where that is far from the origin, as map projections are, a whole number of kilometres is subtracted from
points and poses (`frames.world_offset`), for coordinates are float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from ditr_cache.datasets.base import ClassInfo, Dataset, Need, Option, ids_by_split
from ditr_cache.datasets.captures import LEVELS, find_captures
from ditr_cache.datasets.documents import read_lines
from ditr_cache.datasets.fusion import fuse_views
from ditr_cache.datasets.posed.classes import find_classes
from ditr_cache.datasets.posed.cloud import LABEL_FILES, STEM, CloudFile, find_cloud
from ditr_cache.datasets.posed.colmap_model import model_folder, read_workspace
from ditr_cache.datasets.posed.frames import Description, PosedFrame, in_time_order, moved, view_of, world_offset
from ditr_cache.datasets.posed.transforms import FILE, read_transforms
from ditr_cache.errors import DataError, MissingDataError, UsageError, shortened
from ditr_cache.pointcloud.optional import check_installed
from ditr_cache.sample import Points, Sample, View

_LOG = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")

_NEAREST = 0.1  # metres, of depth that is fused into points
_COLMAP = "COLMAP (sparse/0, with images/ beside), or nerfstudio's ns-process-data"


class PosedDataset(Dataset):
    """Captures described by nerfstudio's or Instant-NGP's `transforms.json`, or by a COLMAP model.

    Args:
        root: folder that holds the captures, or is one.
        points: `auto`, `depth` to fuse points from depth maps, or the name of the point file in every capture.
        depth: `auto`, or `none` to leave depth maps out: points hide points then.
        depth_unit: metres per unit of depth maps, where `transforms.json` does not say.
        depth_max: metres; depth beyond is not fused into points.
        voxel_size: metres, of the grid on which depth is fused into points.
        normals: `file`, or `estimate` where the file has none.

    Raises:
        MissingDataError: no capture found.
        DataError: classes or split lists that are not understood.
        UsageError: options that exclude each other, or a library that one needs is not installed.
    """

    name: ClassVar[str] = "posed"
    title: ClassVar[str] = "your own posed images (nerfstudio, Instant-NGP, COLMAP) with a point cloud (PLY, LAS, PCD)"
    needs: ClassVar[tuple[Need, ...]] = (
        Need("<capture>/transforms.json", "poses and intrinsics (nerfstudio, Instant-NGP)", "ns-process-data"),
        Need(
            "<capture>/sparse/0/cameras.bin, images.bin",
            "or: the same by COLMAP (.bin or .txt)",
            "colmap mapper",
            optional=True,
        ),
        Need(
            "<capture>/images/",
            "images, where the file above says; without them points have no features",
            "your own capture",
            optional=True,
        ),
        Need(
            "<capture>/point_cloud.ply|las|laz|pcd",
            "points, with colour, normals, strength and labels as far as the file has them; without it, COLMAP's "
            "fused.ply, or points fused from depth maps",
            "your scanner, or colmap stereo_fusion",
            optional=True,
        ),
        Need(
            "<capture>/depth/",
            "depth maps, where transforms.json says; of COLMAP stereo/depth_maps/ or depths/; without them points "
            "hide points",
            "your own capture, or colmap patch_match_stereo",
            optional=True,
        ),
        Need(
            "<capture>/labels.npy|txt",
            "a label per point, where the point file has none; without both there are no labels",
            "your own annotation",
            optional=True,
        ),
        Need(
            "classes.txt|json", "names and colours of the classes; without it no labels", "your own list", optional=True
        ),
        Need(
            "train.txt, val.txt, test.txt",
            "captures of each split, one a line; without them all are train",
            "your own list",
            optional=True,
        ),
    )
    options: ClassVar[tuple[Option, ...]] = (
        Option("points", "auto", "auto, depth (fuse points from depth maps), or the point file's name in each capture"),
        Option("depth", "auto", "auto, or none: leave depth maps out, points hide points", ("auto", "none")),
        Option("depth_unit", 1e-3, "metres per unit of depth maps, where transforms.json does not say"),
        Option("depth_max", 6.0, "metres; depth beyond is not fused into points"),
        Option("voxel_size", 0.02, "metres, of the grid on which depth is fused into points"),
        Option("normals", "file", "file, or estimate where the point file has none", ("file", "estimate")),
    )

    def __init__(
        self,
        root: Path,
        *,
        points: str = "auto",
        depth: str = "auto",
        depth_unit: float = 1e-3,
        depth_max: float = 6.0,
        voxel_size: float = 0.02,
        normals: str = "file",
    ) -> None:
        for option, value in (("depth_unit", depth_unit), ("depth_max", depth_max), ("voxel_size", voxel_size)):
            if not 0 < value < np.inf:
                raise UsageError(f"option {option}={value} of dataset {self.name!r}: expected a positive number")
        if points == "depth" and depth == "none":
            raise UsageError(f"dataset {self.name!r}: points=depth needs depth maps, but depth=none leaves them out")
        if "/" in points:
            raise UsageError(f"option points={points!r} of dataset {self.name!r}: expected a file's name, no path")
        if normals == "estimate":
            check_installed("scipy", "estimated normals", "datasets")
        self.root = root
        self.points, self.depth, self.normals = points, depth, normals
        self.depth_unit, self.depth_max, self.voxel_size = depth_unit, depth_max, voxel_size
        self._captures = find_captures(root, _is_capture)
        if not self._captures:
            raise MissingDataError(
                f"dataset {self.name!r}: no capture at {str(root)!r} or up to {LEVELS} levels below; expected folders "
                f"with {FILE}, or with a COLMAP model in sparse/0; make one with {_COLMAP}"
            )
        inside = [folder for folder in self._captures.values() if folder != root]
        at_root = find_classes([root])
        self._classes = at_root if at_root.infos else find_classes(inside)
        self.ids = ids_by_split(self._read_splits(), SPLITS)

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes of `classes.txt` or `classes.json`, empty where there is neither."""
        return self._classes.infos

    def read(self, sample_id: str) -> Sample:
        """One capture. The headers of its images and depth maps are read, their pixels only when asked for.

        Raises:
            UnknownNameError: no such capture in any split.
            MissingDataError: no points, or a file of the COLMAP model is missing.
            DataError: a description that is not understood, or none of whose frames can be used.
        """
        split = self.split_of(sample_id)
        folder = self._captures[sample_id]
        described = self._describe(folder)
        cloud = None if self.points == "depth" else find_cloud(folder, described.cloud, _file_name(self.points))
        frames = in_time_order(described.frames)
        to_poses = described.poses_from_original
        if cloud is not None and to_poses is not None and not _same_file(cloud, described.cloud):
            frames = [replace(f, camera_from_world=f.camera_from_world @ to_poses) for f in frames]
        offset = world_offset(frames)
        cameras = np.array([-f.camera_from_world[:3, :3].T @ f.camera_from_world[:3, 3] for f in frames]).reshape(-1, 3)
        if offset is not None and np.any(offset):
            _LOG.info("%s: points and poses are moved by -%s metres, so that float32 holds them", folder, offset)
            frames = [moved(frame, offset) for frame in frames]
        views, broken = _views(frames, described)
        load_points: Callable[[], Points]
        if cloud is None:
            if not any(view.load_depth is not None for view in views):
                raise MissingDataError(
                    f"{folder}: no point cloud, and no depth maps to fuse one from; expected {STEM}.ply, .las, .laz or "
                    ".pcd, what ply_file_path of transforms.json names, or fused.ply of colmap stereo_fusion (the few "
                    "points of a sparse model are none); another name with --option points=NAME"
                    + "".join(f"; {error}" for _, error in broken[:1])
                )
            load_points = partial(
                fuse_views,
                views,
                where=str(folder),
                voxel_size=self.voxel_size,
                depth_range=(_NEAREST, self.depth_max),
            )
        else:
            load_points = CloudFile(
                path=cloud,
                labels=next((path for name in LABEL_FILES if (path := folder / name).is_file()), None),
                classes=self._classes,
                offset=offset,
                estimate_normals=self.normals == "estimate",
                cameras=cameras[np.isfinite(cameras).all(axis=1)],
            ).read
        return Sample(
            id=sample_id,
            split=split,
            views=views,
            load_points=load_points,
            broken_views=broken,
        )

    def _describe(self, folder: Path) -> Description:
        read = read_transforms if (folder / FILE).is_file() else read_workspace
        return read(folder, self.root, depth=self.depth == "auto", depth_unit=self.depth_unit)

    def _read_splits(self) -> dict[str, str]:
        """Sample id -> split, by the lists at the root."""
        remedy = "one capture a line"
        lists = {s: read_lines(path, remedy) for s in SPLITS if (path := self.root / f"{s}.txt").is_file()}
        split_of: dict[str, str] = {}
        absent = []
        for split, names in lists.items():
            for name in (name.removeprefix("./").rstrip("/") for name in names):
                if name not in self._captures:
                    absent.append(name)
                elif split_of.setdefault(name, split) != split:
                    raise DataError(
                        f"{self.root / split}.txt: capture {name!r} is in {split_of[name]}.txt, too; a capture belongs "
                        "to one split"
                    )
        if not split_of:  # no lists, or lists of images
            return dict.fromkeys(self._captures, "train")
        unlisted = sorted(self._captures.keys() - split_of.keys())
        for what, which in (("in no split list and left out", unlisted), ("listed, but not on disk", sorted(absent))):
            if which:
                _LOG.warning("dataset %r: %d captures are %s: %s", self.name, len(which), what, shortened(which))
        return split_of


def _same_file(path: Path, other: Path | None) -> bool:
    return other is not None and other.is_file() and path.samefile(other)


def _file_name(points: str) -> str:
    return "" if points == "auto" else points


def _is_capture(folder: Path) -> bool:
    return (folder / FILE).is_file() or model_folder(folder) is not None


def _views(
    frames: Sequence[PosedFrame], described: Description
) -> tuple[tuple[View, ...], tuple[tuple[str, str], ...]]:
    """Views, and (id, error) of the frames that are none.

    Raises:
        DataError: no frame can be used, and not for want of images.
    """
    views: dict[str, View] = {}
    broken = list(described.broken)
    for frame in frames:
        try:
            if frame.id in views:
                raise DataError(f"{described.source}: image {frame.id!r} stands there twice; taking the first")
            views[frame.id] = view_of(frame, described.source)
        except DataError as error:
            broken.append((frame.id, error))
    if not views and broken:
        other = next((error for _, error in broken if not isinstance(error, MissingDataError)), None)
        if other is not None:
            raise DataError(f"{described.source}: none of its {len(broken)} frames can be used; {other}")
        return (), (("", _lost(frames, described, broken)),)
    return tuple(views.values()), tuple((frame, str(error)) for frame, error in broken)


def _lost(frames: Sequence[PosedFrame], described: Description, broken: Sequence[tuple[str, DataError]]) -> str:
    """What to say where every frame lacks its image or its depth map."""
    bare = [frame.depth for frame in frames if frame.image.is_file()]
    if not bare:
        return (
            f"{described.source}: none of its {len(broken)} images is there: points without features; {broken[0][1]}, "
            "then run again with --retry-incomplete"
        )
    return (
        f"{described.source}: of its {len(broken)} frames {len(bare)} lack the depth map"
        + (f" and {len(broken) - len(bare)} the image" if len(bare) < len(broken) else "")
        + f": points without features; {bare[0]}: no such file; copy the depth maps, then run again with "
        "--retry-incomplete, or leave all depth maps out with --option depth=none and another --out"
    )
