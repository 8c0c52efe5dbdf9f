"""Images, depth maps and poses of 2D-3D-S, which show the rooms of S3DIS.

```
area_<n>/data/rgb/camera_<uuid>_<room>_frame_<m>_domain_rgb.png         depth/..._depth.png     pose/..._pose.json
```

A pose maps the frame of its folder to the camera (OpenCV's axes). `area_5a` has that of Area 5; `area_5b` has one of
its own, a quarter turn away (found by users, 2D-3D-Semantics issue 40; DITR and Pointcept use the same numbers). Depth
is z in units of 1/512 m, 0 or 65535 where unknown. Panoramas are not read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.documents import read_json
from ditr_cache.datasets.frames import first_image_size, rigid_pose, same_aspect
from ditr_cache.datasets.images import read_color, read_depth
from ditr_cache.errors import DataError, MissingDataError, errors_at
from ditr_cache.sample import Camera, View

FOLDERS: Mapping[int, tuple[str, ...]] = {
    **{area: (f"area_{area}",) for area in (1, 2, 3, 4, 6)},
    5: ("area_5a", "area_5b"),
}
"""Area -> the folders that show it; a room of Area 5 is in one of its two, or in both."""

AREA_5B_FROM_AREA_5 = np.array([[0, -1, 0, 6.22617759], [1, 0, 0, 4.09703582], [0, 0, 1, 0], [0, 0, 0, 1.0]])

DEPTH_UNITS = 512.0
"""Depth values per metre."""

KINDS: Mapping[str, str] = {"rgb": "png", "depth": "png", "pose": "json"}
IMAGES_DOWNLOAD = (
    "area_{1,2,3,4,5a,5b,6}_no_xyz.tar of 2D-3D-S (https://sdss.redivis.com/datasets/f304-a3vhsvcaf, table no_xyz)"
)

_MAX_SIDE = 2**15


@dataclass
class _Frames:
    """Which files of one room are in a folder: kind -> stems."""

    stems: dict[str, set[str]] = field(default_factory=lambda: {kind: set() for kind in KINDS})


def find_images(candidates: Sequence[Path]) -> Path | None:
    """The first of the folders, or of their folders for the downloads without XYZ, that holds a folder `area_<n>`."""
    for folder in candidates:
        for place in (folder, folder / "noXYZ", folder / "no_xyz"):
            if any((place / name / "data").is_dir() for names in FOLDERS.values() for name in names):
                return place
    return None


class AreaImages:
    """The frames of one area by room; the folders are listed once, when first asked for.

    Args:
        root: folder that holds `area_<n>`.
        area: 1 to 6.

    Raises:
        MissingDataError: a folder of the area is missing: 2D-3D-S is unpacked in part.
    """

    def __init__(self, root: Path, area: int) -> None:
        self._rooms: dict[str, dict[str, _Frames]] = defaultdict(dict)
        self.folders = tuple(root / name for name in FOLDERS[area])
        for folder in self.folders:
            for kind, suffix in KINDS.items():
                data = folder / "data" / kind
                if not data.is_dir():
                    raise MissingDataError(
                        f"{data}: no such folder; unpack {IMAGES_DOWNLOAD} completely, or read the areas that are "
                        "there with --option val_area=0 --split Area_<n>"
                    )
                pattern = re.compile(rf"(camera_[^_]+_(.+)_frame_\d+)_domain_{kind}\.{suffix}")
                for path in data.iterdir():
                    match = pattern.fullmatch(path.name)
                    if match is not None:
                        frames = self._rooms[match[2]].setdefault(folder.name, _Frames())
                        frames.stems[kind].add(match[1])

    def views(self, room: str) -> tuple[tuple[View, ...], tuple[tuple[str, str], ...]]:
        """Views of a room in the frame of its area, by scanner and frame number, and (id, error) of broken ones.

        Raises:
            MissingDataError: a room with images, but without any depth map or any pose.
            DataError: no image of the room can be read.
        """
        views: list[View] = []
        broken: list[tuple[str, str]] = []
        for folder in self.folders:
            frames = self._rooms.get(room, {}).get(folder.name)
            if frames is not None:
                found, failed = _views(folder, room, frames)
                views += found
                broken += failed
        return tuple(views), tuple(broken)


def _views(folder: Path, room: str, frames: _Frames) -> tuple[list[View], list[tuple[str, str]]]:
    for kind, stems in frames.stems.items():
        if not stems:
            raise MissingDataError(
                f"{folder / 'data' / kind}: no file of room {room!r}, which other folders have; unpack "
                f"{IMAGES_DOWNLOAD} again, completely"
            )
    complete = set.intersection(*frames.stems.values())
    every = sorted(set.union(*frames.stems.values()), key=_place_and_number)
    size = depth_size = (0, 0)
    if complete:
        ordered = [stem for stem in every if stem in complete]
        size = first_image_size([_file(folder, stem, "rgb") for stem in ordered])
        depth_size = first_image_size([_file(folder, stem, "depth") for stem in ordered])
    views, broken = [], []
    for stem in every:
        name = f"{folder.name}/{stem}"
        try:
            for kind in KINDS:
                if stem not in frames.stems[kind]:
                    raise MissingDataError(
                        f"{_file(folder, stem, kind)}: no such file, but others of this frame; unpack "
                        f"{IMAGES_DOWNLOAD} again"
                    )
            views.append(_view(folder, stem, name, size, depth_size))
        except DataError as error:
            broken.append((name, str(error)))
    return views, broken


def _view(folder: Path, stem: str, name: str, size: tuple[int, int], depth_size: tuple[int, int]) -> View:
    color, depth, pose = (_file(folder, stem, kind) for kind in KINDS)
    k, camera_from_area = read_frame_pose(pose)
    return View(
        id=name,
        camera=camera_of(k, size, str(pose)),
        camera_from_world=from_area_5(camera_from_area) if folder.name == "area_5b" else camera_from_area,
        load_image=partial(read_color, color, size=size, where=str(color)),
        depth_camera=camera_of(k, depth_size, str(pose)),
        load_depth=partial(read_depth, depth, size=depth_size, where=str(depth), scale=DEPTH_UNITS),
    )


def read_frame_pose(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Intrinsic matrix [3, 3] and `camera_from_area` [4, 4] of a frame; the latter NaN where it is not finite.

    Raises:
        MissingDataError: no such file.
        DataError: not a pose of 2D-3D-S.
    """
    remedy = f"unpack {IMAGES_DOWNLOAD} again"
    content = read_json(path, remedy)
    try:
        k = np.asarray(content["camera_k_matrix"], dtype=np.float64)
        rows = np.asarray(content["camera_rt_matrix"], dtype=np.float64)
        if rows.shape not in ((3, 4), (4, 4)):
            raise DataError(f"camera_rt_matrix: expected 3x4 numbers, got shape {list(rows.shape)}")
        return k, rigid_pose(np.concatenate([rows[:3], [(0, 0, 0, 1)]]))
    except (ValueError, KeyError, TypeError) as error:  # DataError is a ValueError
        raise DataError(
            f"{path}: not a pose of 2D-3D-S, with camera_k_matrix and camera_rt_matrix "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error


def camera_of(k: NDArray[np.float64], size: tuple[int, int], where: str) -> Camera:
    """Camera of images of (width, height) `size`.

    The principal point of 2D-3D-S is the middle of the image: a matrix says of which image size it is, and images that
    somebody made smaller are known.

    Raises:
        DataError: singular intrinsics, or those of images of another shape.
    """
    with errors_at(where):
        if k.shape != (3, 3) or not np.isfinite(k).all():
            raise DataError(f"camera: expected 3x3 finite intrinsics, got {k.tolist()}")
        own = float(2 * k[0, 2]), float(2 * k[1, 2])
        if not all(1 <= side <= _MAX_SIDE for side in own):
            raise DataError(f"camera: principal point ({k[0, 2]:g}, {k[1, 2]:g}) is not the middle of an image")
        width, height = round(own[0]), round(own[1])
        camera = Camera.from_matrix(k, width=width, height=height)
    if not same_aspect((width, height), size):
        raise DataError(
            f"{where}: its intrinsics are of {width}x{height} images, the room's first is {size[0]}x{size[1]}; cropped "
            f"images cannot be used, unpack {IMAGES_DOWNLOAD} again"
        )
    return camera if (width, height) == size else camera.resized(width=size[0], height=size[1])


def from_area_5(camera_from_area_5b: NDArray[np.float64]) -> NDArray[np.float64]:
    """`camera_from_area` in the frame of Area 5 of a pose of the folder `area_5b`."""
    return camera_from_area_5b @ AREA_5B_FROM_AREA_5


def _file(folder: Path, stem: str, kind: str) -> Path:
    return folder / "data" / kind / f"{stem}_domain_{kind}.{KINDS[kind]}"


def _place_and_number(stem: str) -> tuple[str, int]:
    head, _, number = stem.rpartition("_frame_")
    return head, int(number)
