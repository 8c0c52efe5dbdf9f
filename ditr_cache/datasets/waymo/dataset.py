"""Waymo Open Dataset, Perception v2.0.x, in its official layout: Parquet files, one per component and segment.

```
ROOT/training/<component>/<segment>.parquet     likewise validation/, testing/ and, where downloaded, testing_location/
component: vehicle_pose lidar lidar_pose lidar_calibration lidar_camera_projection lidar_segmentation
           camera_image camera_calibration                                (no lidar_segmentation in testing)
```

A sample is one frame, its id `<segment>_<frame_timestamp_micros>`, its world the vehicle's frame at the frame's pose (x
forward, y left, z up). Points are in the order of Pointcept's files: return 1 of the lidars TOP, FRONT, SIDE_LEFT,
SIDE_RIGHT, REAR, pixel by pixel, then return 2 of all. Everything is joined by keys, never by position.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar

from ditr_cache.datasets.base import SCANS_PER_PARTITION, ClassInfo, Dataset, Defaults, Need, Option, Release
from ditr_cache.datasets.roots import root_below
from ditr_cache.datasets.waymo.benchmark import TEST_FRAMES, class_table, read_test_frames
from ditr_cache.datasets.waymo.camera import CAMERAS, image_from_frame, read_lens, read_shutter
from ditr_cache.datasets.waymo.lidar import LASERS, TOP, frame_pose
from ditr_cache.datasets.waymo.segment import (
    Segment,
    SegmentKey,
    load_image,
    load_points,
    load_released,
    load_rolling,
    open_segment,
)
from ditr_cache.datasets.waymo.tables import COMPONENTS, component_path, download_of, read_keys
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, shortened
from ditr_cache.sample import Sample, View
from ditr_cache.schema import LinkSettings

_LOG = logging.getLogger(__name__)

SPLITS = {"train": "training", "val": "validation", "test": "testing", "test_location": "testing_location"}
"""Split -> its folder."""

_LABELS = "lidar_segmentation"
_PROJECTIONS = "lidar_camera_projection"
_POINT_COMPONENTS = ("vehicle_pose", "lidar", "lidar_pose", "lidar_calibration")
_IMAGE_COMPONENTS = ("camera_image", "camera_calibration")
_RETURNS = {"both": (1, 2), "first": (1,)}
_LISTING_THREADS = 8  # a listing waits for the file system


def _need(component: str, lost: str = "") -> Need:
    content = COMPONENTS[component].content
    return Need(
        f"<split>/{component}/<segment>.parquet",
        f"{content}; {lost}" if lost else content,
        download_of("<split>", component),
        optional=bool(lost),
    )


class _Listing(Mapping[str, Sequence[str]]):
    """Split -> ids, listed when they are asked for: that opens a file of every segment."""

    def __init__(self, splits: Sequence[str], ids_of: Callable[[str], Sequence[str]]) -> None:
        self._splits, self._ids_of = splits, ids_of

    def __getitem__(self, split: str) -> Sequence[str]:
        return self._ids_of(split)

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


class WaymoDataset(Dataset):
    """Waymo's Perception dataset with the 22 classes of its 3D semantic segmentation; splits are those on disk.

    Args:
        root: folder that holds `training/`, `validation/`, `testing/`, `testing_location/`, or some of them.
        projection: `released` takes Waymo's own lidar-to-camera projections; `geometry` projects by poses, lenses and
            the rolling shutter.
        returns: `both`, or the `first` of every pixel.
        frames: `labelled` takes those that the benchmark uses (with labels, or in the list of test frames); `all`.
        crop: `published` cuts the upper rows off the front cameras' images; `none`.

    Raises:
        MissingDataError: no split, or none that has all of its components and a segment.
        DataError: a segment that is in two splits.
    """

    name: ClassVar[str] = "waymo"
    title: ClassVar[str] = "Waymo Open Dataset, Perception v2.0.x, 3D semantic segmentation"
    needs: ClassVar[tuple[Need, ...]] = (
        *(_need(component) for component in (*_POINT_COMPONENTS, *_IMAGE_COMPONENTS)),
        _need(_PROJECTIONS, "without it: --option projection=geometry"),
        _need(_LABELS, "without it: no labels, and --option frames=all"),
    )
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "projection",
            "released",
            "Waymo's own projections, or ours by pose, lens and rolling shutter",
            choices=("released", "geometry"),
        ),
        Option("returns", "both", "which returns of the lidars become points", choices=("both", "first")),
        Option(
            "frames",
            "labelled",
            "those of the benchmark (with labels, or in its list of test frames), or all",
            choices=("labelled", "all"),
        ),
        Option(
            "crop",
            "published",
            "cut the upper 394 of 1280 rows off images, as DITR does, or none",
            choices=("published", "none"),
        ),
    )
    defaults: ClassVar[Defaults] = Defaults(grid=(22, 48), links=LinkSettings(occlusion="none"), layout="views")
    samples_per_partition: ClassVar[int] = SCANS_PER_PARTITION
    release: ClassVar[Release] = Release(
        samples=23_691 + 5_976 + 2_982,
        images=5 * (23_691 + 5_976 + 2_982),
        points=177_000,
        coverage=0.45,
        views_per_point=1.1,
        source="frames: Waymo's own counts of labelled frames and its list of test frames; points: mean of the "
        "dataset's paper; coverage and views per point: estimates from the cameras' fields of view",
    )

    def __init__(
        self,
        root: Path,
        *,
        projection: str = "released",
        returns: str = "both",
        frames: str = "labelled",
        crop: str = "published",
    ) -> None:
        self.root = root
        self._released = projection == "released"
        self._returns = _RETURNS[returns]
        self._all_frames = frames == "all"
        self._crop = crop == "published"
        self._folders = {split: folder for split, folder in SPLITS.items() if (root / folder).is_dir()}
        if not self._folders:
            raise MissingDataError(f"dataset {self.name!r}: no folder 'training' in {str(root)!r}; {_hint(root)}")
        self._contexts = {split: self._list_contexts(split) for split in self._folders}
        self._lacking = {split: lack for split in self._folders if (lack := self._lack(split))}
        if self._lacking and not any(self._needed(split) for split in self._folders if split not in self._lacking):
            raise MissingDataError(next(iter(self._lacking.values())))
        self._split_of: dict[str, str] = {}
        for split, contexts in self._contexts.items():
            for context in contexts:
                if context in self._split_of:
                    raise DataError(
                        f"dataset {self.name!r}: segment {context!r} is in {SPLITS[self._split_of[context]]} and in "
                        f"{SPLITS[split]} of {root}; delete the copy, its frames would be in two splits"
                    )
                self._split_of[context] = split
        self.ids = _Listing(tuple(self._contexts), self._ids_of)
        self._frames: dict[str, tuple[int, ...]] = {}
        self._told: set[str] = set()
        self._test_frames: Mapping[str, tuple[int, ...]] | None = None

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes by label index: ids 1 to 22 of `segmentation.proto`."""
        return class_table()

    def sequence(self, sample_id: str) -> str:
        """The segment of a frame."""
        return sample_id.rpartition("_")[0]

    def read(self, sample_id: str) -> Sample:
        """One frame; points and pixels are read only when asked for.

        Raises:
            UnknownNameError: no such frame in any split.
            MissingDataError: a component of its segment is missing.
            DataError: a component that cannot be used, or that has no row of this frame.
        """
        context, _, number = sample_id.rpartition("_")
        split = self._split_of.get(context)
        if split is None:
            raise UnknownNameError.of(f"segment of dataset {self.name!r}", context, self._split_of)
        self._check_split(split)
        timestamps = self._timestamps(context)
        timestamp = next((t for t in timestamps if str(t) == number), None)
        if timestamp is None:
            raise self.unknown_sample(sample_id, (f"{context}_{t}" for t in timestamps))
        key = SegmentKey.of(self.root, SPLITS[split], context, timestamps)
        self._check_files(key)
        segment = open_segment(key)
        self._check_rows(segment, timestamp)
        views, broken = self._views(key, segment, timestamp)
        return Sample(
            id=sample_id,
            split=split,
            views=views,
            load_points=partial(load_points, key, timestamp, self._returns, len(self.classes)),
            broken_views=broken,
        )

    def _ids_of(self, split: str) -> list[str]:
        """Ids of one split by segment and time. Raises `MissingDataError` where a component is missing as a whole."""
        self._check_split(split)
        contexts = self._contexts[split]
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            every = list(pool.map(self._timestamps, contexts))
        bare = [context for context, found in zip(contexts, every, strict=True) if not found]
        if bare and self._needed(split):
            _LOG.warning(
                "dataset %r: %d of %d segments in %s have no %s and are left out: %s",
                self.name,
                len(bare),
                len(contexts),
                self.root / SPLITS[split],
                "labelled frames" if split in ("train", "val") else "frames in the benchmark's list",
                shortened(bare, 3),
            )
        return [f"{context}_{t}" for context, found in zip(contexts, every, strict=True) for t in found]

    def _list_contexts(self, split: str) -> list[str]:
        """Segments of a split, sorted, from the names of the files."""
        places = (self.root / self._folders[split] / component for component in self._components(split))
        # There are other files in these folders, too (waymo-open-dataset issue 802).
        names = (path.name for place in places if place.is_dir() for path in place.iterdir())
        return sorted({n.removesuffix(".parquet") for n in names if n.endswith(".parquet") and n[0] != "."})

    def _needed(self, split: str) -> bool:
        """Whether a split has frames that are samples; the benchmark's list names none of testing_location."""
        return self._all_frames or split != "test_location"

    def _lack(self, split: str) -> str:
        """What keeps a split from being read: a component that is missing as a whole, or no segment; or nothing."""
        folder = self.root / self._folders[split]
        if not self._needed(split):
            return ""
        others = "; the other splits can be read without it, with --split" if len(self._folders) > 1 else ""
        for component in self._components(split):
            if not (folder / component).is_dir():
                return (
                    f"dataset {self.name!r}: no folder {str(folder / component)!r}; it comes with "
                    f"{download_of(folder.name, component)}{self._way_out(component)}{others}"
                )
        if not self._contexts[split]:
            return (
                f"dataset {self.name!r}: no segment in {folder}, expected files <component>/<segment>.parquet of the "
                f"Waymo Open Dataset, Perception v2.0.x (waymo.com/open){others}"
            )
        return ""

    def _check_split(self, split: str) -> None:
        """Raise `MissingDataError` where a component of a split is missing as a whole, or it has no segment."""
        if split in self._lacking:
            raise MissingDataError(self._lacking[split])

    def _components(self, split: str) -> tuple[str, ...]:
        """Components that a split must have."""
        labels = (_LABELS,) if split in ("train", "val") and not self._all_frames else ()
        projections = (_PROJECTIONS,) if self._released else ()
        return (*_POINT_COMPONENTS, *_IMAGE_COMPONENTS, *projections, *labels)

    def _way_out(self, component: str) -> str:
        """The end of an error about a missing component: how to do without it."""
        option = {_PROJECTIONS: "projection=geometry", _LABELS: "frames=all"}.get(component)
        return f"; to do without it, take --option {option}" if option else ""

    def _timestamps(self, context: str) -> tuple[int, ...]:
        """Frames of a segment that are samples, in time order."""
        if context not in self._frames:
            split = self._split_of[context]
            if self._all_frames:
                found = {key[0] for key in read_keys(self._path(context, "vehicle_pose"))}
            elif split in ("train", "val"):
                path = self._path(context, _LABELS)  # several segments have no such file
                found = {key[0] for key in read_keys(path)} if path.is_file() else set()
            else:
                found = self._listed(context)
            self._frames[context] = tuple(sorted(found))
        return self._frames[context]

    def _listed(self, context: str) -> set[int]:
        """Frames of a segment of testing that the benchmark evaluates."""
        if self._test_frames is None:
            self._test_frames = read_test_frames(self.root)
        listed, path = set(self._test_frames.get(context, ())), self._path(context, "vehicle_pose")
        if not listed or not path.is_file():
            return listed
        found = listed & {key[0] for key in read_keys(path)}
        if found != listed:
            _LOG.warning(
                "%s: %d of the %d frames that the benchmark's list (%s) names are not in it and are left out",
                path, len(listed - found), len(listed), TEST_FRAMES,
            )  # fmt: skip
        return found

    def _path(self, context: str, component: str) -> Path:
        return component_path(self.root, SPLITS[self._split_of[context]], component, context)

    def _check_files(self, key: SegmentKey) -> None:
        """Raise `MissingDataError` for the first component that is missing. A segment without images is allowed."""
        needed = self._components(self._split_of[key.context]) if key.has("camera_image") else _POINT_COMPONENTS
        for component in needed:
            if not key.has(component):
                raise MissingDataError(
                    f"{key.path(component)}: no such file ({COMPONENTS[component].content}); it comes with "
                    f"{download_of(key.folder, component)}{self._way_out(component)}"
                )

    def _check_rows(self, segment: Segment, timestamp: int) -> None:
        """Raise `DataError` where a component has no row, or several, of this frame.

        The release has no row of a lidar without any return, neither of its range images nor of its projections
        (v2/perception/compat_v1/lidar.py of waymo-open-dataset). Where only one of the two is missing, it was lost.
        """
        segment.table("vehicle_pose").row(timestamp)
        segment.table("lidar_pose").row(timestamp, TOP)
        for laser in LASERS:
            if self._without_return(segment, timestamp, laser):
                continue
            segment.table("lidar").row(timestamp, laser)
            segment.table("lidar_calibration").row(laser)
            if self._released and segment.key.has("camera_image"):
                segment.table(_PROJECTIONS).row(timestamp, laser)

    def _without_return(self, segment: Segment, timestamp: int, laser: int) -> bool:
        """Whether a lidar other than TOP is missing because it saw nothing. Logged once for a segment."""
        key = segment.key
        if laser == TOP or (timestamp, laser) in segment.table("lidar"):
            return False
        if key.has(_PROJECTIONS) and (timestamp, laser) in segment.table(_PROJECTIONS):
            return False
        if key.context not in self._told:
            self._told.add(key.context)
            _LOG.warning(
                "%s: no row of lidar %s at %d: it is taken to have had no return (told once for a segment)",
                key.path("lidar"), LASERS[laser], timestamp,
            )  # fmt: skip
        return True

    def _views(
        self, key: SegmentKey, segment: Segment, timestamp: int
    ) -> tuple[tuple[View, ...], tuple[tuple[str, str], ...]]:
        """Views of a frame in the order of the cameras' numbers, and those that cannot be used."""
        if not key.has("camera_image"):
            error = (
                f"{key.path('camera_image')}: no such file; it comes with {download_of(key.folder, 'camera_image')}; "
                "points are kept without images"
            )
            return (), tuple((name, error) for name in CAMERAS.values())
        images, calibration = segment.table("camera_image"), segment.table("camera_calibration")
        world_from_vehicle = frame_pose(segment.table("vehicle_pose"), timestamp)
        views, broken = [], []
        for number, name in CAMERAS.items():
            if (timestamp, number) not in images and (number,) not in calibration:
                continue  # some segments lack a camera (waymo-open-dataset issue 826)
            try:
                images.row(timestamp, number)
                lens = read_lens(calibration, number, crop=self._crop)
                pose = image_from_frame(images, timestamp, number, world_from_vehicle)
                shutter = None if self._released else read_shutter(images, timestamp, number, lens)
            except DataError as error:
                broken.append((name, str(error)))
                continue
            of_frame = (key, timestamp, self._returns)
            load_projection = None
            if self._released:
                load_projection = partial(load_released, *of_frame, number, lens)
            elif shutter is not None:
                load_projection = partial(load_rolling, *of_frame, len(self.classes), number, lens, shutter)
            views.append(
                View(
                    id=name,
                    camera=lens.camera,
                    camera_from_world=lens.camera_from_vehicle @ pose,
                    load_image=partial(load_image, key, timestamp, number, lens),
                    load_projection=load_projection,
                )
            )
        return tuple(views), tuple(broken)


def _hint(root: Path) -> str:
    """What to do where no split is found."""
    if root.name in SPLITS.values() or any((root / component).is_dir() for component in COMPONENTS):
        return f"pass its parent {str(root.parent)!r} with --root"
    if any(next(place.glob("*.tfrecord"), None) for place in (root, *(root / f for f in SPLITS.values()))):
        return "TFRecords are version 1 of the dataset, download version 2 (Parquet) from waymo.com/open"
    below = root_below(root, _has_components)
    if below is not None:
        return f"pass {str(below)!r} with --root"
    return (
        "expected <split>/<component>/<segment>.parquet of the Waymo Open Dataset, Perception v2.0.x (waymo.com/open)"
    )


def _has_components(root: Path) -> bool:
    return any((root / folder / component).is_dir() for folder in SPLITS.values() for component in COMPONENTS)
