"""Structured3D in its official layout: rendered rooms of houses that designers furnished.

```
ROOT/Structured3D/scene_00000/2D_rendering/<room>/perspective/full/<position>/rgb_rawlight.png  depth.png
                                                        semantic.png  instance.png  camera_pose.txt
ROOT/Structured3D/scene_00000/2D_rendering/<room>/panorama/full/rgb_rawlight.png  depth.png  semantic.png  instance.png
                                                  panorama/camera_xyz.txt
```

Downloads may be unpacked into one folder or each into a folder of its own, `ROOT/<any>/Structured3D/`. There are no
point files: points are what perspectives and panorama of a room show, see `renderings`. A sample is a room, its id as
the errata write it, `scene_00000_room_485142`. Scenes and rooms that the authors call invalid (`errata.txt`) are left
out. Coordinates are metres in the house's own frame, as the annotations have them, but for the unit.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from ditr_cache.datasets.base import ClassInfo, Dataset, Defaults, Need, Option, Release
from ditr_cache.datasets.nyu40 import STRUCTURED3D25
from ditr_cache.datasets.roots import root_below
from ditr_cache.datasets.shipped import shipped_lines
from ditr_cache.datasets.structured3d.renderings import Images, Rendering, open_rendering, room_points
from ditr_cache.errors import DataError, MissingDataError, UsageError
from ditr_cache.sample import Sample
from ditr_cache.schema import LinkSettings

_LOG = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
VIEWS = {"perspective": ("perspective",), "panorama": ("panorama",), "both": ("perspective", "panorama")}
"""Value of the option `views` -> kinds of renderings that become views."""

LIGHTS = ("raw", "cold", "warm")

_FIRST_VAL, _FIRST_TEST = 3000, 3250  # scenes
_SCENES_PER_ZIP = 200
_NO_PERSPECTIVES = 8  # perspective_full_08.zip holds the scenes of 09 once more: 01600 to 01799 were never released
_SCENE = re.compile(r"scene_(\d{5})")
_PERSPECTIVES, _PANORAMA = "perspective/full", "panorama/full"
_ZIPS = {"perspective": "Structured3D_perspective_full_{:02d}.zip", "panorama": "Structured3D_panorama_{:02d}.zip"}


@dataclass(frozen=True)
class _Room:
    """A room, and the folders that it was unpacked into: more than one where downloads have a folder each."""

    scene: int
    folders: tuple[Path, ...]

    def find(self, relative: str) -> Path:
        """The file `relative`, or where it would be in the folder that holds what belongs to it."""
        places = [folder / relative for folder in self.folders]
        there = next((p for p in places if p.exists()), None)
        return there or next((p for p in places if _has_more_than_instances(p.parent)), places[0])

    def has(self, kind: str) -> bool:
        """Whether renderings of `kind` were unpacked: the archive of boxes brings folders with instances alone."""
        if kind == "perspective":
            return any(_has_more_than_instances(path) for path in self._positions())
        return any(self.find(f"panorama/{name}").is_file() for name in ("camera_xyz.txt", "full/depth.png"))

    def names(self) -> Iterator[str]:
        """Names of the renderings: perspectives by their number, then the panorama."""
        positions = {path.name for path in self._positions() if _has_more_than_instances(path)}
        yield from (f"{_PERSPECTIVES}/{position}" for position in sorted(positions, key=int))
        if self.has("panorama"):
            yield _PANORAMA

    def _positions(self) -> Iterator[Path]:
        """Folders of perspectives."""
        for folder in self.folders:
            if (folder / _PERSPECTIVES).is_dir():
                yield from (path for path in (folder / _PERSPECTIVES).iterdir() if _is_number(path.name))


class Structured3DDataset(Dataset):
    """Rooms of Structured3D, furnished (`full`), with the 25 classes that Swin3D and Pointcept keep of NYU40.

    Splits are `train` (scenes 00000 to 02999), `val` (to 03249) and `test`, all with labels.

    Args:
        root: folder that holds `Structured3D/`, or one such folder per download; or that folder itself.
        views: which renderings get features; points come from all there are.
        light: of the panoramas' images; perspectives have raw light alone.
        voxel_size: metres, of the grid on which the pixels of a room are thinned out.

    Raises:
        MissingDataError: no room found, or no rendering of the kind that `views` asks for.
        UsageError: an option that cannot be used.
    """

    name: ClassVar[str] = "structured3d"
    title: ClassVar[str] = "Structured3D, rooms with the 25 frequent classes of NYU40"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(
            f"Structured3D/scene_<n>/2D_rendering/<room>/{_PERSPECTIVES}/<position>/",
            "rgb_rawlight.png, depth.png, semantic.png and camera_pose.txt: images, points, labels",
            "Structured3D_perspective_full_00.zip to _17.zip",
        ),
        Need(
            "Structured3D/scene_<n>/2D_rendering/<room>/panorama/",
            "camera_xyz.txt, full/rgb_rawlight.png, full/depth.png, full/semantic.png: without it no points that "
            "perspectives do not see, and no rooms that have none",
            "Structured3D_panorama_00.zip to _17.zip",
            optional=True,
        ),
        Need(
            f"Structured3D/scene_<n>/2D_rendering/<room>/{{{_PERSPECTIVES}/<position>,{_PANORAMA}}}/instance.png",
            "instances, of all renderings: without it there are none",
            "Structured3D_bbox.zip",
            optional=True,
        ),
    )
    options: ClassVar[tuple[Option, ...]] = (
        Option("views", "perspective", "renderings that get features; points come from all", tuple(VIEWS)),
        Option("light", "raw", "of panorama images; perspectives have raw light alone", LIGHTS),
        Option("voxel_size", 0.02, "metres, of the grid on which pixels are thinned out into points"),
    )
    defaults: ClassVar[Defaults] = Defaults(
        grid=(25, 45), links=LinkSettings(depth_min=1.0, depth_max=4.0), layout="views"
    )
    release: ClassVar[Release | None] = Release(
        samples=21_700,
        images=77_000,
        points=260_000,
        coverage=0.45,
        views_per_point=1.4,
        source="21,835 rooms, less the errata, are official; 3.5 perspectives a room, points on a grid of 2 cm (from "
        "the size of Pointcept's files), coverage and views per point are estimates",
    )

    def __init__(self, root: Path, *, views: str = "perspective", light: str = "raw", voxel_size: float = 0.02) -> None:
        if views not in VIEWS or light not in LIGHTS or not 1e-4 <= voxel_size <= 10:
            raise UsageError(
                f"dataset {self.name!r}: expected views={'|'.join(VIEWS)}, light={'|'.join(LIGHTS)} and voxel_size "
                f"from 0.0001 to 10 metres, got {views!r}, {light!r} and {voxel_size!r}"
            )
        self.root = root
        self.light = light
        self.voxel_size = voxel_size
        self._kinds = VIEWS[views]
        self._rooms = _list_rooms(root)
        self._look_for_views()
        self.ids = {
            split: sorted(i for i, room in self._rooms.items() if _split_of_scene(room.scene) == split)
            for split in SPLITS
        }

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes by label index."""
        return tuple(STRUCTURED3D25.values())

    def sequence(self, sample_id: str) -> str:
        """The house that a room is part of."""
        return sample_id.partition("_room_")[0]

    def read(self, sample_id: str) -> Sample:
        """One room; images, depth and labels are read only when asked for.

        Its points come from *all* its renderings, whatever views are selected. Renderings of which a file is missing
        or cannot be used are broken views.

        Raises:
            UnknownNameError: no such room.
            MissingDataError: no rendering of those that get features is left, as files are missing; names the first,
                and its download.
            DataError: no rendering can be used.
        """
        split = self.split_of(sample_id)
        room = self._rooms[sample_id]
        renderings: list[Rendering] = []
        errors: dict[str, DataError] = {}
        for name in room.names():
            try:
                renderings.append(_open(room, name, self.light))
            except DataError as error:
                errors[name] = error
        views = tuple(r.view for r in renderings if r.view.id.startswith(self._kinds))
        broken = [(name, str(error)) for name, error in errors.items()]
        if not views:
            lost = [error for name, error in errors.items() if name.startswith(self._kinds)]
            missing = [error for error in lost if isinstance(error, MissingDataError)]
            if missing or not renderings:
                raise [*missing, *errors.values()][0]
            if not lost:
                broken.append(("", self._without_views(room)))
        return Sample(
            id=sample_id,
            split=split,
            views=views,
            load_points=partial(room_points, renderings, where=sample_id, voxel_size=self.voxel_size),
            broken_views=tuple(broken),
        )

    def _without_views(self, room: _Room) -> str:
        archives = " or ".join(_ZIPS[kind].format(room.scene // _SCENES_PER_ZIP) for kind in self._kinds)
        return (
            f"{room.folders[0]}: no {' or '.join(self._kinds)} renderings: its points have no features; unpack "
            f"{archives} again or, where the release has none (some rooms, all of scenes 01600 to 01799), use --option "
            "views=both"
        )

    def _look_for_views(self) -> None:
        """Raise `MissingDataError` where no room has the views that get features; warn of downloads that lack."""
        by_zip: dict[int, list[_Room]] = {}
        for room in self._rooms.values():
            by_zip.setdefault(room.scene // _SCENES_PER_ZIP, []).append(room)
        for kind in self._kinds:
            lacking = [number for number, rooms in by_zip.items() if not any(room.has(kind) for room in rooms)]
            if len(lacking) == len(by_zip):
                raise MissingDataError(
                    f"dataset {self.name!r}: no {kind} renderings at {str(self.root)!r}; unpack "
                    f"{_ZIPS[kind].format(min(lacking))} and its like, or choose others with --option views="
                    f"{'panorama' if kind == 'perspective' else 'perspective'}"
                )
            if kind == "perspective":
                lacking = [number for number in lacking if number != _NO_PERSPECTIVES]
            if lacking:
                _LOG.warning(
                    "dataset %r: no %s renderings of %d rooms, which get no features from them; unpack %s",
                    self.name,
                    kind,
                    sum(len(by_zip[number]) for number in lacking),
                    ", ".join(_ZIPS[kind].format(number) for number in sorted(lacking)),
                )


def _list_rooms(root: Path) -> dict[str, _Room]:
    """Id -> room, of all that have renderings and are valid."""
    folders: dict[str, list[Path]] = {}
    odd: list[Path] = []
    for scene in _scene_folders(root):
        if not (scene / "2D_rendering").is_dir():
            continue
        for folder in (scene / "2D_rendering").iterdir():
            if _is_number(folder.name):
                folders.setdefault(f"{scene.name}_room_{folder.name}", []).append(folder)
            elif folder.is_dir() and not folder.name.startswith("."):
                odd.append(folder)
    if odd:
        _LOG.warning("%d folders are left out, their names are no room's number: %s", len(odd), min(odd))
    errata = _errata()
    rooms = {}
    for name, places in folders.items():
        scene_name = name.partition("_room_")[0]
        if name not in errata and scene_name not in errata:
            room = _Room(int(scene_name.removeprefix("scene_")), tuple(sorted(places)))
            if any(room.has(kind) for kind in _ZIPS):
                rooms[name] = room
    if not rooms:
        packed = next(iter(sorted(root.glob("Structured3D_*.zip"))), None)
        below = root_below(root, lambda folder: next(_scene_folders(folder), None) is not None)
        remedy = (
            f'unpack the archives first: for f in {packed.parent}/*.zip; do 7z x -y -o{packed.parent} "$f"; done '
            "(unzip cannot read those of the perspectives)"
            if packed
            else f"pass {str(below)!r} with --root"
            if below is not None
            else "pass the folder that the downloads were unpacked into with --root"
        )
        raise MissingDataError(
            f"dataset 'structured3d': no room with renderings at {str(root)!r}, expected Structured3D/scene_00000/"
            f"2D_rendering/<room>/ with {_PERSPECTIVES}/ or panorama/; {remedy}"
        )
    return rooms


def _scene_folders(root: Path) -> Iterator[Path]:
    """Folders of scenes in the root, in its `Structured3D`, and in those one level below."""
    for path in _children(root):
        if _SCENE.fullmatch(path.name):
            yield path
            continue
        for child in _children(path):
            if _SCENE.fullmatch(child.name):
                yield child
            elif child.name == "Structured3D":
                yield from (scene for scene in _children(child) if _SCENE.fullmatch(scene.name))


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _has_more_than_instances(folder: Path) -> bool:
    """Whether a folder holds a file of an archive of renderings, not only what the archive of boxes puts there."""
    return folder.is_dir() and any(path.is_file() and path.name != "instance.png" for path in folder.iterdir())


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _errata() -> set[str]:
    return set(shipped_lines("structured3d", "errata.txt"))


def _split_of_scene(scene: int) -> str:
    return "train" if scene < _FIRST_VAL else "val" if scene < _FIRST_TEST else "test"


def _open(room: _Room, name: str, light: str) -> Rendering:
    """One rendering. Raises `MissingDataError` naming the file and its download, or `DataError`."""
    panorama = name == _PANORAMA
    archive = _ZIPS["panorama" if panorama else "perspective"].format(room.scene // _SCENES_PER_ZIP)
    files: Mapping[str, str] = {
        "pose": "panorama/camera_xyz.txt" if panorama else f"{name}/camera_pose.txt",
        "color": f"{name}/rgb_{light}light.png" if panorama else f"{name}/rgb_rawlight.png",
        "rawlight": f"{name}/rgb_rawlight.png",
        "depth": f"{name}/depth.png",
        "semantic": f"{name}/semantic.png",
    }
    found = {key: room.find(relative) for key, relative in files.items()}
    missing = next((path for path in found.values() if not path.is_file()), None)
    if missing is not None:
        raise MissingDataError(f"{missing}: no such file; it comes with {archive}, unpack that again")
    instance = room.find(f"{name}/instance.png")
    return open_rendering(name, Images(**found, instance=instance if instance.is_file() else None), panorama=panorama)
