"""ScanNet++ (v2, and the older v1) in its official layout.

```
ROOT/splits/nvs_sem_train.txt, nvs_sem_val.txt, sem_test.txt     scene ids
ROOT/metadata/semantic_benchmark/top100.txt, map_benchmark.csv   classes, and how raw labels become them
ROOT/data/<id>/scans/mesh_aligned_0.05.ply                       points: the vertices of the laser scanner's mesh
ROOT/data/<id>/scans/segments.json, segments_anno.json           annotation, see `labels`
ROOT/data/<id>/dslr/  iphone/                                    views, see `views`
```

Facts: the toolkit, https://github.com/scannetpp/scannetpp (`common/scene_release.py`), and the documentation at
https://kaldir.vc.in.tum.de/scannetpp/documentation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

from ditr_cache.datasets.base import ClassInfo, Dataset, Defaults, Need, Option, Release
from ditr_cache.datasets.documents import read_lines
from ditr_cache.datasets.meshes import read_mesh_points
from ditr_cache.datasets.roots import other_root
from ditr_cache.datasets.scannetpp.labels import Annotation, benchmark_classes, class_indices
from ditr_cache.datasets.scannetpp.views import Frames, check_libraries, dslr_views, iphone_views, released
from ditr_cache.errors import MissingDataError, UsageError
from ditr_cache.sample import Sample

_LOG = logging.getLogger(__name__)

SPLITS = {"train": "nvs_sem_train.txt", "val": "nvs_sem_val.txt", "test": "sem_test.txt"}
"""Split -> its list in `splits/`. Scenes of the lists for novel view synthesis alone have no scan."""

VIEWS = ("dslr", "dslr-undistorted", "iphone", "iphone-video")
"""Sources of views; the first is the default."""

_VIDEO_STRIDE = 10  # of 60 Hz: the frames that COLMAP has
_SCRIPT = "ScanNet++'s download script"


class ScanNetPPDataset(Dataset):
    """ScanNet++ with the 100 classes of its semantic benchmark; the splits are those that have a list.

    Args:
        root: folder that holds `data/`, `splits/` and `metadata/`. Scenes may be missing: those on disk are it.
        views: one of `VIEWS`.

    Raises:
        MissingDataError: no scenes, or no list of a split.
        UsageError: no such source of views, or a library that its scenes need is not installed.
    """

    name: ClassVar[str] = "scannetpp"
    title: ClassVar[str] = "ScanNet++, the 100 classes of its semantic benchmark"
    needs: ClassVar[tuple[Need, ...]] = (
        Need("splits/nvs_sem_train.txt, nvs_sem_val.txt, sem_test.txt", "scenes of each split", f"{_SCRIPT}, metadata"),
        Need("metadata/semantic_benchmark/", "classes, map of labels (train, val)", f"{_SCRIPT}, metadata"),
        Need("data/<id>/scans/mesh_aligned_0.05.ply", "points, colour, mesh", f"{_SCRIPT}, scan_mesh_path"),
        Need(
            "data/<id>/scans/segments.json, segments_anno.json",
            "labels (train, val)",
            f"{_SCRIPT}, scan_mesh_segs_path, scan_anno_json_path",
        ),
        Need(
            "data/<id>/scans/mesh_aligned_0.05_mask.txt",
            "vertices that are not evaluated; without it they are labelled like the others",
            f"{_SCRIPT}, scan_mesh_mask_path",
            optional=True,
        ),
        Need(
            "data/<id>/dslr/resized_images/, colmap/, nerfstudio/transforms.json",
            "photos (views=dslr, dslr-undistorted); without the folder dslr points have no features",
            f"{_SCRIPT}, dslr_resized_dir, dslr_colmap_dir, dslr_nerfstudio_transform_path",
            optional=True,
        ),
        Need(
            "data/<id>/dslr/resized_undistorted_images/, nerfstudio/transforms_undistorted.json",
            "undistorted photos (views=dslr-undistorted)",
            f"{_SCRIPT}, dslr_resized_undistorted_dir, dslr_nerfstudio_transform_undistorted_path; or the toolkit's "
            "dslr.undistort",
            optional=True,
        ),
        Need(
            "data/<id>/iphone/rgb.mkv, depth.bin, colmap/",
            "frames (views=iphone, iphone-video); without the folder iphone points have no features",
            f"{_SCRIPT}, iphone_video_path, iphone_depth_path, iphone_colmap_dir",
            optional=True,
        ),
        Need(
            "data/<id>/iphone/pose_intrinsic_imu.json",
            "poses of all frames (views=iphone-video)",
            f"{_SCRIPT}, iphone_pose_intrinsic_imu_path",
            optional=True,
        ),
    )
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "views",
            VIEWS[0],
            "photos of the DSLR, as taken (fisheye) or undistorted; frames of the iPhone's video, those that COLMAP has"
            " (every tenth) or all by ARKit's poses",
            VIEWS,
        ),
    )
    # DITR's configuration for ScanNet++ was not released; this keeps the photos' aspect at about ScanNet's tokens.
    defaults: ClassVar[Defaults] = Defaults(grid=(28, 42))
    release: ClassVar[Release] = Release(
        samples=956,
        images=580_000,
        points=1_000_000,
        coverage=0.9,
        views_per_point=65.0,
        source="856 + 50 + 50 scenes are the official lists; 608 photos a scene are the mean of the paper's 280 000 "
        "photos of 460 scenes; a million vertices a mesh, coverage and views per point (40 to 90) are guesses",
    )

    def __init__(self, root: Path, *, views: str = VIEWS[0]) -> None:
        if views not in VIEWS:
            raise UsageError(f"option views={views!r} of dataset {self.name!r}: expected one of {', '.join(VIEWS)}")
        self.root = root
        self.views = views
        self._scenes = root / "data"
        if not self._scenes.is_dir():
            expected = f"data/<id>/scans/mesh_aligned_0.05.ply there, as {_SCRIPT} has it"
            hint = other_root(root, _has_scenes, expected)
            raise MissingDataError(f"dataset {self.name!r}: no folder 'data' in {str(root)!r}; {hint}")
        self.ids = self._split_ids()
        if views in ("iphone", "iphone-video"):
            check_libraries(self._scenes / scene for ids in self.ids.values() for scene in ids)
        self._classes = benchmark_classes(root)
        self._index: Mapping[str, int] | None = None

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The benchmark's classes by label index."""
        return self._classes

    def read(self, sample_id: str) -> Sample:
        """One scene; pixels, mesh and labels are read only when asked for.

        Raises:
            UnknownNameError: no such scene in any split.
            MissingDataError: a file of the scan, of its annotation or of the chosen views is missing.
            DataError: poses or intrinsics cannot be used.
            UsageError: a library to decode the video is needed and not installed.
        """
        split = self.split_of(sample_id)
        scene = self._scenes / sample_id
        mesh = released(scene / "scans" / "mesh_aligned_0.05.ply", "scan_mesh_path")
        labels = self._annotation(scene / "scans") if split != "test" else None
        views, broken = self._read_views(scene, withheld=split == "test")
        return Sample(
            id=sample_id,
            split=split,
            views=views,
            load_points=partial(read_mesh_points, mesh, labels),
            broken_views=broken,
            every_nth_frame=_VIDEO_STRIDE if self.views == "iphone-video" else 1,
        )

    def _read_views(self, scene: Path, *, withheld: bool) -> Frames:
        if self.views in ("iphone", "iphone-video"):
            return iphone_views(scene, every_frame=self.views == "iphone-video")
        return dslr_views(scene, undistorted=self.views == "dslr-undistorted", withheld=withheld)

    def _annotation(self, scans: Path) -> Annotation:
        released(scans / "segments.json", "scan_mesh_segs_path")
        released(scans / "segments_anno.json", "scan_anno_json_path")
        if self._index is None:
            self._index = class_indices(self.root, self._classes)
        return Annotation(scans, self._index)

    def _split_ids(self) -> dict[str, list[str]]:
        """Split -> sorted ids of the scenes on disk."""
        lists = {split: self.root / "splits" / name for split, name in SPLITS.items()}
        lists = {split: path for split, path in lists.items() if path.is_file()}
        if not lists:
            raise MissingDataError(
                f"{self.root / 'splits' / SPLITS['train']}: no such file, nor {SPLITS['val']} or {SPLITS['test']}; "
                f"{_SCRIPT} gets the folders splits and metadata first, run it again"
            )
        present = {scene.name for scene in self._scenes.iterdir() if scene.is_dir()}
        listed = {split: set(read_lines(path, f"get it again with {_SCRIPT}")) for split, path in lists.items()}
        ids = {split: sorted(names & present) for split, names in listed.items()}
        found, wanted = sum(map(len, ids.values())), sum(map(len, listed.values()))
        if not found:
            raise MissingDataError(
                f"dataset {self.name!r}: none of the {wanted} scenes in {self.root / 'splits'} is in {self._scenes}, "
                f"expected folders such as 1ada7a0617; download some with {_SCRIPT}"
            )
        if found < wanted:
            _LOG.warning(
                "dataset %r: %d of %d scenes in the split lists are not at %s and are left out",
                self.name,
                wanted - found,
                wanted,
                self._scenes,
            )
        return ids


def _has_scenes(root: Path) -> bool:
    """Whether a folder is the release: others have a folder `data`, too."""
    return (root / "data").is_dir() and ((root / "splits").is_dir() or (root / "metadata").is_dir())
