"""Which releases of nuScenes are below a root, and what each has: tables, splits, labels, the archives of its files.

Names of archives: those of the download page. That each of the ten of v1.0-trainval holds 85 scenes, in the order of
their names, is the maintainers' word (issues 573, 636 and 664 of github.com/nutonomy/nuscenes-devkit). Lists of scenes:
utils/splits.py there.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.json_rows import rows
from ditr_cache.datasets.nuscenes.labels import index_of_category
from ditr_cache.datasets.nuscenes.tables import Tables
from ditr_cache.datasets.shipped import shipped_lines
from ditr_cache.errors import DataError, MissingDataError, shortened

_LOG = logging.getLogger(__name__)

TRAINVAL, TEST, MINI = "v1.0-trainval", "v1.0-test", "v1.0-mini"

SPLITS: dict[str, dict[str, str]] = {
    TRAINVAL: {"train": "train", "val": "val"},
    MINI: {"train": "mini_train", "val": "mini_val"},
    TEST: {"test": "test"},
}
"""Release -> split -> official list of scenes in `splits/` (utils/splits.py of the devkit)."""

PAGE = "https://www.nuscenes.org/nuscenes#download"
META = {TRAINVAL: "v1.0-trainval_meta.tgz", TEST: "v1.0-test_meta.tgz", MINI: "v1.0-mini.tgz"}
LIDARSEG = {TRAINVAL: "nuScenes-lidarseg-all-v1.0.tar.bz2", MINI: "nuScenes-lidarseg-mini-v1.0.tar.bz2"}

TABLES = ("sensor", "calibrated_sensor", "scene", "sample", "sample_data", "ego_pose")
"""Tables of the metadata that are read."""

SCENES_PER_ARCHIVE = 85
"""The ten archives of v1.0-trainval hold so many scenes each, in the order of their names."""


@lru_cache(maxsize=8)
def scene_list(name: str) -> tuple[str, ...]:
    """Names of the scenes of an official list."""
    return tuple(shipped_lines("nuscenes/splits", f"{name}.txt"))


def archive_number(scene: str) -> int:
    """Which of the ten archives of v1.0-trainval holds a scene: 1 to 10."""
    return 1 + sorted((*scene_list("train"), *scene_list("val"))).index(scene) // SCENES_PER_ARCHIVE


class NuScenesRelease:
    """One release: its tables, its splits, and where it has its labels.

    Args:
        root: of the dataset.
        name: its version.
        labelled: whether it has to have labels; those of the test scenes are not published.
    """

    def __init__(self, root: Path, name: str, *, labelled: bool) -> None:
        self.root, self.name = root, name
        folder = root / name
        self.categories: NDArray[np.int16] | None = None
        self._label_files: dict[str, str] = {}
        self.lidarseg_remedy = ""
        if labelled and name in LIDARSEG:
            self.lidarseg_remedy = (
                f"unpack {LIDARSEG[name]} into {str(root)!r}, over the tables ({PAGE}), or do without labels: --option "
                "labels=none"
            )
            self._read_lidarseg(folder)
        self.tables = Tables(folder, f"unpack {META[name]} ({PAGE})")
        self.split_of = {scene: split for split, official in SPLITS[name].items() for scene in scene_list(official)}
        self.ids: dict[str, list[str]] = {split: [] for split in SPLITS[name]}
        unlisted = set()
        for sample_id in self.tables.ids:
            split = self.split_of.get(scene := self.tables.scene(sample_id))
            if split is None:
                unlisted.add(scene)
            else:
                self.ids[split].append(sample_id)
        if unlisted:
            _LOG.warning(
                "%s: %d scenes are in no official list of %s and are left out: %s",
                folder, len(unlisted), name, shortened(sorted(unlisted)),
            )  # fmt: skip

    def archive(self, scene: str) -> str:
        """The archive that holds the files of a scene."""
        if self.name != TRAINVAL:
            return "v1.0-test_blobs.tgz" if self.name == TEST else META[MINI]
        part = f"v1.0-trainval{archive_number(scene):02d}"
        return f"{part}_blobs.tgz, or {part}_keyframes.tgz"

    def label_file(self, sample_id: str) -> Path | None:
        """The label file of a sample; None where labels are not wanted, or not published. Raises `MissingDataError`."""
        if self.categories is None:
            return None
        if sample_id not in self._label_files:
            raise MissingDataError(
                f"{self.root / self.name / 'lidarseg.json'}: no row for sample {sample_id!r}; {self.lidarseg_remedy}"
            )
        return released_file(self.root, self._label_files[sample_id], self.lidarseg_remedy)

    def _read_lidarseg(self, folder: Path) -> None:
        path = folder / "lidarseg.json"
        if not path.is_file():
            raise MissingDataError(
                f"{path}: no such file{_elsewhere(self.root, f'{self.name}/lidarseg.json')}; {self.lidarseg_remedy}"
            )
        for row in rows(path, self.lidarseg_remedy):
            token, filename = row.get("sample_data_token"), row.get("filename")
            if not isinstance(token, str) or not isinstance(filename, str):
                raise DataError(
                    f"{path}: expected rows with sample_data_token and filename, got {sorted(row)}; "
                    f"{self.lidarseg_remedy}"
                )
            self._label_files[token] = filename
        self.categories = index_of_category(folder / "category.json", self.lidarseg_remedy)


def versions(root: Path, wanted: str) -> list[str]:
    """The releases to read. Raises `MissingDataError` where there is none."""
    # Lidarseg's archive brings folders for releases that may not be there.
    there = [name for name in SPLITS if any((root / name / f"{table}.json").is_file() for table in TABLES)]
    if wanted != "auto":
        chosen = [name for name in there if name == wanted]
    else:
        chosen = [name for name in (TRAINVAL if TRAINVAL in there else MINI, TEST) if name in there]
    if chosen:
        return chosen
    inner = next((p for p in sorted(root.iterdir()) for name in SPLITS if (p / name / "scene.json").is_file()), None)
    hint = ""
    if there:
        hint = f"; there is {' and '.join(there)}: --option version={there[0]}"
    elif root.name in SPLITS or inner is not None:
        hint = f"; pass {str(inner or root.parent)!r} with --root"
    names = [wanted] if wanted in META else [TRAINVAL, MINI]
    raise MissingDataError(
        f"dataset 'nuscenes': no {' or '.join(f'{name}/scene.json' for name in names)} in {str(root)!r}{hint}; unpack "
        f"{' or '.join(META[name] for name in names)} there ({PAGE})"
    )


def released_file(root: Path, name: str, remedy: str) -> Path:
    """A file that a table names.

    Raises:
        MissingDataError: it is not there.
        DataError: a name that leads out of the root.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise DataError(f"{name!r}: expected a file below {str(root)!r}; the tables were altered, unpack them again")
    path = root / pure
    if not path.is_file():
        raise MissingDataError(f"{path}: no such file{_elsewhere(root, name)}; {remedy}")
    return path


def _elsewhere(root: Path, name: str) -> str:
    """A hint where an archive was unpacked one folder too deep."""
    found = next((p for p in sorted(root.iterdir()) if (p / name).is_file()), None)
    return "" if found is None else f", but there is {found / name}: move what is in {found} up to {root}"
