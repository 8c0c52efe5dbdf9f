"""S3DIS with the images of 2D-3D-S: points and labels of the one download, images, depth and poses of the other.

```
ROOT/Stanford3dDataset_v1.2_Aligned_Version/Area_<n>/Area_<n>_alignmentAngle.txt     or ROOT/Stanford3dDataset_v1.2/
ROOT/Stanford3dDataset_v1.2_Aligned_Version/Area_<n>/<room>/Annotations/<class>_<i>.txt
ROOT/2D-3D-S/area_{1,2,3,4,5a,5b,6}/data/{rgb,depth,pose}/                           or ROOT/area_<n>/
```

Rooms of the aligned release were turned one by one, and two of v1.2 are, see `turn`; poses are in the frame of the
area. Points and poses are brought together in the frame of the option `frame`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo, Dataset, Defaults, Need, Option, Release, ids_by_split
from ditr_cache.datasets.roots import other_root
from ditr_cache.datasets.s3dis.points import (
    CLASSES,
    POINTS_DOWNLOAD,
    Outline,
    annotation_files,
    download_of,
    read_outline,
    read_points,
)
from ditr_cache.datasets.s3dis.room_images import FOLDERS, IMAGES_DOWNLOAD, AreaImages, find_images
from ditr_cache.datasets.s3dis.turn import V1_2_TURNED, quarter_turn, read_angles, settle_angle
from ditr_cache.errors import MissingDataError, UsageError
from ditr_cache.pointcloud.optional import check_installed
from ditr_cache.sample import Sample, View
from ditr_cache.schema import LinkSettings

RELEASES = {"aligned": "Stanford3dDataset_v1.2_Aligned_Version", "v1.2": "Stanford3dDataset_v1.2"}
"""Release -> the folder that its archive unpacks to. Where both are there, the first is read."""

IMAGES_FOLDER = "2D-3D-S"


@dataclass(frozen=True)
class _Room:
    area: int
    folder: Path


class S3DISDataset(Dataset):
    """S3DIS, the 13 classes; a sample is a room, `Area_5_office_19`.

    Args:
        root: folder that holds a release of S3DIS and `2D-3D-S`, or that is the release. Areas may be missing: those on
            disk are the dataset.
        val_area: area that is split `val`, the others are `train`; 0: each area is a split, `Area_1` to `Area_6`.
        frame: `aligned`: every room in its canonical orientation, as the aligned release and Pointcept have it; `area`:
            the rooms of an area as they lie in the building.
        release: which one to read; `auto` tells by the name of the folder.
        images: folder that holds `area_1` and so on, absolute or below the root; empty: the places above.

    Raises:
        MissingDataError: no release of S3DIS, or no room in it; no images in the folder that was named.
        UsageError: the name of the folder does not tell which release it is, or a library is not installed.
    """

    name: ClassVar[str] = "s3dis"
    title: ClassVar[str] = "S3DIS with the images of 2D-3D-S, 13 classes"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(
            f"{RELEASES['aligned']}/Area_<n>/<room>/Annotations/<class>_<i>.txt",
            f"points, colours, classes and instances; or those of {RELEASES['v1.2']}",
            POINTS_DOWNLOAD,
        ),
        Need(
            f"{RELEASES['aligned']}/Area_<n>/Area_<n>_alignmentAngle.txt",
            "how rooms were turned; without it depth maps are asked, and v1.2 is read with --option frame=area only",
            POINTS_DOWNLOAD,
            optional=True,
        ),
        Need(
            f"{IMAGES_FOLDER}/area_<n>/data/{{rgb,depth,pose}}/camera_<uuid>_<room>_frame_<m>_domain_*",
            "images, depth maps and poses (areas 1, 2, 3, 4, 5a, 5b, 6); without them points have no features",
            IMAGES_DOWNLOAD,
            optional=True,
        ),
    )
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "val_area",
            5,
            "area that is split 'val', the others are 'train'; 0: six splits, Area_1 to Area_6",
            (0, 1, 2, 3, 4, 5, 6),
        ),
        Option(
            "frame",
            "aligned",
            "aligned: each room in its canonical orientation; area: rooms as they lie in the building",
            ("aligned", "area"),
        ),
        Option("release", "auto", "which points are read; auto: by the name of their folder", ("auto", *RELEASES)),
        Option("images", "", "folder that holds area_1 and so on, if not the root or 2D-3D-S in or beside it"),
    )
    # DITR: 37 x 37 tokens, 10 images of a room, depth within 0.2 m at any distance. Rooms have a million points and
    # more: one row per point would take many times the space of the tokens, so these are kept, once each.
    defaults: ClassVar[Defaults] = Defaults(
        grid=(37, 37), links=LinkSettings(max_views=10, occlusion_tolerance=0.2, depth_min=0.0), layout="views"
    )
    release: ClassVar[Release | None] = Release(
        samples=272,
        images=2710,
        points=1_000_000,
        coverage=0.7,
        views_per_point=2.5,
        source="272 rooms, one without images, 273 million points and 70,496 images in all are published figures; 10 "
        "images of a room are the default; coverage and views per point are guesses",
    )

    def __init__(
        self, root: Path, *, val_area: int = 5, frame: str = "aligned", release: str = "auto", images: str = ""
    ) -> None:
        self.root = root
        self.val_area, self.frame = val_area, frame
        check_installed("pyarrow", "the text files of S3DIS", "datasets")
        check_installed("scipy", "normals of S3DIS, which are estimated,", "datasets")
        self._points, found = _find_points(root, release)
        self._file_frame = "aligned" if found == "aligned" else "area"
        self._images = _find_images(root, self._points, images)
        self._rooms = {
            f"Area_{area}_{folder.name}": _Room(area, folder)
            for area, place in _areas(self._points).items()
            for folder in sorted(place.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
        }
        if not self._rooms:
            raise MissingDataError(
                f"dataset {self.name!r}: no room in {self._points}, expected folders such as Area_5/office_19; unpack "
                f"{download_of(self._points)}"
            )
        split_of = {sample_id: self._split(room) for sample_id, room in self._rooms.items()}
        self.ids = ids_by_split(split_of, sorted(set(split_of.values())))
        # Listed or read when first asked for; small against the points.
        self._area_images: dict[int, AreaImages] = {}
        self._area_angles: dict[int, dict[str, int]] = {}
        self._outlines: dict[str, Outline] = {}
        self._settled: dict[str, int] = {}

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes by label index; every point has one."""
        return CLASSES

    def read(self, sample_id: str) -> Sample:
        """One room; pixels and depth are read only when asked for.

        Of a room with views all coordinates are gone through, and six depth maps: they tell how it is turned, and the
        middle of its box belongs to its poses.

        Raises:
            UnknownNameError: no such room.
            MissingDataError: no annotation, an area's images or a needed alignment angle.
            DataError: files that cannot be used.
        """
        split = self.split_of(sample_id)
        room = self._rooms[sample_id]
        annotation_files(room.folder)
        views, broken = self._views(room)
        points_from_file, area_from_points = self._turns(sample_id, room, views)
        views = tuple(replace(v, camera_from_world=v.camera_from_world @ area_from_points) for v in views)
        return Sample(
            id=sample_id,
            split=split,
            views=views,
            load_points=partial(read_points, room.folder, points_from_file, _stands(views)),
            broken_views=broken,
        )

    def _split(self, room: _Room) -> str:
        if self.val_area == 0:
            return f"Area_{room.area}"
        return "val" if room.area == self.val_area else "train"

    def _views(self, room: _Room) -> tuple[tuple[View, ...], tuple[tuple[str, str], ...]]:
        """Views of a room in the frame of its area, and what is broken; a room without images says so there."""
        without = "its points have no features"
        if self._images is None:
            return (), (
                (
                    "",
                    f"{self.root / IMAGES_FOLDER / FOLDERS[room.area][0]}: no such folder: {without}; unpack "
                    f"{IMAGES_DOWNLOAD}, then run again with --retry-incomplete",
                ),
            )
        if room.area not in self._area_images:
            self._area_images[room.area] = AreaImages(self._images, room.area)
        area = self._area_images[room.area]
        views, broken = area.views(room.folder.name)
        if not views and not broken:
            files = " or ".join(f"{f / 'data' / 'rgb'}/camera_*_{room.folder.name}_frame_*" for f in area.folders)
            broken = (
                (
                    "",
                    f"{files}: no such file: {without} (at least Area_3/hallway_5 has no image in the release; "
                    f"of other rooms unpack {IMAGES_DOWNLOAD} again)",
                ),
            )
        return views, broken

    def _turns(
        self, sample_id: str, room: _Room, views: Sequence[View]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`points_from_file` and `area_from_points`, both [4, 4]."""
        file_frame = self._file_frame
        if self.frame == file_frame == "aligned" and not views:
            return np.eye(4), np.eye(4)
        angle = self._angle(room)
        if angle is None and self.frame != file_frame and (file_frame == "area" or not views):
            raise MissingDataError(
                f"no angle of room {room.folder.name!r} in "
                f"{self._points / f'Area_{room.area}' / f'Area_{room.area}_alignmentAngle.txt'}; unpack "
                f"{POINTS_DOWNLOAD} again, or read the rooms as they are in the files with --option frame={file_frame}"
            )
        area_from_file = self._area_from_file(sample_id, room, views, angle)
        if self.frame == "area":
            points_from_file, area_from_points = area_from_file, 0
        elif file_frame == "aligned":
            points_from_file, area_from_points = 0, area_from_file
        else:  # the angle is of the room as v1.2 has it
            assert angle is not None
            points_from_file, area_from_points = -angle, area_from_file + angle
        if points_from_file == 0 == area_from_points:
            return np.eye(4), np.eye(4)
        middle = self._outline(sample_id, room).middle
        return quarter_turn(points_from_file, middle), quarter_turn(area_from_points, middle)

    def _area_from_file(self, sample_id: str, room: _Room, views: Sequence[View], angle: int | None) -> int:
        """Degrees by which a room as it is in the file has to be turned to lie as its poses have it."""
        announced, source = angle, "the file of alignment angles"
        if self._file_frame == "area":
            announced, source = V1_2_TURNED.get(sample_id, 0), f"what is known of {RELEASES['v1.2']}"
        if not views:
            assert announced is not None
            return announced
        if sample_id not in self._settled:
            outline = self._outline(sample_id, room)
            self._settled[sample_id] = settle_angle(announced, outline, views, f"sample {sample_id!r}", source)
        return self._settled[sample_id]

    def _outline(self, sample_id: str, room: _Room) -> Outline:
        if sample_id not in self._outlines:
            self._outlines[sample_id] = read_outline(room.folder)
        return self._outlines[sample_id]

    def _angle(self, room: _Room) -> int | None:
        """Degrees by which a room was turned, by the file of its own release or of the other one beside it."""
        if room.area not in self._area_angles:
            name = f"Area_{room.area}"
            places = (self._points, *(self._points.parent / folder for folder in RELEASES.values()))
            files = (place / name / f"{name}_alignmentAngle.txt" for place in places)
            path = next((f for f in files if f.is_file()), None)
            self._area_angles[room.area] = {} if path is None else read_angles(path)
        return self._area_angles[room.area].get(room.folder.name)


def _find_points(root: Path, release: str) -> tuple[Path, str]:
    """Folder of the areas, and which release it is."""
    wanted = RELEASES if release == "auto" else {release: RELEASES[release]}
    for found, folder in wanted.items():
        if _areas(root / folder):
            return root / folder, found
    if not _areas(root):
        names = list(wanted.values())
        expected = (
            f"folders such as {names[0]}/Area_5/office_19/Annotations; unpack {download_of(root / names[0])} and pass "
            "the folder that holds it with --root"
        )
        raise MissingDataError(
            f"dataset 's3dis': {'neither' if names[1:] else 'no'} {' nor '.join(repr(name) for name in names)} in "
            f"{str(root)!r}; {other_root(root, partial(_is_root, names), expected)}"
        )
    by_name = {folder: found for found, folder in RELEASES.items()}
    if release == "auto" and root.resolve().name not in by_name:
        raise UsageError(
            f"dataset 's3dis': folders Area_<n> in {str(root)!r}, whose name does not tell the release; say it with "
            "--option release=aligned (rooms turned one by one) or --option release=v1.2"
        )
    return root, by_name[root.resolve().name] if release == "auto" else release


def _is_root(names: Sequence[str], folder: Path) -> bool:
    """Whether one of the releases of these names can be read with this root."""
    other = folder.name in RELEASES.values() and folder.name not in names
    return any(_areas(folder / name) for name in names) or (not other and bool(_areas(folder)))


def _areas(folder: Path) -> dict[int, Path]:
    """Area -> folder `Area_<n>`."""
    if not folder.is_dir():
        return {}
    found = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"Area_([1-6])", p.name)) and p.is_dir()}
    return dict(sorted(found.items()))


def _find_images(root: Path, points: Path, named: str) -> Path | None:
    """Folder that holds `area_1` and so on; None where there are no images."""
    if named:
        found = find_images([root / named])
        if found is None:
            raise MissingDataError(
                f"dataset 's3dis': no area_<n>/data in {str(root / named)!r} (--option images), expected folders "
                f"such as area_1/data/rgb; unpack {IMAGES_DOWNLOAD} there"
            )
        return found
    return find_images([root / IMAGES_FOLDER, root, points.parent / IMAGES_FOLDER, points.parent])


def _stands(views: Sequence[View]) -> NDArray[np.float64]:
    """[K, 3] places at which the scanner stood; its frames share them up to rounding."""
    poses = [v.camera_from_world for v in views if np.isfinite(v.camera_from_world).all()]
    places = np.array([-pose[:3, :3].T @ pose[:3, 3] for pose in poses]).reshape(-1, 3)
    return np.unique(np.round(places, 2), axis=0)
