"""The folders of KITTI odometry as its downloads unpack, and the calibration of its cameras and its lidar.

```
ROOT/dataset/sequences/<00 to 21>/velodyne/<000000>.bin  image_2/<000000>.png  calib.txt  times.txt
```

Every zip holds `dataset/`. They may be unpacked over each other, or each into a folder of its own below ROOT: a file is
taken from the first place that has it. `calib.txt` (readme.txt of devkit_odometry.zip): `P0` to `P3` are 3 x 4
projections of the rectified cameras, `Tr` takes velodyne points to camera 0, and a point falls on x = P2 Tr X of the
left colour image. P2's fourth column is the shift from camera 0 to camera 2, times the intrinsics; its third row is not
zero either. KITTI does not say where in a pixel its coordinates count from; they are taken as continuous ones as they
stand, half a pixel off at most.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.frames import check_principal_point, rigid_pose
from ditr_cache.datasets.roots import root_below
from ditr_cache.errors import DataError, MissingDataError, errors_at, shortened
from ditr_cache.sample import Camera

_LOG = logging.getLogger(__name__)

_PAGE = "of KITTI odometry, https://www.cvlibs.net/datasets/kitti/eval_odometry.php"
VELODYNE_ZIP = f"data_odometry_velodyne.zip {_PAGE}"
COLOR_ZIP = f"data_odometry_color.zip {_PAGE}"
CALIB_ZIP = f"data_odometry_calib.zip {_PAGE}"

IMAGE_SIZES: dict[float, tuple[int, int]] = {718.856: (1241, 376), 721.5377: (1242, 375), 707.0912: (1226, 370)}
"""Focal length of a recording day's rectified images -> their (width, height)."""

_MAX_TEXT = 2**20  # bytes; the longest times.txt has 65 kB


class OdometryFolders:
    """The sequences below a root, wherever each download was unpacked.

    Args:
        root: folder that holds `sequences`, or `dataset/sequences`, or folders with `dataset/sequences`.
        dataset: names the dataset in errors.

    Raises:
        MissingDataError: no folder `sequences`.
    """

    def __init__(self, root: Path, dataset: str) -> None:
        nested = (p for p in root.glob("*/dataset/sequences") if not p.relative_to(root).parts[0].startswith("."))
        places = (root / "sequences", root / "dataset" / "sequences", *sorted(nested))
        self.places = [place for place in dict.fromkeys(places) if place.is_dir()]
        if not self.places:
            here = root.resolve()
            near = next((p.parent for p in (here, here.parent) if p.name == "sequences"), None)
            near = near or root_below(root, lambda p: (p / "sequences").is_dir() or any(p.glob("*/dataset/sequences")))
            hint = f"pass {str(near)!r}" if near else f"unpack {VELODYNE_ZIP}, and pass the folder that it went to"
            raise MissingDataError(
                f"dataset {dataset!r}: no folder 'sequences' or 'dataset/sequences' in {str(root)!r}; {hint} with "
                "--root"
            )

    def names(self) -> list[str]:
        """Sorted names of all folders of sequences."""
        found = {p.name for place in self.places for p in place.iterdir() if p.is_dir()}
        return sorted(name for name in found if not name.startswith("."))

    def has_folder(self, sequence: str, name: str) -> bool:
        """Whether a sequence has a folder `name` anywhere."""
        return any((place / sequence / name).is_dir() for place in self.places)

    def scans(self, sequence: str, folder: str, suffix: str) -> set[str]:
        """Numbers, six digits each, of the files of one kind that a sequence has. Others are left out and logged."""
        scans: set[str] = set()
        for place in self.places:
            path = place / sequence / folder
            if not path.is_dir():
                continue
            names = {p.name for p in path.iterdir() if p.name.endswith(suffix) and not p.name.startswith(".")}
            numbered = {name for name in names if re.fullmatch("[0-9]{6}" + re.escape(suffix), name)}
            if odd := sorted(names - numbered):
                _LOG.warning(
                    "%s: %d files are not named 000000%s, 000001%s, ... and are left out: %s",
                    path, len(odd), suffix, suffix, shortened(odd),
                )  # fmt: skip
            scans |= {name.removesuffix(suffix) for name in numbered}
        return scans

    def files(self, sequence: str, name: str) -> list[Path]:
        """All places that have the file `name` of a sequence, the one to take first."""
        return [path for place in self.places if (path := place / sequence / name).is_file()]

    def expected(self, sequence: str, name: str) -> Path:
        """Where a file `name` that is nowhere would be: next to others of its kind, or else in the first place."""
        beside = (place / sequence / name for place in self.places)
        return next((path for path in beside if path.parent.is_dir()), self.places[0] / sequence / name)

    def file(self, sequence: str, name: str, download: str) -> Path:
        """The file `name` of a sequence. Raises `MissingDataError`, naming the download, where it is nowhere."""
        found = self.files(sequence, name)
        if not found:
            raise MissingDataError(f"{self.expected(sequence, name)}: no such file; unpack {download}")
        return found[0]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calib.txt` says of the left colour camera.

    Args:
        path: of the file.
        projection: [3, 4] P2.
        camera_0_from_velodyne: [3, 4] Tr.
    """

    path: Path
    projection: NDArray[np.float64]
    camera_0_from_velodyne: NDArray[np.float64]

    def posed_camera(self, size: tuple[int, int]) -> tuple[Camera, NDArray[np.float64]]:
        """The camera of images of (width, height) `size`, and `camera_from_velodyne` [4, 4].

        Raises:
            DataError: values that are no camera's or no rigid motion, or that belong to images of another size.
        """
        focal = float(self.projection[0, 0])
        released = next((s for f, s in IMAGE_SIZES.items() if abs(f - focal) < 1e-3), size)
        if released != size:
            raise DataError(
                f"{self.path}: P2 is of images of {released[0]}x{released[1]} pixels, but those of the sequence have "
                f"{size[0]}x{size[1]}; unpack {COLOR_ZIP}, or crop or scale P2 as the images were"
            )
        intrinsics, shift = self.projection[:, :3], self.projection[:, 3]
        camera_from_velodyne = np.eye(4)
        camera_from_velodyne[:3] = self.camera_0_from_velodyne
        with errors_at(self.path, f"unpack {CALIB_ZIP}"):
            camera = check_principal_point(Camera.from_matrix(intrinsics, width=size[0], height=size[1]), "P2")
            camera_from_velodyne[:3, 3] += np.linalg.solve(intrinsics, shift)
            return camera, rigid_pose(camera_from_velodyne)


def read_calibration(folders: OdometryFolders, sequence: str) -> Calibration:
    """The calibration of a sequence: of several `calib.txt`, the first that has `Tr`.

    Raises:
        MissingDataError: no `calib.txt`, or none with `Tr`.
        DataError: one whose P2 or Tr is not 12 finite numbers.
    """
    first = folders.file(sequence, "calib.txt", CALIB_ZIP)
    for path in folders.files(sequence, "calib.txt"):
        lines = (line.partition(":") for line in _text(path).splitlines())
        entries = {key.strip(): value for key, _, value in lines}
        if "P2" in entries and "Tr" in entries:
            projection, transform = (_matrix(entries[key], f"{path}: {key}") for key in ("P2", "Tr"))
            return Calibration(path, projection, transform)
    raise MissingDataError(
        f"{first}: no lines 'P2:' and 'Tr:', which take points of the lidar to the image; the calib.txt of "
        f"data_odometry_color.zip and data_odometry_gray.zip has no 'Tr:', so unpack {CALIB_ZIP}, last, over it"
    )


def check_times(path: Path, scans: Iterable[str]) -> None:
    """Log a warning where `times.txt` has no time of a scan, or one that is not later than the one before.

    No time decides anything here: scan and image of the same number were taken together. But a file that does not fit
    tells of files of another release.
    """
    words = _text(path).split()
    try:
        times = np.array([float(word) for word in words])
    except ValueError as error:
        _LOG.warning("%s: expected one number of seconds per line (%s)", path, error)
        return
    last = max((int(scan) for scan in scans), default=-1)
    if last >= len(times):
        _LOG.warning("%s: %d times, but scans up to %06d; are scans and times of one release?", path, len(times), last)
    stuck = np.flatnonzero(~(np.diff(times) > 0))
    if len(stuck):
        _LOG.warning(
            "%s: %d times are not later than the one before, the first in line %d (%g s); scans and images are paired "
            "by their numbers all the same",
            path, len(stuck), stuck[0] + 2, times[stuck[0] + 1],
        )  # fmt: skip


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_TEXT).decode("ascii", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _matrix(text: str, where: str) -> NDArray[np.float64]:
    """[3, 4] of 12 numbers."""
    try:
        values = np.array([float(word) for word in text.split()])
    except ValueError as error:
        raise DataError(f"{where}: expected 12 numbers ({error}); unpack {CALIB_ZIP}") from error
    if len(values) != 12 or not np.isfinite(values).all():
        raise DataError(
            f"{where}: expected 12 finite numbers, got {len(values)}, {int(np.isfinite(values).sum())} of them finite; "
            f"unpack {CALIB_ZIP}"
        )
    return values.reshape(3, 4)
