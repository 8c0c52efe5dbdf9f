"""Folders of posed RGB-D frames: how people bring their own captures.

A capture is a folder in one of two layouts, at the root or up to three levels below it:

```
7-Scenes   seq-01/frame-000000.color.png|jpg  frame-000000.depth.png  frame-000000.pose.txt (4x4, camera-to-world)
Open3D     NAME/color/*.jpg|png  NAME/depth/*.png  NAME/odometry.log or trajectory.log (camera-to-world, in frame order)
```

Depth is 16-bit PNG in millimetres, 0 or 65535 where unknown, registered to colour (they share the pose). Intrinsics are
the nearest file upward from the capture, see `INTRINSICS` and `DEPTH_INTRINSICS`; they are taken as they stand (tools
differ by half a pixel in where they put pixel centres). There are no labels; points are fused from depth.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ditr_cache.datasets.base import ClassInfo, Dataset, Need, Option, ids_by_split
from ditr_cache.datasets.captures import LEVELS, find_captures
from ditr_cache.datasets.documents import read_lines
from ditr_cache.datasets.frames import (
    check_principal_point,
    first_image_size,
    frame_number,
    invert_pose,
    numbered_files,
    parse_matrix,
    read_matrix,
    read_pose,
    same_aspect,
)
from ditr_cache.datasets.fusion import fuse_views
from ditr_cache.datasets.images import read_color, read_depth
from ditr_cache.errors import DataError, MissingDataError, errors_at, shortened
from ditr_cache.sample import Camera, Sample, View

_LOG = logging.getLogger(__name__)

INTRINSICS = (
    "camera-intrinsics.txt",
    "intrinsics.txt",
    "intrinsic.txt",
    "camera_primesense.json",
    "intrinsic.json",
    "camera_intrinsic.json",
    "camera.json",
)
"""Files with the intrinsics of colour, and of depth where it has no file of its own: a 3x3 matrix as text, or Open3D's
JSON (`PinholeCameraIntrinsic`, or `PinholeCameraParameters` that holds one)."""

DEPTH_INTRINSICS = ("depth-intrinsics.txt",)
"""Files with the intrinsics of depth, a 3x3 matrix."""

TRAJECTORIES = ("odometry.log", "trajectory.log")
"""Open3D's camera-to-world poses: a line of three integers and four lines of a matrix per frame."""

SPLITS = {"train": "TrainSplit.txt", "test": "TestSplit.txt"}
"""Split -> 7-Scenes' list of its sequences. Captures without lists beside them are `train`."""

_COLOR_SUFFIXES = (".jpg", ".jpeg", ".png")
_SEVEN_SCENES_SIZE = (640, 480)
_SEVEN_SCENES_MATRIX = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])  # of the dataset's own description
_REMEDY = (
    "write one next to the frames: 'camera-intrinsics.txt' with three lines 'fx 0 cx', '0 fy cy', '0 0 1' in pixels of "
    "the colour images"
)


@dataclass(frozen=True)
class _Frame:
    """One frame: its id, its files, and its pose as a file or as the text of a matrix in a log."""

    id: str
    color: Path
    depth: Path | None
    pose: Path | str


class RGBDDataset(Dataset):
    """Captures of posed RGB-D frames below a folder. A sample is one capture; its id is the path below the root.

    Args:
        root: folder that holds the captures, or is one.
        voxel_size: metres, of the grid on which depth is fused into points.
        depth_range: metres along z; depth outside is not fused.

    Raises:
        MissingDataError: no capture found.
    """

    name: ClassVar[str] = "rgbd"
    title: ClassVar[str] = "posed RGB-D frames in the layout of 7-Scenes or Open3D"
    needs: ClassVar[tuple[Need, ...]] = (
        Need("<capture>/frame-<n>.color.jpg|png, .depth.png, .pose.txt", "frames (7-Scenes)", "your own capture"),
        Need("<capture>/color/ depth/ odometry.log", "or: frames (Open3D)", "your own capture", optional=True),
        Need("camera-intrinsics.txt", "intrinsics, in the capture's folder or above it", "your own capture"),
    )
    options: ClassVar[tuple[Option, ...]] = (
        Option("voxel_size", 0.02, "metres, of the grid on which depth is fused into points"),
    )

    def __init__(self, root: Path, *, voxel_size: float = 0.02, depth_range: tuple[float, float] = (0.1, 6.0)) -> None:
        self.root = root
        self.voxel_size = voxel_size
        self.depth_range = depth_range
        self._captures = find_captures(root, _is_capture)
        if not self._captures:
            raise MissingDataError(
                f"dataset {self.name!r}: no capture at {str(root)!r} or up to {LEVELS} levels below; expected files "
                "frame-000000.color.png, frame-000000.depth.png, frame-000000.pose.txt (7-Scenes), or folders color "
                f"and depth with a file {' or '.join(TRAJECTORIES)} (Open3D)"
            )
        self.ids = ids_by_split(self._read_splits(), SPLITS)

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """No classes: these captures have no labels."""
        return ()

    def read(self, sample_id: str) -> Sample:
        """One capture; images and depth are read only when asked for.

        Its points are fused from the depth of *all* its frames, whatever frames are selected later; frames without a
        pose or with an unreadable image are left out.

        Raises:
            UnknownNameError: no such capture in any split.
            MissingDataError: no poses or no intrinsics.
            DataError: poses or intrinsics that cannot be used.
        """
        split = self.split_of(sample_id)
        folder = self._captures[sample_id]
        layout = "7-Scenes" if _is_seven_scenes(folder) else "Open3D"
        broken: list[tuple[str, str]] = []
        complete = []
        for frame in _seven_scenes_frames(folder) if layout == "7-Scenes" else _open3d_frames(folder):
            try:
                if frame.depth is None:
                    raise MissingDataError(f"{frame.color}: no depth map for this frame")
                complete.append((frame.id, frame.color, frame.depth, _pose(frame)))
            except DataError as error:
                broken.append((frame.id, str(error)))

        views: tuple[View, ...] = ()
        if complete:
            color_size = first_image_size([color for _, color, _, _ in complete])
            depth_size = first_image_size([depth for _, _, depth, _ in complete])
            camera, depth_camera = _cameras(folder, self.root, color_size, depth_size, layout)
            views = tuple(
                View(
                    id=frame_id,
                    camera=camera,
                    camera_from_world=pose,
                    load_image=partial(read_color, color, size=color_size, where=str(color)),
                    depth_camera=depth_camera,
                    load_depth=partial(read_depth, depth, size=depth_size, where=str(depth)),
                )
                for frame_id, color, depth, pose in complete
            )
        return Sample(
            id=sample_id,
            split=split,
            views=views,
            load_points=partial(
                fuse_views, views, where=str(folder), voxel_size=self.voxel_size, depth_range=self.depth_range
            ),
            broken_views=tuple(broken),
        )

    def _read_splits(self) -> dict[str, str]:
        """Sample id -> split. 7-Scenes lists the sequences of each split next to them, one "sequence1" per line."""
        split_of: dict[str, str] = {}
        unlisted = []
        for sample_id, folder in self._captures.items():
            lists = {split: path for split in SPLITS if (path := folder.parent / SPLITS[split]).is_file()}
            if not lists or folder == self.root:
                split_of[sample_id] = "train"
                continue
            number = frame_number(folder.name)
            split = next((s for s, path in lists.items() if number in _read_sequences(path)), None)
            if split is None:
                unlisted.append(sample_id)
            else:
                split_of[sample_id] = split
        if unlisted:
            _LOG.warning(
                "dataset %r: %d captures are in neither TrainSplit.txt nor TestSplit.txt and are left out: %s",
                self.name,
                len(unlisted),
                shortened(unlisted),
            )
        return split_of


def _is_capture(folder: Path) -> bool:
    return _is_seven_scenes(folder) or ((folder / "color").is_dir() and (folder / "depth").is_dir())


def _is_seven_scenes(folder: Path) -> bool:
    return next(folder.glob("frame-*.color.*"), None) is not None


def _read_sequences(path: Path) -> set[int | None]:
    return {frame_number(line) for line in read_lines(path, "get 7-Scenes' list again")}


def _seven_scenes_frames(folder: Path) -> Iterator[_Frame]:
    colors = numbered_files(folder, tuple(f".color{suffix}" for suffix in _COLOR_SUFFIXES))
    depths = numbered_files(folder, (".depth.png",))
    for number, color in colors.items():
        name = color.name.split(".")[0]
        yield _Frame(name, color, depths.get(number), folder / f"{name}.pose.txt")


def _open3d_frames(folder: Path) -> Iterator[_Frame]:
    colors = numbered_files(folder / "color", _COLOR_SUFFIXES)
    depths = numbered_files(folder / "depth", (".png",))
    path = next((folder / name for name in TRAJECTORIES if (folder / name).is_file()), None)
    if path is None:
        raise MissingDataError(
            f"{folder}: no poses, expected {' or '.join(TRAJECTORIES)} as Open3D writes it (frames exported from "
            "ScanNet are read with --dataset scannet)"
        )
    lines = [line for line in path.read_text(encoding="ascii", errors="replace").splitlines() if line.strip()]
    poses = ["\n".join(lines[i + 1 : i + 5]) for i in range(0, len(lines), 5)]
    if len(lines) % 5 or len(poses) != len(colors):
        raise DataError(
            f"{path}: expected five lines for each of the {len(colors)} images in {folder / 'color'}, got {len(lines)} "
            "lines; the log and the frames do not belong together, or one is incomplete"
        )
    for (number, color), pose in zip(colors.items(), poses, strict=True):
        yield _Frame(color.stem, color, depths.get(number), pose)


def _pose(frame: _Frame) -> Any:
    if isinstance(frame.pose, Path):
        return read_pose(frame.pose)
    return invert_pose(parse_matrix(frame.pose, f"pose of frame {frame.id}"))


def _cameras(
    folder: Path, root: Path, color_size: tuple[int, int], depth_size: tuple[int, int], layout: str
) -> tuple[Camera, Camera]:
    """Cameras of colour and depth of a capture."""
    path = _nearest(folder, root, INTRINSICS)
    depth_path = _nearest(folder, root, DEPTH_INTRINSICS)
    if path is not None:
        camera = _read_camera(path, color_size)
    elif layout == "7-Scenes" and color_size == depth_size == _SEVEN_SCENES_SIZE:
        _LOG.warning("%s: no intrinsics file, taking those documented for 7-Scenes (585, 585, 320, 240)", folder)
        camera = Camera.from_matrix(_SEVEN_SCENES_MATRIX, width=color_size[0], height=color_size[1])
    else:
        raise MissingDataError(f"{folder}: no intrinsics ({', '.join(INTRINSICS)}) here or above; {_REMEDY}")
    if depth_path is not None:
        return camera, _read_camera(depth_path, depth_size)
    if not same_aspect(depth_size, color_size):
        raise DataError(
            f"{folder}: colour is {color_size[0]}x{color_size[1]} and depth {depth_size[0]}x{depth_size[1]}: one "
            f"intrinsics file cannot serve both; give those of depth in {DEPTH_INTRINSICS[0]}"
        )
    return camera, camera.resized(width=depth_size[0], height=depth_size[1])


def _nearest(folder: Path, root: Path, names: Iterable[str]) -> Path | None:
    """First of the files `names` in `folder`, or else in the nearest folder above it up to `root`."""
    names = tuple(names)
    for place in (folder, *folder.parents):
        for name in names:
            if (place / name).is_file():
                return place / name
        if place == root:
            return None
    return None


def _read_camera(path: Path, size: tuple[int, int]) -> Camera:
    """Camera of images of (width, height) `size` from a matrix file or Open3D's JSON."""
    if path.suffix != ".json":
        matrix = read_matrix(path)
        with errors_at(path):
            camera = Camera.from_matrix(matrix, width=size[0], height=size[1])
        return check_principal_point(camera, str(path))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document = document.get("intrinsic", document)
        width, height = int(document["width"]), int(document["height"])
        matrix = np.array(document["intrinsic_matrix"], dtype=np.float64).reshape(3, 3).T  # stored by columns
        camera = Camera.from_matrix(matrix, width=width, height=height)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # DataError is a ValueError
        raise DataError(
            f"{path}: not a camera as Open3D writes it, with width, height and intrinsic_matrix ({error})"
        ) from error
    if not same_aspect((width, height), size):
        raise DataError(
            f"{path}: intrinsics are of {width}x{height} images, but those of the capture have {size[0]}x{size[1]}; "
            "cropped images need intrinsics of their own"
        )
    return camera.resized(width=size[0], height=size[1])
